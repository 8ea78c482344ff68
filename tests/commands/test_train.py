"""`stage-interactor train`: from a folder to a detector, and from one detector to another."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dataset_formats import write_yolo

import stage_interactor
from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.commands.train import train_net
from stage_interactor.config import load_config
from stage_interactor.engine.presets import free_memory

ROOT = Path(__file__).parents[2]
# A model of seconds, whatever the preset.
TINY = (
    "+model.backbone.channels=[16,16,16,16]",
    "+model.backbone.stem_width=8",
    "model.neck.in_channels=[16,16,16,16]",
    "model.queries.num_queries=8",
    "dataloader.train.mapper.augmentation.1.short_edge_length=[64]",
    "dataloader.test.mapper.augmentation.0.short_edge_length=[64]",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
)


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """The generated images as YOLO keeps them."""
    out = tmp_path_factory.mktemp("own") / "shapes"
    out.mkdir()
    parts = ("train", "val")
    json_files = {name: small_run / f"shapes/{name}.json" for name in parts}
    write_yolo(json_files, {name: small_run / "shapes" / name for name in parts}, out)
    return out


def train(folder, output_dir, *arguments):
    options = ("--preset", "nano", "--output-dir", output_dir, *arguments)
    return main(["train", str(folder), *map(str, options), "train.device=cpu", *TINY])


def with_classes(folder, path, instead_of_ring):
    """A copy of the folder whose last class is called something else."""
    shutil.copytree(folder, path)
    text = (path / "data.yaml").read_text()
    (path / "data.yaml").write_text(text.replace("- ring", instead_of_ring))
    return path


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    assert train(folder, output, "--epochs", 1) == 0
    return output


def test_a_folder_becomes_a_detector(folder, trained):
    results = json.loads((trained / "results.json").read_text())
    assert "AP" in results["bbox"]
    detector = Detector.from_checkpoint(trained / "model_final.pth", device="cpu")
    assert detector.class_names == ["ellipse", "rectangle", "triangle", "cross", "ring"]
    picture = sorted((folder / "images/val").iterdir())[0]
    assert len(detector(picture, threshold=0.0, multi_label=True)) == 8


def test_fine_tuning_with_other_classes_keeps_all_but_the_class_layers(
    folder, trained, tmp_path, capfd
):
    own = with_classes(folder, tmp_path / "own", "- ring\n- star")
    checkpoint = trained / "model_final.pth"
    assert train(own, tmp_path / "out", "--epochs", 1, "--checkpoint", checkpoint) == 0
    out = capfd.readouterr().out
    assert "Fine-tuning: the checkpoint has classes ['ellipse'," in out
    assert "'star']" in out
    assert "(8 tensors)" in out  # weight and bias of four stages
    assert Detector.from_checkpoint(tmp_path / "out/model_final.pth").class_names[-1] == "star"


def test_a_checkpoint_of_another_model_is_refused(folder, trained, tmp_path, capsys):
    arguments = ("--checkpoint", trained / "model_final.pth", "--dry-run")
    assert train(folder, tmp_path, *arguments, "model.decoder.out_points=16") == 2
    told = capsys.readouterr().err
    assert "is of another model than --preset nano: model.decoder.out_points=32 (here 16)" in told


def test_the_schedule_follows_the_data_and_the_parts_the_memory(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("stage_interactor.engine.presets.free_memory", lambda: 1.0)
    assert train(folder, tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    # 16000 images at least, 8 at a time; 0.3 + 4 * 0.15 GiB are more than 80 % of 1 GiB.
    assert "train.max_iter=2000" in out and "train.accumulation_steps=4" in out
    assert "train.eval_period=200" in out
    assert "train.early_stopping.patience=5" in out
    assert train(folder, tmp_path, "--dry-run", "--epochs", 10, "train.eval_period=7") == 0
    out = capsys.readouterr().out
    assert "train.max_iter=20 " in out and out.count("train.eval_period") == 1
    assert "lr_multiplier.warmup_iters=2 " in out
    assert not (tmp_path / "model_final.pth").exists()
    assert free_memory() > 0


def test_what_is_not_given_follows_the_length_that_is(folder, tmp_path, capsys):
    assert train(folder, tmp_path, "--dry-run", "train.max_iter=30") == 0
    shown = shlex.split(capsys.readouterr().out.split("go on from:")[1].replace("\\\n", " "))
    scaled = {"lr_multiplier.warmup_iters=3", "train.eval_period=3", "train.checkpointer.period=3"}
    assert scaled <= set(shown)
    assert [word for word in shown if word.startswith("train.max_iter")] == ["train.max_iter=30"]
    own = ("train.max_iter=30", "lr_multiplier.warmup_iters=20", "train.eval_period=10")
    assert train(folder, tmp_path, "--dry-run", "--epochs", 2, *own) == 0
    out = capsys.readouterr().out
    assert "warmup_iters=20" in out and "warmup_iters=3" not in out and "eval_period=3" not in out


@pytest.mark.parametrize("command", ["train_net.py", "stage-interactor train"])
def test_flags_may_stand_behind_the_overrides(command, monkeypatch):
    typed = "--config-file quickstart.py train.max_iter=3 --resume optimizer.lr=1 --num-gpus 2"
    called = []
    monkeypatch.setattr(
        "stage_interactor.commands.train.train",
        lambda config, overrides, **options: called.append((config, list(overrides), options)),
    )
    if command == "train_net.py":
        monkeypatch.setattr(sys, "argv", [command, *typed.split()])
        with pytest.raises(SystemExit) as left:
            train_net()
        assert left.value.code == 0
    else:
        assert main(["train", *typed.split()]) == 0
    ((config, overrides, options),) = called
    assert config == "quickstart.py" and overrides == ["train.max_iter=3", "optimizer.lr=1"]
    assert options["resume"] and options["num_gpus"] == 2 and not options["eval_only"]


def test_without_images_to_evaluate_on_some_are_held_out(folder, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    text = (own / "data.yaml").read_text()
    (own / "data.yaml").write_text("\n".join(x for x in text.splitlines() if "val" not in x))
    assert train(own, tmp_path / "out", "--dry-run") == 0
    assert "2 images of 'train' are held out" in capsys.readouterr().out
    parts = [
        json.loads((tmp_path / f"out/annotations/{name}.json").read_text())
        for name in ("train", "val")
    ]
    assert [len(part["images"]) for part in parts] == [14, 2]
    for part in parts:
        ids = {image["id"] for image in part["images"]}
        assert {item["image_id"] for item in part["annotations"]} <= ids


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--epochs", "nan"), "--epochs must be a finite number of more than 0, got nan"),
        (("--epochs", "inf"), "--epochs must be a finite number of more than 0, got inf"),
        (("--freeze", ","), "--freeze ',' names no part"),
        (("--num-gpus", "1000000"), "a multiple of the 1000000 processes"),
        (("--machine-rank", "1"), "machine_rank is 1; of 1 it is one from 0 to 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_told(folder, tmp_path, capsys, flags, told):
    batch = "dataloader.train.total_batch_size=2"
    assert train(folder, tmp_path / "run", *flags, batch) == 2
    assert told in capsys.readouterr().err


def test_arguments_of_python_that_cannot_be_meant_are_told(folder, tmp_path):
    with pytest.raises(ValueError, match="--epochs must be a finite number .* got 'two'"):
        stage_interactor.train(str(folder), epochs="two", output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="no data set is named: the list of them is empty"):
        stage_interactor.train([], output_dir=tmp_path / "run")


def test_of_two_that_say_the_same_none_is_ignored(folder, tmp_path, capsys):
    elsewhere = f"train.output_dir={tmp_path}/elsewhere"
    assert train(folder, tmp_path / "run", elsewhere) == 2
    told = f"train.output_dir is named twice: {tmp_path}/run and {tmp_path}/elsewhere"
    assert told in capsys.readouterr().err
    config = ["train", "--config-file", "quickstart.py", "--output-dir", f"{tmp_path}/run"]
    assert main([*config, elsewhere]) == 2 and told in capsys.readouterr().err
    assert train(folder, tmp_path / "run", "--epochs", 3, "--dry-run", "train.max_iter=2") == 0
    assert "--epochs 3 is not used: train.max_iter=2" in capsys.readouterr().out
    for flag, value, override in (
        ("--augmentation", "light", "data.augmentation=strong"),
        ("--flip", "none", "data.flip=both"),
        ("--background", "drop", "data.background=keep"),
        ("--freeze", "neck,backbone", "train.freeze=[backbone]"),
    ):
        assert train(folder, tmp_path / "run", flag, value, "--dry-run", override) == 2
        assert f"{override.split('=')[0]} is named twice: " in capsys.readouterr().err
    for flag, value, override in (
        ("--freeze", "neck,backbone,", "train.freeze=['neck', backbone]"),
        ("--background", "0.1", "data.background=.10"),
        ("--augmentation", "light", "data.augmentation='light'"),
        ("--checkpoint", "a b.pth", "train.init_checkpoint=ab.pth"),
    ):
        same = train(folder, tmp_path / "run", flag, value, "--dry-run", override) == 0
        assert same == (flag != "--checkpoint"), flag
    assert "train.init_checkpoint is named twice: a b.pth and ab.pth" in capsys.readouterr().err
    assert train(folder, f"{tmp_path}/run/", f"train.output_dir={tmp_path}/run", "--dry-run") == 0


def test_mistakes_are_told(folder, tmp_path, capsys):
    assert main(["train", str(folder), "--epochs", "-1", "--output-dir", str(tmp_path)]) == 2
    assert "--epochs must be a finite number of more than 0, got -1" in capsys.readouterr().err
    assert train(folder, tmp_path, "--dry-run", "model.nonsense=1") == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(folder, tmp_path, "--nonsense")


@pytest.mark.parametrize("name", ["cells (1)", "zélles", "a,b", "it's", "2024"])
def test_a_folder_may_be_called_anything(folder, tmp_path, name, capsys):
    shutil.copytree(folder, tmp_path / name)
    assert train(tmp_path / name, tmp_path / f"out {name}", "--dry-run") == 0
    shown = capsys.readouterr().out.split("go on from:")[1].replace("\\\n", " ")
    arguments = [part for part in shlex.split(shown) if part.startswith(("data.", "train.o"))]
    data = load_config("configs/custom_data.py", arguments)
    assert data.data.name == name
    assert data.train.output_dir == str(tmp_path / f"out {name}")


def test_a_run_is_not_overwritten_but_can_be_resumed(folder, trained, capfd):
    before = (trained / "model_final.pth").read_bytes()
    assert train(folder, trained, "--epochs", 1) == 2
    assert "holds a run already" in capfd.readouterr().err
    assert (trained / "model_final.pth").read_bytes() == before
    assert train(folder, trained, "--epochs", 1, "--resume") == 0
    assert "Nothing to train" in capfd.readouterr().out


def test_classes_of_another_name_start_anew_even_if_their_number_is_the_same(
    folder, trained, tmp_path, capfd
):
    own = with_classes(folder, tmp_path / "own", "- star")
    arguments = ("--epochs", 0.01, "--checkpoint", trained / "model_final.pth")
    assert train(own, tmp_path / "out", *arguments) == 0
    assert "starts anew (8 tensors)" in capfd.readouterr().out


def test_splits_with_other_classes_are_refused(small_run, tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    for name in ("train", "val"):
        shutil.copytree(small_run / "shapes" / name, tmp_path / name)
        content = json.loads((small_run / f"shapes/{name}.json").read_text())
        content["categories"][0]["name"] = name
        (tmp_path / f"annotations/{name}.json").write_text(json.dumps(content))
    assert train(tmp_path, tmp_path / "out", "--dry-run") == 2
    assert "train has the classes ['train'," in capsys.readouterr().err


def test_a_signal_to_the_command_saves_and_leaves_and_the_run_can_go_on(small_run, tmp_path):
    arguments = [sys.executable, "-m", "stage_interactor.commands", "quickstart",
                 f"train.output_dir={tmp_path}", f"shapes.root={small_run}/shapes",
                 "shapes.num_train=16", "shapes.num_val=6", "shapes.image_size=64",
                 "train.amp.enabled=false", "dataloader.train.total_batch_size=4",
                 "model.queries.num_queries=8", "train.log_period=1"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "projects"), "OMP_NUM_THREADS": "1"}
    options = dict(env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen([*arguments, "train.max_iter=100000"], **options)
    metrics = tmp_path / "metrics.json"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "--resume goes on from there" in told and "Traceback" not in told
    reached = int((tmp_path / "last_checkpoint").read_text()[len("model_") : -len(".pth")]) + 1
    more = [f"train.max_iter={reached + 2}", "--resume"]
    done = subprocess.run([*arguments, *more], **options)
    assert done.returncode == 0, done.stdout
    assert f"Starting training from iteration {reached}" in done.stdout
