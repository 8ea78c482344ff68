"""One training step: mixed precision, gradient accumulation and clipping, non-finite guards."""

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..d2 import comm
from ..d2.engine import SimpleTrainer

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(FloatingPointError):
    """A loss or gradient became infinite or NaN. The weights are still those from before it."""


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process; all of them must ask."""
    if comm.get_world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


class Trainer(SimpleTrainer):
    """detectron2's SimpleTrainer with what training a detector takes.

    Every iteration seeds the random generators from (seed, process, iteration), so that a run that
    was interrupted goes on with the same random numbers.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer; the loader yields lists of dicts.
        amp: ``enabled`` and ``dtype``, ``"bfloat16"`` or ``"float16"`` (with loss scaling).
        clip_grad: ``enabled`` and ``params`` for ``torch.nn.utils.clip_grad_norm_``.
        accumulation_steps: the batch of a process is split into so many parts, one after the
            other, to fit into memory; the gradients are averaged.
        seed: 0 or larger.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        amp: Mapping[str, Any] | None = None,
        clip_grad: Mapping[str, Any] | None = None,
        accumulation_steps: int = 1,
        seed: int = 0,
    ):
        super().__init__(model, data_loader, optimizer)
        amp, clip_grad = amp or {}, clip_grad or {}
        dtype = amp.get("dtype", "bfloat16")
        if dtype not in _DTYPES:
            raise ValueError(f"train.amp.dtype must be one of {list(_DTYPES)}, got {dtype!r}")
        if accumulation_steps < 1:
            raise ValueError(
                f"train.accumulation_steps must be 1 or more, got {accumulation_steps}"
            )
        self.device = next(model.parameters()).device
        self.amp_enabled = bool(amp.get("enabled", False))
        self.amp_dtype = _DTYPES[dtype]
        scaled = self.amp_enabled and self.amp_dtype == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.clip_params = dict(clip_grad["params"]) if clip_grad.get("enabled") else None
        self.accumulation_steps = accumulation_steps
        self.seed = seed

    def run_step(self) -> None:
        start = time.perf_counter()
        numbers = (self.seed, comm.get_rank(), self.iter)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad(set_to_none=True)
        losses = self._accumulate_gradients(data)
        self.after_backward()
        self._step_optimizer(data)

        self._write_metrics(losses, data_time)
        images = len(data) * comm.get_world_size()
        self.storage.put_scalar("images_per_second", images / (time.perf_counter() - start))

    def _accumulate_gradients(self, data: list[dict]) -> dict[str, Tensor]:
        """Forward and backward of all parts of the batch; the mean losses."""
        parts = min(self.accumulation_steps, len(data))
        bounds = [len(data) * part // parts for part in range(parts + 1)]
        means: dict[str, Tensor] = {}
        for part in range(parts):
            images = data[bounds[part] : bounds[part + 1]]
            share = len(images) / len(data)
            together: AbstractContextManager = nullcontext()  # gradients of all processes
            if isinstance(self.model, DistributedDataParallel) and part < parts - 1:
                together = self.model.no_sync()
            with together:
                with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_enabled):
                    losses = self.model(images)
                    total = sum(losses.values())
                self._check_losses(losses, total, images)
                self.grad_scaler.scale(total * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + loss.detach() * share
        return means

    def _step_optimizer(self, data: list[dict]) -> None:
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limits = self.clip_params or {"max_norm": float("inf")}
        norm = torch.nn.utils.clip_grad_norm_(parameters, **limits)
        self.storage.put_scalar("grad_norm", norm.item())
        # Gradients are equal on all processes, so that all of them stop here or none does. With
        # float16 the scaler skips such a step and lowers the scale.
        if not self.grad_scaler.is_enabled() and not torch.isfinite(norm):
            raise NonFiniteError(
                f"iteration {self.iter}: the gradient norm is {norm.item()}, with finite losses. "
                f"Images: {_names(data)}"
            )
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_losses(
        self, losses: Mapping[str, Tensor], total: Tensor, images: list[dict]
    ) -> None:
        finite = bool(torch.isfinite(total).item())
        if not any_process(not finite, self.device):
            return
        found = None
        if not finite:
            bad = {name: loss.item() for name, loss in losses.items() if not loss.isfinite()}
            found = f"{bad or {'total_loss': total.item()}} on images {_names(images)}"
        reports = [report for report in comm.all_gather(found) if report]
        raise NonFiniteError(f"iteration {self.iter}: {'; '.join(reports)}")

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _names(images: list[dict]) -> list[str]:
    return [str(image.get("file_name", image.get("image_id", "unknown"))) for image in images]
