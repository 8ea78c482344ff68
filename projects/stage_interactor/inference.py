"""A trained detector made ready for use: weights in the compute precision, compiled if wanted."""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from .modeling import StageInteractor
from .modeling.detector import Predictions

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Layers that compute coordinates, in full precision whatever the rest is in.
_FULL_PRECISION = ("sampler", "head.box_out")


def prepare_for_inference(
    model: StageInteractor,
    *,
    dtype: str | torch.dtype = torch.float32,
    channels_last: bool = True,
    compile: bool = False,
    bucket: int = 1,
) -> "PreparedDetector":
    """A copy of the detector for inference alone; the model itself is not changed.

    BatchNorms are folded into the convolutions before them. To be used in place of the model in
    evaluation; coordinates, attention's biases and deformable convolutions stay in float32.

    Args:
        model: trained.
        dtype: what is computed in: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Convolutions and
            linear layers are kept in it.
        channels_last: memory layout of the convolutions.
        compile: by ``torch.compile``, with CUDA graphs on a GPU. Every new image size is compiled
            anew, which takes a minute or more: see ``bucket``.
        bucket: images are padded to multiples of it, so that few sizes occur. Rounded up to the
            model's ``size_divisibility``.

    Raises:
        ValueError: for another dtype or a bucket below 1.
    """
    check_options(dtype=dtype, bucket=bucket)
    dtype = DTYPES.get(dtype, dtype)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_norms(model.backbone)
    if channels_last:
        for part in (model.backbone, model.neck):
            part.to(memory_format=torch.channels_last)
        if hasattr(model.backbone, "layout"):
            model.backbone.layout = torch.channels_last
    if dtype != torch.float32:
        for name, module in model.named_modules():
            full = any(f".{part}." in f".{name}." for part in _FULL_PRECISION)
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not full:
                module.to(dtype)
    multiple = model.size_divisibility
    model.size_divisibility = -(-bucket // multiple) * multiple
    return PreparedDetector(model, dtype, channels_last, compile)


def check_options(*, dtype: str | torch.dtype = "float32", bucket: int = 1, **others: bool) -> None:
    """Raises a ValueError for options that :func:`prepare_for_inference` cannot take."""
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ValueError(f"train.inference.dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if bucket < 1:
        raise ValueError(f"train.inference.bucket must be at least 1 pixel, got {bucket}")
    unknown = set(others) - {"channels_last", "compile"}
    if unknown:
        raise ValueError(f"train.inference has no option {sorted(unknown)}")


def _fold_norms(backbone: nn.Module) -> None:
    """Folds each BatchNorm that follows a convolution into its weights: one pass less, same result.

    What torch.fx cannot trace stays as it is.
    """
    for name, network in backbone.named_children():
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            try:
                folded = fuse(network)
                folded.output_fmt = getattr(network, "output_fmt", "NCHW")  # of timm's networks
                setattr(backbone, name, folded)
            except Exception as error:  # whatever tracing a stranger's network raises
                logger.info(f"BatchNorms of {type(network).__name__} are not folded: {error}")


class PreparedDetector(nn.Module):
    """What :func:`prepare_for_inference` makes; takes and gives what the detector does."""

    def __init__(
        self, model: StageInteractor, dtype: torch.dtype, channels_last: bool, compile: bool
    ):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._compiled_sizes: set[tuple[int, ...]] = set()
        self._predict = model.predict
        if compile:
            cuda = model.device.type == "cuda"
            self._predict = torch.compile(
                model.predict,
                dynamic=False,
                fullgraph=True,
                mode="reduce-overhead" if cuda else "default",
            )
        self.compiles = compile

    @torch.inference_mode()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """See :meth:`StageInteractor.forward`."""
        device = self.model.device
        images = self.model.preprocess(batched_inputs)
        tensor = images.tensor.contiguous(memory_format=self.memory_format)
        sizes = torch.tensor(images.image_sizes, device=device)
        half = self.dtype != torch.float32
        with torch.autocast(device.type, self.dtype if half else torch.bfloat16, enabled=half):
            found = (
                self._announced(tensor, sizes) if self.compiles else self._predict(tensor, sizes)
            )
        return self.model.postprocess(found, images.image_sizes, batched_inputs)

    def _announced(self, images: torch.Tensor, sizes: torch.Tensor) -> Predictions:
        """Compiled prediction; says so where it has to compile first."""
        shape = tuple(images.shape)
        is_new = shape not in self._compiled_sizes
        if is_new:
            known = len(self._compiled_sizes)
            size = f"{shape[0]} x {shape[2]} x {shape[3]}"
            logger.info(f"Compiling for images of {size} (size {known + 1}; a minute or more) ...")
            start = time.perf_counter()
            self._compiled_sizes.add(shape)
        # PyTorch gives up after 8 sizes of all compiled detectors of a process.
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
            found = Predictions(*(value.clone() for value in self._predict(images, sizes)))
        if is_new:
            logger.info(f"Compiled for {size} in {time.perf_counter() - start:.0f} seconds")
        return found
