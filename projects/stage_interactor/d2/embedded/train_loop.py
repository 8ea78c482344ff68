"""Stands in for ``detectron2.engine.train_loop``.

Left out: ``AMPTrainer``, metrics written by another thread or only every few iterations, a trace in
the log of an error that is raised.
"""

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import nn

from . import comm
from .events import EventStorage

logger = logging.getLogger(__name__)


class HookBase:
    """What a trainer calls around its iterations; every method may stay as it is.

    The order is ``before_train``, then for each iteration ``before_step``, ``after_backward``
    (by trainers that have a backward pass) and ``after_step``, then ``after_train``, also after an
    exception. ``before_step`` should take no time, for the sake of timers.

    Attributes:
        trainer: the trainer, set when the hook is registered.
    """

    trainer: "TrainerBase"

    def before_train(self) -> None:
        pass

    def after_train(self) -> None:
        pass

    def before_step(self) -> None:
        pass

    def after_backward(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict:
        """What a checkpoint should keep; if not empty, define ``load_state_dict`` too."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        raise NotImplementedError


class TrainerBase:
    """A loop over iterations, with hooks; what an iteration does is up to ``run_step``.

    Attributes:
        iter: the current iteration.
        start_iter, max_iter: the first iteration, and the one to stop before.
        storage: the :class:`EventStorage` of the training.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks, to be called in this order; None is left out.

        Raises:
            TypeError: if one is not a HookBase.
        """
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"register_hooks got {hook!r}, which is no HookBase.")
            hook.trainer = weakref.proxy(self)  # not a cycle: the trainer owns its hooks
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations from ``start_iter`` up to, not including, ``max_iter``."""
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                # after_train can tell a finished training by iter == max_iter
                self.iter += 1
            finally:
                self.after_train()

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()

    def run_step(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict:
        """The iteration and the state of the hooks, by class; of several of a class the first."""
        states: dict[str, dict] = {}
        for hook in self._hooks:
            state = hook.state_dict()
            if state:
                states.setdefault(type(hook).__qualname__, state)
        return {"iteration": self.iter} | ({"hooks": states} if states else {})

    def load_state_dict(self, state_dict: dict) -> None:
        self.iter = state_dict["iteration"]
        for name, state in state_dict.get("hooks", {}).items():
            for hook in self._hooks:
                if type(hook).__qualname__ == name:
                    hook.load_state_dict(state)
                    break
            else:
                logger.warning("There is no hook %s; its state is ignored.", name)


class SimpleTrainer(TrainerBase):
    """One model, one data loader, one optimiser, and a loss that is the sum of a dict.

    Args:
        model: returns a dict of losses for a batch. It is set to training mode.
        data_loader: an iterable of batches that does not end before the training.
        optimizer: a torch optimiser.
    """

    def __init__(
        self, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer

    @cached_property
    def _data_loader_iter(self) -> Iterator:
        return iter(self.data_loader)  # starts the workers, so not before it is used

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable]) -> None:
        """Replace the data loader by what ``data_loader_builder()`` returns."""
        del self.data_loader  # the old one and its workers go first
        self.__dict__.pop("_data_loader_iter", None)
        self.data_loader = data_loader_builder()

    def run_step(self) -> None:
        """One batch, one backward pass, one step.

        Raises:
            RuntimeError: if the model is in evaluation mode.
            FloatingPointError: if a loss is infinite or NaN; the optimiser then has not stepped.
        """
        if not self.model.training:
            raise RuntimeError("The model is in evaluation mode; a hook must restore train().")
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        loss_dict = self.model(batch)
        self.optimizer.zero_grad()
        sum(loss_dict.values()).backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.optimizer.step()

    def _write_metrics(self, loss_dict: Mapping[str, torch.Tensor], data_time: float) -> None:
        """Put losses, averaged over the processes, and the slowest data time into the storage.

        Args:
            loss_dict: scalar losses by name, the same in all processes.
            data_time: seconds that this process waited for its batch.

        Raises:
            FloatingPointError: on the main process, if their sum is infinite or NaN.
        """
        storage = self.storage
        storage.put_scalar("rank_data_time", data_time)
        metrics = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather((metrics, data_time))
        if not comm.is_main_process():
            return
        all_metrics, data_times = zip(*gathered)
        storage.put_scalar("data_time", np.max(data_times))
        metrics = {name: np.mean([m[name] for m in all_metrics]) for name in metrics}
        total = sum(metrics.values())
        if not np.isfinite(total):
            raise FloatingPointError(
                f"The loss became infinite or NaN at iteration {self.iter}: {metrics}"
            )
        storage.put_scalar("total_loss", total)
        if len(metrics) > 1:
            for name, value in metrics.items():
                storage.put_scalar(name, value)

    def state_dict(self) -> dict:
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
