"""A run goes on from what is whole, with what its user says now, or says why it cannot."""

import copy
import dataclasses
import itertools
import json
import logging
import os
import random
import re

import pytest
import torch
from checks.small import random_image, tiny_model
from omegaconf import OmegaConf

from stage_interactor.config import flatten, load_config
from stage_interactor.data import Part, StreamSampler
from stage_interactor.engine import CheckpointError, NonFiniteError, Trainer
from stage_interactor.engine.milestones import Best
from stage_interactor.engine.resume import (
    Previous,
    check_resumable,
    check_weights_fit,
    checkpoint_to_resume,
    goes_on,
)
from stage_interactor.engine.training import train
from stage_interactor.inference.blueprint import Blueprint
from stage_interactor.inference.weights import read_checkpoint

TINY = "tests/tiny_config.py"
SHORT = ("train.max_iter=8", "train.checkpointer.period=2", "lr_multiplier.warmup_iters=1",
         "train.amp.enabled=false")  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(TINY, [f"shapes.root={images}", *SHORT], output_dir=output)
    return output


def log_of(folder):
    return (folder / "log.txt").read_text()


# Files


def remove(path, rng):
    path.unlink()


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def spoil(path, rng):
    path.write_bytes(rng.randbytes(1000) + path.read_bytes()[1000:])


def keep_weights_alone(path, rng):
    torch.save({"model": read_checkpoint(str(path))["model"]}, path)


DAMAGES = (remove, cut, spoil, keep_weights_alone)
TAGS = (b"", b"\xff\x00\x80", b"../whole/model_final.pth", b"/etc/passwd", b".", b"model_9.pth",
        b"a\nb", None)  # fmt: skip


def copy_of(run, folder):
    """What a killed run has: its checkpoints up to the sixth iteration."""
    folder.mkdir()
    for name in ("model_0000001.pth", "model_0000003.pth", "model_0000005.pth", "metrics.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "last_checkpoint").write_text("model_0000005.pth")


def assert_same_end(folder, whole):
    ours, theirs = (read_checkpoint(str(of / "model_final.pth")) for of in (folder, whole))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    lines = [json.loads(line) for line in open(folder / "metrics.json")]
    assert [line["iteration"] for line in lines] == list(range(8))


@pytest.mark.cases(2)
def test_the_newest_whole_checkpoint_is_gone_on_from(rng, cases, whole, images, tmp_path):
    for case in range(cases):
        folder = tmp_path / str(case)
        copy_of(whole, folder)
        damage, tag = rng.choice((*DAMAGES, None)), rng.choice(TAGS)
        expected = "model_0000005.pth"
        if damage:
            damage(folder / expected, rng)
            expected = "model_0000003.pth"
        else:
            (folder / "last_checkpoint").unlink()
            if tag is not None:
                (folder / "last_checkpoint").write_bytes(tag)
        train(TINY, [f"shapes.root={images}", *SHORT], output_dir=folder, resume=True)
        told = re.search(r"WARNING: (.*): going on from .*/(model_\d+.pth)", log_of(folder))
        assert told and told[2] == expected, (damage, tag)
        assert "last_checkpoint" in told[1] and (not damage or "model_0000005.pth" in told[1])
        assert_same_end(folder, whole)


def test_what_can_be_resumed_from_nowhere_is_an_error(whole, tmp_path):
    assert checkpoint_to_resume(str(tmp_path / "none")) is None
    copy_of(whole, tmp_path / "run")
    for path in (tmp_path / "run").glob("*.pth"):
        cut(path, random.Random(0))
    with pytest.raises(CheckpointError, match="names model_0000005.*nor can model_0000001.pth, mo"):
        checkpoint_to_resume(str(tmp_path / "run"))
    for path in (tmp_path / "run").glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match="names model_0000005.pth, which is not there; there"):
        checkpoint_to_resume(str(tmp_path / "run"))
    (tmp_path / "run" / "last_checkpoint").unlink()
    (tmp_path / "run" / "last_checkpoint").mkdir()
    assert checkpoint_to_resume(str(tmp_path / "run")) is None


