"""Stands in for ``detectron2.engine.train_loop``.

Left out: ``AMPTrainer``, and metrics written by another thread.
"""

import logging
import time
import weakref
from collections.abc import Mapping

import numpy as np
import torch

from . import comm
from .events import EventStorage, get_event_storage

logger = logging.getLogger(__name__)


class HookBase:
    """What a trainer calls around its iterations; every method may stay as it is.

    The order is ``before_train``, then for each iteration ``before_step``, ``after_backward``
    (by trainers that have a backward pass) and ``after_step``, then ``after_train``, also after an
    exception. ``before_step`` should take no time, for the sake of timers.

    Attributes:
        trainer: the trainer, set when the hook is registered.
    """

    trainer: "TrainerBase" = None

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


class TrainerBase:
    """A loop over iterations, with hooks; what an iteration does is up to ``run_step``.

    Attributes:
        iter: the current iteration.
        start_iter, max_iter: the first iteration, and the one to stop before.
        storage: the :class:`EventStorage` of the training.
    """

    def __init__(self):
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
            except Exception:
                logger.exception("Exception during training:")
                raise
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
        states = {}
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
        model: returns a dict of losses, or one loss, for a batch. It is set to training mode.
        data_loader: an iterable of batches that does not end before the training.
        optimizer: a torch optimiser.
        gather_metric_period: every how many iterations losses are gathered and checked.
        zero_grad_before_forward: whether gradients are cleared before the forward pass, not before
            the backward pass.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
    ):
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self._data_loader_iter_obj = None

    @property
    def _data_loader_iter(self):
        if self._data_loader_iter_obj is None:  # starts the workers, so not before it is used
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder) -> None:
        """Replace the data loader by what ``data_loader_builder()`` returns."""
        del self.data_loader  # the old one and its workers go first
        self._data_loader_iter_obj = None
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

        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        loss_dict = self.model(batch)
        if isinstance(loss_dict, torch.Tensor):
            losses, loss_dict = loss_dict, {"total_loss": loss_dict}
        else:
            losses = sum(loss_dict.values())
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        losses.backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.optimizer.step()

    def _write_metrics(
        self,
        loss_dict: Mapping[str, torch.Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        iter = self.iter if iter is None else iter
        if (iter + 1) % self.gather_metric_period == 0:
            self.write_metrics(loss_dict, data_time, iter, prefix)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Put losses, averaged over the processes, and the slowest data time into the storage.

        Args:
            loss_dict: scalar losses by name, the same in all processes.
            data_time: seconds that this process waited for its batch.
            prefix: of the name ``total_loss``.

        Raises:
            FloatingPointError: on the main process, if their sum is infinite or NaN.
        """
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        metrics = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather((metrics, data_time))
        if not comm.is_main_process():
            return
        all_metrics, data_times = zip(*gathered)
        storage.put_scalar("data_time", np.max(data_times), cur_iter=cur_iter)
        metrics = {name: np.mean([m[name] for m in all_metrics]) for name in metrics}
        total = sum(metrics.values())
        if not np.isfinite(total):
            raise FloatingPointError(
                f"The loss became infinite or NaN at iteration {cur_iter}: {metrics}"
            )
        storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
        if len(metrics) > 1:
            storage.put_scalars(cur_iter=cur_iter, **metrics)

    def state_dict(self) -> dict:
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
