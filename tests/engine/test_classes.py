"""Classes go by their names, whatever order data, checkpoints and runs have them in."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import stage_interactor
from stage_interactor.config import load_config
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.data import load_coco_dataset

CONFIG = "tests/tiny_config.py"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def renumbered(shapes, path, part, ids):
    """The generated pictures of a part with other ids for their five classes."""
    content = json.loads((shapes / f"{part}.json").read_text())
    for item in content["annotations"]:
        item["category_id"] = ids[item["category_id"] - 1]
    for item in content["categories"]:
        item["id"] = ids[item["id"] - 1]
    path.write_text(json.dumps(content))
    return path


ORDERS = [(5, 4, 3, 2, 1), (30, 7, 0, 12, 9), ("e", "d", "a", "b", "c")]


@pytest.fixture
def run(shapes, tmp_path):
    """Trains or evaluates the tiny config, on data whose classes have other ids."""

    def start(folder, overrides=(), train=None, val=None, **options):
        cfg = load_config(
            CONFIG,
            [f"shapes.root={shapes}", "train.amp.enabled=false", "train.max_iter=2",
             f"train.output_dir={tmp_path / folder}", *overrides],
        )  # fmt: skip
        for part, ids in (("train", train), ("val", val)):
            if ids is None:
                continue
            json_file = renumbered(shapes, tmp_path / f"{folder}_{part}.json", part, ids)
            loader = cfg.dataloader.train if part == "train" else cfg.dataloader.test
            loader.dataset = L(load_coco_dataset)(
                name=f"{tmp_path.name}_{folder}_{part}",
                json_file=str(json_file),
                image_root=str(shapes / part),
                is_train=part == "train",
            )
        return stage_interactor.train(cfg, **options)

    return start


def found(run, json_file):
    """Detections with the names of their classes, as the file that was evaluated has them."""
    names = {c["id"]: c["name"] for c in json.loads(Path(json_file).read_text())["categories"]}
    found = json.loads(Path(run.path("coco_instances_results.json")).read_text())
    return [{**item, "category_id": names.get(item["category_id"])} for item in found]


def same(first, second):
    return first == second or json.dumps(first) == json.dumps(second)  # NaN is NaN here


@pytest.mark.parametrize("ids", ORDERS, ids=str)
def test_what_is_evaluated_is_the_same_for_every_order(run, shapes, tmp_path, ids):
    plain = run("plain", ["train.max_iter=20"])
    path = plain.checkpoint
    for name, options in (("alone", {"eval_only": True, "checkpoint": path}),
                          ("trained", {})):  # fmt: skip
        overrides = [] if options else ["train.max_iter=20"]
        other = run(name, overrides, val=ids, **options)
        assert same(other.metrics, plain.metrics)
        if not isinstance(ids[0], str):  # which COCO's format does not have: it is renumbered
            assert found(other, tmp_path / f"{name}_val.json") == found(plain, shapes / "val.json")


@pytest.mark.parametrize("ids", ORDERS, ids=str)
def test_a_run_goes_on_in_the_order_that_it_began_with(run, tmp_path, ids):
    whole = run("whole", ["train.max_iter=4"])
    run("begun", ["train.max_iter=4", "train.checkpointer.period=2"])
    (tmp_path / "begun/last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "begun/model_final.pth").unlink()
    other = run("begun", ["train.max_iter=4"], train=ids, val=ids[::-1], resume=True)
    first, second = (torch.load(r.checkpoint, weights_only=True) for r in (whole, other))
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key
    names = [[c["name"] for c in x["blueprint"]["categories"]] for x in (first, second)]
    assert names[0] == names[1]
    assert same(whole.metrics, other.metrics)


def test_fine_tuning_keeps_the_order_of_the_checkpoint(run, tmp_path):
    before = run("before")
    plain = run("plain", checkpoint=before.checkpoint)
    other = run("other", train=ORDERS[1], checkpoint=before.checkpoint)
    first, second = (torch.load(r.checkpoint, weights_only=True)["model"] for r in (plain, other))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_folder_whose_parts_have_other_orders_is_trained_on(shapes, tmp_path):
    for part, ids in (("train", (1, 2, 3, 4, 5)), ("val", ORDERS[0])):
        shutil.copytree(shapes / part, tmp_path / "data" / part)
        renumbered(shapes, tmp_path / f"data/{part}.json", part, ids)
    tiny = ["model.queries.num_queries=8", "train.max_iter=1", "train.device=cpu",
            "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]  # fmt: skip
    run = stage_interactor.train(
        tmp_path / "data", tiny, preset="nano", output_dir=tmp_path / "out"
    )
    names = ["ellipse", "rectangle", "triangle", "cross", "ring"]
    content = torch.load(run.checkpoint, weights_only=True)
    assert [c["name"] for c in content["blueprint"]["categories"]] == names
    assert "matched by name" in (tmp_path / "out/log.txt").read_text()