def test_best_weights_that_are_damaged_are_chosen_anew(whole, images, tmp_path):
    copy_of(whole, tmp_path / "run")
    (tmp_path / "run" / "model_best.pth").write_bytes(b"x")
    train(TINY, [f"shapes.root={images}", *SHORT], output_dir=tmp_path / "run", resume=True)
    assert "The best weights are chosen anew" in log_of(tmp_path / "run")
    assert read_checkpoint(str(tmp_path / "run" / "model_best.pth"))["iteration"] == 7


def test_a_pipe_in_place_of_a_name_is_not_waited_for(whole, tmp_path, monkeypatch):
    copy_of(whole, tmp_path / "run")
    (tmp_path / "run" / "last_checkpoint").unlink()
    os.mkfifo(tmp_path / "run" / "last_checkpoint")
    os.mkfifo(tmp_path / "run" / "job_id")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert goes_on(None, str(tmp_path / "run"))[0] is False
    assert checkpoint_to_resume(str(tmp_path / "run")).path.endswith("model_0000005.pth")


@pytest.mark.parametrize("where", [(), ("written",), ("scalars",), ("parts",), ("evaluated",)])
@pytest.mark.parametrize(
    "rubbish", ["x", [[1, 2]], [(6, 0, 1, True)], [(6, 4, 10**7, True)], {"lr": (True, [(1, "x")])}]
)
def test_a_checkpoint_whose_run_is_none_is_not_gone_on_from(where, rubbish, whole, tmp_path):
    copy_of(whole, tmp_path / "run")
    path = tmp_path / "run" / "model_0000005.pth"
    content = read_checkpoint(str(path))
    (content if not where else content["run"])[where[0] if where else "run"] = rubbish
    torch.save(content, path)
    assert checkpoint_to_resume(str(tmp_path / "run")).path.endswith("model_0000003.pth")


