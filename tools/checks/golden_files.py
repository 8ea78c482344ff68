"""Reading the reference figures, and the one place that says how closely they must be met."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.modeling import StageOutput

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[2] / "tests/golden")

# Largest relative error (norm of the difference over norm of the reference), by kind of file and
# precision. Labels and matches are exact. In float32 two results of a decoder have their own
# figure: "sampled", because random features make errors of the sampling positions grow from stage
# to stage, and "grad", because the gradient of bilinear sampling jumps where a point crosses from
# one pixel to the next: a rounding error there is a different, equally valid, gradient.
TOLERANCE = {
    ("decoder", torch.float64): {"": 1e-9},
    ("adamixer", torch.float64): {"": 1e-9},
    ("assigner", torch.float64): {"": 1e-6},
    ("code1", torch.float64): {"": 1e-6},
    ("code2", torch.float64): {"": 1e-6},
    ("decoder", torch.float32): {"": 3e-4, "sampled": 1e-3, "grad": 5e-2},
    ("adamixer", torch.float32): {"": 3e-4, "sampled": 1e-3, "grad": 5e-2},
    ("assigner", torch.float32): {"": 3e-4},
    ("code1", torch.float32): {"": 3e-4},
    ("code2", torch.float32): {"": 3e-4},
}
PRECISIONS = [torch.float64, torch.float32]


def golden_files(kind: str) -> list[Path]:
    """The files ``<kind>_*.npz``. A folder without any reference file fails, it never skips."""
    kinds = {kind for kind, _ in TOLERANCE}
    if not any(path.name.split("_")[0] in kinds for path in GOLDEN_DIR.glob("*_*.npz")):
        raise FileNotFoundError(f"no reference files in {GOLDEN_DIR} (variable GOLDEN_DIR)")
    return sorted(GOLDEN_DIR.glob(f"{kind}_*.npz"))


class Golden:
    """One file of reference figures.

    Args:
        path: the file.
        dtype: precision that floating-point inputs are given in.
        device: where the inputs are put.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: str = "cpu"):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.kind = path.name.split("_")[0]
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def config(self) -> dict:
        return json.loads(str(self.arrays["config"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def keys(self, prefix: str) -> list[str]:
        """Keys below a prefix, without it."""
        return [key[len(prefix) :] for key in self.arrays if key.startswith(prefix)]

    def count(self, pattern: str) -> int:
        """How many of ``pattern.format(0)``, ``pattern.format(1)``, ... there are."""
        index = 0
        while any(key.startswith(pattern.format(index)) for key in self.arrays):
            index += 1
        return index

    def tensor(self, key: str) -> torch.Tensor:
        """An array as it is, in the requested precision if it is floating-point."""
        value = torch.from_numpy(np.asarray(self.arrays[key])).to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def num_points(self) -> list[int]:
        """P of every stage of a decoder."""
        if self.kind == "adamixer":
            return [self.config["points"]] * self.count("state/roi_head.bbox_head.{}.iof_tau")
        stage = "state/roi_head.bbox_head.{}.feat_extractor"
        points = []
        for prefix in map(stage.format, range(self.count(stage))):
            outer = self.arrays[f"{prefix}.gen_one_d.0.bias"].size // (3 * self.config["groups"])
            points.append(outer * self.arrays[f"{prefix}.gen_double_d.0.bias"].size // 3)
        return points

    def instances(self) -> list[Instances]:
        """The objects of every image."""
        images = []
        for image in range(self.count("in/gt_boxes_{}")):
            instances = Instances(tuple(self.arrays[f"in/image_size_{image}"].tolist()))
            instances.gt_boxes = Boxes(torch.from_numpy(self.arrays[f"in/gt_boxes_{image}"]))
            instances.gt_classes = torch.from_numpy(self.arrays[f"in/gt_classes_{image}"])
            images.append(instances.to(self.device))
        return images

    def check(self, key: str, actual: torch.Tensor) -> None:
        """Compares with the reference ``key``, within the table above."""
        expected = torch.from_numpy(np.asarray(self.arrays[key])).double()
        actual = actual.detach().double().cpu()
        assert actual.shape == expected.shape, f"{key}: shape {actual.shape}, not {expected.shape}"
        error = (actual - expected).norm().item()
        scale = expected.norm().item()
        # A reference below 1e-12 is a zero with rounding: tau's gradient at the first stage, where
        # all boxes are the whole image and no attention can depend on them.
        relative = error / scale if scale > 1e-12 else error
        limits = TOLERANCE[self.kind, self.dtype]
        limit = limits.get(key.split("/")[0], limits.get(key.split("/")[-1], limits[""]))
        assert relative <= limit, f"{key}: relative error {relative:.2e}, allowed {limit:.0e}"

    def check_equal(self, key: str, actual: torch.Tensor) -> None:
        """Compares exactly: matches, labels and counts."""
        expected = torch.from_numpy(np.asarray(self.arrays[key])).to(actual.dtype)
        different = int((actual.cpu().reshape(expected.shape) != expected).sum())
        assert not different, f"{key}: {different} of {expected.numel()} entries differ"


def predictions(logits: torch.Tensor, boxes: torch.Tensor) -> StageOutput:
    """A stage's output that holds predictions only."""
    return StageOutput(logits, boxes, content=torch.empty(0), xyzr=torch.empty(0))
