"""What is found in a picture does not depend on the pictures that it is batched with."""

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from checks.processes import join, leave
from mixed_batches import (
    BACKBONES,
    random_companies,
    random_detector,
    random_picture,
    random_sizes,
    scrambled_checkpoint,
    write_annotations,
    write_pictures,
)
from PIL import Image

from stage_interactor import Detector
from stage_interactor.config import load_config
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.evaluation import DatasetEvaluator
from stage_interactor.data import load_coco_dataset
from stage_interactor.data.grouping import BySize, batches_by_size
from stage_interactor.engine.evaluation import do_test
from stage_interactor.inference.blueprint import load_model
from stage_interactor.inference.export import ExportedGraph, export_checkpoint
from stage_interactor.inference.exported import ExportedDetector
from stage_interactor.inference.predict import predict_files
from stage_interactor.inference.prepare import prepare_for_inference

NAMES = ["ellipse", "rectangle", "triangle", "cross", "ring"]
FORMATS = {".onnx": "onnx", ".pt2": "torch-export"}
ROOT = Path(__file__).parents[2]


def as_input(picture):
    image = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    return {"image": image, "height": picture.shape[0], "width": picture.shape[1]}


@pytest.mark.cases(2)
@pytest.mark.parametrize("norm_groups", [4, None])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_picture_has_the_same_detections_in_any_company(
    backbone, norm_groups, operations, rng, cases
):
    for case in range(cases):
        torch.manual_seed(case)
        divisibility = rng.choice([32, 64, 96])
        model = random_detector(backbone, norm_groups, size_divisibility=divisibility).double()
        inputs = [as_input(random_picture(rng, size)) for size in random_sizes(rng, 7)]
        with torch.no_grad():
            alone = [model([image])[0]["instances"] for image in inputs]
            for company in random_companies(rng, len(inputs)):
                outputs = model([inputs[number] for number in company])
                for number, output in zip(company, outputs):
                    found, expected = output["instances"], alone[number]
                    assert found.image_size == expected.image_size
                    # Rounding errors of float64, from products of other numbers of rows.
                    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-10)
                    torch.testing.assert_close(
                        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3
                    )
                    assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_picture_that_overflows_is_alone_with_it(value, operations, rng):
    torch.manual_seed(0)
    model = random_detector("resnet", 4)
    inputs = [as_input(random_picture(rng, (60, 90))) for _ in range(3)]
    for image in inputs:
        image["image"] = image["image"].float()
    with torch.no_grad():
        expected = [output["instances"] for output in model(inputs)]
        inputs[1]["image"] = torch.full_like(inputs[1]["image"], value)
        found = [output["instances"] for output in model(inputs)]
    for number in (0, 2):
        assert torch.equal(found[number].scores, expected[number].scores)
        assert torch.equal(found[number].pred_boxes.tensor, expected[number].pred_boxes.tensor)


def test_images_of_one_size_are_still_one_batch(rng):
    torch.manual_seed(0)
    model = random_detector("resnet", 4)
    # All are padded to 64 x 96, whatever their own sizes are.
    inputs = [as_input(random_picture(rng, size)) for size in ((64, 96), (33, 65), (50, 90))]
    with torch.no_grad():
        for ours, theirs in zip(model(inputs), model._detect(inputs)):
            ours, theirs = ours["instances"], theirs["instances"]
            assert torch.equal(ours.scores, theirs.scores)
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