@pytest.mark.parametrize("key", ["steps", "skipped_in_a_row", "optimizer"])
def test_a_state_that_does_not_fit_is_told(key, whole, images, tmp_path):
    copy_of(whole, tmp_path / "run")
    path = tmp_path / "run" / "model_0000005.pth"
    content = read_checkpoint(str(path))
    content["trainer"][key] = "x"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds no state of a training"):
        train(TINY, [f"shapes.root={images}", *SHORT], output_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize("best", ["x", {"value": "x", "iteration": 1}, {"value": 1.0}, [1]])
def test_a_best_that_says_nothing_of_itself_is_chosen_anew(best, whole, tmp_path, caplog):
    logging.getLogger("stage_interactor").propagate = True
    content = read_checkpoint(str(whole / "model_best.pth"))
    content["run"]["best"] = best
    torch.save(content, tmp_path / "model_best.pth")
    assert Best.in_folder(str(tmp_path)) is None
    assert "chosen anew" in caplog.text


# Settings


def config_of(*overrides):
    config = load_config(TINY, ["model.num_classes=5", *overrides])
    config.model.update(pixel_mean=[1.0, 2.0, 3.0], pixel_std=[1.0, 2.0, 3.0])
    return config


def other(value, rng):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice((1, 2, 5))
    if isinstance(value, str):
        return f"{value}_other"
    return ["other"] if isinstance(value, list) else "other"


def test_every_key_that_changes_is_said_or_refused(rng):
    categories = [{"id": index, "name": str(index)} for index in range(5)]
    theirs = Blueprint.of_run(config_of(), categories)
    content = theirs.as_extra()
    known = [key for key in flatten(theirs.config, ".") if not key.endswith("_target_")]
    silent = set()
    for key in known:
        config = config_of()
        value = OmegaConf.select(config, key)
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        changed = other(plain, rng)
        OmegaConf.update(config, key, changed, merge=False)
        try:
            found = check_resumable(Previous("a.pth", content), config)
        except CheckpointError as error:
            told = str(error)  # of a key that follows this one, if it has the same value
            assert f"{key.rpartition('.')[2]} was " in told and f"it is {changed}" in told, key
            continue
        if key not in [change.key for change in found]:
            silent.add(key)
    # Those of other sections are not kept with a checkpoint; the classes are compared by name.
    assert silent <= {"optimizer.params.model", "model.num_classes", "train.wandb", "train.mlflow"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.queries.num_queries=9", "model.queries.num_queries was 8, and now it is 9"),
        ("model.decoder.num_points=[8,8]", r"num_points was \[8, 8, 8\], and now it is \[8, 8\]"),
        ("model.decoder.num_heads=4", "model.decoder.num_heads was 2, and now it is 4"),
        (
            "train.init_checkpoint=other.pth",
            "train.init_checkpoint was '', and now it is other.pth",
        ),
    ],
)
def test_what_cannot_change_is_an_error_with_both_values(override, told, whole, images, tmp_path):
    copy_of(whole, tmp_path / "run")
    before = sorted(os.listdir(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=told):
        train(
            TINY,
            [f"shapes.root={images}", *SHORT, override],
            output_dir=tmp_path / "run",
            resume=True,
        )
    written = {"config.yaml", "config_resolved.yaml", "log.txt"}
    assert sorted(set(os.listdir(tmp_path / "run")) - written) == before


def test_what_an_older_version_did_not_know_is_said_apart(caplog):
    logging.getLogger("stage_interactor").propagate = True
    theirs = Blueprint.of_run(config_of(), [{"id": 1, "name": "a"}] * 5)
    del theirs.config["train"]["log_period"]
    caplog.set_level("INFO")
    for version, said, count in (("0.0.1", "does not know: train.log_period=1", 0),
                                 (theirs.version, "", 1)):  # fmt: skip
        content = dataclasses.replace(theirs, version=version).as_extra()
        changes = check_resumable(Previous("a.pth", content), config_of())
        assert said in caplog.text and len(changes) == count
    assert str(changes[0]) == "train.log_period, (not given), 1"


def test_weights_of_the_same_shapes_fit_whatever_changed():
    model = tiny_model()
    content = {"model": model.state_dict()}
    check_weights_fit(Previous("a.pth", content), model, [])


def trainer_of(optimizer, **options):
    torch.manual_seed(0)
    model = tiny_model()
    data = [[random_image(2, (64, 64), seed=index) for index in range(2)]] * 20
    return Trainer(model, data, optimizer(model, **options))


def adamw(model, groups=1, **options):
    parameters = list(model.parameters())
    share = len(parameters) // groups
    split = [parameters[i * share : (i + 1) * share] for i in range(groups - 1)]
    split.insert(0, parameters[(groups - 1) * share :])  # another order
    return torch.optim.AdamW([{"params": part} for part in split], **{"lr": 1e-3} | options)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 1e-3} | options)


def resumed(before, after):
    before.train(0, 2)
    after.model.load_state_dict(before.model.state_dict())
    after.load_state_dict(before.state_dict())
    kept = copy.deepcopy([after.optimizer.state.get(p, {}) for p in after.model.parameters()])
    after.train(2, 4)
    assert all(parameter.isfinite().all() for parameter in after.model.parameters())
    return kept


def test_options_of_the_optimizer_are_those_of_now():
    options = dict(lr=1e-5, betas=(0.5, 0.6), weight_decay=0.3, eps=1e-3)
    after = trainer_of(adamw, **options)
    kept = resumed(trainer_of(adamw), after)
    assert all(state["step"] == 2 for state in kept)
    (group,) = after.optimizer.param_groups
    assert {key: group[key] for key in options} == options and group["initial_lr"] == 1e-5


