"""Released checkpoints: every key of them, at full size, and end to end at a small one."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import numpy as np
import pytest
import torch
from checks.golden_files import Golden, golden_files

from stage_interactor import Detector
from stage_interactor.config import instantiate, list_configs, load_config
from stage_interactor.errors import call
from stage_interactor.inference import conversion, released
from stage_interactor.modeling import ChannelMapper, TimmBackbone
from stage_interactor.untrusted.tensors import CheckpointError

ROOT = Path(__file__).parents[2]
KEYS = json.loads((ROOT / "tests/golden/released_keys.json").read_text())
RUNS = {
    "stageinteractor_r50_1x_coco": "r50_100q_12ep",
    "stageinteractor_r50_300_query_crop_mstrain_480-800_3x_coco": "r50_300q_36ep_crop",
    "stageinteractor_r101_300_query_crop_mstrain_480-800_3x_coco": "r101_300q_36ep_crop",
    "stageinteractor_dx101_300_query_crop_mstrain_480-800_3x_coco": "x101_dcn_300q_36ep_crop",
    "stageinteractor_swin_s_300_query_crop_mstrain_480-800_3x_coco": "swin_s_300q_36ep_crop",
}


def released_config(run: str) -> str:
    return str(ROOT / "configs" / "released" / f"stage_interactor_{run}.py")


def build(config: str, *overrides: str) -> torch.nn.Module:
    cfg = load_config(config, ["model.backbone.pretrained=false", *overrides])
    with torch.device("meta"):
        return instantiate(cfg.model)


def made_up(shapes: dict) -> dict:
    """Random bytes in the shapes of a released checkpoint: copying them is all that is tested."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("name", KEYS)
def test_a_full_size_checkpoint_is_used_to_the_last_key_and_comes_back(name):
    model = build(released_config(RUNS[name]))
    sources = released.model_sources(model)
    state = made_up(KEYS[name])
    assert released.unused_keys(state, sources) == []
    ours = released.from_released(state, sources)
    expected = model.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in expected.items()
    }
    kept = {k: v for k, v in state.items() if not any(part in k for part in released.DROPPED)}
    assert sum(v.numel() for v in expected.values()) == sum(v.numel() for v in kept.values())
    back = released.to_released(ours, sources)
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[key], kept[key]) for key in kept)


def test_the_default_variant_has_the_released_size_but_for_the_inner_offsets():
    model, variant = (
        build(path)
        for path in (
            str(ROOT / "configs" / "stage_interactor_r50_100q_12ep.py"),
            released_config("r50_100q_12ep"),
        )
    )
    differing = {
        key.split(".", 3)[3]
        for key, value in model.state_dict().items()
        if variant.state_dict()[key].shape != value.shape
    }
    assert differing == {"sampler.inner.weight", "sampler.inner.bias"}


