"""Training loop, hooks, writers, checkpoints, schedules, on whichever runtime is there."""

import argparse
import logging

import numpy as np
import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import OmegaConf
from torch import nn

from stage_interactor.d2 import RUNTIME, comm
from stage_interactor.d2.checkpoint import DetectionCheckpointer
from stage_interactor.d2.config import LazyConfig
from stage_interactor.d2.data import build_detection_train_loader
from stage_interactor.d2.engine import (
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    hooks,
)
from stage_interactor.d2.events import (
    EventStorage,
    get_event_storage,
)
from stage_interactor.d2.logger import setup_logger
from stage_interactor.d2.solver import WarmupParamScheduler, get_default_optimizer_params
from stage_interactor.engine.launch import launch


class Model(nn.Module):
    """Two losses that are easy to follow."""

    def __init__(self, bad_from=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.norm = nn.LayerNorm(2)
        self.calls, self.bad_from = 0, bad_from

    def forward(self, batch):
        self.calls += 1
        factor = float("nan") if self.bad_from and self.calls >= self.bad_from else 1.0
        loss = (self.weight**2).sum() * factor
        return {"loss_box": loss, "loss_class": self.norm(self.weight).sum() * 0 + batch}


def make_trainer(model=None):
    model = Model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return SimpleTrainer(model, iter([torch.tensor(1.0)] * 100), optimizer)


def schedule():
    steps = MultiStepParamScheduler([1.0, 0.1], milestones=[6], num_updates=10)
    return WarmupParamScheduler(steps, warmup_factor=0.1, warmup_length=0.2)


def test_hooks_are_called_in_order():
    calls = []

    class Recorder(HookBase):
        def __getattribute__(self, name):
            if name.startswith(("before_", "after_")):
                calls.append(name)
            return super().__getattribute__(name)

    trainer = make_trainer()
    trainer.register_hooks([Recorder(), None])
    calls.clear()
    trainer.train(3, 5)
    step = ["before_step", "after_backward", "after_step"]
    assert calls == ["before_train", *step, *step, "after_train"]
    assert trainer.iter == 5 and trainer.start_iter == 3


def test_a_training_step_is_one_step_of_gradient_descent():
    trainer = make_trainer()
    trainer.train(0, 1)
    assert trainer.model.weight.tolist() == pytest.approx([2.0 * 0.8, -1.0 * 0.8])


def test_gradients_do_not_add_up_over_iterations():
    trainer = make_trainer()
    trainer.train(0, 3)
    assert trainer.model.weight.tolist() == pytest.approx([2.0 * 0.8**3, -1.0 * 0.8**3])


def test_a_loss_that_is_not_finite_stops_the_training_before_the_step():
    trainer = make_trainer(Model(bad_from=3))
    finished = []

    class Finish(HookBase):
        def after_train(self):
            finished.append(self.trainer.iter)

    trainer.register_hooks([Finish()])
    with pytest.raises(FloatingPointError, match="iteration"):
        trainer.train(0, 10)
    assert finished == [2]
    assert trainer.model.weight.tolist() == pytest.approx([2.0 * 0.8**2, -1.0 * 0.8**2])


def test_a_model_in_evaluation_mode_is_not_trained():
    trainer = make_trainer()
    trainer.model.eval()
    with pytest.raises((RuntimeError, AssertionError), match="eval"):
        trainer.train(0, 1)


def test_an_interrupted_training_goes_on_where_it_was(tmp_path):
    whole, first, second = (make_trainer() for _ in range(3))
    for trainer in (whole, first, second):
        trainer.register_hooks([hooks.IterationTimer()])
    whole.train(0, 10)
    first.train(0, 4)
    first.iter -= 1  # the last iteration that was finished
    DetectionCheckpointer(first.model, str(tmp_path), trainer=first).save("model_0000003")
    checkpointer = DetectionCheckpointer(second.model, str(tmp_path), trainer=second)
    checkpointer.resume_or_load("", resume=True)
    assert second.iter == 3
    second.train(4, 10)
    assert second.model.weight.tolist() == whole.model.weight.tolist()


def test_checkpoints_load_and_tell_what_is_missing(tmp_path, logged):
    model = nn.Linear(2, 2)
    torch.save({"model": {"weight": torch.ones(2, 2)}}, tmp_path / "weights.pth")
    rest = DetectionCheckpointer(model).load(str(tmp_path / "weights.pth"))
    assert rest == {} and model.weight.eq(1).all() and "bias" in "".join(logged)


def test_only_the_processes_told_so_write_checkpoints(tmp_path):
    DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("model")
    assert list(tmp_path.iterdir()) == []
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001")
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"model": {}, "extra": argparse.Namespace()}, tmp_path / "unsafe.pth")
    with pytest.raises(Exception, match="(?i)unsafe|weights_only"):
        DetectionCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / "unsafe.pth"))