def test_the_state_of_a_weight_goes_with_its_name():
    before, after = trainer_of(adamw), trainer_of(adamw, groups=3)
    before.train(0, 2)
    expected = {
        name: before.optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in before.model.named_parameters()
    }
    after.load_state_dict(before.state_dict())
    for name, parameter in after.model.named_parameters():
        assert torch.equal(after.optimizer.state[parameter]["exp_avg"], expected[name]), name


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [(adamw, sgd, {"momentum": 0.9}), (sgd, adamw, {}), (adamw, adamw, {"amsgrad": True})],
)
def test_another_optimizer_starts_anew_and_says_so(before, after, options, caplog):
    logging.getLogger("stage_interactor").propagate = True
    old = trainer_of(before, **({"momentum": 0.9} if before is sgd else {}))
    kept = resumed(old, trainer_of(after, **options))
    assert not any(kept)
    assert "weights starts anew" in caplog.text and "changed on resume" in caplog.text


def test_a_checkpoint_of_an_earlier_version_is_in_the_order_of_its_groups():
    before, after = trainer_of(adamw), trainer_of(adamw)
    before.train(0, 2)
    state = before.state_dict()
    del state["parameters"]
    after.load_state_dict(state)
    assert all(state["step"] == 2 for state in after.optimizer.state.values())


@pytest.mark.cases(2)
def test_a_run_goes_on_with_what_is_said_now(rng, cases, whole, images, tmp_path):
    changes = [
        "optimizer.lr=1e-6", "optimizer.weight_decay=0.5", "train.max_iter=7", "train.max_iter=10",
        "train.model_ema.decay=0.5", "train.model_ema.enabled=false", "train.amp.enabled=true",
        "train.clip_grad.enabled=false", "train.accumulation_steps=2", "train.seed=3",
        "dataloader.train.total_batch_size=2", "dataloader.train.total_batch_size=6",
        "dataloader.train.mapper.augmentation.0.prob=0.1", "train.eval_period=3",
        "train.checkpointer.period=3", "lr_multiplier.final=0.5", "lr_multiplier.warmup_iters=3",
        "optimizer.params.weight_decay_norm=0.0", "model.criterion.loss_giou_weight=1.0",
        "model.nms_threshold=0.5", "dataloader.train.aspect_ratio_grouping=false",
    ]  # fmt: skip
    for case, change in enumerate(rng.sample(changes, min(cases, len(changes)))):
        folder = tmp_path / str(case)
        copy_of(whole, folder)
        settings = [f"shapes.root={images}", *SHORT, change]
        train(TINY, settings, output_dir=folder, resume=True)
        key, _, value = change.partition("=")
        assert re.search(f"changed on resume: {re.escape(key)}, .*, {_as_python(value)}\n",
                         log_of(folder)), change  # fmt: skip
        content = read_checkpoint(str(folder / "model_final.pth"))
        config = OmegaConf.create(content["blueprint"]["config"])
        assert content["iteration"] + 1 == config.train.max_iter
        for group in content["trainer"]["optimizer"]["param_groups"]:
            assert group["initial_lr"] == config.optimizer.lr
            assert group["weight_decay"] in (config.optimizer.weight_decay, 0.0)


def _as_python(value):
    return {"true": "True", "false": "False"}.get(value, re.escape(str(json.loads(value))))


# Images


def draws_of(records, parts, part, seed):
    """What each process takes in a part of a training that comes after others."""
    return [
        list(
            itertools.islice(
                StreamSampler(
                    records,
                    part.batch_size,
                    aspect_ratio_grouping=part.grouped,
                    seed=seed,
                    rank=rank,
                    world_size=part.world_size,
                    earlier=parts,
                ),
                part.iterations * part.batch_size,
            )
        )
        for rank in range(part.world_size)
    ]


@pytest.mark.cases(60)
def test_no_image_is_lost_or_taken_twice_whatever_batches_become(rng, cases):
    for case in range(cases):
        records = [
            {"width": rng.choice((10, 20)), "height": 15} for _ in range(rng.randrange(1, 30))
        ]
        parts, taken = [], []
        for _ in range(rng.randrange(1, 5)):
            part = Part(
                rng.randrange(12), rng.randrange(1, 5), rng.randrange(1, 4), rng.random() < 0.5
            )
            taken += itertools.chain(*draws_of(records, parts, part, case))
            parts.append(part)
        (rest,) = draws_of(records, parts, Part(60, 1, 1, False), case)
        assert sorted(taken + rest) == list(range(len(taken) + 60)), parts


