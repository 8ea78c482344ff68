"""Files of detectors are data: whatever is in one, it is used as what it says, or told in a line.

Nothing in it is run, imported, opened or connected to; it takes no more memory and time than a
detector of its size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_checkpoints
import pytest
import torch

from stage_interactor import Detector
from stage_interactor.config import instantiate, load_config
from stage_interactor.engine import CheckpointError
from stage_interactor.inference.blueprint import Blueprint

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


def test_no_file_does_anything_and_what_is_wrong_is_told_in_a_line(good, use, rng, tmp_path):
    told = use(list(hostile_checkpoints.written(good, tmp_path, rng)))
    fine = [name for name, result in told.items() if result["found"] and "flipped" not in name]
    assert [name.split(" ", 1)[-1] for name in fine] == [
        "good", "a list in itself", "a list of lists of lists", "safetensors extra twice",
    ]  # fmt: skip
    for word, wanted in {
        " calls os.system": "calls os.system, which is not known as a part",
        "1 bits flipped": "checksum",
        "weights NaN": "NaN or infinite",
        "weights too large": "NaN or infinite",
        "weights expanded": "would take",
        "weights sparse": "dense",
        "short storages": "4",
        "a file of weights": "checkpoint_path",
        "is compressed": "compressed",
        "as .pt2": "--trust",
        "is a pipe": "pipe",
    }.items():
        found = [result["told"] for name, result in told.items() if word in name]
        assert found and any(wanted in text for text in found), (word, found)


@pytest.mark.cases(100)
def test_a_blueprint_changed_at_random_is_used_or_told(good, use, rng, cases):
    below = [("config", "model"), ("config", "dataloader", "test"), ("categories",), ()]
    mutated = [hostile_checkpoints.mutated(good, rng, rng.choice(below)) for _ in range(cases)]
    told = use(mutated)
    assert 0 < sum(bool(result["found"]) for result in told.values()) < len(told)


@pytest.mark.cases(10)
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
