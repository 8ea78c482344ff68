"""What a checkpoint holds, what the best weights are, and what a failed iteration leaves behind."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from checks.small import random_image, tiny_model
from fvcore.common.param_scheduler import LinearParamScheduler

import stage_interactor
from stage_interactor.d2.events import EventStorage, get_event_storage
from stage_interactor.engine import (
    Checkpointer,
    CheckpointError,
    LearningRate,
    Milestones,
    ModelEma,
    NonFiniteError,
    RunState,
    Trainer,
    process,
)
from stage_interactor.engine.early_stopping import EarlyStopping, sign_of
from stage_interactor.engine.evaluation import numbers
from stage_interactor.engine.writers import MetricsWriter

CONFIG = "tests/tiny_config.py"


class Killed(BaseException):
    """Ends a run as a kill would: nothing is saved after it."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture
def train(shapes, tmp_path):
    """A run of the tiny config in a folder; overrides as text."""

    def start(*overrides, folder="run", **options):
        fixed = [f"shapes.root={shapes}", "train.amp.enabled=false", *overrides]
        return stage_interactor.train(CONFIG, fixed, output_dir=tmp_path / folder, **options)

    return start


@pytest.fixture
def plan(monkeypatch):
    """A table of APs, by iterations done, in place of evaluating; gives what was evaluated."""
    table, seen = {}, []

    def evaluate(cfg, model, draw=False, iteration=None):
        done = get_event_storage().iter + 1
        assert iteration == done - 1
        seen.append(done)
        value = table[done]
        if isinstance(value, BaseException):
            raise value
        return {"bbox": {"AP": value}}

    monkeypatch.setattr(process, "do_test", evaluate)
    return table, seen


def log_of(tmp_path):
    return (tmp_path / "run" / "log.txt").read_text()


