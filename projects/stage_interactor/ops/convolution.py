"""Convolutions with what follows them: a BatchNorm with fixed statistics, an addition, a ReLU.

Such a norm scales and shifts each channel. The scale may as well be in the convolution's weights,
``conv(x, w * s) + t`` with ``s = gamma / sqrt(var + eps)`` and ``t = beta - mean * s``: the norm is
gone, and with it what it keeps for its backward pass. In training weights are scaled anew for every
forward pass, and come out in the precision that is computed in; the gradients of ``w``, ``gamma``
and ``beta`` follow by the chain rule.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from .backend import runs_kernels
from .shift_relu import shift_relu


def write(name: str, value: Any, other: Any) -> Any:
    """What ``value += other`` gives, where ``name`` is ``"iadd"``."""
    return getattr(operator, name)(value, other)


class _Proxy(fx.Proxy):
    """Of a tensor: ``y += z`` stays what it is, since other names of y see it too.

    For torch.fx it is ``y = y + z``, and what is set of a tensor is nothing.
    """

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):  # torch.fx's own
            raise ValueError(f"it sets {name!r} of a tensor")
        super().__setattr__(name, value)


def _writer(name: str) -> Callable[[Any, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy(
        "call_function", write, (name, proxy, other), {}
    )


for _operator in "add and floordiv lshift matmul mod mul or pow rshift sub truediv xor".split():
    setattr(_Proxy, f"__i{_operator}__", _writer(f"i{_operator}"))


class _Attribute(_Proxy, fx.proxy.Attribute):
    """Of what a tensor has, such as its ``data``."""


def has_fixed_statistics(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that computes the same for every image, and has weights."""
    return (
        type(module) in (nn.BatchNorm2d, BatchNormAct2d)
        and not module.training
        and bool(module.track_running_stats and module.affine)
    )


def is_known(module: nn.Module) -> bool:
    """Whether its code is a library's: that of one's own may do what does not show in a trace."""
    return type(module).__module__.partition(".")[0] in ("timm", "torch", "torchvision")


class _Tracer(fx.Tracer):
    """Looks into all modules, or into known ones that have norms with fixed statistics alone."""

    def __init__(self, everywhere: bool):
        super().__init__()
        self._everywhere = everywhere

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_fixed_statistics(m):
            return True
        if self._everywhere:
            return super().is_leaf_module(m, module_qualified_name)
        return not (is_known(m) and any(has_fixed_statistics(part) for part in m.modules()))


