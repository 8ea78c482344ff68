"""``stage-interactor export``: a trained detector as one file for other programs.

The exported graph takes pixels and gives boxes. What is left outside is resizing before it and, if
``model.nms_threshold`` is set, NMS after it. It is computed by the reference operations, which are
made of PyTorch's own.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import __version__
from .blueprint import KEY, Blueprint, load_model
from .d2.structures import ImageList
from .engine import CheckpointError, save_safetensors
from .modeling import StageInteractor
from .modeling.detector import Predictions
from .ops import use_ops

logger = logging.getLogger(__name__)

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
INPUTS = ("images", "image_sizes")
OUTPUTS = ("boxes", "scores", "classes")
_LARGEST_BATCH, _LARGEST_SIDE = 256, 8192


class ExportedGraph(nn.Module):
    """What an exported file computes: normalisation, detector, the best (query, class) pairs."""

    def __init__(self, model: StageInteractor):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: (B, 3, H, W) float32, 0 to 255, RGB unless the config says BGR. H and W are
                multiples of the coarsest stride; what pads an image at its right and bottom does
                not matter.
            image_sizes: (B, 2) int64, height and width of each image without its padding.

        Returns:
            boxes (B, K, 4) xyxy in pixels of the input, scores (B, K), classes (B, K); best first.
        """
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < image_sizes[:, :1]  # (B, H)
        columns = torch.arange(width, device=images.device) < image_sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        return tuple(self.model.predict(images * inside, image_sizes))


