"""Files of detectors are data: whatever is in one, it is used as what it says, or told in a line.

Nothing in it is run, imported, opened or connected to; it takes no more memory and time than a
detector of its size.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import hostile_checkpoints
import numpy as np
import pytest
import torch

from stage_interactor import Detector
from stage_interactor.config import instantiate, load_config
from stage_interactor.engine import CheckpointError
from stage_interactor.inference.blueprint import Blueprint
from stage_interactor.untrusted.tensors import read_model_zoo

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "tests/files/picture.png"
SMALL = [
    "model.backbone.stem_width=4", "model.backbone.channels=[8,8,8,8]",
    "model.decoder.embed_dim=16",
    "model.neck.in_channels=[8,8,8]", "model.neck.norm_groups=4", "model.queries.num_queries=4",
    "model.decoder.num_groups=2", "model.decoder.num_heads=2", "model.decoder.feedforward_dim=16",
    "model.decoder.num_points=[4,4,4]", "model.decoder.out_points=4",
    "+dataloader.test.mapper.augmentation="
    "[{_target_:stage_interactor.d2.transforms.ResizeShortestEdge,short_edge_length:[64],"
    "max_size:100,sample_style:choice}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def good():
    """What a checkpoint of a tiny detector holds."""
    torch.manual_seed(0)
    cfg = load_config("quickstart", SMALL)
    model = instantiate(cfg.model)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate("abcde")]
    extra = Blueprint.of_run(cfg, categories).as_extra()
    return {"model": model.state_dict(), "iteration": 5, **extra}


@pytest.fixture
def use(good, tmp_path):
    """Has files used by a process that is watched; what it tells of each, by their names."""
    hostile_checkpoints.prepare(tmp_path)

    def use_all(cases):
        paths = {"good": tmp_path / "good.pth"}
        torch.save(good, paths["good"])
        for number, case in enumerate(cases):
            path = tmp_path / f"{number}{case.suffix}"
            case.write(path)
            paths[f"{number} {case.name}"] = path
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))}
        done = subprocess.run(
            [sys.executable, Path(__file__).parent / "watcher.py", tmp_path, PICTURE, ROOT],
            input="\n".join(map(str, paths.values())),
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(told) == len(paths), done.stderr[-3000:]
        assert not (tmp_path / "trace").exists()
        assert told[0]["found"], told[0]
        for name, result in zip(paths, told):
            assert not result["seen"], (name, result)
            assert not result["told"].startswith(("BUG", "SystemExit")), (name, result)
            assert len(result["told"]) < 2500 and result["told"].isprintable(), (name, result)
            assert result["seconds"] < 30, (name, result)
            assert bool(result["found"]) != bool(result["told"]), (name, result)
        assert told[-1]["gib"] - told[0]["gib"] < 2, told[-1]
        return dict(zip(paths, told))

    return use_all


# What is said of some, and of which kind they are; all others have a line too.
SAID = {
    "backbone calls os.system": "calls os.system, which is not known as a part",
    "a bit of a weight": "checksum",
    "weights NaN": "NaN or infinite",
    "weights too large for float32": "NaN or infinite",
    "weights expanded": "would take 737",
    "weights sparse": "_rebuild_sparse_tensor",
    "beside the weights some zeros": "bytearray",
    "beside the weights some zeros, legacy": "bytearray",
    "beside the weights copies": "an OrderedDict of something else",
    "four channels": "config.model.pixel_mean",
    "a tensor's numel": "_rebuild_from_type_v2",
    "safetensors extra of lists": "letters",
    "backbone with a file of weights": "checkpoint_path",
    "is compressed": "compressed",
    "a pickle as .pt2": "--trust",
    "is a pipe": "pipe",
    "a deep blueprint": "levels of nesting",
    "categories with one id": "an id that no earlier one has",
    "safetensors extra twice": "twice",
    "beside the weights system": "posix.system",
}
FINE = {
    "a list in itself", "a list of lists of lists",
    "sides of any size", "a dict's get", "a dict's keys", "a dict's __deepcopy__",
}  # fmt: skip


@pytest.mark.cases(20)
def test_no_file_does_anything_and_what_is_wrong_is_told_in_a_line(good, use, rng, tmp_path, cases):
    listed = list(hostile_checkpoints.written(good, tmp_path, rng))
    assert {case.name for case in listed} >= SAID.keys() | FINE
    named = [case for case in listed if case.name in SAID.keys() | FINE]
    told = use(named + rng.sample(listed, min(cases, len(listed))))
    for name, result in told.items():
        number, _, kind = name.partition(" ")
        if "flipped" not in kind:  # may hit what is of no account
            assert bool(result["found"]) == (kind in FINE or name == "good"), (name, result)
        assert SAID.get(kind, "") in result["told"], (name, result)


def test_a_graph_of_onnx_only_computes(good, use, tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="needs stage-interactor[export]")
    import hostile_graphs

    told = use(list(hostile_graphs.written(good["blueprint"], tmp_path)))
    found = [name.partition(" ")[2] for name, result in told.items() if result["found"]]
    assert found == ["", "good"]
    for kind, words in {
        "a loop": "'Loop' is not one", "a branch": "'If' is not one", "doubling": "values",
        "another domain": "'com.microsoft.Gelu'", "a function": "functions", "products": "multipl",
        "a file /etc/pass": "another file", "weights of NaN": "NaN", "a huge expansion": "GiB",
        "a class too many": "class 99", "many arrays": "operators and arrays",
        "the size of a picture doubled": "none of pictures",
        "its size in numbers doubled": "none of pictures", "its pixels doubled": "none of pictures",
        "much text": "no weights", "scores of NaN": "NaN", "other outputs": "boxes",
    }.items():  # fmt: skip
        texts = [result["told"] for name, result in told.items() if name.endswith(kind)]
        assert any(words in text for text in texts), (kind, texts)


@pytest.mark.cases(40)
def test_a_blueprint_changed_at_random_is_used_or_told(good, use, rng, cases):
    below = [("config", "model"), ("config", "dataloader", "test"), ("categories",), ()]
    mutated = [hostile_checkpoints.mutated(good, rng, rng.choice(below)) for _ in range(cases)]
    told = use(mutated)
    assert 0 < sum(bool(result["found"]) for result in told.values()) < len(told)


@pytest.mark.cases(6)
def test_what_is_not_built_changes_nothing(good, use, rng, cases):
    below = [("config", part) for part in ("optimizer", "lr_multiplier", "train", "shapes")]
    told = use([hostile_checkpoints.mutated(good, rng, rng.choice(below)) for _ in range(cases)])
    expected = told["good"]["found"]
    for name, result in told.items():
        plain = not any(word in result["told"] for word in ("characters", "plain value", "damaged"))
        assert result["found"] == expected or not plain, (name, result)


def test_a_file_of_torch_export_needs_trust(tmp_path, good):
    path = tmp_path / "model.pt2"
    torch.save(good, path)
    with pytest.raises(CheckpointError, match=r"model.pt2.*as Python.*onnx.*--trust"):
        Detector.from_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read as an exported program"):
        Detector.from_checkpoint(path, trusted=True)


def test_memory_that_a_picture_would_need_is_computed(good, tmp_path):
    content = {**good, "blueprint": json.loads(json.dumps(good["blueprint"]))}
    config = content["blueprint"]["config"]
    resize = config["dataloader"]["test"]["mapper"]["augmentation"][0]
    resize.update(short_edge_length=[4096], max_size=8192)
    torch.save(content, tmp_path / "c.pth")
    Detector.from_checkpoint(tmp_path / "c.pth", device="cpu")  # narrow enough
    resize.update(short_edge_length=[4097])
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="short_edge_length.0 is 4097; expected .* 0 to 4096"):
        Detector.from_checkpoint(tmp_path / "c.pth", device="cpu")


class _Calls:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_of_a_model_zoo_gives_arrays_and_calls_nothing(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"a": np.ones(3, np.float32), "b": np.float64(3)}
    for content in ({"model": weights, "__author__": "someone"}, {"blobs": weights}, weights):
        Path("zoo.pkl").write_bytes(pickle.dumps(content, protocol))
        read = read_model_zoo("zoo.pkl")["model"]
        assert read.keys() == weights.keys() and (read["a"] == 1).all()
    for content in (_Calls(), {"model": _Calls()}, {"a": np.array([_Calls()])}, [1], os.system):
        Path("zoo.pkl").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(CheckpointError, match=r"zoo.pkl (is no file of|holds)"):
            read_model_zoo("zoo.pkl")
    assert not Path("made_by_a_pickle").exists()
