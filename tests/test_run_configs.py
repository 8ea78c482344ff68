"""Every run config, made small: built, trained for a step, and evaluated on generated images."""

import json
from pathlib import Path

import pytest
import torch

from stage_interactor.config import (
    instantiate,
    list_configs,
    load_config,
    require_runnable,
    save_config,
    save_resolved,
    without_pretrained_weights,
)
from stage_interactor.d2 import RUNTIME
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.evaluation import COCOEvaluator, inference_on_dataset
from stage_interactor.data import load_shapes

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = [CONFIGS / name for name in list_configs()]
NEEDS = {"detectron2": "detectron2", "detrex": "detrex"}  # folder: package

# The same networks with few and narrow layers.
SMALL_BACKBONES = {
    "resnet": dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8),
    "resnext": dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=2, stem_width=8),
    "tf_efficientnet": {},  # is small
    "swin": dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)),
    "convnext": dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)),
    "vit": dict(embed_dim=32, depth=2, num_heads=2, out_channels=32),
}


def shrink(cfg) -> None:
    """Sizes down, structure unchanged."""
    decoder = cfg.model.decoder
    if cfg.model.num_classes != 5:
        cfg.model.num_classes = 5  # of the generated shapes
    cfg.model.queries.num_queries = 8
    cfg.model.pop("max_detections", None)
    base = 16
    largest = max(decoder.num_points)
    decoder.num_points = [max(8, base * points // largest) for points in decoder.num_points]
    decoder.update(embed_dim=32, feedforward_dim=32, out_points=8)
    backbone = cfg.model.backbone
    without_pretrained_weights(cfg)
    if "name" in backbone:
        if "strides" not in backbone:  # the quick start is small already
            family = next(name for name in SMALL_BACKBONES if backbone.name.startswith(name))
            backbone.update(SMALL_BACKBONES[family])
            cfg.model.neck.in_channels = instantiate(backbone).channels


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shapes") / "data")


def assert_saved_the_same(cfg, folder) -> None:
    """What is loaded again is the same: its references, its order, and the values of them."""
    one, two = folder / "one.yaml", folder / "two.yaml"
    for save in (save_config, save_resolved):
        save(cfg, one)
        save(load_config(one if save is save_config else folder / "kept.yaml"), two)
        assert one.read_text() == two.read_text()
        one.replace(folder / "kept.yaml")


@pytest.mark.parametrize(
    "path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix(""))
)
def test_a_run_trains_and_evaluates(path, shapes, tmp_path):
    package = NEEDS.get(path.relative_to(CONFIGS).parts[0])
    if package:
        pytest.importorskip(package)
    if package and RUNTIME != "detectron2":
        pytest.skip("runs on detectron2")
    cfg = load_config(str(path))
    require_runnable(cfg)
    assert_saved_the_same(cfg, tmp_path)
    shrink(cfg)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    save_config(cfg, tmp_path / "small.yaml")
    torch.manual_seed(0)
    again = instantiate(load_config(tmp_path / "small.yaml").model).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())

    data = dict(root=shapes, num_train=2, num_val=2, image_size=64)
    for split, loader in (("train", cfg.dataloader.train), ("val", cfg.dataloader.test)):
        loader.dataset = L(load_shapes)(split=split, name=f"run_config_{split}", **data)
        loader.num_workers = 0
        crop = loader.mapper.get("augmentation_with_crop") or []
        for step in [*loader.mapper.augmentation, *crop]:
            if "short_edge_length" in step:
                step.short_edge_length = 64
    cfg.dataloader.train.total_batch_size = 2
    cfg.dataloader.evaluator.dataset_name = "run_config_val"
    if path.stem.endswith("_lvis"):  # whose metric needs more than these data have
        cfg.dataloader.evaluator._target_ = COCOEvaluator
    cfg.train.output_dir = str(tmp_path)

    assert 0 < instantiate(cfg.lr_multiplier)(0.5) <= 1
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    losses = model.train()(next(iter(instantiate(cfg.dataloader.train))))
    total = sum(losses.values())
    # Of noised objects, and of a second set of queries, too.
    kinds = 2 if "denoising" in cfg.model or "one_to_many_queries" in cfg.model.queries else 1
    # A cascade that goes through its stages again says after which turns it learns.
    cascade = cfg.model.decoder.get("parts", {}).get("cascade") or {}
    turns = [*cascade.get("supervised", ())] and 1 + cascade.unrolled + len(cascade.supervised)
    assert total.isfinite()
    assert len(losses) == kinds * 3 * (turns or len(cfg.model.decoder.num_points))
    total.backward()
    optimizer.step()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(unused) == cfg.train.ddp.find_unused_parameters, f"no gradient: {unused[:5]}"

    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    assert results["bbox"]["AP"] >= 0
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {item["image_id"] for item in predictions} == {1, 2}
    if cfg.model.get("nms_threshold") is None:
        assert len(predictions) == 2 * cfg.model.queries.num_queries
