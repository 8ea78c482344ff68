"""A trained detector written as one file for other programs.

The exported graph takes pixels and gives boxes. What is left outside is resizing before it and, if
``model.nms_threshold`` is set, NMS after it. It is computed by the reference operations, which are
made of PyTorch's own.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import __version__
from ..d2.detections import UnusableDetectionsError, split_output
from ..d2.structures import ImageList
from ..errors import UserError
from ..modeling import StageInteractor
from ..ops import use_ops
from ..pages.page import render
from ..untrusted.files import read_json
from ..writing import new_file, write_atomically, write_text
from .blueprint import KEY, Blueprint, load_model
from .exported import INPUTS, OUTPUTS, ExportedDetector, require_openvino
from .hub import PREFIX
from .lowered import PRECISIONS, lowered_modules, require_nncf, to_half, to_int8
from .weights import save_safetensors

logger = logging.getLogger(__name__)

SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",  # and the weights beside it in a .bin file
    "torch-export": ".pt2",
    "safetensors": ".safetensors",
}
# How far AP may fall below PyTorch's, in percent.
TOLERANCES = {"fp32": 0.1, "fp16": 0.5, "int8": 1.5}
_MOST_PIXELS, _MOST_SCORE = 1.0, 0.01  # that a file of float32 may differ by, where AP is unknown
_METRICS = {
    "COCOEvaluator": "COCO AP",
    "PascalVOCDetectionEvaluator": "Pascal VOC AP",
    "LVISEvaluator": "LVIS AP",
}
_LARGEST_BATCH, _LARGEST_SIDE = 256, 8192
# The end of a card that was written here; the hash tells whether somebody has changed it since.
_MARK = "<!-- written by stage-interactor: sha256 of the lines above is {} -->\n"
_MARKED = re.compile(r"(.*)" + _MARK.format("([0-9a-f]{64})").strip() + r"\s*", re.DOTALL)


class ExportError(UserError, RuntimeError):
    """What was exported is not what the checkpoint is."""


class Judge(Protocol):
    """What tells what a detector is worth: :class:`stage_interactor.engine.judge.Judge`."""

    path: str  # of the data
    part: str  # of them, that is evaluated on
    apart: bool  # whether :meth:`pictures` are others than those

    def __len__(self) -> int: ...

    def __call__(self, detect: Any, blueprint: Blueprint) -> dict[str, float]: ...

    def pictures(self, blueprint: Blueprint) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class Exported:
    """What :func:`export_checkpoint` wrote, and how far it is from PyTorch."""

    path: str
    card: str | None  # the model card; None where somebody's own is in its place, which stays
    # Pixels, at most; None where it could not be compared, or is of another precision.
    box_difference: float | None = None
    score_difference: float | None = None
    expected: Mapping[str, float] | None = None  # COCO's metrics of PyTorch, where it was judged
    metrics: Mapping[str, float] | None = None  # and of the file
    kept: tuple[str, ...] = ()  # parts in float32 that would have been of less


def export_checkpoint(
    checkpoint: str | os.PathLike,
    format: str = "onnx",
    path: str | os.PathLike | None = None,
    *,
    config_file: str | None = None,
    averaged: bool | None = None,
    precision: str = "fp32",
    judge: Judge | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Writes the detector of a checkpoint, and a model card beside it.

    A graph that was written is run, and compared with PyTorch; safetensors are the weights
    themselves. The file carries what :class:`Detector` needs.

    With a judge the AP of the file and PyTorch's are measured. Where a file of less precision
    loses too much, the parts of the detector that cost most stay in float32, as few as will do.

    Args:
        checkpoint: a ``.pth`` or ``.safetensors`` file.
        format: ``"onnx"``, ``"openvino"``, ``"torch-export"`` or ``"safetensors"``.
        path: of the file to write; beside the checkpoint by default.
        config_file: for a checkpoint without a config of its own: the one that it was trained with.
        averaged: which of its weights, see :meth:`Detector.from_checkpoint`.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``, of ONNX and OpenVINO: weights and features
            of its layers. What computes places stays in float32, see
            :mod:`~stage_interactor.inference.lowered`.
        judge: data to measure AP on, and for int8 the ranges of the features.
        tolerance: how far AP may fall, in percent; 0.1, 0.5 or 1.5 by default, by precision.

    Raises:
        ValueError: another format or precision, or a path that does not fit it or is the checkpoint
            itself; int8 without a judge.
        FileNotFoundError, CheckpointError, ConfigError: see :meth:`Detector.from_checkpoint`.
        ImportError: a package that writes the format is missing.
        UnusableDetectionsError: the detector, or what was written, gives NaN.
        ExportError: AP falls by more than the tolerance, whatever stays in float32.
    """
    checkpoint = os.fspath(checkpoint)
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {list(SUFFIXES)}, got {format!r}")
    _check_precision(format, precision, judge, tolerance)
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    suffix = SUFFIXES[format]
    if path is None and checkpoint.startswith(PREFIX):
        raise ValueError(f"{checkpoint} lies in a cache: name the file to write, with --output")
    # So that each has a card of its own.
    own = (".openvino" if format == "openvino" else "") + f".{precision}" * (precision != "fp32")
    path = os.fspath(path or f"{os.path.splitext(checkpoint)[0]}{own}{suffix}")
    if not path.endswith(suffix):
        raise ValueError(f"--output {path}: a file of the format {format} ends in {suffix}")
    if os.path.abspath(path) == os.path.abspath(checkpoint):
        raise ValueError(f"--output {path} is the checkpoint itself; name another file")
    if format in ("onnx", "openvino"):
        _require_onnx()
    if format == "openvino":
        require_openvino()
    if precision == "int8":
        require_nncf()
    model, blueprint = load_model(checkpoint, config_file, averaged=averaged)
    expected = None if judge is None else judge(model.cpu(), blueprint)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    result: Exported
    if format == "safetensors":
        save_safetensors(model, blueprint.as_extra(), path)
        result = Exported(path, None, expected=expected, metrics=expected)
    elif format == "torch-export":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights that share memory
            extra = {f"{KEY}.json": blueprint.to_json()}
            with new_file(path) as file:
                torch.export.save(export_program(model), file, extra_files=extra)
        result = _compared(model, blueprint, path, judge, expected)
        try:
            _require_tolerance(result, tolerance)
        except ExportError:
            os.unlink(path)
            raise
    else:
        with tempfile.TemporaryDirectory() as folder:
            maker = _Maker(model, blueprint, format, precision, judge, expected, folder)
            result = maker.within(tolerance)
            _move(result.path, path)
        result = replace(result, path=path)
    card = os.path.splitext(path)[0] + ".md"
    if os.path.lexists(card) and not (os.path.isfile(card) and is_ours(card)):
        return result
    options: dict[str, Any] = {"precision": precision, "judge": judge, "result": result}
    write_text(card, model_card(blueprint, checkpoint, model, **options))
    return replace(result, card=card)