@pytest.fixture(scope="module")
def checkpoint(small_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("scrambled") / "model.pth"
    return scrambled_checkpoint(small_run / "model_final.pth", path)


@pytest.fixture(scope="module")
def detectors(checkpoint):
    """By kind: of a checkpoint; padded to 64 pixels; compiled; as exported, and exported."""
    made = {}

    def build(kind):
        if kind == "version_0_1_0.onnx":
            pytest.importorskip("onnxruntime", reason="needs stage-interactor[export]")
            return Detector.from_checkpoint(ROOT / "tests/files" / kind, device="cpu")
        if kind in FORMATS:
            if kind == ".onnx":
                pytest.importorskip("onnxscript", reason="needs stage-interactor[export]")
                pytest.importorskip("onnxruntime", reason="needs stage-interactor[export]")
            path = checkpoint.with_suffix(kind)
            export_checkpoint(checkpoint, FORMATS[kind], path)
            detector = Detector.from_checkpoint(checkpoint, device="cpu")
            detector.model, _ = ExportedDetector.load(str(path), "cpu", trusted=True)
            return detector
        detector = Detector.from_checkpoint(checkpoint, device="cpu")
        model, blueprint = load_model(str(checkpoint))
        if kind == "graph":
            detector.model = ExportedDetector(ExportedGraph(model), blueprint)
            detector.model.least_side = 64
        elif kind != "plain":
            with pytest.MonkeyPatch.context() as patch:
                # What is compiled is not the question, but what is given to it.
                patch.setattr(torch, "compile", lambda function, **options: function)
                detector.model = prepare_for_inference(model, bucket=64, compile=kind == "compiled")
        return detector

    def make(kind):
        if kind not in made:
            made[kind] = build(kind)
        return made[kind]

    return make


# Scores of such weights differ by 1e-5, and at times more, between equal batches of 1 and 5 images.
ROUNDING = 5e-4


def assert_same(found, expected):
    """Scores, and the box of the best detection where it is the best by more than rounding."""
    assert found.image_size == expected.image_size
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=ROUNDING)
    if expected.scores[0] - expected.scores[1] > 2 * ROUNDING:
        np.testing.assert_allclose(found.boxes[0], expected.boxes[0], rtol=0, atol=0.5)
        assert found.names[0] == expected.names[0]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "bucket", "compiled", "graph", "version_0_1_0.onnx"),
        *(pytest.param(suffix, marks=pytest.mark.soak) for suffix in FORMATS),
    ],
)
def test_detectors_of_every_kind_find_the_same_in_a_list(kind, detectors, rng, cases):
    detector = detectors(kind)
    for _ in range(cases):
        pictures = [random_picture(rng, size) for size in random_sizes(rng, 7)]
        alone = [detector(picture, threshold=0.0) for picture in pictures]
        for company in random_companies(rng, len(pictures)):
            found = detector([pictures[number] for number in company], threshold=0.0)
            for number, detections in zip(company, found):
                assert_same(detections, alone[number])


def test_a_compiled_detector_gets_each_size_in_one_number_of_images(detectors, rng, monkeypatch):
    detector = detectors("compiled")
    detector.model._compiled_sizes.clear()
    monkeypatch.setattr(type(detector.model), "_compare", lambda self, images, sizes: "")
    small, large = (random_picture(rng, size) for size in ((60, 60), (60, 120)))
    for company in ([small, large, large], [small, small, large], [large, small, small]):
        assert len(detector(company, threshold=0.0)) == 3
    assert detector.model._compiled_sizes.keys() == {(3, 3, 64, 64), (3, 3, 64, 128)}


class Order(DatasetEvaluator):
    """What it is given, in that order."""

    last: "Order"

    def reset(self):
        Order.last = self
        self.names, self.lengths = [], []

    def process(self, inputs, outputs):
        assert len(inputs) == len(outputs)
        self.lengths.append(len(inputs))
        for image, output in zip(inputs, outputs):
            assert output["instances"].image_size == (image["height"], image["width"])
            self.names.append(Path(image["file_name"]).name)

    def evaluate(self):
        return {"own": {"count": len(self.names)}}


def evaluation_config(annotations, folder, checkpoint, output, batch_size, *overrides):
    """Of the checkpoint's model on pictures of one's own, and that model."""
    settings = (f"train.output_dir={output}", "train.device=cpu",
                f"dataloader.test.batch_size={batch_size}")  # fmt: skip
    cfg = load_config("configs/quickstart.py", [*settings, *overrides])
    cfg.dataloader.test.dataset = L(load_coco_dataset)(
        name=annotations.stem, json_file=str(annotations), image_root=str(folder), is_train=False,
        filter_empty=False,
    )  # fmt: skip
    Path(output).mkdir(exist_ok=True)
    return cfg, load_model(str(checkpoint))[0]