def load(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def best_of(folder):
    content = load(folder, "model_best")
    assert content["iteration"] == content["run"]["best"]["iteration"]
    return content["run"]["best"]["value"], content["iteration"] + 1


EVERY_4 = ("train.eval_period=4", "train.checkpointer.period=4")


def test_a_checkpoint_knows_the_evaluation_of_its_iteration(train, plan, tmp_path):
    plan[0].update({4: 50.0, 8: 10.0, 12: 20.0})
    train(*EVERY_4)
    for name in ("model_0000003", "model_0000007", "model_0000011", "model_final"):
        run = load(tmp_path / "run", name)["run"]
        assert run["best"] == {"value": 50.0, "iteration": 3, "metric": "bbox/AP"}, name
        assert not run["pending"]
    assert best_of(tmp_path / "run") == (50.0, 4)


@pytest.mark.parametrize("killed", [4, 8, 12])
def test_a_run_killed_while_it_evaluates_goes_on_with_the_evaluation(killed, train, plan, tmp_path):
    table, seen = plan
    table.update({4: 50.0, 8: 10.0, 12: 20.0})
    table[killed] = Killed()
    with pytest.raises(Killed):
        train(*EVERY_4)
    table[killed] = 30.0
    train(*EVERY_4, resume=True)
    assert seen == [4, 8, 12][: killed // 4] + [4, 8, 12][killed // 4 - 1 :]
    assert best_of(tmp_path / "run") == ((30.0, 4) if killed == 4 else (50.0, 4))
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.json")]
    assert [line["iteration"] for line in lines] == list(range(12))
    aps = {line["iteration"] + 1: line["bbox/AP"] for line in lines if "bbox/AP" in line}
    assert aps == {4: 50.0, 8: 10.0, 12: 20.0} | {killed: 30.0}
    assert all("total_loss" in line for line in lines)


@pytest.mark.parametrize("value, kept", [(20.0, (50.0, 4)), (60.0, (60.0, 16))])
def test_the_best_of_a_finished_run_is_kept_when_it_goes_on(value, kept, train, plan, tmp_path):
    plan[0].update({4: 50.0, 8: 10.0, 12: 20.0, 16: value})
    train(*EVERY_4)
    train(*EVERY_4, "train.max_iter=16", resume=True)
    assert best_of(tmp_path / "run") == kept


def test_the_best_is_kept_when_an_older_checkpoint_is_resumed(train, plan, tmp_path):
    plan[0].update({4: 10.0, 8: 50.0, 12: 20.0})
    train(*EVERY_4)
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    plan[0].update({8: 40.0, 12: 45.0})
    train(*EVERY_4, resume=True)
    assert best_of(tmp_path / "run") == (50.0, 8)


def test_what_is_best_is_what_the_metric_and_its_mode_say(train, plan, tmp_path):
    plan[0].update({4: math.nan, 8: 10.0, 12: 20.0})
    train(*EVERY_4)
    assert best_of(tmp_path / "run") == (20.0, 12)
    with pytest.raises(ValueError, match="train.best_checkpointer.mode must be .* got 'best'"):
        train("train.best_checkpointer.mode=best", folder="other")
    names = ("bbox/AP", "bbox/AP-loss", "validation/total_loss", "mine/loss_class")
    assert [sign_of(name) for name in names] == [1, 1, -1, -1]
    assert [sign_of("speed", mode) for mode in (None, "max", "min")] == [1, 1, -1]


def test_early_stopping_says_what_counted():
    stopping = EarlyStopping(2, "bbox/AP", min_delta=30)
    waiting = None
    for value in (40.0, 60.0, 65.0):
        assert not stopping.ends(waiting)
        waiting = stopping.after(waiting, {"bbox/AP": value})
    told = "bbox/AP has not become better than 40.00000 by more than 30 in 2 evaluations ("
    assert stopping.ends(waiting) and stopping.told(waiting).startswith(told)
    assert stopping.told(waiting).endswith("min_delta=30)")
    waiting = stopping.after(None, {"bbox/AP": math.nan})
    assert "has had no finite value" in stopping.told(waiting)
    falling = EarlyStopping(1, "validation/total_loss")
    assert not falling.ends(
        falling.after(falling.after(None, {falling.metric: 3.0}), {falling.metric: 2.0})
    )


STOPS = ("train.eval_period=2", "train.checkpointer.period=3", "train.early_stopping.patience=2")


def iterations_of(tmp_path):
    return [json.loads(line)["iteration"] for line in open(tmp_path / "run" / "metrics.json")]


def test_a_run_that_does_not_become_better_ends_early(train, plan, tmp_path, monkeypatch):
    table, seen = plan
    table.update({2: 50.0, 4: 40.0, 6: 50.0})
    run = train(*STOPS)
    assert seen == [2, 4, 6] and iterations_of(tmp_path) == list(range(6))
    assert load(tmp_path / "run")["iteration"] == 5 and best_of(tmp_path / "run") == (50.0, 2)
    assert (
        run.checkpoint and (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    )
    told = "bbox/AP has not become better than 50.00000 in 2 evaluations"
    assert f"The run ends here: {told}" in log_of(tmp_path)

    seen.clear()
    table[6] = 45.0
    with monkeypatch.context() as patched:
        patched.setattr(process, "do_test", lambda cfg, model, draw: seen.append(draw))
        train(*STOPS, resume=True)
    assert f"The run has ended early: {told}" in log_of(tmp_path) and seen == [True]
    assert iterations_of(tmp_path) == list(range(6))

    table.update({8: 30.0, 10: 60.0, 12: 20.0})
    train(*STOPS, "train.early_stopping.patience=4", resume=True)
    assert iterations_of(tmp_path) == list(range(12)) and best_of(tmp_path / "run") == (60.0, 10)


@pytest.mark.parametrize(
    "settings, values, ends",
    [
        (("min_delta=5",), [10, 14, 15, 16], 6),  # better than the value that counts, not enough
        (("min_delta=5",), [10, 14, 16, 20, 21], 10),
        ((), [math.nan, math.nan, 3], 4),  # of data without an object
        (("patience=1",), [1, 2, 2], 6),
        (("patience=null",), [3, 2, 1, 0, 0, 0], 12),
        ((), [3, 2, 4, 3, 5, 1], 12),
    ],
)
def test_what_counts_as_better(settings, values, ends, train, plan, tmp_path):
    plan[0].update({2 * i: value for i, value in enumerate(values, 1)})
    train(*STOPS, *(f"train.early_stopping.{setting}" for setting in settings))
    assert plan[1][-1] == ends and load(tmp_path / "run")["iteration"] == ends - 1


@pytest.mark.parametrize("at", [4, 6])
def test_a_run_killed_before_it_ended_early_ends_where_it_would_have(at, train, plan, tmp_path):
    table, seen = plan
    table.update({2: 50.0, 4: 40.0, 6: 50.0})
    kept, table[at] = table[at], Killed()
    with pytest.raises(Killed):
        train(*STOPS)
    table[at] = kept
    train(*STOPS, resume=True)
    assert iterations_of(tmp_path) == list(range(6)) and load(tmp_path / "run")["iteration"] == 5

    seen.clear()  # killed when all but its last file was written
    os.remove(tmp_path / "run" / "model_final.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000005.pth")
    train(*STOPS, resume=True)
    assert iterations_of(tmp_path) == list(range(6)) and load(tmp_path / "run")["iteration"] == 5
    assert not seen


def test_several_processes_end_early_together(train, tmp_path):
    settings = "train.early_stopping.min_delta=100", "train.early_stopping.patience=1"
    train("train.eval_period=2", *settings, num_gpus=2)
    assert iterations_of(tmp_path) == list(range(4))
    assert load(tmp_path / "run")["iteration"] == 3 and (tmp_path / "run/detections.jpg").exists()


@pytest.mark.parametrize(
    "setting, told",
    [
        (
            "patience=0",
            "train.early_stopping.patience must be a whole number of 1 or more, or null",
        ),
        ("min_delta=-1", "train.early_stopping.min_delta must be a finite number, at least 0"),
        ("+wait=3", "train.early_stopping has no key wait"),
        ("metric=bbox/ap", "train.early_stopping.metric=bbox/ap: the evaluator has .*bbox/AP50"),
    ],
)
def test_early_stopping_that_cannot_be_meant(setting, told, train):
    key = f"+train.early_stopping.{setting[1:]}" if setting[0] == "+" else None
    with pytest.raises(ValueError, match=told):
        train(*STOPS, key or f"train.early_stopping.{setting}")


def test_a_run_that_fails_in_its_last_iteration_is_not_evaluated(
    train, plan, tmp_path, monkeypatch
):
    step = Trainer._step_optimizer

    def fail(self, losses, total, images):
        return step(self, losses, total * math.nan if self.iter == 11 else total, images)

    monkeypatch.setattr(Trainer, "_step_optimizer", fail)
    plan[0].update({4: 50.0, 8: 10.0, 12: 99.0})
    with pytest.raises(NonFiniteError, match=r"iteration 11: .*\n.*is saved as .*model_0000010"):
        train(*EVERY_4)
    assert plan[1] == [4, 8] and best_of(tmp_path / "run") == (50.0, 4)
    assert not (tmp_path / "run" / "model_final.pth").exists()
    monkeypatch.undo()
    assert load(tmp_path / "run", "model_0000010")["iteration"] == 10


def test_averages_that_begin_with_a_resumed_run_begin_with_its_weights(train, tmp_path):
    off, on = ("train.model_ema.enabled=false",), ("train.model_ema.decay=0.9998",)
    rate = "optimizer.lr=0.01"
    train(*off, rate, "train.max_iter=40", "train.log_period=40")
    weights = load(tmp_path / "run")["model"]
    train(*on, rate, "train.max_iter=42", resume=True)
    averages = load(tmp_path / "run")["ema"]
    start = tiny_weights(train, tmp_path)
    for key, value in weights.items():
        moved = (value - start[key]).norm()
        if value.is_floating_point() and moved > 0.01:
            assert (averages[f"module.{key}"] - value).norm() < 0.2 * moved, key


def tiny_weights(train, tmp_path):
    """The weights that the tiny config starts from."""
    train("optimizer.lr=0.0", "train.max_iter=1", folder="start")
    return load(tmp_path / "start")["model"]


def test_averages_end_with_a_word(train, tmp_path):
    train("train.max_iter=2")
    train("train.max_iter=4", "train.model_ema.enabled=false", resume=True)
    assert "The averages of the checkpoint end here" in log_of(tmp_path)
    assert "ema" not in load(tmp_path / "run")


def test_what_the_user_says_of_the_optimizer_holds_for_a_resumed_run(train, tmp_path):
    changed = ("optimizer.lr=1e-6", "optimizer.weight_decay=0.5", "optimizer.betas=[0.8,0.9]")
    warm_up = "lr_multiplier.warmup_iters=1"
    train("train.max_iter=4", warm_up)
    train("train.max_iter=8", warm_up, *changed, resume=True)
    rates = {
        line["iteration"]: line["lr"]
        for line in map(json.loads, open(tmp_path / "run" / "metrics.json"))
    }
    assert max(rates[iteration] for iteration in range(4, 8)) <= 1e-6 < rates[1]
    (group, *_) = load(tmp_path / "run")["trainer"]["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5 and list(group["betas"]) == [0.8, 0.9]
    assert "changed on resume: optimizer.lr, 0.0005, 1e-06\n" in log_of(tmp_path)


def test_a_run_resumed_as_it_was_has_no_other_settings(train, tmp_path):
    train("train.max_iter=2", "train.eval_period=1")
    train("train.max_iter=2", "train.eval_period=1", resume=True)
    assert "Nothing to train" in log_of(tmp_path)
    assert "changed on resume" not in log_of(tmp_path)


@pytest.mark.parametrize(
    "override, told",
    [
        ("model.pixel_mean=[1,2,3]", r"model.pixel_mean was .* and now it is \[1, 2, 3\]"),
        ("model.pixel_std=[1.0,2.0,3.0]", "model.pixel_std was"),
        (
            "dataloader.train.mapper.image_format=BGR",
            "dataloader.test.mapper.image_format was RGB, and now it is BGR",
        ),
    ],
)
def test_weights_are_not_trained_on_with_other_images(override, told, train):
    train("train.max_iter=2")
    with pytest.raises(CheckpointError, match=f"--resume: .*model_final.pth .* {told}"):
        train("train.max_iter=4", override, resume=True)


def test_weights_are_not_trained_on_with_other_classes(train, monkeypatch, tmp_path):
    train("train.max_iter=2")
    path = tmp_path / "run" / "model_final.pth"
    content = load(tmp_path / "run")
    categories = content["blueprint"]["categories"]
    categories[0]["name"] = "another"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="class names was .* and now it is"):
        train("train.max_iter=4", resume=True)


def test_what_to_resume_from_must_be_known(train, tmp_path):
    train("train.max_iter=2", resume=True)  # nothing there: a new run, and a line that says so
    assert "There is no checkpoint in" in log_of(tmp_path)
    tag = tmp_path / "run" / "last_checkpoint"
    for text, told in (
        ("model_0000099.pth", "names model_0000099.pth, which is not there"),
        (None, "there is no .*last_checkpoint"),
    ):
        tag.unlink() if text is None else tag.write_text(text)
        train("train.max_iter=2", resume=True)
        assert re.search(f"{told}: going on from .*/model_final.pth", log_of(tmp_path))
        assert "Nothing to train" in log_of(tmp_path)
    for path in (tmp_path / "run").glob("model_*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    tag.write_text("model_final.pth")
    with pytest.raises(CheckpointError, match="names model_final.pth, .*; nor can model_best.pth"):
        train("train.max_iter=4", resume=True)


# One step, without files.


class Normed(torch.nn.Module):
    """A neck with a BatchNorm, whose statistics a failing pass would spoil."""

    def __init__(self, neck):
        super().__init__()
        self.neck = neck
        self.norm = torch.nn.BatchNorm2d(16)

    def forward(self, features):
        return [self.norm(level) for level in self.neck(features)]


def build():
    torch.manual_seed(0)
    model = tiny_model()
    model.neck = Normed(model.neck)
    return model


def trainer_for(model, batches, dtype="float32", **options):
    amp = {"enabled": dtype != "float32", "dtype": dtype if dtype != "float32" else "bfloat16"}
    amp |= {key: options.pop(key) for key in ("max_skipped_steps",) if key in options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Trainer(model, batches, optimizer, amp=amp, **options)


def images():
    return [random_image(count, (64, 64), seed=index) for index, count in enumerate((2, 3, 1, 2))]


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(state, other):
    assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_failed_iteration_leaves_no_trace(dtype, parts, what):
    model, bad = build(), images()
    if what == "loss":  # a picture that overflows: the statistics of its pass are not finite
        bad[2]["image"] = torch.full((3, 64, 64), torch.inf)
    trainer = trainer_for(
        model, iter([images(), bad]), dtype, accumulation_steps=parts, max_skipped_steps=1
    )
    trainer.train(0, 1)
    before, steps = state_of(model), trainer.steps
    scaler = trainer.grad_scaler.state_dict()
    if what == "gradient":
        model.queries.content.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match="iteration 1: .*image2.jpg"):
        trainer.train(1, 2)
    assert_equal(state_of(model), before)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert trainer.steps == steps and trainer.grad_scaler.state_dict() == scaler


def test_a_skipped_step_is_counted_by_nothing():
    model = build()
    trainer = trainer_for(model, [images()] * 6, "float16")
    average = ModelEma(model, 0.9)
    trainer.register_hooks([LearningRate(LinearParamScheduler(1.0, 0.0)), average])
    overflow = {1, 2, 4}
    model.queries.content.register_hook(
        lambda gradient: gradient * (math.inf if trainer.iter in overflow else 1.0)
    )
    seen = []
    after_step = average.after_step

    def watch():
        after_step()
        seen.append((state_of(model), state_of(average.average.module), trainer.steps))

    average.after_step = watch
    trainer.train(0, 6)
    assert [steps for *_, steps in seen] == [1, 1, 1, 2, 2, 3]
    for iteration in overflow:
        assert_equal(seen[iteration][0], seen[iteration - 1][0])
        assert_equal(seen[iteration][1], seen[iteration - 1][1])
    rates = [rate for rate, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.01 * (1 - steps / 6) for steps in (0, 1, 1, 1, 2, 2)])
    norms = [norm for norm, _ in trainer.storage.history("grad_norm").values()]
    assert len(norms) == 3 and all(map(math.isfinite, norms))


def test_steps_that_are_skipped_one_after_the_other_end_the_run():
    model = build()
    model.queries.content.register_hook(lambda gradient: gradient * math.inf)
    trainer = trainer_for(model, [images()] * 50, "float16", max_skipped_steps=5)
    with pytest.raises(
        NonFiniteError, match="in 5 iterations in a row .*max_skipped_steps=5.*4096"
    ):
        trainer.train(0, 50)
    assert trainer.iter == 4 and trainer.steps == 0
    short = trainer_for(model, [images()] * 50, "float16")
    with pytest.raises(NonFiniteError, match="in 3 iterations in a row"):
        short.train(0, 3)  # not a single step: such a run has not finished
    with pytest.raises(ValueError, match="train.amp.max_skipped_steps must be 1 or more, got 0"):
        trainer_for(model, [], "float16", max_skipped_steps=0)


@pytest.mark.parametrize("where", ["weight", "buffer", "average", "optimizer"])
def test_what_is_not_finite_is_not_saved(where, tmp_path):
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = Trainer(model, [images()] * 2, optimizer)
    trainer.train(0, 1)
    average = ModelEma(model, 0.9).average
    tensors = {
        "weight": model.backbone.convs[1].weight.data,
        "buffer": model.neck.norm.running_var,
        "average": average.module.queries.content.data,
        "optimizer": next(iter(optimizer.state.values()))["exp_avg_sq"],
    }
    tensors[where].view(-1)[3] = math.nan if where == "weight" else math.inf
    checkpointer = Checkpointer(model, str(tmp_path), trainer=trainer, ema=average)
    names = {
        "weight": "model.backbone.convs.1.weight",
        "buffer": "model.neck.norm.running_var",
        "average": "ema.module.queries.content",
        "optimizer": "trainer.optimizer.state.0.exp_avg_sq",
    }
    with pytest.raises(NonFiniteError, match=f"not be finite: {names[where]}"):
        checkpointer.save("model_0000000")
    assert not os.listdir(tmp_path)


def test_milestones_tell_which_metrics_there_are(tmp_path, caplog):
    model = build()
    trainer = trainer_for(model, [images()] * 2)
    state = RunState()
    milestones = Milestones(
        state,
        Checkpointer(model, str(tmp_path), trainer=trainer, run=state),
        lambda last: {"bbox": {"AP50": 1.0}, "speed": 2},
        lambda: None,
        [model],
        eval_period=1,
        period=0,
        log_period=1,
    )
    trainer.register_hooks([milestones])
    trainer.train(0, 2)
    assert "no metric bbox/AP to choose the best weights by" in caplog.text
    assert "['bbox/AP50', 'speed']" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


def test_metrics_of_iterations_that_come_again_are_taken_out(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "x": 1.0}\n{"iteration": 3, "x": 3.0}\n{"iteration": 4, "x"')
    writer = MetricsWriter(str(path), 3)
    with EventStorage(3) as storage:
        storage.put_scalars(x=5.0, y=math.nan, smoothing_hint=False)
        writer.write()
        writer.write()
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 1, "x": 1.0}, {"iteration": 3, "x": 5.0, "y": None}]


def test_another_run_in_the_folder_is_set_aside(train, plan, tmp_path):
    plan[0].update({2: 90.0, 4: 80.0})
    train("train.max_iter=4", "train.eval_period=2", "train.checkpointer.period=2")
    old = load(tmp_path / "run")["model"]
    # A new run that is killed before it saves anything, and then resumed, is the new run.
    plan[0].update({2: Killed()})
    with pytest.raises(Killed):
        train("train.max_iter=4", "train.eval_period=2", "train.seed=5")
    plan[0].update({2: 10.0, 4: 20.0})
    train("train.max_iter=4", "train.eval_period=2", "train.seed=5", resume=True)
    assert "holds a training already" in log_of(tmp_path)
    assert best_of(tmp_path / "run") == (20.0, 4)
    train("train.max_iter=4", "train.eval_period=2", "train.seed=5", folder="other")
    ours, new = load(tmp_path / "run")["model"], load(tmp_path / "other")["model"]
    assert all(torch.equal(ours[key], new[key]) for key in new)
    assert not all(torch.equal(old[key], new[key]) for key in new)
    # Nothing is lost, and a third one finds another place.
    aside = tmp_path / "run" / "earlier_run_1"
    assert best_of(aside) == (90.0, 2) and (aside / "last_checkpoint").exists()
    lines = [json.loads(line)["iteration"] for line in open(aside / "metrics.json")]
    assert lines == [0, 1, 2, 3]
    train("train.max_iter=2")
    assert best_of(tmp_path / "run" / "earlier_run_2") == (20.0, 4)


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_its_best(train, plan, tmp_path):
    settings = ("train.max_iter=6", "train.eval_period=2", "train.checkpointer.period=100")
    plan[0].update({2: 50.0, 4: Killed()})
    with pytest.raises(Killed):
        train(*settings)
    assert not (tmp_path / "run" / "last_checkpoint").exists()
    plan[0].update({4: 40.0, 6: 30.0})
    train(*settings, resume=True)
    assert plan[1] == [2, 4, 4, 6] and best_of(tmp_path / "run") == (50.0, 2)
    train(*settings, folder="whole")
    assert_equal(load(tmp_path / "run")["model"], load(tmp_path / "whole")["model"])


def test_a_run_that_ends_earlier_than_it_was_meant_to_is_evaluated(train, plan, tmp_path):
    plan[0].update({8: 70.0, 12: 80.0})
    train("train.max_iter=12", "train.eval_period=0", "train.checkpointer.period=4")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000007.pth")
    train("train.max_iter=8", "train.eval_period=0", "train.checkpointer.period=4", resume=True)
    assert plan[1] == [12, 8] and load(tmp_path / "run")["iteration"] == 7


@pytest.mark.parametrize(
    "override, told",
    [
        ("train.checkpointer.max_to_keep=0", "max_to_keep must be a whole number of 1 or more"),
        ("train.log_period=-1", "train.log_period must be .* got -1"),
        ("train.best_checkpointer.val_metric=bbox/AR", "val_metric=bbox/AR: the evaluator has"),
        ("train.best_checkpointer.mode=min", "best_checkpointer.mode=min: of bbox/AP larger"),
    ],
)
def test_settings_that_cannot_be_meant_end_a_run_before_it_begins(override, told, train, tmp_path):
    with pytest.raises(ValueError, match=told):
        train(override)
    assert not list((tmp_path / "run").glob("model_*"))


def test_an_evaluator_gives_numbers_or_an_error_that_names_what_is_none():
    given = {"bbox": {"AP": np.float32(2.0)}, "speed": 3}
    assert numbers(given) == {"bbox": {"AP": 2.0}, "speed": 3.0}
    for wrong, name in (({"a": {"b": "high"}}, "a/b='high'"), ({"a": None}, "a=None")):
        with pytest.raises(ValueError, match=f"the evaluator gave {name}, which is no number"):
            numbers(wrong)
    with pytest.raises(ValueError, match="a/b={'c': 1}"):
        numbers({"a": {"b": {"c": 1}}})
