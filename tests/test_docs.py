"""The documentation builds without a warning, and what it tells to type works."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_formats import write_yolo

from stage_interactor.commands import main
from stage_interactor.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Behind the commands of the documentation, to make them small.
TINY_MODEL = """+model.backbone.channels=[16,16,16,16] +model.backbone.stem_width=8
    model.neck.in_channels=[16,16,16,16] model.queries.num_queries=8""".split()
SMALL_IMAGES = """dataloader.train.mapper.augmentation.1.short_edge_length=[64]
    dataloader.test.mapper.augmentation.0.short_edge_length=[64]
    dataloader.train.num_workers=0 dataloader.test.num_workers=0""".split()
SMALL_TRAIN = ["--preset", "nano", "--epochs", "1", *TINY_MODEL, *SMALL_IMAGES]
SMALL_QUICKSTART = """train.max_iter=2 shapes.num_train=8 shapes.num_val=4 shapes.image_size=64
    train.amp.enabled=false dataloader.train.total_batch_size=4""".split()


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the fenced blocks whose first line, behind the fence, is one of these."""
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return [content for language, content in fenced if language in languages]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="needs stage-interactor[docs]")
    pytest.importorskip("mkdocstrings", reason="needs stage-interactor[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file()
    api = (tmp_path / "site/api/index.html").read_text()
    assert "Finds objects in pictures of any size" in api and ":class:" not in api


@pytest.fixture(scope="module")
def workspace(small_run, tmp_path_factory):
    """A folder in which the documentation's commands can be typed."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("train_net.py", "configs", "tools"):
        (root / name).symlink_to(ROOT / name)
    parts = ("train", "val")
    json_files = {name: small_run / f"shapes/{name}.json" for name in parts}
    for name in ("cells", "cells_v2"):
        (root / name).mkdir()
        write_yolo(json_files, {part: small_run / "shapes" / part for part in parts}, root / name)
    shutil.copy(next((root / "cells/images/val").iterdir()), root / "cells/image.jpg")
    description = root / "cells_v2/data.yaml"
    description.write_text(description.read_text().replace("- ring", "- ring\n- star"))
    return root


def run(command: list[str], workspace: Path) -> None:
    if command[0] == "stage-interactor":
        small = SMALL_TRAIN if command[1] == "train" else []
        assert main([*command[1:], *small]) == 0, command
        return
    assert command[:2] == ["python", "train_net.py"], command
    small = SMALL_QUICKSTART if "configs/quickstart.py" in command else []
    result = subprocess.run([sys.executable, *command[1:], *small], cwd=workspace, text=True,
                            capture_output=True)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def run_all(page: Path, workspace: Path) -> int:
    """Runs all commands of a page; how many there are."""
    typed = [command for block in blocks(page, "bash") for command in commands(block)]
    for command in typed:
        run(command, workspace)
    return len(typed)


def test_the_tutorial_can_be_followed(workspace, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs stage-interactor[export]")
    monkeypatch.chdir(workspace)
    page = ROOT / "docs/own_data.md"
    assert run_all(page, workspace) == 10
    written = """data.html cells/report.html stages.html found/predictions.csv cells/model_final.md
        found_by_onnx/image.jpg cells_v2/model_final.pth"""
    for name in written.split():
        assert (workspace / "output" / name).is_file(), name
    (code,) = blocks(page, "python")
    exec(compile(code, str(page), "exec"), {})
    assert "Instances" in capsys.readouterr().out


def test_the_guide_to_configs_can_be_followed(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    page = ROOT / "docs/configs.md"
    assert run_all(page, workspace) == 2
    (code,) = blocks(page, "python")
    exec(compile(code, str(page), "exec"), {})
    assert "2.5e-05 87960" in capsys.readouterr().out
    (own,) = blocks(page, 'python title="configs/my_run.py"')
    (workspace / "configs").unlink()
    shutil.copytree(ROOT / "configs", workspace / "configs")
    (workspace / "configs/my_run.py").write_text(own)
    assert load_config("configs/my_run.py").model.backbone.name == "convnext_tiny.fb_in1k"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_keys_that_a_page_names_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    for kind, name in re.findall(r"(?:(python|bash) )((?:tools/)?\w+\.(?:py|sh))\b", text):
        assert (ROOT / name).is_file(), f"{kind} {name}"
    for block in blocks(page, "", "bash"):
        for command in commands(block):
            if "--config-file" not in command:
                continue
            config = command[command.index("--config-file") + 1]
            assert "/" not in config or not config.startswith("configs") or Path(config).is_file()
            if config.startswith("configs/") and not re.match(
                "configs/(detectron2|detrex)", config
            ):
                keys = [part for part in command if re.match(r"\+?[a-z_]+(\.\w+)*=", part)]
                load_config(config, [key for key in keys if "$" not in key])
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