def test_patch_merging_reads_the_same_pixels_as_mmdetections():
    backbone = TimmBackbone(
        name="swin_tiny_patch4_window7_224", pretrained=False, frozen_stages=0,
        embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), output_norm=True,
    )  # fmt: skip
    sources = released.backbone_sources(backbone)
    merging = backbone.network.layers_1.downsample
    torch.nn.init.normal_(merging.norm.weight)
    torch.nn.init.normal_(merging.norm.bias)
    theirs = released.to_released(backbone.state_dict(), sources)
    prefix = "backbone.stages.0.downsample"
    pixels = torch.randn(2, 6, 10, 8)
    # mmdetection unfolds 2x2 patches, channel first.
    unfolded = torch.nn.functional.unfold(pixels.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    normed = torch.nn.functional.layer_norm(
        unfolded, (32,), theirs[f"{prefix}.norm.weight"], theirs[f"{prefix}.norm.bias"]
    )
    expected = normed @ theirs[f"{prefix}.reduction.weight"].T
    torch.testing.assert_close(merging(pixels).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_relative_positions_are_numbered_as_mmdetections():
    network = TimmBackbone(
        name="swin_tiny_patch4_window7_224", pretrained=False, frozen_stages=0
    ).network
    steps = (torch.arange(7)[:, None] * 13 + torch.arange(7)).flatten()  # of its WindowMSA
    expected = (steps[:, None] + steps[None, :]).flip(1)
    assert torch.equal(network.layers_0.blocks[0].attn.relative_position_index, expected)


def test_a_model_with_parts_that_no_release_has_is_refused():
    model = build(released_config("r50_100q_12ep"))
    model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no such parts.*extra"):
        released.model_sources(model)


def test_the_supplements_variant_is_not_written_as_a_released_checkpoint():
    model = build(str(ROOT / "configs" / "stage_interactor_r50_100q_12ep.py"))
    with pytest.raises(ValueError, match="needs model.decoder.variant=release"):
        released.model_sources(model)


def convert(*arguments):
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def released_file(kind: str, folder: Path):
    """A released checkpoint with a golden decoder in it, and the overrides that describe it."""
    golden = Golden(golden_files(kind)[0], torch.float32)
    config = golden.config
    state = {key: golden.tensor(f"state/{key}") for key in golden.keys("state/")}
    num_points = ",".join(map(str, golden.num_points()))
    overrides = [
        f"model.num_classes={config['classes']}",
        f"model.queries.num_queries={config['queries']}",
        f"model.decoder.embed_dim={config['dim']}",
        f"model.decoder.num_groups={config['groups']}",
        f"model.decoder.num_heads={config['heads']}",
        f"model.decoder.feedforward_dim={config['ffn']}",
        f"model.decoder.out_points={config['out_points']}",
        f"model.decoder.num_points=[{num_points}]",
        "model.backbone.name=test_resnet",
        "model.backbone.frozen_stages=0",
    ]
    backbone = TimmBackbone(name="test_resnet", pretrained=False, frozen_stages=0)
    neck = ChannelMapper(in_channels=backbone.channels, out_channels=config["dim"])
    state |= released.to_released(backbone.state_dict(), released.backbone_sources(backbone))
    state |= released.to_released(neck.state_dict(), released.neck_sources(neck))
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, folder / "released.pth")
    return golden, folder, state, overrides


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return released_file("decoder", tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("kind", ["decoder", "adamixer"])
def test_the_golden_decoders_through_the_tool(kind, tmp_path):
    golden, folder, state, overrides = released_file(kind, tmp_path)
    out, back = tmp_path / "out.pth", tmp_path / "back.pth"
    config = released_config("r50_100q_12ep")
    if kind == "adamixer":
        config = str(ROOT / "configs" / "adamixer_r50_100q_12ep.py")
    done = convert(folder / "released.pth", out, "--config-file", config, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "init_proposal_bboxes: always the whole image" in done.stdout
    cfg = load_config(config, ["model.backbone.pretrained=false", *overrides])
    model = instantiate(cfg.model).eval()
    model.load_state_dict(torch.load(out, weights_only=True)["model"])
    sizes = torch.tensor([image.image_size for image in golden.instances()])
    features = [golden.tensor(f"in/feature_{level}") for level in range(4)]
    outputs = model.decoder(features, *model.queries(sizes))
    for index, output in enumerate(outputs):
        golden.check(f"out/stage_{index}/boxes", output.boxes)
        golden.check(f"out/stage_{index}/logits", output.logits)

    done = convert(out, back, "--to-released", "--config-file", config, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    returned = torch.load(back, weights_only=True)["state_dict"]
    dropped = state.keys() - returned.keys()
    assert all(any(part in key for part in released.DROPPED) for key in dropped)
    assert all(torch.equal(returned[key], state[key]) for key in returned)


def test_files_that_do_not_fit_are_told_apart(small, tmp_path, monkeypatch, capsys):
    _, folder, state, overrides = small
    config = ("--config-file", released_config("r50_100q_12ep"))
    good, out = folder / "released.pth", tmp_path / "out.pth"

    def message(path, *arguments, config=config):
        command = ["convert_checkpoint.py", path, out, *config, *overrides, *arguments]
        monkeypatch.setattr(sys, "argv", [str(item) for item in command])
        assert call("convert", convert_checkpoint.main, mistake=1) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "there is no such file" in message(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    assert "is not a checkpoint that can be loaded safely" in message(tmp_path / "text.pth")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pth")
    assert "neither a released" in message(tmp_path / "other.pth")
    assert "is a released checkpoint already: convert it without" in message(good, "--to-released")
    assert "16, 32) in the file, (7, 32) in the model" in message(
        good, "model.queries.num_queries=7"
    )
    assert "model.decoder.variant=release" in message(good, "model.decoder.variant=supplement")
    for wider in ("model.decoder.embed_dim=64", "model.decoder.out_points=64"):
        assert "does not fit the config" in message(good, wider)
    torch.save(
        {"model": {"decoder.stages.0.head.cls_out.bias": torch.zeros(1)}}, tmp_path / "c.pth"
    )
    assert "does not fit the config" in message(tmp_path / "c.pth", "--to-released")
    key = "roi_head.bbox_head.0.fc_cls.weight"
    torch.save({"state_dict": {k: v for k, v in state.items() if k != key}}, tmp_path / "a.pth")
    assert f"1 keys are missing, such as ['{key}']" in message(tmp_path / "a.pth")
    torch.save({"state_dict": state | {"mask_head.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    assert "no place in this model, such as ['mask_head.weight']" in message(tmp_path / "b.pth")


def test_a_released_checkpoint_is_a_detector_by_its_name(small, tmp_path, monkeypatch, caplog):
    golden, folder, state, overrides = small
    classes = [{"id": index, "name": f"c{index}"} for index in range(golden.config["classes"])]
    monkeypatch.setattr(conversion, "categories_of", lambda _: classes)
    monkeypatch.setattr(conversion, "load_config", lambda name: load_config(name, overrides))
    name, file = "stage_interactor_r50_100q_12ep", "stageinteractor_r50_1x_coco.pth"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"checkpoints/{file}: there is no such file.*page"):
        Detector.from_released(name)
    with pytest.raises(ValueError, match="'r50'; there are stage_interactor_r50_100q_12ep, "):
        Detector.from_released("r50")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / file).write_bytes((folder / "released.pth").read_bytes())
    with caplog.at_level("INFO"):
        detector = Detector.from_released(name, device="cpu")
    digest = hashlib.sha256((folder / "released.pth").read_bytes()).hexdigest()
    assert f"has the SHA-256 {digest}" in caplog.text and "nothing to compare" in caplog.text
    assert detector.class_names == [item["name"] for item in classes]
    named = Detector.from_released(f"released/{name}.py", folder / "released.pth", device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    found, again = detector(picture, 0.0), named(picture, 0.0)
    assert len(found) and (found.boxes == again.boxes).all()
    key = max(key for key in state if key.endswith("fc_cls.weight"))  # of the last stage
    torch.save({"state_dict": {**state, key: state[key] + 1}}, tmp_path / "other.pth")
    other = Detector.from_released(name, tmp_path / "other.pth", device="cpu")
    assert (other(picture, 0.0).scores[:5] != found.scores[:5]).any()
    torch.save({"state_dict": {**state, key: state[key][:-1]}}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="tensors differ in shape"):
        Detector.from_released(name, tmp_path / "short.pth", device="cpu")


def test_every_released_config_has_its_file():
    names = {Path(name).stem for name in list_configs() if name.startswith("released/")}
    assert conversion.FILES.keys() == names
    expected = {f"stage_interactor_{run}": f"{name}.pth" for name, run in RUNS.items()}
    assert conversion.FILES == expected


def test_averages_are_converted_unless_it_is_asked_not_to(small, tmp_path):
    _, folder, _, overrides = small
    config = ("--config-file", released_config("r50_100q_12ep"), *overrides)
    ours, out = tmp_path / "ours.pth", tmp_path / "out.pth"
    assert convert(folder / "released.pth", ours, *config).returncode == 0
    content = torch.load(ours, weights_only=True)
    averages = {f"module.{key}": value + 1.0 for key, value in content["model"].items()}
    torch.save(content | {"ema": averages}, ours)
    biases = []
    for flags, told in (([], "averaged weights"), (["--trained-weights"], "trained weights, not")):
        done = convert(ours, out, "--to-released", *flags, *config)
        assert done.returncode == 0 and f"Loading the {told}" in done.stdout, done.stderr
        state = torch.load(out, weights_only=True)["state_dict"]
        biases.append(state["roi_head.bbox_head.0.fc_cls.bias"].mean())
    assert biases[0] == pytest.approx(biases[1].item() + 1)

    averages["module.decoder.stages.0.head.cls_out.bias"][0] = float("inf")
    torch.save(content | {"ema": averages}, ours)
    done = convert(ours, out, "--to-released", *config)
    assert (
        done.returncode and "1 tensors hold NaN or infinite values: ema.module.dec" in done.stderr
    )


def test_released_weights_that_are_not_finite_are_refused(small, tmp_path):
    _, _, state, overrides = small
    key = "roi_head.bbox_head.0.fc_cls.weight"
    bad = state | {key: state[key] * float("nan")}
    torch.save({"state_dict": bad}, tmp_path / "bad.pth")
    config = ("--config-file", released_config("r50_100q_12ep"), *overrides)
    done = convert(tmp_path / "bad.pth", tmp_path / "out.pth", *config)
    assert (
        done.returncode
        and f"1 tensors hold NaN or infinite values: state_dict.{key}" in done.stderr
    )
