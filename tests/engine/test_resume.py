"""A run that was interrupted, at any moment, goes on as if it had not been."""

import json
import os
import signal
import time

import pytest
import torch

CONFIG = ("--config-file", "tests/tiny_config.py")


def overrides(output, shapes):
    return (f"train.output_dir={output}", f"shapes.root={shapes}")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture(scope="module")
def whole_run(train_net, shapes, tmp_path_factory):
    """A run of 12 iterations without interruption."""
    output = tmp_path_factory.mktemp("whole")
    process = train_net(*CONFIG, *overrides(output, shapes))
    assert process.returncode == 0, process.output
    return output


def final_model(output):
    return torch.load(output / "model_final.pth", weights_only=True)


def assert_same_end(output, whole_run):
    ours, theirs = final_model(output), final_model(whole_run)
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for key, value in theirs[part].items():
            assert torch.equal(ours[part][key], value), f"{part}: {key}"
    assert ours["trainer"]["iteration"] == theirs["trainer"]["iteration"]


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("moment", ["after_a_checkpoint", "while_a_checkpoint_is_written"])
def test_a_killed_run_resumes_from_the_last_whole_checkpoint(
    moment, train_net, shapes, whole_run, tmp_path
):
    env = {}
    if moment == "while_a_checkpoint_is_written":
        # Half of the second checkpoint reaches the disk, and then the process waits to be killed.
        (tmp_path / "sitecustomize.py").write_text(
            "import os, time, torch\n"
            "save, calls = torch.save, []\n"
            "def slow_save(data, file):\n"
            "    calls.append(1)\n"
            "    if len(calls) < 2: return save(data, file)\n"
            "    import io\n"
            "    whole = io.BytesIO(); save(data, whole)\n"
            "    file.write(whole.getvalue()[: len(whole.getvalue()) // 2]); file.flush()\n"
            "    open(os.environ['HALF_WRITTEN'], 'w').close()\n"
            "    time.sleep(600)\n"
            "torch.save = slow_save\n"
        )
        env = {"PYTHONPATH": str(tmp_path), "HALF_WRITTEN": str(tmp_path / "half")}
        reached = (tmp_path / "half").exists
    else:
        reached = (tmp_path / "out" / "last_checkpoint").exists
    arguments = (*CONFIG, *overrides(tmp_path / "out", shapes))
    process = train_net(*arguments, wait=False, env=env)
    wait_for(reached, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model_final.pth").exists()
    for checkpoint in (tmp_path / "out").glob("*.pth"):  # what has the name is whole
        torch.load(checkpoint, weights_only=True)
    resumed = train_net("--resume", *arguments)
    assert resumed.returncode == 0, resumed.output
    assert_same_end(tmp_path / "out", whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_run_can_go_on(
    number, train_net, shapes, whole_run, tmp_path
):
    arguments = (*CONFIG, *overrides(tmp_path, shapes))
    process = train_net(*arguments, wait=False)
    metrics = tmp_path / "metrics.json"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert "--resume goes on from there" in output and "Traceback" not in output
    stopped_at = torch.load(
        tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True
    )
    assert stopped_at["iteration"] < 11
    resumed = train_net("--resume", *arguments)
    assert resumed.returncode == 0, resumed.output
    assert f"Starting training from iteration {stopped_at['iteration'] + 1}" in resumed.output
    assert_same_end(tmp_path, whole_run)


@pytest.mark.parametrize(
    "settings",
    [("dataloader.train.num_workers=2", "dataloader.test.num_workers=1"), ("--num-gpus", "2")],
    ids=["workers", "processes"],
)
def test_a_signal_to_the_whole_process_group_saves_too(settings, train_net, shapes, tmp_path):
    flags = [s for s in settings if not s.startswith("dataloader")]
    rest = [s for s in settings if s.startswith("dataloader")]
    arguments = (*flags, *CONFIG, *overrides(tmp_path, shapes), *rest, "train.max_iter=4000")
    process = train_net(*arguments, wait=False)
    metrics = tmp_path / "metrics.json"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "--resume goes on from there" in output, output
    stopped_at = torch.load(
        tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True
    )
    assert f"after iteration {stopped_at['iteration']};" in output
    assert not list(tmp_path.glob("*.tmp"))


def test_workers_do_not_change_the_run(train_net, shapes, whole_run, tmp_path):
    process = train_net(*CONFIG, *overrides(tmp_path, shapes), "dataloader.train.num_workers=2")
    assert process.returncode == 0, process.output
    assert_same_end(tmp_path, whole_run)


def test_resuming_a_finished_run_evaluates_it(train_net, shapes, whole_run):
    process = train_net("--resume", *CONFIG, *overrides(whole_run, shapes))
    assert process.returncode == 0, process.output
    assert "Nothing to train" in process.output and "AP50" in process.output


def test_the_run_leaves_what_detectron2_users_look_for(whole_run):
    for name in (
        "config.yaml",
        "config_resolved.yaml",
        "metrics.json",
        "last_checkpoint",
        "log.txt",
        "coco_instances_results.json",
        "detections.jpg",
        "model_best.pth",
    ):
        assert (whole_run / name).exists(), name
    assert (whole_run / "last_checkpoint").read_text() == "model_final.pth"
    assert list(whole_run.glob("events.out.tfevents.*"))
    keys = set().union(*(json.loads(line) for line in open(whole_run / "metrics.json")))
    assert keys >= {
        "iteration", "total_loss", "loss_class", "loss_bbox", "loss_giou", "lr", "time",
        "data_time", "eta_seconds", "images_per_second", "bbox/AP", "bbox/AP50", "bbox/AP-ring",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["config.yaml", "config_resolved.yaml"])
def test_the_saved_config_runs_again_and_gives_the_same_figures(
    name, train_net, shapes, whole_run, tmp_path
):
    process = train_net(
        "--eval-only",
        "--config-file",
        whole_run / name,
        f"train.output_dir={tmp_path}",
        f"dataloader.evaluator.output_dir={tmp_path}",
        f"train.init_checkpoint={whole_run}/model_final.pth",
        env={"PYTHONPATH": "tools"},  # the tiny backbone lives there
    )
    assert process.returncode == 0, process.output
    results = "coco_instances_results.json"
    assert json.loads((tmp_path / results).read_text()) == json.loads(
        (whole_run / results).read_text()
    )


def test_only_the_last_checkpoints_are_kept_also_after_resuming(train_net, shapes, tmp_path):
    arguments = (*CONFIG, *overrides(tmp_path, shapes), "train.checkpointer.max_to_keep=2")
    arguments += ("train.checkpointer.period=2",)
    assert train_net(*arguments, "train.max_iter=6").returncode == 0
    kept = sorted(path.name for path in tmp_path.glob("model_0*.pth"))
    assert kept == ["model_0000003.pth", "model_0000005.pth"]
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    assert train_net("--resume", *arguments, "train.max_iter=10").returncode == 0
    kept = sorted(path.name for path in tmp_path.glob("model_0*.pth"))
    assert kept == ["model_0000007.pth", "model_0000009.pth"]
