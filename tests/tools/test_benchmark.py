import json
import re

import benchmark
import pytest
import torch


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("benchmark") / "report.json")


def measured(path, options=""):
    options += " --image-size 64 96 --repeats 2 --queries 8 --objects 3 --eval-images 4"
    options += " --device cpu --output"
    arguments = ["--config-file", "configs/quickstart.py", *options.split(), str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["benchmark.py", *arguments])
        patch.setattr(benchmark.Machine, "_product", lambda self, dtype: 1e11)
        benchmark.main()
    return json.loads(path.read_text())


def test_every_part_is_measured_in_every_variant(report):
    variants: dict[str, list[str]] = {}
    for result in report["results"]:
        variants.setdefault(result["case"], []).append(result["variant"])
        assert result["median"] > 0 and result["floor"] > 0 and result["ratio"] > 0
    both = ["reference, float32", "fast, float32", "fast, bfloat16"]
    whole = variants.pop("whole inference, 8 queries")
    assert whole == [*both, "fast, float32, prepared", "fast, bfloat16, prepared"]
    losses = variants.pop("matching + labels + losses, 16 images of 3 objects")
    assert losses == both[:2]
    for size in ("640 x 480", "4000 x 3000"):
        loading = variants.pop(f"loading a {size} JPEG for training, one process")
        assert loading == [*both[:2], "fast, float32, decode=fast"]
    scoring = variants.pop("COCO's metric of 4 images")
    assert scoring == [*both[:2], "fast, float32, faster-coco-eval"]
    assert all(names == both for names in variants.values())
    starts = ["backbone", "neck", "sampling", "channel mixing", "spatial mixing", "static mixing"]
    starts += ["decoder, 8 queries, inference", "decoder, 8 queries, training", "training step"]
    for start in starts:
        assert any(case.startswith(start) for case in variants), start


def test_batches_of_several_sizes_are_measured_in_each_way(tmp_path):
    options = "--parts mixed_sizes --batch-size 1 2 --precision float32"  # alone there is one way
    results = measured(tmp_path / "report.json", options)["results"]
    assert {result["case"] for result in results} == {
        "16 images of four sizes, padded to the largest of a batch, batch 2"
    }
    ways = ["float32", "float32, one size at a time", "float32, sizes put together"]
    variants = ["reference, float32", *(f"fast, {way}" for way in ways)]
    assert [result["variant"] for result in results] == variants


def test_the_report_names_machine_and_setting(report):
    assert report["machine"]["torch"] == torch.__version__
    assert report["setting"]["image_size"] == [64, 96] and report["setting"]["queries"] == [8]


def test_floors_are_the_longer_of_products_and_copies():
    machine = benchmark.Machine.__new__(benchmark.Machine)
    machine.device = torch.device("cpu")
    machine.products, machine.copy = dict.fromkeys(benchmark.DTYPES, 1e9), 1e9
    for flops, least, floor in ((2e6, 1e6, 2.0), (1e6, 4e6, 4.0)):
        case = benchmark.Case("part", {"float32": lambda: None}, 1, least, flops=flops)
        results = benchmark.measure(case, machine, 2, only_reference=True)
        assert [result.floor for result in results] == [floor]
    text = benchmark.table(results)
    assert re.search(r"\| part \| reference, float32 \|", text)


def test_peak_memory_is_what_the_work_holds():
    machine = benchmark.Machine.__new__(benchmark.Machine)
    machine.device = torch.device("cpu")
    peak = machine.peak_mib(lambda: torch.ones(64 * 2**20 // 4).sum())
    if peak is None:
        pytest.skip("this system does not say what a process has held at most")
    assert 60 < peak < 80


def test_the_bare_model_is_the_papers():
    model = benchmark.bare_model(100)
    stages = sum(p.numel() for p in model.decoder.parameters()) / 1e6
    assert model.queries.num_queries == 100 and round(stages, 1) == 112.5
    frozen = [n for n, p in model.backbone.named_parameters() if not p.requires_grad]
    assert frozen and all("conv1" in name or "layer1" in name for name in frozen)