def _check_precision(
    format: str, precision: str, judge: Judge | None, tolerance: float | None
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision (--precision) must be one of {list(PRECISIONS)}, got {precision!r}"
        )
    if precision != "fp32" and format not in ("onnx", "openvino"):
        raise ValueError(f"--precision {precision} is for --format onnx and openvino, not {format}")
    if precision == "int8" and judge is None:
        raise ValueError(
            "--precision int8 needs data, to measure the ranges of the features on and what it "
            "costs: --data FOLDER"
        )
    if tolerance is not None:
        if judge is None:
            raise ValueError("--tolerance is of the AP that is measured on data: --data FOLDER")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"--tolerance must be 0 or more, got {tolerance}")


@dataclass
class _Maker:
    """Writes the graph of a detector, with one part or another in float32."""

    model: StageInteractor
    blueprint: Blueprint
    format: str
    precision: str
    judge: Judge | None
    expected: Mapping[str, float] | None
    folder: str  # for what is only tried

    def __post_init__(self) -> None:
        self.graph = to_onnx(export_program(self.model), self.blueprint)
        self.modules = lowered_modules(self.model)
        self.calibration: list[dict[str, np.ndarray]] = []
        if self.precision == "int8" and self.judge is not None:
            stride = self.model.size_divisibility
            for picture in self.judge.pictures(self.blueprint):
                images = ImageList.from_tensors([picture["image"].float()], stride)
                values = images.tensor.numpy(), np.array(images.image_sizes)
                self.calibration.append(dict(zip(INPUTS, values)))

    def within(self, tolerance: float) -> Exported:
        """The first that loses no more AP than this: all lowered, or with as few parts kept as will
        do, those that cost most first."""
        result = self.make(())
        if self.precision == "fp32" or self.judge is None or _lost(result) <= tolerance:
            _require_tolerance(result, tolerance)
            return result
        parts = list(dict.fromkeys(self.modules.values()))
        told = f"{self.precision} loses {_lost(result):.2f} AP"
        logger.warning(f"{told}, more than {tolerance:g}: which parts do is tried ({len(parts)})")
        losses = {part: _lost(self.make((part,))) for part in parts}
        kept: tuple[str, ...] = ()
        for part in sorted(parts, key=lambda part: losses[part]):
            kept += (part,)
            if len(kept) == 1 < len(parts) and losses[part] > tolerance:
                continue  # it was tried alone
            result = self.make(kept)
            if _lost(result) <= tolerance:
                return result
        raise ExportError(
            f"{told} on {self.judge.path}, more than {tolerance:g} (--tolerance), and still "
            f"{_lost(result):.2f} with every part in float32: the export itself is wrong"
        )

    def make(self, kept: tuple[str, ...]) -> Exported:
        """With some parts in float32."""
        path = os.path.join(self.folder, f"model{SUFFIXES[self.format]}")
        modules = [name for name, part in self.modules.items() if part not in kept]
        graph = self.graph
        if self.precision == "fp16":
            graph = to_half(graph, modules)
        elif self.precision == "int8" and modules:
            graph = to_int8(graph, modules, self.calibration)
        if self.format == "onnx":
            save_onnx(graph, path)
        else:
            save_openvino(graph, self.blueprint, path)
        result = _compared(self.model, self.blueprint, path, self.judge, self.expected)
        if result.metrics:
            told = f", {', '.join(kept)} in float32" if kept else ""
            logger.info(f"{self.precision}{told}: AP {result.metrics['AP']:.2f}")
        if self.precision != "fp32":  # boxes of nearly the same scores are in another order
            result = replace(result, box_difference=None, score_difference=None)
        return replace(result, kept=kept)