def test_a_run_with_other_batches_goes_on_with_the_images_that_are_left(
    images, tmp_path, monkeypatch
):
    seen = []
    accumulate = Trainer._accumulate_gradients

    def note(self, data):
        seen.extend(item["file_name"] for item in data)
        return accumulate(self, data)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", note)
    small = [f"shapes.root={images}", "shapes.num_train=24"]
    for number, size in ((2, 4), (3, 6), (8, 2)):  # 24 images
        overrides = [f"train.max_iter={number}", f"dataloader.train.total_batch_size={size}"]
        train(TINY, [*small, *overrides], output_dir=tmp_path / "run", resume=True)
    assert len(seen) == len(set(seen)) == 24
    assert "changed on resume: dataloader.train.total_batch_size, 6, 2" in log_of(tmp_path / "run")


# NaN


def follow_the_advice(overrides, output, told):
    """Fails as it is told, and then goes on to the end as it is advised to."""
    with pytest.raises(NonFiniteError, match=told) as caught:
        train(TINY, overrides, output_dir=output)
    (advice,) = re.findall(r"--resume (\S+=\S+)", str(caught.value))
    train(TINY, [*overrides, advice], output_dir=output, resume=True)
    lines = [json.loads(line) for line in open(output / "metrics.json")]
    assert [line["iteration"] for line in lines] == list(range(8))
    assert max(line["total_loss"] for line in lines) < 100
    return lines


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (("optimizer.lr=1e6",), "starts again"),  # no step was small enough to go on from
        (("optimizer.lr=1e6", "train.checkpointer.period=1"), "starts again"),
        (
            (
                "optimizer.lr=1e6",
                "train.checkpointer.period=1",
                "train.eval_period=1",
                "train.unusable_detections=warning",
            ),
            "starts again",
        ),
        (("optimizer.lr=3", "train.checkpointer.period=1"), "goes on from .*model_0000000.pth"),
    ],
)
def test_the_advice_after_a_rate_that_ruins_the_weights_works(settings, start, images, tmp_path):
    overrides = [f"shapes.root={images}", *SHORT, *settings]
    lines = follow_the_advice(overrides, tmp_path, f"--resume optimizer.lr=0.0001 {start}")
    assert lines[-1]["lr"] <= 1e-4


def test_the_advice_after_a_rate_that_is_too_high_works(images, tmp_path, monkeypatch):
    step = Trainer._step_optimizer

    def diverge(self, losses, total, data):
        high = self.optimizer.param_groups[0]["lr"] > 1e-4
        bad = high and self.iter == 5
        return step(self, losses, total * float("nan") if bad else total, data)

    monkeypatch.setattr(Trainer, "_step_optimizer", diverge)
    overrides = [f"shapes.root={images}", *SHORT, "optimizer.lr=0.002"]
    told = "--resume optimizer.lr=0.0001 goes on from .*model_0000003.pth"
    lines = follow_the_advice(overrides, tmp_path, told)
    assert lines[3]["lr"] > 1e-4 > lines[4]["lr"]


def test_the_advice_after_half_precision_that_overflows_works(images, tmp_path, monkeypatch):
    step = Trainer._step_optimizer

    def overflow(self, losses, total, data):
        factor = float("inf") if self.amp_enabled and self.iter == 5 else 1.0
        return step(self, losses, total * factor, data)

    monkeypatch.setattr(Trainer, "_step_optimizer", overflow)
    overrides = [f"shapes.root={images}", *SHORT, "train.amp.enabled=true"]
    follow_the_advice(overrides, tmp_path, "In float32 the losses of these images are finite")
    assert "Starting training from iteration 5" in log_of(tmp_path)
