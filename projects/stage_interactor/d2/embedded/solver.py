"""Stands in for ``detectron2.solver``.

Left out: building optimisers and schedules from yacs configs, gradient clipping by class surgery.
"""

from collections.abc import Callable

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRMultiplier", "WarmupParamScheduler", "get_default_optimizer_params"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,  # BatchNorm1d..3d and SyncBatchNorm
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


class WarmupParamScheduler(CompositeParamScheduler):
    """Put a warm-up before another schedule.

    Args:
        scheduler: the schedule to warm up to.
        warmup_factor: where the warm-up starts, relative to the schedule's first value.
        warmup_length: its share of the whole training, in [0, 1].
        warmup_method: ``"linear"`` or ``"constant"``.
        rescale_interval: whether the schedule is squeezed into the time after the warm-up; if not
            it runs on the whole training, and the warm-up covers its beginning.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ):
        start = warmup_factor * scheduler(0.0)
        warmup: ParamScheduler
        if warmup_method == "linear":
            end = scheduler(0.0 if rescale_interval else warmup_length)
            warmup = LinearParamScheduler(start, end)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(
                f"warmup_method is {warmup_method!r}; it must be 'linear' or 'constant'."
            )
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Multiply the initial learning rate of every group by one fvcore schedule.

    Args:
        multiplier: the schedule, from the share of training done to the factor.
        max_iter: length of the training in iterations.
        last_iter: the last iteration that is done, -1 at the start.

    Raises:
        ValueError: if ``multiplier`` is not an fvcore ParamScheduler.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ):
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(
                f"LRMultiplier got the multiplier {multiplier!r}; it must be an fvcore "
                "ParamScheduler."
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict:
        """The position only: the schedule itself has no state and comes from the config."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_lr * factor for base_lr in self.base_lrs]


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict]:
    """Group the trainable parameters of a model by their learning rate and weight decay.

    Args:
        base_lr: learning rate of all groups; None leaves it to the optimiser.
        weight_decay: weight decay of all groups; None leaves it to the optimiser.
        weight_decay_norm: weight decay in normalisation layers.
        bias_lr_factor: factor on the learning rate of parameters named ``bias``.
        weight_decay_bias: weight decay of parameters named ``bias``.
        lr_factor_func: from a parameter's full name to a factor on its learning rate.
        overrides: settings by a parameter's own name (without its module), which win.

    Returns:
        As few groups as there are different settings, each parameter in one of them.

    Raises:
        ValueError: if a factor is given without ``base_lr``, or ``bias`` is set in two ways.
    """
    given = {"lr": base_lr, "weight_decay": weight_decay}
    defaults = {key: value for key, value in given.items() if value is not None}
    overrides = dict(overrides or {})
    if base_lr is None and (lr_factor_func is not None or bias_lr_factor not in (None, 1.0)):
        raise ValueError("bias_lr_factor and lr_factor_func need base_lr, which is not given.")
    bias = {}
    if base_lr is not None and bias_lr_factor not in (None, 1.0):
        bias["lr"] = base_lr * bias_lr_factor
    if weight_decay_bias is not None:
        bias["weight_decay"] = weight_decay_bias
    if bias and "bias" in overrides:
        raise ValueError(
            f"overrides sets 'bias' to {overrides['bias']}, and bias_lr_factor or weight_decay_bias"
            f" set it to {bias}. Use only one of them."
        )
    if bias:
        overrides["bias"] = bias

    groups: dict[tuple, list] = {}
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            settings = dict(defaults)
            if isinstance(module, _NORMS) and weight_decay_norm is not None:
                settings["weight_decay"] = weight_decay_norm
            if lr_factor_func is not None:
                settings["lr"] *= lr_factor_func(f"{module_name}.{name}")
            settings.update(overrides.get(name, {}))
            groups.setdefault(tuple(settings.items()), []).append(parameter)
    return [dict(settings) | {"params": parameters} for settings, parameters in groups.items()]
