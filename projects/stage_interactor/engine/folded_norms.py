"""BatchNorms with fixed statistics, folded into the convolutions before them while one trains.

How that is computed: :mod:`stage_interactor.ops.convolution`. Here it is attached to a backbone,
and whether it is the faster way is measured.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..d2 import comm
from ..ops import current_ops
from ..ops.convolution import FoldedNetwork, has_fixed_statistics, is_known
from ..ops.cuda_graph import is_watched
from .buffers import BufferSnapshot

logger = logging.getLogger("stage_interactor.engine")

_TURNS = 5  # of each way when they are compared; the first two get kernels ready


class FoldedNorms:
    """Computes what a backbone's networks compute, with their norms folded where that is possible.

    Weights, modules and state stay the networks' own.

    Args:
        backbone: it, or parts of it, are networks of PyTorch, torchvision or timm.
        folds: ``"auto"`` compares the two ways on CUDA, at the first images, and is False on other
            devices, where little is gained; True or False.

    Attributes:
        folds: what has been chosen; ``"auto"`` until it has.
        measured: the same if it was measured, for a run that goes on to keep; otherwise None.
    """

    measured: bool | None = None

    def __init__(self, backbone: nn.Module, folds: bool | str = "auto"):
        self.folds = folds
        self._backbone = backbone
        self._known: dict[nn.Module, tuple[list, FoldedNetwork | None]] = {}
        device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
        if folds == "auto" and device.type != "cuda":
            self.folds = False
        elif folds == "auto" and torch.are_deterministic_algorithms_enabled():
            self.folds = True  # times are never the same twice

    def keep(self, measured: bool) -> None:
        """Does as was measured before, where it would be measured."""
        if self.folds == "auto":
            self.folds = self.measured = measured

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside of the ``with`` calls of the backbone's networks are computed in this way."""
        networks: list[Any] = []
        if self.folds is not False and current_ops() == "fast":
            networks = [n for n in _networks(self._backbone) if "forward" not in vars(n)]
        for network in networks:
            network.forward = partial(self._forward, network)  # of this object alone
        try:
            yield
        finally:
            for network in networks:
                del network.forward

    def _forward(self, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = partial(type(network).forward, network)
        folded = None
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            folded = self._folded(network)
        if folded is None:
            return plain(*args, **kwargs)
        if self.folds == "auto":
            self.keep(self._compare(network, plain, folded, args[0]))
        return (folded if self.folds is True else plain)(args[0])

    def _folded(self, network: nn.Module) -> FoldedNetwork | None:
        """The network as its modules are now, if there is something to fold and nobody looks."""
        modules = list(network.modules())
        now = [(module, module.training) for module in modules]
        if network not in self._known or self._known[network][0] != now:
            self._known[network] = now, self._traced(network)
        folded = self._known[network][1]
        if folded is None or is_watched(network):
            return None
        # What would be computed otherwise than by the modules' code, or again.
        special = any(
            module._compiled_call_impl is not None
            or getattr(module, "grad_checkpointing", False)
            or (module is not network and "forward" in vars(module))
            for module in modules
        )
        return None if special else folded

    @staticmethod
    def _traced(network: nn.Module) -> FoldedNetwork | None:
        try:
            folded = FoldedNetwork(network)
        except Exception as error:  # whatever tracing a stranger's network raises
            reason = str(error).partition("\n")[0]
            logger.info(f"Norms of {type(network).__name__} are not folded: {reason}")
            return None
        return folded if len(folded) else None

    def _compare(
        self,
        network: nn.Module,
        plain: Callable[[Tensor], Any],
        folded: Callable[[Tensor], Any],
        images: Tensor,
    ) -> bool:
        """Whether forward and backward pass are faster folded, of all processes together."""
        parameters = [p for p in network.parameters() if p.requires_grad]
        buffers = BufferSnapshot(network)
        times: list[list[float]] = [[], []]
        with torch.enable_grad(), torch.random.fork_rng([images.device]):
            for _ in range(_TURNS):
                for way, found in zip((plain, folded), times):
                    torch.cuda.synchronize(images.device)
                    start = time.perf_counter()
                    maps = [m for m in tree_leaves(way(images)) if m.requires_grad]
                    if maps:
                        grads = [torch.ones_like(level) for level in maps]
                        torch.autograd.grad(maps, parameters, grads, allow_unused=True)
                    torch.cuda.synchronize(images.device)
                    found.append(time.perf_counter() - start)
        buffers.restore()
        # All processes take the same way: gradients come in another order in each.
        as_it_is, with_folds = (
            sum(part) / len(part)
            for part in zip(*comm.all_gather([1e3 * min(found[2:]) for found in times]))
        )
        folds = with_folds < as_it_is
        logger.info(
            f"Forward and backward pass of {type(network).__name__}: {as_it_is:.1f} ms, with norms "
            f"folded into the convolutions {with_folds:.1f} ms, so they are "
            f"{'folded' if folds else 'left'} (train.fold_norms)"
        )
        return folds


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module that can be looked into and have norms to fold."""
    if not any(has_fixed_statistics(part) for part in module.modules()):
        return
    if is_known(module) and type(module) not in (nn.ModuleList, nn.ModuleDict):
        yield module
    else:
        for part in module.children():
            yield from _networks(part)
