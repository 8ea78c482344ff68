"""A CUDA device that is not there: tensors say they are on it, and are computed on the CPU.

With it, what a program sends to a device, reads back from it and asks of it can be counted, and a
CUDA graph recorded and replayed, on any machine. It is stricter than a device: it refuses what a
device would do in silence and slowly, and, while a graph is recorded, what a recording cannot hold.

Autocast is that of the CPU, which casts in fewer places; kernels are the CPU's own.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
# Operations whose result has a size that the host must learn.
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}


class DeviceTensor(torch.Tensor):
    """Says that it is on the device; ``elem`` has its values."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> "DeviceTensor":
        # For PyTorch's own code it is on the CPU, whose autocast and autograd it gets.
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, elem.stride(), elem.storage_offset(), dtype=elem.dtype
        )
        tensor.elem = elem
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def cpu(self, *args: Any) -> Tensor:
        return _active().to_host(self)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copies = kwargs.pop("copy", False)
        if args and isinstance(args[0], DeviceTensor):
            args = (DEVICE, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cpu":
            if dtype in (None, self.dtype):
                return self.clone() if copies else self
            return super().to(dtype)
        return _active().to_host(self, dtype, non_blocking)

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = DeviceTensor(self.elem.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of a stand-in that is not switched on")


def _active() -> "StandIn":
    assert StandIn.active is not None, "the stand-in is switched off"
    return StandIn.active


def on_host(values: Any) -> Any:
    """Values of the device, for a test to look at; nothing is counted."""
    return tree_map(lambda x: x.elem.clone() if isinstance(x, DeviceTensor) else x, values)


class StandIn(TorchDispatchMode):
    """The device; see :func:`stand_in_device`.

    Attributes:
        dispatched: operations by name.
        launched: those of them that compute or move something: no views, no memory asked for.
        waits: where the host has waited for the device.
        uploads: bytes of each transfer to the device.
        replays: of graphs.
    """

    active: "StandIn | None" = None

    def __init__(self) -> None:
        super().__init__()
        # Only under this key are factories with device="cuda" asked for without a driver.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.pinned: set[int] = set()
        self.recording: list[Callable[[], None]] | None = None
        self.reset()

    def reset(self) -> None:
        self.dispatched: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()
        self.waits: list[str] = []
        self.uploads: list[int] = []
        self.replays = 0

    def _wait(self, what: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"a graph cannot hold {what}")
        ours = [f for f in traceback.extract_stack() if "stage_interactor" in f.filename]
        self.waits.append(
            f"{what}: " + " < ".join(f"{f.filename}:{f.lineno}" for f in ours[:-3:-1])
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return DEVICE
        name = func._schema.name.split("::")[1]
        if kwargs.pop("pin_memory", None) and self.recording is None:
            made = func(*args, **kwargs)
            self.pinned.add(made.untyped_storage()._cdata)
            return made
        if name == "_pin_memory":
            copy = args[0].clone()
            self.pinned.add(copy.untyped_storage()._cdata)
            return copy
        if name == "is_pinned":
            return args[0].untyped_storage()._cdata in self.pinned
        leaves = tree_leaves((args, kwargs))
        ours = [x for x in leaves if isinstance(x, DeviceTensor)]
        if name == "_to_copy" and (moved := self._moved(args[0], kwargs)) is not None:
            return moved
        target = kwargs.get("device")
        here = bool(ours) or (target is not None and torch.device(target).type == "cuda")
        if here and name != "copy_":
            tensors = [x for x in leaves if isinstance(x, Tensor) and x.dim()]
            if not all(isinstance(x, DeviceTensor) for x in tensors):
                raise RuntimeError(f"{name} has tensors of the host and of the device")
        if here:
            self.dispatched[name] += 1
            views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
            if not views and "empty" not in name:
                self.launched[name] += 1
            by_mask = name == "index" and any(
                isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
                for x in tree_leaves(args[1])
            )
            if (
                name in ("_local_scalar_dense", "is_nonzero", "equal")
                or by_mask
                or (name in _SIZED_BY_VALUES)
            ):
                self._wait(name)
            if name == "copy_" and not all(isinstance(x, DeviceTensor) for x in args[:2]):
                self._wait("copy_ between host and device")
        return self.run(func, args, kwargs, here)

    def run(self, func: Callable, args: Any, kwargs: Any, here: bool = True) -> Any:
        """Computes on the CPU; results are the device's if ``here``."""

        def plain(x: Any) -> Any:
            if isinstance(x, torch.device) and x.type == "cuda":
                return torch.device("cpu")
            return x.elem if isinstance(x, DeviceTensor) else x

        args_, kwargs_ = tree_map(plain, args), tree_map(plain, kwargs)
        made = func(*args_, **kwargs_)
        schema = getattr(func, "_schema", None)
        if self.recording is not None and here:
            self.recording.append(_again(func, args_, kwargs_, made))
        if schema is not None:
            written = [
                args[i] if i < len(args) else kwargs[a.name]
                for i, a in enumerate(schema.arguments)
                if a.alias_info is not None
                and a.alias_info.is_write
                and (i < len(args) or a.name in kwargs)
            ]
            if written:
                return (
                    (written[0] if len(schema.returns) == 1 else tuple(written))
                    if (schema.returns)
                    else None
                )
        return tree_map(lambda x: DeviceTensor(x) if here and isinstance(x, Tensor) else x, made)

    def to_host(
        self, tensor: DeviceTensor, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Tensor:
        """Waited for: one that is not waited for must be followed by a wait for an event."""
        self.dispatched["copy to host"] += 1
        self.launched["copy to host"] += 1
        self._wait("a copy to the host" + " (unfinished)" * non_blocking)
        return tensor.detach().elem.to(dtype or tensor.dtype, copy=True)

    def _moved(self, tensor: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The result of a ``_to_copy`` between host and device; None if it is none."""
        device = options.get("device")
        if device is None:
            return None
        device, non_blocking = torch.device(device), options.pop("non_blocking", False)
        if isinstance(tensor, DeviceTensor):
            if options.get("dtype") in (None, tensor.dtype):
                return DeviceTensor(tensor.elem)  # it is where it is asked to be
            options.pop("device")
            return None
        if device.type == "cuda":
            self.dispatched["copy to device"] += 1
            self.launched["copy to device"] += 1
            pinned = tensor.untyped_storage()._cdata in self.pinned
            if not (pinned and non_blocking):
                self._wait("a copy of pageable memory")
            elif self.recording is not None:
                self._wait("a copy from the host")
            self.uploads.append(tensor.numel() * tensor.element_size())
            return DeviceTensor(torch.ops.aten._to_copy(tensor, dtype=options.get("dtype")).clone())
        return None

    def kernel(self, name: str, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """A launch that is no operator of PyTorch."""
        self.dispatched[name] += 1
        self.launched[name] += 1
        return self.run(func, args, kwargs)


def _again(func: Callable, args: Any, kwargs: Any, made: Any) -> Callable[[], None]:
    """Computes once more into the tensors that were made when it was recorded."""
    before = [x for x in tree_leaves(made) if isinstance(x, Tensor)]

    def replay() -> None:
        after = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
        for old, new in zip(before, after, strict=True):
            if old.shape != new.shape:
                raise RuntimeError(f"{func} has another shape on replay")
            if old.numel() and old.data_ptr() != new.data_ptr():  # no view of what is there
                old.copy_(new)

    return replay


class _Graph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self, device: StandIn):
        self._device, self.steps = device, []

    def replay(self) -> None:
        if self._device.recording is not None:
            raise RuntimeError("a graph is replayed while one is recorded")
        self._device.replays += 1
        self._device.dispatched["graph replay"] += 1
        self._device.launched["graph replay"] += 1
        # Casts are in the recording; what surrounds a replay changes nothing of it.
        with torch.no_grad(), _off(), _Autocast("cpu", enabled=False):
            for step in self.steps:
                step()

    def reset(self) -> None:
        self.steps = []


@contextmanager
def _off() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _as_cpu(device_type: str) -> str:
    return "cpu" if device_type == "cuda" else device_type


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__(_as_cpu(device_type), *args, **kwargs)


@contextmanager
def stand_in_device() -> Iterator[StandIn]:
    """While it is there, ``"cuda:0"`` is a device; ``module.to("cuda:0")`` moves a model."""
    from stage_interactor.ops import (
        cuda_graph,
        map_norm,
        map_norm_triton,
        mixing_triton,
        sampling,
        sampling_triton,
        shift_relu,
        shift_relu_triton,
    )

    device = StandIn()
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    foreach = torch.utils._foreach_utils

    @contextmanager
    def record(graph: _Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        if device.recording is not None:
            raise RuntimeError("a graph is recorded inside of another")
        device.recording = []
        try:
            yield
            graph.steps = device.recording
        finally:
            device.recording = None

    @contextmanager
    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    # What the kernels do, by the CPU's form of the same.
    def sample_forward(value, xy, weights, sizes, strides, map_sizes=None):
        def compute(value, xy, weights, map_sizes):
            known = sizes if map_sizes is None else map_sizes.flatten().tolist()
            return sampling.sample_op(value, xy, weights, known, strides)

        return device.kernel("sample_forward", compute, value, xy, weights, map_sizes)

    def sample_backward(grad, value, xy, weights, sizes, strides, total, map_sizes=None):
        def compute(grad, value, xy, weights, total, map_sizes):
            known = sizes if map_sizes is None else map_sizes.flatten().tolist()
            grad_xy, grad_weights, reads = sampling._backward_of_points(
                grad, value, xy, weights, known, strides
            )
            if total is not None:
                total += sampling._scatter([reads], value).to(total.dtype)
            return grad_xy, grad_weights

        inputs = grad, value, xy, weights, total, map_sizes
        return device.kernel("sample_backward", compute, *inputs)

    def shift_forward(maps, shift, residual):
        device.kernel("shift_relu", shift_relu._plain, maps, shift, residual)

    def shift_backward(grad, out):
        return device.kernel("shift_relu_backward", shift_relu._plain_backward, grad, out)

    def norm_forward(*inputs):
        return device.kernel("group_norm", map_norm._plain_forward, *inputs)

    def norm_backward(*inputs):
        return device.kernel("group_norm_backward", map_norm._plain_backward, *inputs)

    group = foreach._group_tensors_by_device_and_dtype

    def grouped(lists: Any, *args: Any, **kwargs: Any) -> Any:
        found = group(lists, *args, **kwargs)
        return {(lists[0][0].device, dtype): parts for (_, dtype), parts in found.items()}

    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(data, **kwargs)
        return made if device is None else made.to(device)

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    cuda = torch.cuda
    replaced = [
        (torch, "tensor", tensor),
        (torch, "autocast", _Autocast),
        (
            torch,
            "is_autocast_enabled",
            lambda kind="cuda": enabled("cpu" if kind == "cuda" else kind),
        ),
        (torch, "get_autocast_dtype", lambda kind: dtype("cpu" if kind == "cuda" else kind)),
        (cuda, "is_available", lambda: True),
        (cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (cuda, "current_device", lambda: 0),
        (cuda, "device_of", nothing),
        (cuda, "device", nothing),
        (cuda, "stream", nothing),
        (cuda, "Stream", lambda *args, **kwargs: stream),
        (cuda, "current_stream", lambda *args, **kwargs: stream),
        (cuda, "synchronize", lambda *args: device._wait("synchronize")),
        (cuda, "get_rng_state", lambda *args: torch.get_rng_state()),
        (cuda, "set_rng_state", lambda state, *args: None),
        (cuda, "max_memory_allocated", lambda *args: 0),
        (cuda, "CUDAGraph", lambda *args, **kwargs: _Graph(device)),
        (cuda, "graph", record),
        (cuda, "graph_pool_handle", lambda: (0, 0)),
        (foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, DeviceTensor]),
        (import_module("torch.optim.optimizer"), "_group_tensors_by_device_and_dtype", grouped),
        (import_module("torch.nn.utils.clip_grad"), "_group_tensors_by_device_and_dtype", grouped),
        (mixing_triton, "supports", lambda *args: True),
        (sampling_triton, "sample_forward", sample_forward),
        (sampling_triton, "sample_backward", sample_backward),
        (shift_relu_triton, "forward", shift_forward),
        (shift_relu_triton, "backward", shift_backward),
        (map_norm_triton, "forward", norm_forward),
        (map_norm_triton, "backward", norm_backward),
        (torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        (cuda_graph, "_streams", {}),
        (StandIn, "active", device),
    ]
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            replaced.append((torch.optim.Optimizer, name, lambda self: None))
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(device)
        yield device