def _compared(
    model: StageInteractor,
    blueprint: Blueprint,
    path: str,
    judge: Judge | None,
    expected: Mapping[str, float] | None,
) -> Exported:
    """A file that was written, beside PyTorch."""
    try:
        exported, _ = ExportedDetector.load(path, "cpu", trusted=True)
    except ImportError as error:
        if judge is not None:
            raise
        logger.warning(f"Not compared with PyTorch: {error}")
        return Exported(path, None)
    differences = _differences(model, exported, path)
    metrics = None if judge is None else judge(exported, blueprint)
    return Exported(path, None, *differences, expected, metrics)


def _lost(result: Exported) -> float:
    """AP, in percent."""
    assert result.expected is not None and result.metrics is not None
    return result.expected["AP"] - result.metrics["AP"]


def _require_tolerance(result: Exported, tolerance: float) -> None:
    boxes, scores = result.box_difference or 0, result.score_difference or 0
    if result.metrics is None and (boxes > _MOST_PIXELS or scores > _MOST_SCORE):
        raise ExportError(
            "the file does not find what PyTorch does: in a picture of noise boxes differ by "
            f"{boxes:.1e} pixels, scores by {scores:.1e}; --data with annotated pictures tells "
            "what that costs"
        )
    if result.metrics is None or result.expected is None or _lost(result) <= tolerance:
        return
    raise ExportError(
        f"AP falls from {result.expected['AP']:.2f} to {result.metrics['AP']:.2f}, by more than "
        f"{tolerance:g} (--tolerance)"
    )


def _move(made: str, path: str) -> None:
    """A file, and what belongs to it, to its place."""
    ends = (".bin", ".xml") if made.endswith(".xml") else (os.path.splitext(made)[1],)
    for end in ends:  # what others look for comes last
        with open(os.path.splitext(made)[0] + end, "rb") as source:
            write_atomically(
                os.path.splitext(path)[0] + end, lambda file: shutil.copyfileobj(source, file)
            )


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


def to_onnx(program: torch.export.ExportedProgram, blueprint: Blueprint) -> Any:
    """An exported program as an ONNX model, which carries the blueprint."""
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
    return model


def save_onnx(model: Any, path: str) -> None:
    """Writes an ONNX model."""
    onnx = _require_onnx()
    write_atomically(path, lambda file: onnx.save(model, file))


def save_openvino(model: Any, blueprint: Blueprint, path: str) -> None:
    """Writes an ONNX model as OpenVINO's, an ``.xml`` file and a ``.bin`` file beside it."""
    openvino = require_openvino()
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "model.onnx")
        save_onnx(model, source)
        converted = openvino.convert_model(source)
    converted.set_rt_info(blueprint.to_json(), KEY)
    # What is to be in float16 is so already.
    openvino.save_model(converted, path, compress_to_fp16=False)


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "exporting to ONNX needs: pip install 'stage-interactor[export]'"
        ) from error
    return onnx