class ExportedDetector:
    """An exported file in the detector's place: takes and gives what the detector does.

    Args:
        compute: images and sizes to boxes, scores and classes, as :class:`ExportedGraph` does.
        blueprint: that the file carries.
        device: where ``compute`` wants its input.
    """

    def __init__(self, compute: Callable, blueprint: Blueprint, device: str = "cpu"):
        self.compute = compute
        self.device = device
        model = blueprint.config["model"]
        self.size_divisibility = model.get("size_divisibility", 32)
        self.nms_threshold = model.get("nms_threshold")

    @classmethod
    def load(cls, path: str, device: str | None) -> tuple["ExportedDetector", Blueprint]:
        """Reads an ``.onnx`` or ``.pt2`` file.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: onnxruntime is not installed.
            CheckpointError: it cannot be read, or was not exported by this project.
            ValueError: onnxruntime has no such device.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: there is no such file")
        if path.endswith(".onnx"):
            compute, text = _load_onnx(path, device)
            device = "cpu"  # where onnxruntime takes its input from
        else:
            extra = {f"{KEY}.json": ""}
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            program = _load_program(path, extra)
            program = move_to_device_pass(program, device)
            compute, text = program.module(), extra[f"{KEY}.json"]
        blueprint = Blueprint.from_json(text, path)
        return cls(compute, blueprint, device), blueprint

    @torch.inference_mode()
    def __call__(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """See :meth:`StageInteractor.forward`."""
        images = [image["image"].float() for image in batched_inputs]
        images = ImageList.from_tensors(images, self.size_divisibility)
        sizes = torch.tensor(images.image_sizes)
        found = self.compute(images.tensor.to(self.device), sizes.to(self.device))
        return StageInteractor.postprocess(
            Predictions(*found), images.image_sizes, batched_inputs, self.nms_threshold
        )


def _load_program(path: str, extra: dict[str, str]) -> torch.export.ExportedProgram:
    """``torch.export.load`` without its way out, to unpickle what a file holds."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as an exported program: {error}") from error
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _load_onnx(path: str, device: str | None) -> tuple[Callable, str | None]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "an .onnx file needs onnxruntime: pip install onnxruntime, or onnxruntime-gpu"
        ) from error
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    available = onnxruntime.get_available_providers()
    if device is None:
        device = "cuda" if providers["cuda"] in available else "cpu"
    kind, _, number = device.partition(":")
    if providers.get(kind) not in available:
        raise ValueError(f"--device {device}: this onnxruntime has {available}")
    options = {"device_id": int(number)} if number else {}
    try:
        session = onnxruntime.InferenceSession(path, providers=[(providers[kind], options)])
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read by onnxruntime: {error}") from error

    def compute(images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        inputs = dict(zip(INPUTS, (images.numpy(), image_sizes.numpy())))
        return [torch.from_numpy(value) for value in session.run(list(OUTPUTS), inputs)]

    return compute, session.get_modelmeta().custom_metadata_map.get(KEY)


def export_program(model: StageInteractor) -> torch.export.ExportedProgram:
    """The detector in evaluation as one graph, for batches and images of any size."""
    stride = model.size_divisibility
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
    model = written.model_proto
    stride = blueprint.config["model"].get("size_divisibility", 32)
    axes = {0: "batch", 2: f"{stride}*height", 3: f"{stride}*width"}
    for value in (*model.graph.input, *model.graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = axes[axis]
    onnx.helper.set_model_props(model, {KEY: blueprint.to_json()})
    onnx.save(model, path)


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting to ONNX needs: pip install onnx onnxscript") from error
    return onnx


def save_model_card(path: str, blueprint: Blueprint, source: str, model: StageInteractor) -> None:
    """Writes what one should know about an exported detector, as Markdown."""
    config = blueprint.config
    names = [category["name"] for category in blueprint.categories]
    results = os.path.join(os.path.dirname(source), "results.json")
    scores = {}
    if os.path.isfile(results):
        with open(results) as file:
            scores = json.load(file).get("bbox", {})
    backbone = config["model"]["backbone"]
    train = config["train"]
    data = {
        part: config["dataloader"][part]["dataset"].get("name")
        or config["dataloader"][part]["dataset"].get("names")
        for part in ("train", "test")
    }
    stride = config["model"].get("size_divisibility", 32)
    lines = [
        "---",
        "library_name: stage-interactor",
        "pipeline_tag: object-detection",
        "license: unknown  # yours to say: of these weights, which is not that of the code",
        "---",
        f"# StageInteractor, {len(names)} classes",
        "",
        "A query-based object detector, [StageInteractor](https://arxiv.org/abs/2304.04978) (ICCV "
        f"2023), written on {date.today()} by version {__version__} with PyTorch "
        f"{torch.__version__} and Python {platform.python_version()}.",
        "",
        f"- Exported from `{os.path.basename(source)}`",
        f"- Classes, from 0: {', '.join(names)}",
        f"- Backbone `{backbone.get('name', backbone['_target_'])}`, "
        f"{config['model']['queries'].get('num_queries', 100)} queries, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        f"- From a run of {train['max_iter']} iterations of "
        f"{config['dataloader']['train'].get('total_batch_size')} images on `{data['train']}`"
        + (", averaged weights" if blueprint.averaged else ""),
        "",
        "## Evaluation",
        "",
    ]
    if scores:
        lines += [f"COCO AP on `{data['test']}`, at the last evaluation of the run:", ""]
        lines += ["| " + " | ".join(scores) + " |", "|" + "---|" * len(scores)]
        lines += ["| " + " | ".join(f"{value:.2f}" for value in scores.values()) + " |"]
    else:
        lines += ["No results.json lies beside the checkpoint: evaluate it with `--eval-only`."]
    lines += [
        "",
        "## Input and output",
        "",
        f"- `{INPUTS[0]}`: float32 (B, 3, H, W), 0 to 255, "
        f"{blueprint.config_of_input.get('image_format', 'RGB')}; H and W multiples of {stride}. "
        "Resize as below, then pad at the right and the bottom with anything.",
        f"- `{INPUTS[1]}`: int64 (B, 2), height and width of each image without its padding.",
        f"- `{OUTPUTS[0]}`: float32 (B, K, 4), left, top, right, bottom in pixels of the input; "
        f"`{OUTPUTS[1]}`: float32 (B, K), 0 to 1, best first; `{OUTPUTS[2]}`: int64 (B, K).",
        f"- NMS afterwards: {config['model'].get('nms_threshold') or 'none is needed'}",
        "- Resizing:",
        "",
        "```json",
        json.dumps(blueprint.config_of_input["augmentation"], indent=2),
        "```",
        "",
        "## Config",
        "",
        "```json",
        json.dumps(config["model"], indent=2),
        "```",
        "",
    ]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a detector as one file, and a model card beside it. What was written "
        "is run and compared with PyTorch."
    )
    parser.add_argument("--checkpoint", required=True, help=".pth or .safetensors")
    parser.add_argument("--format", choices=list(SUFFIXES), default="onnx")
    parser.add_argument("--output", help="file to write (beside the checkpoint)")
    parser.add_argument(
        "--config-file", help="that a checkpoint without a config of its own was trained with"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command."""
    suffix = SUFFIXES[args.format]
    path = args.output or os.path.splitext(args.checkpoint)[0] + suffix
    if not path.endswith(suffix):
        raise ValueError(f"--output {path}: a file of the format {args.format} ends in {suffix}")
    if os.path.abspath(path) == os.path.abspath(args.checkpoint):
        raise ValueError(f"--output {path} is the checkpoint itself; name another file")
    model, blueprint = load_model(args.checkpoint, args.config_file)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    print(f"Writing {path} (a minute or so) ...")
    if args.format == "safetensors":
        # These are the weights to use already.
        extra = blueprint._replace(averaged=False).as_extra()
        save_safetensors(model, extra, path)
    else:
        if args.format == "onnx":
            _require_onnx()
        program = export_program(model)
        if args.format == "onnx":
            save_onnx(program, blueprint, path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about weights that share memory
                extra = {f"{KEY}.json": blueprint.to_json()}
                torch.export.save(program, path, extra_files=extra)
        _compare(model, path)
    card = os.path.splitext(path)[0] + ".md"
    told = f"Wrote {path} ({os.path.getsize(path) / 2**20:.0f} MiB)"
    if os.path.exists(card):
        print(f"{told}; {card} is there already and stays as it is")
    else:
        save_model_card(card, blueprint, args.checkpoint, model)
        print(f"{told} and {card}")
    return 0


def _compare(model: StageInteractor, path: str) -> None:
    """Says how far an exported file is from PyTorch, on noise of another size than its example."""
    try:
        exported, _ = ExportedDetector.load(path, "cpu")
    except ImportError as error:
        print(f"Not compared with PyTorch: {error}")
        return
    stride = model.size_divisibility
    noise = np.random.default_rng(0).integers(0, 256, (3, 6 * stride, 7 * stride - 5))
    inputs = [{"image": torch.from_numpy(noise).to(torch.uint8)}]
    with torch.inference_mode():
        ours, theirs = (run(inputs)[0]["instances"] for run in (model, exported))
    boxes = (ours.pred_boxes.tensor - theirs.pred_boxes.tensor).abs().max()
    scores = (ours.scores - theirs.scores).abs().max()
    print(f"Against PyTorch: boxes differ by {boxes:.1e} pixels at most, scores by {scores:.1e}")
