"""A trained detector written as one file for other programs.

The exported graph takes pixels and gives boxes. What is left outside is resizing before it and, if
``model.nms_threshold`` is set, NMS after it. It is computed by the reference operations, which are
made of PyTorch's own.
"""

import contextlib
import io
import json
import logging
import math
import os
import platform
import warnings
from collections.abc import Mapping
from datetime import date
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import __version__
from ..d2.detections import UnusableDetectionsError, split_output
from ..modeling import StageInteractor
from ..ops import use_ops
from ..pages.page import render
from ..untrusted.files import read_json
from ..writing import new_file, write_atomically, write_text
from .blueprint import KEY, Blueprint, load_model
from .exported import INPUTS, OUTPUTS, ExportedDetector
from .weights import save_safetensors

logger = logging.getLogger(__name__)

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
_LARGEST_BATCH, _LARGEST_SIDE = 256, 8192


class Exported(NamedTuple):
    """What :func:`export_checkpoint` wrote, and how far it is from PyTorch."""

    path: str
    card: str | None  # the model card; None where there was one already, which stays as it is
    box_difference: float | None = None  # pixels, at most; None where it could not be compared
    score_difference: float | None = None


def export_checkpoint(
    checkpoint: str | os.PathLike,
    format: str = "onnx",
    path: str | os.PathLike | None = None,
    *,
    config_file: str | None = None,
    averaged: bool | None = None,
) -> Exported:
    """Writes the detector of a checkpoint, and a model card beside it.

    A graph that was written is run, and compared with PyTorch; safetensors are the weights
    themselves. The file carries what :class:`Detector` needs.

    Args:
        checkpoint: a ``.pth`` or ``.safetensors`` file.
        format: ``"onnx"``, ``"torch-export"`` or ``"safetensors"``.
        path: of the file to write; beside the checkpoint by default.
        config_file: for a checkpoint without a config of its own: the one that it was trained with.
        averaged: which of its weights, see :meth:`Detector.from_checkpoint`.

    Raises:
        ValueError: another format, or a path that does not fit it or is the checkpoint itself.
        FileNotFoundError, CheckpointError, ConfigError: see :meth:`Detector.from_checkpoint`.
        ImportError: a package that writes ONNX is missing.
        UnusableDetectionsError: the detector, or what was written, gives NaN.
    """
    checkpoint = os.fspath(checkpoint)
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {list(SUFFIXES)}, got {format!r}")
    suffix = SUFFIXES[format]
    path = os.fspath(path or os.path.splitext(checkpoint)[0] + suffix)
    if not path.endswith(suffix):
        raise ValueError(f"--output {path}: a file of the format {format} ends in {suffix}")
    if os.path.abspath(path) == os.path.abspath(checkpoint):
        raise ValueError(f"--output {path} is the checkpoint itself; name another file")
    model, blueprint = load_model(checkpoint, config_file, averaged=averaged)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    differences: tuple[float, float] | tuple[()] = ()
    if format == "safetensors":
        save_safetensors(model, blueprint.as_extra(), path)
    else:
        if format == "onnx":
            _require_onnx()
        program = export_program(model)
        if format == "onnx":
            save_onnx(program, blueprint, path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about weights that share memory
                extra = {f"{KEY}.json": blueprint.to_json()}
                with new_file(path) as file:
                    torch.export.save(program, file, extra_files=extra)
        differences = _compare(model, path)
    card = os.path.splitext(path)[0] + ".md"
    if os.path.exists(card):
        return Exported(path, None, *differences)
    save_model_card(card, blueprint, checkpoint, model)
    return Exported(path, card, *differences)


class ExportedGraph(nn.Module):
    """What an exported file computes: normalisation, detector, the best (query, class) pairs."""

    def __init__(self, model: StageInteractor):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: (B, 3, H, W) float32, 0 to 255, RGB unless the config says BGR. H and W are
                multiples of the coarsest stride. What pads an image at its right and bottom does
                not matter, as long as it is finite, but how much it is does: batch images whose
                sides round up to the same multiples.
            image_sizes: (B, 2) int64, height and width of each image without its padding.

        Returns:
            boxes (B, K, 4) xyxy in pixels of the input, scores (B, K), classes (B, K); best first.
            Scores that cannot be computed are NaN, and at least the last of an image is if any is.
        """
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < image_sizes[:, :1]  # (B, H)
        columns = torch.arange(width, device=images.device) < image_sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        found = self.model.predict(images * inside, image_sizes)
        last = torch.where(found.num_undefined[:, None] == 0, found.scores[:, -1:], math.nan)
        return found.boxes, torch.cat((found.scores[:, :-1], last), dim=1), found.classes


def export_program(model: StageInteractor) -> torch.export.ExportedProgram:
    """The detector in evaluation as one graph, for batches and images of any size."""
    stride = model.size_divisibility
    if stride < 1:
        raise ValueError(
            f"model.size_divisibility={stride}: a graph is exported for images whose sides are "
            "multiples of it"
        )
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    height, width = (
        torch.export.Dim(name, min=1, max=_LARGEST_SIDE // stride) for name in ("height", "width")
    )
    dynamic = ({0: batch, 2: stride * height, 3: stride * width}, {0: batch})
    graph = ExportedGraph(model.cpu().eval())
    # One example of any size; two images, since one would be taken for a constant.
    example = (
        torch.zeros(2, 3, 4 * stride, 5 * stride),
        torch.tensor([[4 * stride, 3 * stride]] * 2),
    )
    with use_ops("reference"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=dynamic, strict=False)


def save_onnx(program: torch.export.ExportedProgram, blueprint: Blueprint, path: str) -> None:
    """Writes an exported program as ONNX."""
    onnx = _require_onnx()
    # Attention is taken apart once more, and must be in the way in which it was exported.
    quiet = contextlib.redirect_stdout(io.StringIO())
    logging.disable(logging.WARNING)  # the exporter's thoughts about single operators
    try:
        with warnings.catch_warnings(), quiet, sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program, dynamo=True, input_names=INPUTS, output_names=OUTPUTS, verbose=False
            )
    finally:
        logging.disable(logging.NOTSET)
    assert written is not None  # it is for a file name alone
    model = written.model_proto
    stride = blueprint.config["model"].get("size_divisibility", 32)
    axes = {0: "batch", 2: f"{stride}*height", 3: f"{stride}*width"}
    for value in (*model.graph.input, *model.graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = axes[axis]
    onnx.helper.set_model_props(model, {KEY: blueprint.to_json()})
    write_atomically(path, lambda file: onnx.save(model, file))


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting to ONNX needs: pip install onnx onnxscript") from error
    return onnx


def _compare(model: StageInteractor, path: str) -> tuple[float, float] | tuple[()]:
    """How far boxes and scores are from PyTorch's, on noise of another size than the example."""
    try:
        exported, _ = ExportedDetector.load(path, "cpu", trusted=True)
    except ImportError as error:
        logger.warning(f"Not compared with PyTorch: {error}")
        return ()
    stride = model.size_divisibility
    noise = np.random.default_rng(0).integers(0, 256, (3, 6 * stride, 7 * stride - 5))
    inputs = [{"image": torch.from_numpy(noise).to(torch.uint8)}]
    with torch.inference_mode():
        outputs = [run(inputs)[0] for run in (model, exported)]
    if any(split_output(output)[1] for output in outputs):
        raise UnusableDetectionsError(
            f"{path}: detections in a picture of noise are NaN or infinite"
        )
    ours, theirs = (output["instances"] for output in outputs)
    boxes = (ours.pred_boxes.tensor - theirs.pred_boxes.tensor).abs().max()
    return boxes.item(), (ours.scores - theirs.scores).abs().max().item()


def save_model_card(path: str, blueprint: Blueprint, source: str, model: StageInteractor) -> None:
    """Writes what one should know about an exported detector, as Markdown."""
    config, results = blueprint.config, os.path.join(os.path.dirname(source), "results.json")
    scores: Any = {}
    if os.path.isfile(results):  # of whoever made the checkpoint
        found = read_json(results)
        scores = found.get("bbox") if isinstance(found, dict) else None
        if not isinstance(scores, dict) or not all(
            value is None or type(value) in (int, float) for value in scores.values()
        ):
            raise ValueError(f"{results} holds no metrics, {{'bbox': {{'AP': ...}}}}")
    backbone = config["model"]["backbone"]
    datasets = {part: _value(config, "dataloader", part, "dataset") for part in ("train", "test")}
    text = render(
        "model_card.md",
        blueprint=blueprint,
        config=config,
        date=date.today(),
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        source=os.path.basename(source),
        backbone=backbone.get("name", backbone["_target_"]),
        parameters=sum(p.numel() for p in model.parameters()),
        data={part: _value(of, "name") or _value(of, "names") for part, of in datasets.items()},
        iterations=_value(config, "train", "max_iter"),
        images=_value(config, "dataloader", "train", "total_batch_size"),
        scores=scores,
        thresholds=list(zip(blueprint.class_names, blueprint.thresholds or [])),
        inputs=INPUTS,
        outputs=OUTPUTS,
        augmentation=json.dumps(blueprint.input["augmentation"], indent=2),
        model=json.dumps(config["model"], indent=2),
    )
    write_text(path, text)


def _value(config: Any, *keys: str) -> Any:
    """A value of a config, whatever is there; None if it is not."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
