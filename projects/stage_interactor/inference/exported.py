"""Exported detectors read and run: in the detector's place, with nothing of what writes them."""

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export.passes import move_to_device_pass

from ..d2.structures import ImageList
from ..modeling import StageInteractor
from ..modeling.batches import detect_by_size
from ..modeling.detector import Predictions
from ..untrusted.tensors import CheckpointError, require_file, require_finite
from .blueprint import KEY, Blueprint
from .graph import read_graph, require_detections
from .prepare import choose_device

INPUTS = ("images", "image_sizes")
OUTPUTS = ("boxes", "scores", "classes")

# Why a file is read only if whoever wrote it is trusted.
_UNTRUSTED = {
    ".pt2": "a .pt2 file can run anything on this machine, since torch.export evaluates text in it "
    "as Python",
    ".xml": "an OpenVINO file may hold loops, and arrays of any size, which nothing looks at "
    "before they run",
}
_SECONDS = 60  # that a picture may take, and as much for each million pixels


class ExportedDetector:
    """An exported file in the detector's place: takes and gives what the detector does.

    Args:
        compute: images and sizes to boxes, scores and classes, as the exported graph does.
        blueprint: that the file carries.
        device: where ``compute`` wants its input.
    """

    def __init__(self, compute: Callable, blueprint: Blueprint, device: str = "cpu"):
        self.compute = compute
        self.device = device
        model = blueprint.config["model"]
        self.size_divisibility = model.get("size_divisibility", 32)
        self.nms_threshold = model.get("nms_threshold")
        self.least_side = 0  # that batches are padded to, in pixels

    @classmethod
    def load(
        cls, path: str, device: str | None, *, trusted: bool = False
    ) -> tuple["ExportedDetector", Blueprint]:
        """Reads an ``.onnx``, ``.xml`` (OpenVINO) or ``.pt2`` file.

        Args:
            trusted: ``.pt2`` and ``.xml`` files are read at all; see
                :meth:`Detector.from_checkpoint`.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: onnx, onnxruntime or openvino is not installed.
            CheckpointError: it cannot be read, was not exported by this project, or is a ``.pt2``
                or ``.xml`` file that is not trusted.
            ValueError: PyTorch, onnxruntime or OpenVINO has no such device.
        """
        require_file(path)
        if path.endswith(".onnx"):
            compute, text = _load_onnx(path, device)
            device = "cpu"  # where onnxruntime takes its input from
        elif not trusted:
            raise CheckpointError(
                f"{path}: {_UNTRUSTED[os.path.splitext(path)[1]]}. Take the checkpoint (.pth), or "
                "export it as safetensors or onnx, which are read as data; if you know who wrote "
                "the file and trust them: --trust, or trusted=True in Python"
            )
        elif path.endswith(".xml"):
            compute, text = _load_openvino(path, device)
            device = "cpu"
        else:
            extra = {f"{KEY}.json": ""}
            device = str(choose_device(device))
            program = _load_program(path, extra)
            require_finite(program.state_dict, path)
            program = move_to_device_pass(program, device)
            compute, text = program.module(), extra[f"{KEY}.json"]
        blueprint = Blueprint.from_json(text, path)
        detector = cls(compute, blueprint, device)
        if path.endswith(".pt2"):
            # A side of one stride would be a constant to an exported program, which refuses it.
            detector.least_side = 2 * detector.size_divisibility
        return detector, blueprint

    @torch.inference_mode()
    def __call__(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """See :meth:`StageInteractor.forward`."""
        return detect_by_size(self._detect, batched_inputs, self.size_divisibility)

    def _detect(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """Of images of one padded size."""
        tensors = [image["image"].float() for image in batched_inputs]
        images = ImageList.from_tensors(tensors, self.size_divisibility)
        sizes = torch.tensor(images.image_sizes)
        height, width = (max(self.least_side - side, 0) for side in images.tensor.shape[-2:])
        padded = F.pad(images.tensor, (0, width, 0, height))
        boxes, scores, classes = self.compute(padded.to(self.device), sizes.to(self.device))
        found = Predictions(boxes, scores, classes, torch.zeros(len(sizes)))
        return StageInteractor.postprocess(
            found, images.image_sizes, batched_inputs, self.nms_threshold
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
    # It would keep a number of this machine in the home folder, and tell its maker of each file.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "an .onnx file needs: pip install 'stage-interactor[export]'; on a GPU onnxruntime-gpu"
        ) from error
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    available = onnxruntime.get_available_providers()
    if device is None:
        device = "cuda" if providers["cuda"] in available else "cpu"
    kind, _, number = device.partition(":")
    if providers.get(kind) not in available or not (number or "0").isdecimal():
        raise ValueError(f"device {device!r} (--device): this onnxruntime has {available}")
    text = read_graph(path, dict(zip(INPUTS, (4, 2))), OUTPUTS).get(KEY)
    num_classes = len(Blueprint.from_json(text, path).categories)
    options = {"device_id": int(number)} if number else {}
    try:
        session = onnxruntime.InferenceSession(
            path,
            providers=[(providers[kind], options)],
            disabled_optimizers=["ConstantFolding"],  # which would run a part without a limit
        )
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read by onnxruntime: {error}") from error

    def compute(images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        inputs = dict(zip(INPUTS, (images.numpy(), image_sizes.numpy())))
        options = onnxruntime.RunOptions()
        seconds = _SECONDS * (1 + images[:, 0].numel() / 1e6)
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            found = session.run(list(OUTPUTS), inputs, options)
        except Exception as error:
            late = options.terminate and f" for {seconds:.0f} seconds, far too long"
            raise CheckpointError(
                f"{path} could not be computed{late or ''}: {' '.join(str(error).split())[:300]}"
            ) from error
        finally:
            timer.cancel()
        require_detections(found, num_classes, path)
        return [torch.from_numpy(value) for value in found]

    return compute, text


def require_openvino() -> Any:
    """The module.

    Raises:
        ImportError: it is not installed.
    """
    tell_nobody()
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "OpenVINO's files need: pip install 'stage-interactor[openvino]'"
        ) from error
    return openvino


def tell_nobody() -> None:
    """OpenVINO and NNCF would tell their maker of each model, and cannot without this package."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def _load_openvino(path: str, device: str | None) -> tuple[Callable, str | None]:
    openvino = require_openvino()
    core = openvino.Core()
    name = (device or "cpu").upper()
    if name.partition(":")[0] not in (*core.available_devices, "AUTO"):
        raise ValueError(
            f"device {device!r} (--device): this OpenVINO has {core.available_devices}"
        )
    try:
        model = core.read_model(path)
        text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
        # Otherwise a processor with bfloat16 computes everything in it, places too.
        compiled = core.compile_model(model, name, {"INFERENCE_PRECISION_HINT": "f32"})
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be read by OpenVINO: {told}") from error
    num_classes = len(Blueprint.from_json(text, path).categories)

    def compute(images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        found = compiled(dict(zip(INPUTS, (images.numpy(), image_sizes.numpy()))))
        values = [found[name] for name in OUTPUTS]
        require_detections(values, num_classes, path)
        return [torch.from_numpy(value.copy()) for value in values]

    return compute, text
