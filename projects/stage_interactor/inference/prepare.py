"""A trained detector made ready for use: weights in the compute precision, compiled if wanted."""

import copy
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_flatten

from ..modeling import StageInteractor
from ..modeling.batches import detect_by_size
from ..modeling.detector import Predictions
from ..modeling.extensions.settled_decoder import SettledDecoder
from ..ops.convolution import (
    activation_of,
    convolutions_with_norms,
    is_known,
    module_of,
    take_out,
    traced,
    used_once,
)
from ..ops.cuda_graph import Replayed, is_watched
from ..ops.dense import onednn_computes_in
from ..ops.shift_relu import shift_relu
from .precision import half_is_faster

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"  # the faster one

# Layers that compute coordinates, in full precision whatever the rest is in.
_FULL_PRECISION = ("sampler", "head.box_out")


def is_full_precision(module: str) -> bool:
    """Whether a module of the detector, by its name, stays in float32 whatever the rest is in."""
    return any(f".{part}." in f".{module}." for part in _FULL_PRECISION)


def choose_device(name: str | None) -> torch.device:
    """A device of PyTorch's that computes here; without a name a GPU if there is one.

    Raises:
        ValueError: there is none of that name; it lists those that there are.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if num_gpus else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # there are names of devices that this build lacks
        if device.type in ("cpu", "cuda", "mps", "xpu"):
            return device
    except torch.OutOfMemoryError:  # it is there
        raise
    except Exception as error:  # one kind a device, and assertions
        reason: Exception | None = error
    else:
        reason = None
    known = ["cpu", *(f"cuda:{index}" for index in range(num_gpus))]
    known += ["mps"] * torch.backends.mps.is_available()
    told = ", PyTorch finds no CUDA here" if not num_gpus else ""
    raise ValueError(
        f"device {name!r} (--device): a detector can be used on {', '.join(known)}{told}"
    ) from reason


def prepare_for_inference(
    model: StageInteractor,
    *,
    dtype: str | torch.dtype = torch.float32,
    channels_last: bool = True,
    compile: bool = False,
    bucket: int = 1,
) -> "PreparedDetector":
    """A copy of the detector for inference alone; the model itself is not changed.

    BatchNorms are folded into the convolutions before them, on a CPU and on CUDA ReLUs and
    additions too, so the copy stays on its device. To be used in place of the model in evaluation;
    coordinates, attention's biases and deformable convolutions stay in float32.

    Args:
        model: trained.
        dtype: what is computed in: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, the
            faster of the first two. Convolutions and linear layers are kept in it.
        channels_last: memory layout of the convolutions.
        compile: by ``torch.compile``, with CUDA graphs on a GPU. Every new image size is compiled
            anew, which takes a minute or more: see ``bucket``. On a CPU what is compiled is used
            where it is the faster one, which is measured; a size where it is not is the last one.
        bucket: images are padded to multiples of it, so that few sizes occur. Rounded up to the
            model's ``size_divisibility``. A model sees its padding: AP with another bucket is
            another one, by half a point and more where it pads much.

    Raises:
        ValueError: for another dtype or a bucket below 1.
    """
    if dtype == AUTO:
        half, told = half_is_faster(torch.bfloat16, model.device)
        logger.info(f"dtype=auto: {told}")
        dtype = torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {[*DTYPES, AUTO]}, got {dtype!r}")
    if compile:
        require_compilable(model)
    if bucket < 1:
        raise ValueError(f"bucket must be at least 1 pixel, got {bucket}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    plain = None
    if compile and model.device.type == "cpu":
        options: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last, "bucket": bucket}
        plain = prepare_for_inference(model, **options).model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    can_fuse = model.device.type == "cuda" or (
        model.device.type == "cpu" and onednn_computes_in(dtype)
    )
    # A compiler fuses activations itself.
    _fuse_convolutions(model.backbone, activations=can_fuse and not compile)
    if channels_last:
        for part in (model.backbone, model.neck):
            part.to(memory_format=torch.channels_last)
        if hasattr(model.backbone, "layout"):
            setattr(model.backbone, "layout", torch.channels_last)  # noqa: B010
    if dtype != torch.float32:
        for name, module in model.named_modules():
            layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            if layer and not is_full_precision(name):
                module.to(dtype)
    multiple = max(model.size_divisibility, 1)
    model.size_divisibility = -(-bucket // multiple) * multiple
    return PreparedDetector(model, dtype, channels_last, compile, plain)


def require_compilable(model: StageInteractor) -> None:
    """Raises a ValueError for a detector that does not do the same for all images."""
    if isinstance(model.decoder, SettledDecoder):
        raise ValueError(
            "model.decoder.parts.cascade=SettledDecoder ends a cascade by what is found, which "
            "cannot be compiled: leave compile out (train.inference.compile=false)"
        )


def replayed_on_gpu(model: StageInteractor) -> "StageInteractor | PreparedDetector":
    """The detector as it is, computed without Python in the way where that can be: on CUDA."""
    if model.device.type != "cuda":
        return model
    replayed = PreparedDetector(model, torch.float32, channels_last=False, compile=False)
    replayed.training = model.training  # what is evaluated is trained on afterwards
    return replayed


def _fuse_convolutions(backbone: nn.Module, activations: bool) -> None:
    """Folds BatchNorms into the convolutions before them and, if wanted, ``activations`` too.

    What torch.fx cannot trace, or not as it is, stays as it is.
    """
    for name, network in backbone.named_children():
        if not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU)) for m in network.modules()):
            continue
        try:
            _require_plain(network)
            own = not all(map(_is_known, network.modules()))
            fused = traced(copy.deepcopy(network) if own else network, everywhere=True)
            for conv, norm in convolutions_with_norms(fused):
                folded = fuse_conv_bn_eval(module_of(fused, conv), module_of(fused, norm))
                fused.set_submodule(str(conv.target), folded)
                take_out(fused, norm)
            if activations:
                _fuse_activations(fused)
            fused.recompile()
            fused.delete_all_unused_submodules()
            if own:
                _require_same(fused, network)
            # What timm's networks say of their maps.
            setattr(fused, "output_fmt", getattr(network, "output_fmt", "NCHW"))  # noqa: B010
            setattr(backbone, name, fused)
        except Exception as error:  # whatever tracing a stranger's network raises
            logger.info(f"Convolutions of {type(network).__name__} are not fused: {error}")


_OURS = __name__.removesuffix("inference.prepare")  # what modules of this package begin with


def _is_known(module: nn.Module) -> bool:
    return is_known(module) or type(module).__module__.startswith(_OURS)


def _require_plain(network: nn.Module) -> None:
    """Raises a ValueError if a module does what is not in its class's code."""
    if is_watched(network):
        raise ValueError("it has hooks")
    for module in network.modules():
        if module._compiled_call_impl is not None or "forward" in vars(module):
            raise ValueError(f"{type(module).__name__} has another forward method than its class")