def _differences(
    model: StageInteractor, exported: ExportedDetector, path: str
) -> tuple[float, float]:
    """How far boxes and scores are from PyTorch's, on noise of another size than the example.

    Scores rank by rank. Boxes of nearly the same score may be in another order: each is compared
    with the one that it is, but for those at the end of the list, of which one or the other is in.
    """
    stride = model.size_divisibility
    noise = np.random.default_rng(0).integers(0, 256, (3, 6 * stride, 7 * stride - 5))
    inputs = [{"image": torch.from_numpy(noise).to(torch.uint8)}]
    with torch.inference_mode():
        outputs = [run(inputs)[0] for run in (model, exported)]
    if any(split_output(output)[1] for output in outputs):
        raise UnusableDetectionsError(
            f"{path}: detections in a picture of noise are NaN or infinite"
        )
    found = [output["instances"] for output in outputs]
    boxes, scores, classes = (
        [values.numpy() for values in of]
        for of in (
            [one.pred_boxes.tensor for one in found],
            [one.scores.double() for one in found],
            [one.pred_classes for one in found],
        )
    )
    longest = max(map(len, scores))
    ranked = [np.pad(np.sort(values)[::-1], (0, longest - len(values))) for values in scores]
    by_score = float(np.abs(ranked[0] - ranked[1]).max(initial=0))
    apart = np.abs(boxes[0][:, None] - boxes[1]).max(-1)
    # Of another class it is another object, as far away as a picture is large.
    apart = apart + (classes[0][:, None] != classes[1]) * max(noise.shape)
    ones, others = linear_sum_assignment(apart)
    end = max(values.min(initial=1) for values in scores) + 2 * by_score
    sure = np.maximum(scores[0][ones], scores[1][others]) > end
    pairs = (ones[sure], others[sure]) if sure.any() else (ones, others)
    return float(apart[pairs].max(initial=0)), by_score


def is_ours(path: str) -> bool:
    """Whether a model card is as it was written here; what ends its lines does not count."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        found = _MARKED.fullmatch(file.read())
    return found is not None and _hash(found[1]) == found[2]


def _hash(text: str) -> str:
    return hashlib.sha256("\n".join(text.splitlines()).strip().encode()).hexdigest()


def model_card(
    blueprint: Blueprint,
    source: str,
    model: StageInteractor,
    *,
    license: str | None = None,
    repo_id: str | None = None,
    precision: str = "fp32",
    judge: Judge | None = None,
    result: Exported | None = None,
) -> str:
    """What one should know about a detector, as Markdown with the hub's front matter.

    Args:
        source: path of the checkpoint, beside which its run's ``results.json`` may lie.
        license: of the weights, as the hub calls it.
        repo_id: of the repository on the hub, ``"user/name"``, that it is for. Of the run's last
            weights, ``model_final``, its front matter has the metrics, which are of these.
        precision, judge, result: of what was exported, see :func:`export_checkpoint`.

    Raises:
        ValueError: ``results.json`` holds no metrics.
    """
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
    data = {part: _value(of, "name") or _value(of, "names") for part, of in datasets.items()}
    metrics = {name: value for name, value in scores.items() if value is not None}
    is_last = os.path.splitext(os.path.basename(source))[0] == "model_final"
    text = render(
        "model_card.md",
        license=license,
        repo_id=repo_id,
        index=_model_index(repo_id, str(data["test"]), metrics) if repo_id and is_last else "",
        blueprint=blueprint,
        config=config,
        date=date.today(),
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        source=os.path.basename(source),
        backbone=backbone.get("name", backbone["_target_"]),
        parameters=sum(p.numel() for p in model.parameters()),
        data=data,
        iterations=_value(config, "train", "max_iter"),
        images=_value(config, "dataloader", "train", "total_batch_size"),
        metric=_METRICS.get(
            str(_value(config, "dataloader", "evaluator", "_target_")).rpartition(".")[2], "AP"
        ),
        scores=scores,
        thresholds=list(zip(blueprint.class_names, blueprint.thresholds or [])),
        inputs=INPUTS,
        outputs=OUTPUTS,
        augmentation=json.dumps(blueprint.input["augmentation"], indent=2),
        model=json.dumps(config["model"], indent=2),
        precision=precision,
        result=result,
        judge=judge,
        pictures=0 if judge is None else len(judge),
    )
    return text + _MARK.format(_hash(text))


def _model_index(repo_id: str, dataset: str, metrics: Mapping[str, float]) -> str:
    """The hub's ``model-index``, YAML; empty without metrics. Those of single classes are not in
    it."""
    values = [
        {"type": name, "name": name, "value": round(value, 4)}
        for name, value in metrics.items()
        if "-" not in name and math.isfinite(value)
    ]
    if not values:
        return ""
    of = {"name": dataset, "type": dataset}
    found = {"task": {"type": "object-detection"}, "dataset": of, "metrics": values}
    index = [{"name": repo_id.rpartition("/")[2], "results": [found]}]
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)


def _value(config: Any, *keys: str) -> Any:
    """A value of a config, whatever is there; None if it is not."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