def by_image(folder):
    """The evaluated images in the order of the file, and the scores of each."""
    results = json.loads((folder / "coco_instances_results.json").read_text())
    scores = defaultdict(list)
    for item in results:
        scores[item["image_id"]].append(item["score"])
    return list(scores), {image: sorted(found) for image, found in scores.items()}


def assert_same_results(folder, expected):
    (images, scores), (expected_images, expected_scores) = by_image(folder), by_image(expected)
    assert images == expected_images
    for image in images:
        np.testing.assert_allclose(scores[image], expected_scores[image], rtol=0, atol=ROUNDING)


def evaluate_in_one(rank, arguments):
    do_test(*evaluation_config(*arguments))


def evaluate_in_two(rank, port, arguments):
    join(rank, port, 2)
    cfg, model = evaluation_config(*arguments)
    do_test(cfg, model)
    leave()


@pytest.mark.cases(1)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes share a CPU")
def test_an_evaluation_gives_the_same_with_any_batch_size_and_number_of_processes(
    checkpoint, tmp_path, rng, cases, free_port, monkeypatch
):
    monkeypatch.chdir(ROOT)
    for case in range(cases):
        run = tmp_path / str(case)
        run.mkdir()
        folder = run / f"pictures_{rng.getrandbits(32):08x}"  # the data set is registered so
        sizes = random_sizes(rng, rng.randint(9, 13))  # uneven shares of two processes
        annotations = write_annotations(rng, write_pictures(rng, folder, sizes), NAMES)
        where = annotations, folder, checkpoint
        size = rng.randint(2, 6)
        do_test(*evaluation_config(*where, run / "alone", 1))
        assert by_image(run / "alone")[0] == list(range(1, len(sizes) + 1))
        do_test(*evaluation_config(*where, run / "batches", size))
        workers = "dataloader.test.num_workers=1"
        # In a process of its own: what earlier tests have begun here is nothing to fork.
        mp.spawn(evaluate_in_one, args=((*where, run / "workers", size, workers),), nprocs=1)
        mp.spawn(evaluate_in_two, args=(free_port, (*where, run / "two", size)), nprocs=2)
        for name in ("batches", "workers", "two"):
            assert_same_results(run / name, run / "alone")

        cfg, model = evaluation_config(*where, run / "own", size)
        cfg.dataloader.evaluator = L(Order)()
        images = json.loads(annotations.read_text())["images"]
        assert do_test(cfg, model) == {"own": {"count": len(images)}}
        assert Order.last.names == [image["file_name"] for image in images]


def test_pictures_of_one_size_are_evaluated_in_the_batches_of_the_loader(
    checkpoint, tmp_path, rng, monkeypatch
):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / f"equal_{rng.getrandbits(32):08x}"
    annotations = write_annotations(rng, write_pictures(rng, folder, [(50, 60)] * 7), NAMES)
    cfg, model = evaluation_config(annotations, folder, checkpoint, tmp_path / "out", 3)
    cfg.dataloader.evaluator = L(Order)()
    lengths, detect = [], model._detect

    def watched(images):
        lengths.append(len(images))
        return detect(images)

    model._detect = watched
    do_test(cfg, model)
    assert Order.last.lengths == lengths == [3, 3, 1]


@pytest.mark.cases(1)
def test_files_have_the_same_predictions_with_any_batch_size(detectors, tmp_path, rng, cases):
    detector = detectors("plain")
    for case in range(cases):
        folder = tmp_path / f"pictures{case}"
        paths = write_pictures(rng, folder, random_sizes(rng, rng.randint(6, 14)))
        broken = sorted(paths)[rng.randrange(len(paths))]
        broken.write_bytes(broken.read_bytes()[:60])

        def predicted(name, size, pictures=True):
            output = tmp_path / f"{name}{case}"  # noqa: B023
            return predict_files(detector, folder, threshold=0.0, batch_size=size,  # noqa: B023
                                 output_dir=output, pictures=pictures, progress=False)  # fmt: skip

        expected = predicted("alone", 1)
        for name, results in (
            ("some", predicted("some", rng.randint(2, 5))),
            ("all", predicted("all", 50, pictures=False)),
        ):
            assert results.unreadable == expected.unreadable and len(results.unreadable) == 1
            assert [item.path for item in results] == [item.path for item in expected]
            assert [item.path for item in results] == sorted(map(str, set(paths) - {broken}))
            for ours, theirs in zip(results, expected):
                assert_same(ours.detections, theirs.detections)
            files = [
                json.loads((tmp_path / f"{part}{case}/predictions.json").read_text())["images"]
                for part in (name, "alone")
            ]
            assert files[0] == files[1]
        written = {path.name for path in (tmp_path / f"some{case}").glob("*.png")}
        assert written == {path.name for path in paths if path != broken}
        for path in (tmp_path / f"some{case}").glob("*.png"):
            assert Image.open(path).size == Image.open(folder / path.name).size