@torch.no_grad()
def _require_same(fused: nn.Module, network: nn.Module) -> None:
    """Raises a ValueError if a network of one's own is not what a trace has made of it.

    What it remembers or decides by itself does not show there. So both are given images.
    """
    sizes = (64, 96), (96, 64)
    device = next((p.device for p in network.parameters()), None)
    with torch.random.fork_rng([device] if device and device.type == "cuda" else []):
        images = [torch.randn(2, 3, *size, dtype=torch.float64, device=device) for size in sizes]
        found, expected = (
            [tree_flatten(module(batch.clone())) for batch in images]
            for module in (copy.deepcopy(part).double() for part in (fused, network))
        )
    for (ours, form), (theirs, expected_form) in zip(found, expected):
        if form != expected_form:
            raise ValueError("its results have another form in a trace")
        for one, two in zip(ours, theirs):
            most = 1e-4 * two.abs().max().item()  # norms were folded in float32
            torch.testing.assert_close(one, two, equal_nan=True, rtol=0, atol=most)


class FusedConvolution(nn.Module):
    """ReLU of a convolution, to which a residual may be added: one oneDNN operation on a CPU, and
    elsewhere one after the convolution.

    Args:
        conv: of which.
        overwrites: the result may lie where the residual was, which nobody else needs: then the
            addition is in the one operation too.
        add: how a residual of another shape or precision than the convolution's is added.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        overwrites: bool = False,
        add: Callable[[Any, Any], Any] = operator.add,
    ):
        super().__init__()
        self.conv, self._overwrites, self._add = conv, overwrites, add

    def forward(self, features: Tensor, residual: Any = None) -> Tensor:
        """``features`` (B, C, H, W); ``residual`` in the result's shape, or what can be added."""
        conv = self.conv
        weight = conv.weight
        features = features.to(weight.dtype)
        onednn = features.device.type == "cpu" and onednn_computes_in(weight.dtype)
        if not onednn or features.dim() != 4 or not features.numel():
            return shift_relu(
                conv._conv_forward(features, weight, None), conv.bias, residual, self._add
            )
        where = conv.padding, conv.stride, conv.dilation, conv.groups
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                features, weight, conv.bias, *where, "relu", [], ""
            )
        if not self._overwrites or not self._is_alike(residual, features):
            maps = conv._conv_forward(features, weight, conv.bias)
            return shift_relu(maps, None, residual, self._add)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, features, weight, conv.bias, *where, "add", 1.0, "relu", [], ""
        )

    def _is_alike(self, residual: Any, features: Tensor) -> bool:
        """Whether it has the shape and the precision of the convolution's result."""
        conv = self.conv
        paddings: Any = conv.padding
        geometry = zip(features.shape[2:], paddings, conv.kernel_size, conv.dilation, conv.stride)
        size = [
            (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for n, padding, kernel, dilation, stride in geometry
        ]
        return (
            isinstance(residual, Tensor)
            and residual.dtype == conv.weight.dtype
            and residual.shape == (len(features), conv.out_channels, *size)
        )


def _fuse_activations(network: torch.fx.GraphModule) -> None:
    """Convolution and ReLU, or convolution, addition and ReLU, become one in a traced network.

    A result that is the convolution's alone may be written over. Nothing is computed later than it
    was but where all in between only reads what it is given.
    """
    graph = network.graph

    def is_plain(node: Any) -> bool:
        """Whether it is a convolution that oneDNN takes as it is."""
        module = module_of(network, node)
        return (
            type(module) is nn.Conv2d
            and isinstance(module.padding, tuple)
            and module.padding_mode == "zeros"
            and not node.kwargs
            and used_once(network, node)
        )

    def only_reads(node: torch.fx.Node) -> bool:
        """Whether it gives something new and leaves what it is given."""
        module = module_of(network, node)
        return type(module) in _READERS and not getattr(module, "_overwrites", False)

    for conv in list(graph.nodes):
        if not is_plain(conv) or (found := activation_of(network, conv)) is None:
            continue
        relu, addition, residual, add = found
        overwrites, place, arguments = False, conv, conv.args
        if residual is not None:
            order = {node: index for index, node in enumerate(graph.nodes)}
            between = list(graph.nodes)[order[conv] + 1 : order[addition]]
            if not all(map(only_reads, between)):
                continue
            others = [user for user in residual.users if user is not addition]
            overwrites = type(module_of(network, residual)) in (nn.Conv2d, FusedConvolution) and (
                all(only_reads(user) and order[user] < order[addition] for user in others)
                and conv not in others  # which would read what it writes
            )
            place, arguments = relu, (*conv.args, residual)
        fused = FusedConvolution(module_of(network, conv), overwrites, add)
        network.set_submodule(conv.target, fused)
        with graph.inserting_before(place):
            new = graph.call_module(conv.target, arguments)
        relu.replace_all_uses_with(new)
        for old in filter(None, (relu, addition, conv)):
            graph.erase_node(old)


_READERS = nn.Conv2d, FusedConvolution, nn.MaxPool2d, nn.AvgPool2d


class PreparedDetector(nn.Module):
    """What :func:`prepare_for_inference` makes; takes and gives what the detector does.

    On CUDA what it computes for images of a size is recorded at the third time, and replayed from
    then on: results are the same, and Python is not in the way.
    ``plain`` is what takes the place of a compiled ``model`` where that is slower.
    """

    def __init__(
        self,
        model: StageInteractor,
        dtype: torch.dtype,
        channels_last: bool,
        compile: bool,
        plain: StageInteractor | None = None,
    ):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.plain = plain
        self._compiled_sizes: dict[tuple[int, ...], bool] = {}  # and whether it is used
        self._predict: Callable[..., Any]
        if compile:
            cuda = model.device.type == "cuda"
            self._predict = torch.compile(
                model.predict,
                dynamic=False,
                fullgraph=True,
                mode="reduce-overhead" if cuda else "default",
            )
        else:
            self._predict = Replayed(model.predict, model)
        self.compiles = compile

    @property
    def size_divisibility(self) -> int:
        return self.model.size_divisibility

    @torch.inference_mode()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """See :meth:`StageInteractor.forward`."""

        def detect(images: list[Mapping[str, Any]]) -> list[dict]:
            # Another number of images would be compiled anew: the last one makes it up.
            missing = (len(batched_inputs) - len(images)) * self.compiles
            return self._detect(images + images[-1:] * missing)

        return detect_by_size(detect, batched_inputs, self.size_divisibility)

    def _detect(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """Of images of one padded size."""
        device = self.model.device
        batch = self.model.preprocess(batched_inputs)
        tensor = batch.tensor.contiguous(memory_format=self.memory_format)
        half = self.dtype != torch.float32
        with torch.autocast(device.type, self.dtype if half else torch.bfloat16, enabled=half):
            found = (
                self._announced(tensor, batch.sizes)
                if self.compiles
                else Predictions(*self._predict(tensor, batch.sizes))
            )
        return self.model.postprocess(
            found, batch.image_sizes, batched_inputs, self.model.nms_threshold
        )

    def _announced(self, images: Tensor, sizes: Tensor) -> Predictions:
        """Compiled prediction, where that is the faster one; says so where it compiles first."""
        shape = tuple(images.shape)
        known = self._compiled_sizes.get(shape)
        if self.plain is not None and not all(self._compiled_sizes.values()) and not known:
            return self.plain.predict(images, sizes)
        if known is None:
            number = len(self._compiled_sizes) + 1
            size = f"{shape[0]} x {shape[2]} x {shape[3]}"
            logger.info(f"Compiling for images of {size} (size {number}; a minute or more) ...")
            start = time.perf_counter()
            self._compiled_sizes[shape] = True
        # PyTorch gives up after 8 sizes of all compiled detectors of a process.
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
            found = Predictions(*(value.clone() for value in self._predict(images, sizes)))
            if known is None:
                told = f"Compiled for {size} in {time.perf_counter() - start:.0f} seconds"
                if self.plain is not None:
                    told += self._compare(images, sizes)
                logger.info(told)
        return found

    def _compare(self, images: Tensor, sizes: Tensor) -> str:
        """Which is the faster one for images of this size, from now on, and in words."""
        assert self.plain is not None
        ways = self._predict, self.plain.predict
        times: list[list[float]] = [[], []]
        for turn in range(4):
            for way, found in zip(ways, times):
                start = time.perf_counter()
                way(images, sizes)
                if turn:  # the first one gets ready
                    found.append(time.perf_counter() - start)
        compiled, plain = (min(found) for found in times)
        self._compiled_sizes[tuple(images.shape)] = wins = compiled < plain
        return f": {1e3 * compiled:.1f} ms, {1e3 * plain:.1f} as it was, so it is " + (
            "used" if wins else "not used, and nothing else is compiled"
        )
