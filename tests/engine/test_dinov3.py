"""The configs of DINOv3's networks, made small: trained, gone on with, frozen, used."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checks.small import random_image, without_zeros

from stage_interactor import Detector, get_config, train
from stage_interactor.config import instantiate, load_config, save_config
from stage_interactor.engine.parameters import freeze, parameter_groups
from stage_interactor.inference.prepare import prepare_for_inference

TINY = str(Path(__file__).parents[1] / "tiny_config.py")
SIZES = {
    "convnext_t": (dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)), [8, 16, 32, 64]),
    "vit_s": (dict(embed_dim=32, depth=3, num_heads=2, out_channels=16), [16] * 4),
}


def small(kind):
    """The tiny run with the backbone and the rates of a config."""
    theirs = get_config(f"stage_interactor_dinov3_{kind}_100q_12ep.py")
    sizes, channels = SIZES[kind]
    cfg = load_config(TINY)
    cfg.model.backbone = theirs.model.backbone
    cfg.model.backbone.update(pretrained=False, **sizes)
    cfg.model.neck.in_channels = channels
    cfg.optimizer.params = theirs.optimizer.params
    cfg.train.update(max_iter=4, amp=dict(enabled=False))
    cfg.train.checkpointer.period = 2
    return cfg


def built(kind):
    torch.manual_seed(0)
    return without_zeros(instantiate(small(kind).model), std=0.1)


@pytest.fixture(scope="module", params=list(SIZES))
def run(request, shapes, tmp_path_factory):
    """A whole run, and the file that its config is in."""
    folder = tmp_path_factory.mktemp("run")
    save_config(small(request.param), folder / "config.yaml")
    overrides = [f"train.output_dir={folder / 'out'}", f"shapes.root={shapes}"]
    return train(str(folder / "config.yaml"), overrides), folder / "config.yaml", overrides


def test_a_run_goes_on_to_the_same_weights(run, tmp_path):
    whole, config, (_, data) = run
    halfway = "model_0000001.pth"
    shutil.copy(Path(whole.output_dir, halfway), tmp_path)
    (tmp_path / "last_checkpoint").write_text(halfway)
    resumed = train(str(config), [f"train.output_dir={tmp_path}", data], resume=True)
    ends = [torch.load(path.checkpoint, weights_only=True)["model"] for path in (whole, resumed)]
    start = torch.load(tmp_path / halfway, weights_only=True)["model"]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert not all(torch.equal(value, start[key]) for key, value in ends[0].items())


def test_its_checkpoint_finds_what_its_evaluation_found(run, shapes):
    whole, _, _ = run
    detector = Detector.from_checkpoint(whole.checkpoint, device="cpu")
    evaluated = json.loads(Path(whole.path("coco_instances_results.json")).read_text())
    for record in json.loads((shapes / "val.json").read_text())["images"][:3]:
        path = str(shapes / "val" / record["file_name"])
        found = detector(path, threshold=0.0, multi_label=True)
        scores = [item["score"] for item in evaluated if item["image_id"] == record["id"]]
        np.testing.assert_allclose(found.scores, sorted(scores, reverse=True), atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_gradients_reach_every_weight_and_a_prepared_model_finds_the_same(kind):
    model = built(kind).train()
    batch = [random_image(2, (64, 96), seed=1), random_image(3, (96, 64), seed=2)]
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    unmoved = [name for name, p in model.backbone.named_parameters() if not p.grad.any()]
    assert not unmoved
    model.eval()
    with torch.no_grad():
        ours, theirs = prepare_for_inference(model)(batch), model(batch)
        half = prepare_for_inference(model, dtype="bfloat16")(batch)
    for one, two, third in zip(ours, theirs, half):
        one, two, third = one["instances"], two["instances"], third["instances"]
        torch.testing.assert_close(one.scores, two.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.pred_boxes.tensor, two.pred_boxes.tensor, atol=0.01, rtol=0)
        torch.testing.assert_close(third.scores, two.scores, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", SIZES)
def test_the_network_can_stay_as_it_is_while_what_is_behind_it_learns(kind):
    model = built(kind)
    freeze(model, ["backbone.network"])
    sum(model.train()([random_image(2)]).values()).backward()
    learns = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in learns} == {"pyramid" if kind == "vit_s" else "norms"}
    assert model.backbone.training
    assert not any(module.training for module in model.backbone.network.modules())


@pytest.mark.parametrize("kind", SIZES)
def test_rates_fall_from_block_to_block_and_some_weights_do_not_decay(kind):
    model = instantiate(small(kind).model)
    params = {k: v for k, v in small(kind).optimizer.params.items() if not k.startswith("_")}
    params |= dict(base_lr=1.0, weight_decay=0.1)
    groups = parameter_groups(model, **params)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)].removeprefix("backbone."): (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    decay = {"convnext_t": 0.88, "vit_s": 0.7}[kind]
    expected = {  # name: (blocks behind it and one, whether it decays)
        "convnext_t": {
            "network.stem_0.weight": (6, True),
            "network.stages_0.blocks.0.mlp.fc1.weight": (5, True),
            "network.stages_2.blocks.0.mlp.fc1.weight": (3, True),
            "network.stages_3.blocks.0.gamma": (1, False),
            "network.stages_3.blocks.0.norm.weight": (1, False),
            "norms.3.weight": (0, False),
        },
        "vit_s": {
            "network.model.cls_token": (4, False),
            "network.model.reg_token": (4, False),
            "network.model.patch_embed.proj.weight": (4, True),
            "network.model.blocks.0.attn.qkv.weight": (3, True),
            "network.model.blocks.2.mlp.fc2.weight": (1, True),
            "network.model.blocks.2.gamma_1": (1, False),
            "network.model.norm.weight": (0, False),
            "pyramid.0.0.weight": (0, True),
            "pyramid.0.1.weight": (0, False),
            "pyramid.3.3.weight": (0, True),
        },
    }[kind]
    for name, (power, decays) in expected.items():
        assert found[name] == (pytest.approx(decay**power), 0.1 if decays else 0.0), name
    assert {rate for name, (rate, _) in found.items() if name.startswith("decoder")} == {1.0}
    assert {rate for name, (rate, _) in found.items() if name.startswith("pyramid")} <= {1.0}
