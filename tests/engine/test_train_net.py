"""train_net.py as a user runs it."""

import json
import sys

import pytest
import torch

CONFIG = ("--config-file", "tests/tiny_config.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


def overrides(output, shapes, iterations=2):
    return (
        f"train.output_dir={output}",
        f"shapes.root={shapes}",
        f"train.max_iter={iterations}",
    )


@pytest.fixture(scope="module")
def trained(train_net, shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    process = train_net(*CONFIG, *overrides(output, shapes), "train.model_ema.enabled=false")
    assert process.returncode == 0, process.output
    return output


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_a_run_says_what_it_runs_on_and_where_its_results_are(train_net, shapes, tmp_path):
    process = train_net(*CONFIG, *overrides(tmp_path, shapes))
    assert "Runtime: " in process.output
    if not torch.cuda.is_available():
        assert "Running on the CPU" in process.output
    last = process.output[process.output.index("Finished.") :]
    for name in (
        "model_final.pth",
        "metrics.json",
        "detections.jpg",
        "coco_instances_results.json",
    ):
        assert str(tmp_path / name) in last


def test_evaluation_alone_gives_the_detections_of_the_end_of_training(
    train_net, shapes, trained, tmp_path
):
    process = train_net(
        "--eval-only",
        *CONFIG,
        *overrides(tmp_path, shapes),
        f"train.init_checkpoint={trained}/model_final.pth",
    )
    assert process.returncode == 0, process.output
    results = "coco_instances_results.json"
    assert (tmp_path / results).read_text() == (trained / results).read_text()
    assert (tmp_path / "detections.jpg").exists()


def test_evaluation_without_weights_is_an_error(train_net, shapes, tmp_path):
    process = train_net("--eval-only", *CONFIG, *overrides(tmp_path, shapes))
    assert process.returncode != 0
    assert "--eval-only needs the weights: train.init_checkpoint=" in process.output
    assert "Traceback" not in process.output


def test_a_misspelt_override_ends_with_one_line(train_net, shapes, tmp_path):
    process = train_net(*CONFIG, *overrides(tmp_path, shapes), "train.max_itr=3")
    assert process.returncode != 0
    assert "did you mean max_iter" in process.output and "Traceback" not in process.output


def test_a_checkpoint_of_another_model_is_refused(train_net, shapes, trained, tmp_path):
    process = train_net(
        "--eval-only",
        *CONFIG,
        *overrides(tmp_path, shapes),
        f"train.init_checkpoint={trained}/model_final.pth",
        "model.decoder.feedforward_dim=16",
    )
    assert process.returncode != 0
    assert "feedforward.layers.0.weight" in process.output


def test_a_wrong_number_of_classes_is_an_error(train_net, shapes, tmp_path):
    process = train_net(*CONFIG, *overrides(tmp_path, shapes), "model.num_classes=4")
    assert process.returncode != 0
    assert "num_classes" in process.output and "5" in process.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the processes would need GPUs")
@pytest.mark.parametrize("launcher", ["num_gpus", "torchrun"])
def test_two_processes_train_like_one(launcher, train_net, shapes, trained, tmp_path, free_port):
    arguments = (*CONFIG, *overrides(tmp_path, shapes), "train.model_ema.enabled=false")
    if launcher == "num_gpus":
        arguments = ("--num-gpus", "2", "--dist-url", f"tcp://127.0.0.1:{free_port}", *arguments)
        process = train_net(*arguments)
    else:
        run = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}")
        process = train_net(*arguments, launcher=(sys.executable, *run))
    assert process.returncode == 0, process.output
    assert "World size: 2" in process.output or "0 of 2" in process.output
    one, two = (torch.load(path / "model_final.pth")["model"] for path in (trained, tmp_path))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)
    ours, theirs = metrics(tmp_path)[0]["total_loss"], metrics(trained)[0]["total_loss"]
    assert ours == pytest.approx(theirs, rel=0.2)  # each process divides by its mean of objects


def test_a_loss_that_is_not_finite_stops_with_a_checkpoint_to_go_on_from(
    train_net, shapes, tmp_path
):
    process = train_net(*CONFIG, *overrides(tmp_path, shapes, 12), "optimizer.lr=1e9")
    assert process.returncode != 0
    assert "train_net.py: iteration " in process.output and "Traceback" not in process.output
    assert ".jpg" in process.output and "is saved as" in process.output
    name = (tmp_path / "last_checkpoint").read_text()
    state = torch.load(tmp_path / name, weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_mixed_precision_accumulation_and_averaging_work_together(train_net, shapes, tmp_path):
    process = train_net(
        *CONFIG,
        *overrides(tmp_path, shapes),
        "train.amp.enabled=true",
        "train.accumulation_steps=2",
        "train.eval_period=1",
    )
    assert process.returncode == 0, process.output
    assert "ema" in torch.load(tmp_path / "model_final.pth")


def test_fine_tuning_starts_from_the_weights_that_fit(train_net, shapes, trained, tmp_path):
    process = train_net(
        *CONFIG,
        *overrides(tmp_path, shapes),
        f"train.init_checkpoint={trained}/model_final.pth",
        "model.decoder.feedforward_dim=16",
    )
    assert process.returncode == 0, process.output
    assert "feedforward.layers.0.weight" in process.output  # named in a warning


def test_weights_that_cannot_be_had_are_said_in_one_line_and_not_needed_to_evaluate(
    train_net, tmp_path
):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    run = ("--config-file", "configs/stage_interactor_r50_100q_12ep.py")
    output = f"train.output_dir={tmp_path / 'out'}"
    process = train_net(*run, output, env=offline)
    assert process.returncode == 1 and "Traceback" not in process.output
    last = process.output.strip().splitlines()[-1]
    assert "pretrained weights of 'resnet50.tv_in1k' could not be loaded" in last
    assert "model.backbone.pretrained=False" in last
    process = train_net("--eval-only", *run, output, "train.init_checkpoint=none.pth", env=offline)
    assert process.returncode and "could not be loaded" not in process.output
    assert "none.pth" in process.output