def test_what_was_found_is_kept_and_in_order_when_a_later_picture_is_the_end_of_it(
    detectors, tmp_path, rng, monkeypatch
):
    folder = tmp_path / "pictures"
    sizes = [(60, 60), (60, 120)] * 3
    paths = sorted(write_pictures(rng, folder, sizes))
    detector, calls = detectors("plain"), itertools.count()
    detect = detector.detect_prepared

    def failing(inputs, threshold):
        if next(calls) == 1:
            raise MemoryError
        return detect(inputs, threshold)

    monkeypatch.setattr(detector, "detect_prepared", failing)
    with pytest.raises(MemoryError):
        predict_files(detector, folder, threshold=0.0, batch_size=3, output_dir=tmp_path / "out",
                      progress=False)  # fmt: skip
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    assert len(names) == 3 and names == sorted(names)
    assert set(names) <= {path.name for path in paths}


@pytest.mark.cases(200)
def test_sizes_are_put_together_in_the_number_of_batches_that_there_were(rng, cases):
    for _ in range(cases):
        count, batch_size, kinds = rng.randint(0, 300), rng.randint(1, 9), rng.randint(1, 8)
        items = [(number, rng.randrange(kinds)) for number in range(count)]
        read = []
        waited = 0

        def stream():
            for item in items:  # noqa: B023
                read.append(item)  # noqa: B023
                yield item

        given, calls, done, oldest = [], 0, set(), 0
        for batch in batches_by_size(stream(), batch_size, lambda item: item[1], lambda item: 1):
            waited = max(waited, len(read) - oldest)
            calls += len({kind for _, kind in batch})
            given.append(batch)
            done |= {number for number, _ in batch}
            while oldest in done:
                oldest += 1
        assert sorted(itertools.chain(*given)) == items
        assert [len(batch) for batch in given[:-1]] == [batch_size] * (len(given) - 1)
        assert len(given) == math.ceil(count / batch_size)
        assert waited <= max(16 * batch_size, 1)  # a bounded number is held
        for kind in range(kinds):
            numbers = [number for batch in given for number, this in batch if this == kind]
            assert numbers == sorted(numbers)
        if batch_size == 1 or kinds == 1:
            assert list(itertools.chain(*given)) == items
        # Hardly more calls than there must be, where a size is not rarer than batches are.
        if kinds <= 4 and count >= 100 and batch_size > 1:
            least = sum(
                math.ceil(sum(this == kind for _, this in items) / batch_size)
                for kind in range(kinds)
            )
            assert calls <= 1.5 * least + kinds


def test_large_pictures_are_not_held_in_great_numbers():
    read = []

    def stream():
        for number in range(40):
            read.append(number)
            yield number

    given = 0
    for batch in batches_by_size(stream(), 4, lambda item: item % 2, lambda item: 2**26):
        assert len(read) - given <= 8  # 256 MiB and the pictures of a batch
        given += len(batch)


def test_a_loader_that_is_empty_or_gives_uneven_batches_is_gone_through_once(rng):
    def images(*sizes):
        return [{"image": torch.zeros(3, *size)} for size in sizes]

    assert list(BySize([], 32)) == []
    loader = [images((10, 40), (40, 10)), images((10, 40)), images((9, 33), (64, 1), (40, 10))]
    batches = list(BySize(loader, 32))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    shapes = [tuple(image["image"].shape[1:]) for batch in batches for image in batch]
    assert shapes == [(10, 40), (10, 40), (40, 10), (64, 1), (9, 33), (40, 10)]