def traced(network: nn.Module, everywhere: bool) -> fx.GraphModule:
    """A network's forward pass as a graph of modules, which stay the network's own.

    What does nothing is left out.

    Args:
        everywhere: looks into every module; otherwise into those of known packages that have norms
            with fixed statistics alone.

    Raises:
        Exception: of any kind, for a network that cannot be traced.
    """
    if len(inspect.signature(type(network).forward).parameters) != 2:
        raise ValueError("it may be given more than images")
    graph = _Tracer(everywhere).trace(network)
    made = fx.GraphModule(network, graph)
    for node in list(graph.nodes):
        if type(module_of(made, node)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return made


def module_of(network: fx.GraphModule, node: Any) -> Any:
    """What a node calls, if it is a module; otherwise None."""
    called = isinstance(node, fx.Node) and node.op == "call_module"
    return network.get_submodule(node.target) if called else None


def used_once(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the module that a node calls has no other use, nor its weights."""
    target = str(node.target)
    others = (other for other in network.graph.nodes if other is not node)
    return not any(
        other.target == target
        if other.op == "call_module"
        else other.op == "get_attr" and str(other.target).startswith(f"{target}.")
        for other in others
    )


def convolutions_with_norms(network: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Convolutions whose result goes into a norm with fixed statistics and nowhere else."""
    found = []
    for norm in network.graph.nodes:
        module = module_of(network, norm)
        if module is None or not has_fixed_statistics(module) or norm.kwargs:
            continue
        conv = norm.args[0]
        if (
            type(module_of(network, conv)) is nn.Conv2d
            and len(conv.users) == 1
            and not conv.kwargs
            and used_once(network, conv)
            and used_once(network, norm)
        ):
            found.append((conv, norm))
    return found


def take_out(network: fx.GraphModule, norm: fx.Node) -> None:
    """Leaves a norm out of the graph, but not an activation that is part of it."""
    last: Any = norm.args[0]
    module = module_of(network, norm)
    if isinstance(module, BatchNormAct2d):
        for name in ("drop", "act"):
            part = module.get_submodule(name)
            if type(part) is not nn.Identity:
                network.add_submodule(f"{norm.target}.{name}", part)
                with network.graph.inserting_before(norm):
                    last = network.graph.call_module(f"{norm.target}.{name}", (last,))
    norm.replace_all_uses_with(last)
    network.graph.erase_node(norm)


def activation_of(
    network: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node, fx.Node | None, fx.Node | None, Callable[[Any, Any], Any]] | None:
    """The ReLU of a node whose result goes nowhere else, with the addition of a residual between.

    Nothing is computed between the addition and the ReLU.

    Returns:
        the ReLU, the addition, the residual, and how the two are added, see :func:`addition_of`.
    """
    addition = residual = None
    user, add = _only_user(node), operator.add
    if user is not None and (found := addition_of(user)) and not user.kwargs:
        add, addition, user = found, user, _only_user(user)
        nodes = [arg for arg in addition.args if isinstance(arg, fx.Node)]
        of_others = [arg for arg in nodes if arg is not node]
        # Written over is the first one.
        others_too = add is operator.iadd and nodes[0] is not node
        if not of_others or others_too or user is not addition.next:
            return None
        (residual,) = of_others
    if user is None:
        return None
    is_relu = type(module_of(network, user)) is nn.ReLU or user.target is F.relu
    return (user, addition, residual, add) if is_relu else None


def addition_of(node: fx.Node) -> Callable[[Any, Any], Any] | None:
    """How a node adds two values, if it does: ``operator.add``, or ``iadd`` over the first one."""
    if node.target in (operator.add, torch.add):
        return operator.add
    in_place = node.target is operator.iadd or (node.target is write and node.args[0] == "iadd")
    return operator.iadd if in_place else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class _Fold(torch.autograd.Function):
    """Weights of convolutions, and gammas and betas of the norms after them, to the weights of the
    two together, in the precision and layout that are computed in, and all their shifts.

    ``mean`` is of all channels, ``inverse`` 1 / their deviation; ``scale`` and ``shift`` are what
    these and the norms' gammas and betas make.
    """

    @staticmethod
    def forward(
        ctx,
        mean: Tensor,
        inverse: Tensor,
        scale: Tensor,
        shift: Tensor,
        dtype: torch.dtype | None,
        layout: torch.memory_format,
        *tensors: Tensor,
    ):
        weights = tensors[::3]
        ctx.channels = [len(weight) for weight in weights]
        ctx.mean, ctx.inverse = mean, inverse
        ctx.scales = scale.view(-1, 1, 1, 1).split(ctx.channels)
        folded = [
            torch.mul(w, s, out=torch.empty_like(w, dtype=dtype, memory_format=layout))
            for w, s in zip(weights, ctx.scales)
        ]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights)
        return shift, *folded

    @staticmethod
    @once_differentiable
    def backward(ctx, of_shift: Tensor | None, *of_folded: Tensor | None):
        weights, needs = ctx.saved_tensors, ctx.needs_input_grad[6:]
        used = [index for index, grad in enumerate(of_folded) if grad is not None]
        grads: list[Tensor | None] = [None] * len(needs)
        if used:
            given: Any = [of_folded[index] for index in used]
            products = torch._foreach_mul(given, [weights[index] for index in used])
            sums = dict(zip(used, (product.sum((1, 2, 3)) for product in products)))
            del products
            scaled = torch._foreach_mul(given, [ctx.scales[index] for index in used])
            of_scale = torch.cat(
                [sums[i] if i in sums else s.new_zeros(len(s)) for i, s in enumerate(ctx.scales)]
            )
            if of_shift is None:
                of_shift = torch.zeros_like(of_scale)
            of_gamma = of_scale.addcmul_(ctx.mean, of_shift, value=-1).mul_(ctx.inverse)
            of_norms = list(zip(of_gamma.split(ctx.channels), of_shift.split(ctx.channels)))
            for index, of_weight in zip(used, scaled):
                of_layer = _laid_out_as(weights[index], of_weight), *of_norms[index]
                grads[3 * index : 3 * index + 3] = of_layer
        return *[None] * 6, *(g if needed else None for g, needed in zip(grads, needs))


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the weight's strides, which the fast paths of optimizers and of DDP need."""
    if grad.stride() == weight.stride():
        return grad
    if weight.shape[2:] == (1, 1):  # strides differ that mean nothing
        return grad.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(grad)


class FoldedConvolution(nn.Module):
    """A convolution and the norm with fixed statistics after it, whose weights are folded before.

    Attributes:
        folded: weight and bias of the two together, and what is left for the ReLU to add.
    """

    folded: tuple[Tensor, Tensor | None, Tensor | None]

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv, norm
        self.has_relu = False

    def forward(self, features: Tensor) -> Tensor:
        weight, bias, _ = self.folded
        return self.conv._conv_forward(features, weight, bias)


class ShiftedReLU(nn.Module):
    """The ReLU after a folded convolution, to whose result a residual may be added, by ``add``."""

    def __init__(self, convolution: FoldedConvolution, add: Callable[[Any, Any], Any]):
        super().__init__()
        self._convolution = (convolution,)  # a part of the network, not of this
        self._add = add
        convolution.has_relu = True

    def forward(self, maps: Tensor, residual: Tensor | None = None) -> Tensor:
        """``maps`` are written over."""
        (convolution,) = self._convolution
        return shift_relu(maps, convolution.folded[2], residual, self._add)


class FoldedNetwork:
    """A network whose norms with fixed statistics are folded into the convolutions before them.

    Modules and weights stay the network's own, and are folded anew for every pass, the frozen ones
    too: nothing tells of a tensor that was written to by its ``data``.

    Args:
        network: of images (B, 3, H, W); what :func:`traced` takes, as its modules are now.
    """

    def __init__(self, network: nn.Module):
        self._network = traced(network, everywhere=False)
        self._layers: list[FoldedConvolution] = []
        graph, stages = self._network.graph, []
        for conv, norm in convolutions_with_norms(self._network):
            module = module_of(self._network, conv)
            if module.bias is not None:
                continue
            layer = FoldedConvolution(module, module_of(self._network, norm))
            stages.append(str(conv.target).partition(".")[0])
            self._layers.append(layer)
            take_out(self._network, norm)
            conv.target = f"folded_{len(self._layers)}"
            self._network.add_submodule(conv.target, layer)
            if (found := activation_of(self._network, conv)) is None:
                continue
            relu, addition, residual, add = found
            self._network.add_submodule(f"{conv.target}_relu", ShiftedReLU(layer, add))
            with graph.inserting_before(relu):
                inputs = (conv,) if residual is None else (conv, residual)
                relu.replace_all_uses_with(graph.call_module(f"{conv.target}_relu", inputs))
            for old in filter(None, (relu, addition)):
                graph.erase_node(old)
        self._network.recompile()
        # The gradients of a stage are there when those of its last weights are: by stages they
        # come while the backward pass goes on.
        self._groups = [
            [layer for _, layer in group]
            for _, group in groupby(zip(stages, self._layers), key=lambda pair: pair[0])
        ]

    def __len__(self) -> int:
        """Norms that are folded."""
        return len(self._layers)

    def __call__(self, images: Tensor) -> Any:
        device, dtype = images.device.type, None
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        in_rows = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if in_rows else torch.preserve_format
        later = runs_kernels(images)
        try:
            for group, of_channels in zip(self._groups, self._of_channels()):
                tensors = [
                    tensor
                    for layer in group
                    for tensor in (layer.conv.weight, layer.norm.weight, layer.norm.bias)
                ]
                # Autocast leaves other precisions as they are.
                cast_to = dtype if tensors[0].dtype == torch.float32 else None
                shift, *weights = _Fold.apply(*of_channels, cast_to, layout, *tensors)
                shifts = shift.split([len(weight) for weight in weights])
                for layer, weight, shift in zip(group, weights, shifts):
                    in_relu = later and layer.has_relu
                    # A module's own way to set an attribute takes longer than all of the rest.
                    vars(layer)["folded"] = (
                        (weight, None, shift) if in_relu else (weight, shift, None)
                    )
            return self._network(images)
        finally:
            for layer in self._layers:
                vars(layer).pop("folded", None)

    @torch.no_grad()
    def _of_channels(self) -> Iterator[tuple[Tensor, ...]]:
        """Means, inverse deviations, scales and shifts of the channels of every group."""
        norms = [layer.norm for layer in self._layers]
        mean = torch.cat([norm.get_buffer("running_mean") for norm in norms])
        variances = [norm.get_buffer("running_var") for norm in norms]
        inverse = torch.cat(torch._foreach_add(variances, [norm.eps for norm in norms])).rsqrt_()
        scale = torch.cat([norm.weight for norm in norms]).mul_(inverse)
        shift = torch.cat([norm.bias for norm in norms]).addcmul_(mean, scale, value=-1)
        channels = [sum(layer.norm.num_features for layer in group) for group in self._groups]
        return zip(*(values.split(channels) for values in (mean, inverse, scale, shift)))
