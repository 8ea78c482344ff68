"""What `pip wheel .` gives, installed and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dataset_formats import write_yolo

ROOT = Path(__file__).parents[1]
SMALL = ["shapes.num_train=16", "shapes.num_val=4", "shapes.image_size=64",
         "train.amp.enabled=false", "dataloader.train.total_batch_size=4",
         "model.queries.num_queries=8"]  # fmt: skip
TINY = ["+model.backbone.channels=[16,16,16,16]", "+model.backbone.stem_width=8",
        "model.neck.in_channels=[16,16,16,16]", "model.queries.num_queries=8",
        "dataloader.train.mapper.augmentation.1.short_edge_length=[64]",
        "dataloader.test.mapper.augmentation.0.short_edge_length=[64]",
        "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of the files that belong to the project, not of what an earlier build left behind."""
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "projects"):
        leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=leftovers)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
               "-w", str(source / "dist"), str(source)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "Package would be ignored" not in built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def call(wheel, tmp_path_factory):
    """Runs a command of the installed wheel from an empty folder; gives its output."""
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    empty = tmp_path_factory.mktemp("empty folder, (1)")

    def run(*arguments, program=("-m", "stage_interactor.commands"), status=0):
        environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *program, *map(str, arguments)], cwd=empty, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    run.folder = empty
    place = run("import stage_interactor; print(stage_interactor.__file__)", program=("-c",))
    assert place.strip() == str(site / "stage_interactor/__init__.py")
    return run


def test_it_holds_all_that_the_repository_has_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("projects/stage_interactor", ""), ("configs", "configs/")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT / folder).as_posix()
                assert f"stage_interactor/{inside}{name}" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "docs"))]


def test_every_module_of_it_can_be_imported(call):
    code = """
import importlib, pkgutil, stage_interactor as package
for module in pkgutil.walk_packages(package.__path__, "stage_interactor."):
    if ".configs" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    call(code, program=("-c",))


def test_from_an_empty_folder_to_a_detector_and_back(call):
    out = call("quickstart", "train.max_iter=6", *SMALL)
    assert "Finished." in out and "AP50" in out
    run = call.folder / "output/quickstart"
    assert (run / "model_final.pth").is_file() and (call.folder / "datasets/shapes").is_dir()
    assert "open it in a browser" in call("report", run)
    assert "AP during training" in (run / "report.html").read_text()
    assert "total loss" in call("replay", run, "--iteration", 3)
    picture = sorted((call.folder / "datasets/shapes/val").iterdir())[0]
    call("stages", "--checkpoint", run / "model_final.pth", picture)
    every = ("--threshold", 0, "--multi-label")
    call("predict", "--checkpoint", run / "model_final.pth", picture, *every)
    found = json.loads((call.folder / "output/predict/predictions.json").read_text())
    assert len(found["annotations"]) == 8
    out = call("export", "--checkpoint", run / "model_final.pth", "--format", "torch-export")
    assert "Against PyTorch" in out and (run / "model_final.md").is_file()
    evaluated = (f"train.init_checkpoint={run}/model_final.pth", "train.output_dir=output/eval")
    out = call("train", "--config-file", "quickstart.py", "--eval-only", *SMALL, *evaluated)
    assert "AP50" in out


def test_data_and_output_may_be_called_anything(call, small_run):
    names = ("train", "val")
    json_files = {name: small_run / f"shapes/{name}.json" for name in names}
    folder = call.folder / 'zélles [1], it\'s "日本" {a}'
    folder.mkdir()
    write_yolo(json_files, {name: small_run / "shapes" / name for name in names}, folder)
    call("data", "check", folder)
    call("data", "view", folder, "--output", call.folder / "page (1).html")
    output = call.folder / "out, [b] 'c' (d) é"
    arguments = ("--preset", "nano", "--epochs", 1, "--output-dir", output, *TINY)
    call("train", folder, *arguments)
    assert (output / "model_final.pth").is_file()
    call("train", folder, *arguments, "--resume", "train.max_iter=4")
    (config := call.folder / "my [run], 'é'").mkdir()
    call("config", "quickstart.py", "--copy", config)
    other = call.folder / "run, (2)"
    call("train", "--config-file", config / "quickstart.py", f"train.output_dir={other}",
         "train.max_iter=2", *SMALL)  # fmt: skip
    assert (other / "model_final.pth").is_file()
    call("report", other)
    call("predict", "--checkpoint", output / "model_final.pth", folder / "images/val",
         "--output-dir", call.folder / "found [1]")  # fmt: skip
    call("export", "--checkpoint", other / "model_final.pth", "--format", "safetensors",
         "--output", call.folder / "a, b (c).safetensors")  # fmt: skip


def test_mistakes_are_told_in_a_line(call):
    out = call("train", status=2)
    assert "name data sets, or one config with --config-file" in out and "Traceback" not in out
    out = call("train", "--config-file", "nonsense.py", status=2)
    assert "there is no such file" in out and "Traceback" not in out
    out = call("quickstart", "train.max_itr=3", status=2)
    assert "did you mean max_iter" in out and "Traceback" not in out
    out = call("quickstart", "cells", status=2)
    assert "for your own data there is stage-interactor train" in out