def test_warmup_leads_into_the_schedule():
    values = [schedule()(i / 10) for i in range(10)]
    assert values[:3] == pytest.approx([0.1, 0.55, 1.0])
    assert values[5:7] == [1.0, 0.1]
    with pytest.raises(ValueError, match="quadratic"):
        WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.1, "quadratic")


def test_parameters_are_grouped_by_their_settings():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    groups = get_default_optimizer_params(
        model, base_lr=1.0, weight_decay=0.5, weight_decay_norm=0.0,
        lr_factor_func=lambda name: 0.1 if name.startswith("2") else 1.0,
    )  # fmt: skip
    settings = [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
    assert settings == [(1.0, 0.5, 2), (1.0, 0.0, 2), (0.1, 0.5, 1)]


def test_scalars_are_smoothed_by_the_median_where_hinted():
    with pytest.raises((RuntimeError, AssertionError)):
        get_event_storage()
    with EventStorage(5) as storage:
        assert get_event_storage() is storage
        for iteration, value in enumerate([1.0, 9.0, 2.0], start=5):
            storage.iter = iteration
            storage.put_scalar("loss", value)
            storage.put_scalars(lr=value, smoothing_hint=False)
        latest = storage.latest_with_smoothing_hint(20)
        assert latest == {"loss": (2.0, 7), "lr": (2.0, 7)}
        assert storage.latest_with_smoothing_hint(2)["loss"] == (5.5, 7)
        with pytest.raises((ValueError, AssertionError)):
            storage.put_scalar("loss", 0.0, smoothing_hint=False)
        with pytest.raises(KeyError):
            storage.history("absent")


def test_setup_writes_the_log_and_the_config_and_seeds(tmp_path):
    config_file = tmp_path / "run.py"
    config_file.write_text("train = dict(marker='seen in the log')")
    cfg = OmegaConf.create({"train": {"output_dir": str(tmp_path / "out"), "seed": 7}})
    args = argparse.Namespace(config_file=str(config_file), eval_only=True)
    numbers = []
    for _ in range(2):
        default_setup(cfg, args)
        numbers.append((np.random.rand(), torch.rand(1).item()))
    assert numbers[0] == numbers[1]
    assert LazyConfig.load(str(tmp_path / "out" / "config.yaml")) == cfg
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "seen" in log and torch.__version__ in log and "eval_only=True" in log


def test_a_logger_writes_each_line_once_to_its_file(tmp_path, capsys):
    for _ in range(2):
        logger = setup_logger(str(tmp_path), name="some_project")
    logging.getLogger("some_project.part").warning("only once")
    assert (tmp_path / "log.txt").read_text().count("only once") == 1
    assert setup_logger(str(tmp_path), distributed_rank=1, name="other_project") is not logger
    assert (tmp_path / "log.txt.rank1").exists()


def test_one_process_alone_communicates_with_itself():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (1, 0, 0)
    assert comm.is_main_process() and comm.all_gather("x") == ["x"]
    model = nn.Linear(1, 1)
    assert create_ddp_model(model) is model


def _work_of_a_process(folder):
    rank = comm.get_rank()
    torch.manual_seed(rank)
    model = create_ddp_model(nn.Linear(2, 1))
    trainer = SimpleTrainer(_Losses(model), iter([torch.full((1, 2), 1.0 + rank)] * 2),
                            torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
    trainer.train(0, 2)
    history = trainer.storage.histories().get("total_loss")  # only the main process has it
    report = {
        "ranks": (rank, comm.get_local_rank(), comm.get_world_size()),
        "gathered": comm.all_gather({"r": rank}),
        "first": _first_images(),
        "threads": torch.get_num_threads(),
        "weights": [p.tolist() for p in model.parameters()],
        "losses": [value for value, _ in history.values()] if history else [],
    }
    torch.save(report, f"{folder}/{rank}.pth")


def _first_images():
    """What this process loads first of forty images."""
    loader = build_detection_train_loader(
        [{"number": number} for number in range(40)],
        mapper=None,
        total_batch_size=40,
        aspect_ratio_grouping=False,
    )
    return [record["number"] for record in next(iter(loader))]


class _Losses(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return {"loss": self.model(batch).square().mean()}


@pytest.mark.skipif(RUNTIME == "detectron2", reason="detectron2's DDP needs a GPU for each process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes would need a GPU each")
def test_two_processes_train_one_model_on_the_cpu(tmp_path):
    launch(_work_of_a_process, (str(tmp_path),), processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["ranks"] == (0, 0, 2) and second["ranks"] == (1, 1, 2)
    assert first["gathered"] == second["gathered"] == [{"r": 0}, {"r": 1}]
    assert sorted(first["first"] + second["first"]) == [*range(40)]  # one order, shared
    assert first["weights"] == second["weights"] and len(first["losses"]) == 2
    assert second["losses"] == []
    assert first["threads"] == second["threads"] <= max(1, torch.get_num_threads())
