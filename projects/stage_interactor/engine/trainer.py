"""One training step: mixed precision, gradient accumulation and clipping, non-finite guards."""

import copy
import logging
import math
import operator
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..d2 import comm
from ..d2.engine import SimpleTrainer
from ..errors import UserError, lacks_memory
from ..modeling import Decoder, StageInteractor
from .buffers import BufferSnapshot, any_process, on_any_process
from .decoder_graph import DecoderGraph
from .folded_norms import FoldedNorms

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(UserError, FloatingPointError):
    """A loss, a gradient or a weight became infinite or NaN.

    What raises it leaves weights, buffers, averages and the optimizer as the iteration before it
    did.

    Attributes:
        images: whose losses these are, as they were given to the model.
    """

    images: list[dict] | None = None


class Trainer(SimpleTrainer):
    """detectron2's SimpleTrainer with what training a detector takes.

    Every iteration seeds the random generators from (seed, process, iteration), so that a run that
    was interrupted goes on with the same random numbers. An iteration that fails, or whose step
    float16's loss scaling skips, leaves weights and buffers as they were.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer; the loader yields lists of dicts.
        amp: ``enabled`` and ``dtype``, ``"bfloat16"`` or ``"float16"`` (with loss scaling), and
            ``max_skipped_steps``: after so many skipped steps in a row the run ends (20).
        clip_grad: ``enabled`` and ``params`` for ``torch.nn.utils.clip_grad_norm_``.
        accumulation_steps: the batch of a process goes through the model in so many parts, to fit
            into memory. Matches, labels and losses are those of the whole batch, for which all
            parts but the last go through the model once more, without gradient: k parts cost
            (k - 1) / k of a forward pass more. Where memory runs out in one process there are
            twice as many from then on, down to one image each. A model whose losses are not
            StageInteractor's gets the mean gradient of its parts.
        cuda_graph: on CUDA the decoder is replayed, see :class:`DecoderGraph`: ``"auto"`` where
            that is possible, True or an error, False never.
        fold_norms: the backbone's norms with fixed statistics are folded into its convolutions, see
            :class:`FoldedNorms`: ``"auto"`` on CUDA if that is faster, True or False.
        seed: 0 or larger.

    Attributes:
        steps: of the optimizer so far, which schedule and averages count.
        skipped: whether the last iteration's step was skipped.
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
        cuda_graph: bool | str = "auto",
        fold_norms: bool | str = "auto",
        seed: int = 0,
    ):
        super().__init__(model, data_loader, optimizer)
        amp, clip_grad = amp or {}, clip_grad or {}
        dtype = amp.get("dtype", "bfloat16")
        if dtype not in AMP_DTYPES:
            raise ValueError(f"train.amp.dtype must be one of {list(AMP_DTYPES)}, got {dtype!r}")
        for key, value in (
            ("accumulation_steps", accumulation_steps),
            ("amp.max_skipped_steps", amp.get("max_skipped_steps", 20)),
        ):
            if value < 1:
                raise ValueError(f"train.{key} must be 1 or more, got {value}")
        self.device = next(model.parameters()).device
        self.amp_enabled = bool(amp.get("enabled", False))
        self.amp_dtype = AMP_DTYPES[dtype]
        scaled = self.amp_enabled and self.amp_dtype == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.max_skipped_steps = amp.get("max_skipped_steps", 20)
        self.clip_params = dict(clip_grad["params"]) if clip_grad.get("enabled") else None
        self.accumulation_steps = accumulation_steps
        for key, choice in (("cuda_graph", cuda_graph), ("fold_norms", fold_norms)):
            if not isinstance(choice, bool) and choice != "auto":
                raise ValueError(f'train.{key} must be "auto", true or false, got {choice!r}')
        decoder = getattr(self._unwrapped(), "decoder", None)
        self._decoder_graph: DecoderGraph | None = None
        if cuda_graph and self.device.type == "cuda" and isinstance(decoder, Decoder):
            self._decoder_graph = DecoderGraph(decoder, required=cuda_graph is True)
        self._folded_norms: FoldedNorms | None = None
        if isinstance(backbone := getattr(self._unwrapped(), "backbone", None), nn.Module):
            self._folded_norms = FoldedNorms(backbone, fold_norms)
        self.seed = seed
        self.steps = 0
        self.skipped = False
        self._skipped_in_a_row = 0
        self._buffers: BufferSnapshot | None = None  # from before the iteration

    def run_step(self) -> None:
        start = time.perf_counter()
        seed_iteration(self.seed, comm.get_rank(), self.iter)
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        if self._buffers is None:
            self._buffers = BufferSnapshot(self.model)
        else:
            self._buffers.take()
        try:
            losses, total = self._gradients(data)
            self.after_backward()
            losses = self._step_optimizer(losses, total, data)
        except NonFiniteError as error:
            self._buffers.restore()
            error.images = data
            raise

        self._write_metrics(losses, data_time)
        images = len(data) * comm.get_world_size()
        self.storage.put_scalar("images_per_second", images / (time.perf_counter() - start))

    def _gradients(self, data: list[dict]) -> tuple[dict[str, Tensor], Tensor]:
        """:meth:`_accumulate_gradients`, of a batch in more parts if memory does not do."""
        states = self._generators() if self._can_be_divided(data) else []
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                with ExitStack() as stack:
                    for part in (self._decoder_graph, self._folded_norms):
                        if part:
                            stack.enter_context(part.used())
                    return self._accumulate_gradients(data)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error) or not self._can_be_divided(data):
                    raise
                reason = " ".join(str(error).split())[:200]
            # Out of the handler, whose frames have held what was computed so far.
            self.accumulation_steps = min(2 * self.accumulation_steps, len(data))
            logger.warning(
                f"iteration {self.iter}: memory ran out ({reason}). Its {len(data)} images go "
                f"through the model in {self.accumulation_steps} parts from here on, as with "
                f"train.accumulation_steps={self.accumulation_steps}"
            )
            if self._buffers is not None:
                self._buffers.restore()
            self._set_generators(states)
            if self._decoder_graph:
                self._decoder_graph.forget()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _can_be_divided(self, data: list[dict]) -> bool:
        """Whether a batch can have more parts; several processes would wait for one that tries."""
        return self.accumulation_steps < len(data) and comm.get_world_size() == 1

    def _accumulate_gradients(self, data: list[dict]) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward of all parts of the batch; the losses of the whole batch and their
        sum. Nothing here waits for the device but the matching."""
        parts = min(self.accumulation_steps, len(data))
        bounds = [len(data) * part // parts for part in range(parts + 1)]
        batches = [data[first:last] for first, last in zip(bounds, bounds[1:])]
        model = self._unwrapped()
        if parts > 1 and has_losses_of_outputs(model):
            return self._gradients_of_whole_batch(model, batches)
        means: dict[str, Tensor] = {}
        totals = []
        for images in batches:
            share = len(images) / len(data)
            with self._synchronised(images is batches[-1]):
                with self._autocast():
                    losses = self.model(images)
                    total = sum(losses.values())
                    total = torch.as_tensor(total * share)
                self.grad_scaler.scale(total).backward()
            totals.append(total.detach())
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + loss.detach() * share
        return means, torch.stack(totals).sum()

    def _gradients_of_whole_batch(
        self, model: StageInteractor, batches: Sequence[list[dict]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of all parts' stages together, and their gradient through one part at a time.

        What divides the losses is known when the last stage of the last part is. So all parts go
        through the model first; the losses' gradient is taken up to the stages' outputs, and from
        there through each part, whose forward pass is repeated with the same random numbers. The
        last part still has its graph.
        """
        assert model.criterion is not None
        data = [image for batch in batches for image in batch]
        *earlier, last = batches
        outputs, generators = [], []
        for batch in earlier:
            generators.append(self._generators())
            with torch.no_grad(), self._autocast():
                outputs.append(model(batch, with_losses=False))
        with self._synchronised(False), self._autocast():
            outputs.append(self.model(last, with_losses=False))
        seen = BufferSnapshot(model)  # every image once
        # Of each stage, over all parts: leaves that gather the gradient.
        stages = [
            type(parts[0])(*(torch.cat(field).detach().requires_grad_() for field in zip(*parts)))
            for parts in zip(*outputs)
        ]
        with self._autocast():
            losses = model.criterion(stages, model.ground_truth(data))
            total = sum(losses.values())
        self.grad_scaler.scale(total).backward()

        sizes = [len(batch) for batch in batches]
        gradients = [
            [None if leaf.grad is None else leaf.grad.split(sizes) for leaf in stage]
            for stage in stages
        ]
        for index in (len(earlier), *range(len(earlier))):
            with self._synchronised(index == len(earlier) - 1):
                if index < len(earlier):
                    self._set_generators(generators[index])
                    with self._autocast():
                        outputs[index] = self.model(earlier[index], with_losses=False)
                pairs = [
                    (output, gradient[index])
                    for stage, of_stage in zip(outputs[index], gradients)
                    for output, gradient in zip(stage, of_stage)
                    if gradient is not None and output.requires_grad
                ]
                tensors, of_tensors = zip(*pairs)
                torch.autograd.backward(tensors, of_tensors)
            outputs[index] = None  # and its graph
        seen.restore()
        return {name: loss.detach() for name, loss in losses.items()}, total.detach()

    def _unwrapped(self) -> Any:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_enabled)

    def _synchronised(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged between processes once, in the last backward pass."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _generators(self) -> list[Tensor]:
        """States of the random generators that a forward pass may use."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_generators(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self.device)

    def _step_optimizer(
        self, losses: Mapping[str, Tensor], total: Tensor, data: list[dict]
    ) -> dict[str, Tensor]:
        """Clips, takes the step, and reads at once all that is to be known of the iteration.

        A step that must not be taken is left out: on CUDA by the device itself where the optimizer
        knows how to, so that nothing waits for the backward pass before the step is on its way.

        Returns:
            the losses, on the host.
        """
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limits = self.clip_params or {"max_norm": float("inf")}
        norm = torch.nn.utils.clip_grad_norm_(parameters, **limits)
        # Gradients are equal on all processes, losses are not: all stop or skip here or none does.
        flags = on_any_process(torch.stack((~total.isfinite(), ~norm.isfinite())).to(norm.dtype))
        numbers = torch.cat((flags, torch.stack((norm, total, *losses.values()))))
        guarded = self.device.type == "cuda" and _leaves_out_steps(self.optimizer)
        if guarded:
            # What GradScaler tells such an optimizer: at 1 it changes nothing, not even its state.
            optimizer: Any = self.optimizer
            optimizer.found_inf, optimizer.grad_scale = flags.amax().float(), None
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale
        numbers = numbers.cpu()
        bad_losses, bad_norm, read_norm, read_total = numbers[:4].tolist()
        read = dict(zip(losses, numbers[4:]))
        if bad_losses:
            raise NonFiniteError(self._of_bad_losses(read, read_total, data))
        self.skipped = bool(bad_norm)
        if self.skipped:
            self._skip_step(read_norm, data)
            return read
        self.storage.put_scalar("grad_norm", read_norm)
        if not guarded:
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.steps += 1
        self._skipped_in_a_row = 0
        return read

    def _of_bad_losses(self, losses: Mapping[str, Tensor], total: float, data: list[dict]) -> str:
        """Which losses of which process are not finite; all processes must ask."""
        found = None
        if not math.isfinite(total):
            bad = {name: loss.item() for name, loss in losses.items() if not loss.isfinite()}
            found = f"{bad or {'total_loss': total}} on images {_names(data)}"
        reports = [report for report in comm.all_gather(found) if report]
        return f"iteration {self.iter}: {'; '.join(reports)}"

    def _skip_step(self, norm: float, data: list[dict]) -> None:
        """float16 leaves a step out and lowers the scale of the loss; otherwise it is an error."""
        what = f"iteration {self.iter}: the gradient norm is {norm}, with finite losses"
        if not self.grad_scaler.is_enabled():
            raise NonFiniteError(f"{what}. Images: {_names(data)}")
        in_a_row = self._skipped_in_a_row + 1
        if in_a_row >= self.max_skipped_steps or (
            not self.steps and self.iter + 1 >= self.max_iter
        ):
            raise NonFiniteError(
                f"{what}, in {in_a_row} iterations in a row (train.amp.max_skipped_steps="
                f"{self.max_skipped_steps}): float16 skips such steps and lowers the scale of the "
                f"loss, which is {self.grad_scaler.get_scale():g} by now. Images: {_names(data)}"
            )
        self._skipped_in_a_row = in_a_row
        self.grad_scaler.update()
        if self._buffers is not None:
            self._buffers.restore()

    def is_finite(self, images: list[dict]) -> bool:
        """Whether a process's images have finite losses in float32, on every process."""
        model = self._unwrapped()
        buffers = BufferSnapshot(model)
        with torch.no_grad():
            total = sum(model(images).values())
        buffers.restore()
        return not any_process(not bool(torch.isfinite(total).item()), self.device)

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "parameters": self._names_of_parameters(),  # in the order of the optimizer's state
            "grad_scaler": self.grad_scaler.state_dict(),
            "steps": self.steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "fold_norms": self._folded_norms and self._folded_norms.measured,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """The state of a training; learning rates, weight decay and so on stay the config's.

        What the optimizer keeps for a weight goes with its name. It starts anew where it does not
        fit, because the optimizer is another one or the weight was not trained.
        """
        optimizer = self._optimizer_state(state_dict)
        # Hooks have no state of their own; those of older checkpoints had.
        state = {key: value for key, value in state_dict.items() if key != "hooks"}
        super().load_state_dict(state | {"optimizer": optimizer})
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.steps = operator.index(state_dict.get("steps", self.iter + 1))
        self._skipped_in_a_row = operator.index(state_dict.get("skipped_in_a_row", 0))
        if self._folded_norms and isinstance(folds := state_dict.get("fold_norms"), bool):
            self._folded_norms.keep(folds)

    def _optimizer_state(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's state of a checkpoint as this run's optimizer can load it."""
        saved, ours = state_dict["optimizer"], self.optimizer.state_dict()
        names, sizes = self._names_of_parameters(), [len(g["params"]) for g in ours["param_groups"]]
        theirs = state_dict.get("parameters")
        if theirs is None:  # earlier versions did not say: the same grouping is the same order
            same = sizes == [len(group["params"]) for group in saved["param_groups"]]
            theirs = names if same else []
        by_name = {theirs[index]: kept for index, kept in saved["state"].items() if theirs}
        parts = _kept_by(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            index: by_name[name]
            for index, (name, parameter) in enumerate(zip(names, parameters))
            if name in by_name and _fits(by_name[name], parameter, parts)
        }
        anew = [name for index, name in enumerate(names) if index not in state]
        if anew and saved["state"]:
            shown = ", ".join(anew[:3]) + (", ..." if len(anew) > 3 else "")
            logger.warning(
                f"changed on resume: what the optimizer, {type(self.optimizer).__name__}, keeps "
                f"for {len(anew)} of {len(names)} weights starts anew: {shown}"
            )
        return {"state": state, "param_groups": ours["param_groups"]}

    def _names_of_parameters(self) -> list[str]:
        names = {
            id(parameter): name.removeprefix("module.")
            for name, parameter in self.model.named_parameters()
        }
        groups = self.optimizer.param_groups
        return [names[id(parameter)] for group in groups for parameter in group["params"]]


def seed_iteration(seed: int, rank: int, iteration: int) -> None:
    """Seeds torch's generators for an iteration of a process."""
    state = np.random.SeedSequence((seed, rank, iteration)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def _leaves_out_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer reads on the device whether to take its step (torch's fused ones)."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _kept_by(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """The names under which an optimizer keeps tensors for a weight, found by a step; None if it
    does not make one."""
    weight = nn.Parameter(torch.zeros(1, device=optimizer.param_groups[0]["params"][0].device))
    weight.grad = torch.zeros_like(weight)
    trial = copy.copy(optimizer)
    trial.state = defaultdict(dict)
    trial.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    try:
        trial.step()
    except Exception:  # of a user's own
        return None
    return {name for name, value in trial.state[weight].items() if value is not None}


def _fits(kept: Mapping[str, Any], parameter: Tensor, parts: set[str] | None) -> bool:
    """Whether what an optimizer kept for a weight is what it needs, in the weight's shape."""
    if parts is not None and {k for k, value in kept.items() if value is not None} != parts:
        return False
    tensors = [value for value in kept.values() if isinstance(value, Tensor) and value.ndim]
    return all(value.shape == parameter.shape for value in tensors)


def has_losses_of_outputs(model: nn.Module) -> TypeGuard[StageInteractor]:
    """Whether a model's losses are a criterion of its stages' outputs, and nothing else."""
    ours: Any = StageInteractor
    theirs: Any = type(model)
    return (
        isinstance(model, ours) and theirs.forward is ours.forward and theirs.losses is ours.losses
    )


def _names(images: list[dict]) -> list[str]:
    return [str(image.get("file_name", image.get("image_id", "unknown"))) for image in images]
