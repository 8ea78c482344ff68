#!/usr/bin/env python
"""Times the decoder against the authors' own, in turns in one process, with the same allocator.

python tools/versus_release.py RELEASE --queries 100 300
python tools/versus_release.py RELEASE --train --queries 100 --batch-size 2 --image-size 320 448

RELEASE is a folder with ``mmdet`` and ``configs`` of https://github.com/MCG-NJU/StageInteractor and
``mmcv`` of the source archive of mmcv 1.3.18, which need addict, yapf, terminaltables, six and
opencv-python-headless. Parts of mmcv that would have to be compiled, and that the model does not
use, are stood in for.

Without ``--train`` the six stages run without gradient; with it they, labels and losses run forward
and backward. Both sides have random weights, the same maps, images and objects. A ratio is the
median over the turns of the authors' time in that precision by this one.
"""

import argparse
import functools
import json
import logging
import os
import statistics
import sys
import types
from collections.abc import Callable, Sequence

import bare  # noqa: F401
import numpy as np
import torch
from benchmark import Machine, _autocast
from checks.small import random_image, without_zeros
from torch import Tensor, nn

from stage_interactor.errors import call
from stage_interactor.inference import DTYPES
from stage_interactor.inference.prepare import choose_device
from stage_interactor.modeling import (
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    InitialQueries,
    build_decoder,
)
from stage_interactor.ops import use_ops
from stage_interactor.ops.memory import kept_memory

_CONFIGS = "configs/stageinteractor/stageinteractor_r50_"
_OBJECTS = 20


class _Nothing(nn.Module):
    def __init__(self, *_: object, **__: object):
        super().__init__()


class _Unused(types.ModuleType):
    """Stands in for a compiled part: every name in it is a layer that does nothing."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(
            name, (nn.Module,), {"__init__": lambda self, *_, **__: nn.Module.__init__(self)}
        )


def release_parts(folder: str, queries: int, train: bool) -> tuple[nn.Module, nn.Module]:
    """The authors' initial queries and cascade, as their code builds them.

    Raises:
        FileNotFoundError: the folder lacks a part of what :data:`__doc__` names.
    """
    for name in ("mmdet", "configs", "mmcv"):
        if not os.path.isdir(os.path.join(folder, name)):
            raise FileNotFoundError(f"{folder} has no folder {name}; see --help for what it holds")
    sys.path.insert(0, folder)
    for kind in (bool, int, float, object):  # numpy of their time has them
        if kind.__name__ not in vars(np):
            setattr(np, kind.__name__, kind)
    import mmcv

    for name in ("", ".carafe", ".roi_align", ".nms", ".merge_cells", ".multi_scale_deform_attn"):
        sys.modules.setdefault(f"mmcv.ops{name}", _Unused(f"mmcv.ops{name}"))
    mmcv.ops = sys.modules["mmcv.ops"]
    from mmdet.models import build_head

    which = "1x_coco.py" if queries == 100 else "300_query_crop_mstrain_480-800_3x_coco.py"
    cfg = mmcv.Config.fromfile(f"{folder}/{_CONFIGS}{which}").model
    cfg.rpn_head.num_query = queries
    cfg.roi_head.train_cfg = cfg.train_cfg.rcnn if train else None
    cfg.roi_head.test_cfg = cfg.test_cfg.rcnn
    parts = build_head(cfg.rpn_head), build_head(cfg.roi_head)
    logging.disable(logging.INFO)  # a line for every weight
    for part in parts:
        part.init_weights()
    logging.disable(logging.NOTSET)
    return parts


class Sides:
    """The same work by both, and by the reference of this project, which computes as theirs."""

    def __init__(self, folder: str, device: torch.device, queries: int, batch: int, args):
        height, width = args.image_size
        self.train, self.queries, self.device = args.train, queries, device
        torch.manual_seed(0)
        self.maps = [
            torch.randn(batch, 256, height // stride, width // stride, device=device)
            for stride in (4, 8, 16, 32)
        ]
        rpn, roi = release_parts(folder, queries, args.train)
        self.rpn, self.roi = rpn.to(device), roi.to(device)
        self.initial = InitialQueries(num_queries=queries).to(device)
        self.decoder = build_decoder().to(device)
        self.criterion = Criterion(matcher=HungarianMatcher(), assigner=CrossStageAssigner())
        for module in (self.roi, self.decoder):
            without_zeros(module.train(args.train))
        for level in self.maps:
            level.requires_grad_(args.train)
        self.sizes = torch.tensor([[height, width]] * batch, device=device)
        shape = (height, width, 3)
        self.metas = [
            dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=1.0)
            for _ in range(batch)
        ]
        images = [
            random_image(_OBJECTS, (height, width), num_classes=80, seed=seed)
            for seed in range(batch)
        ]
        self.objects = [image["instances"].to(device) for image in images]

    def work(self) -> dict[str, Callable[[], object]]:
        ours = self._train_ours if self.train else self._infer_ours

        def reference() -> object:
            with use_ops("reference"):
                return ours()

        theirs = self._train_theirs if self.train else self._infer_theirs
        return {"authors": theirs, "reference": reference, "fast": ours}

    def forget_gradients(self) -> None:
        for module in (self.rpn, self.roi, self.initial, self.decoder):
            module.zero_grad()
        for level in self.maps:
            level.grad = None

    def _infer_theirs(self) -> Tensor:
        boxes, content, scale = self.rpn._decode_init_proposals(self.maps, self.metas)
        scale = scale.repeat(1, self.queries, 1)
        stored, logits = None, 0
        for stage in range(len(self.roi.bbox_head)):
            result = self.roi._bbox_forward(
                stage=stage, x=self.maps, xyzr=boxes, object_feats=content, img_metas=self.metas,
                imgs_whwh=scale, cls_logit=logits, xyzr_undetach=boxes, feats=None,
                dyconv1_feats=stored,
            )  # fmt: skip
            boxes, content = result["xyzr"].detach(), result["object_feats"]
            logits, stored = result["cls_score"], result["dyconv1_feats"]
        return logits

    def _infer_ours(self) -> Tensor:
        return self.decoder(self.maps, *self.initial(self.sizes))[-1].logits

    def _train_theirs(self) -> None:
        boxes, content, scale = self.rpn._decode_init_proposals(self.maps, self.metas)
        given = [instances.gt_boxes.tensor for instances in self.objects]
        classes = [instances.gt_classes for instances in self.objects]
        losses = self.roi.forward_train(
            self.maps, boxes, content, self.metas, given, classes, imgs_whwh=scale
        )
        sum(value.sum() for name, value in losses.items() if "loss" in name).backward()

    def _train_ours(self) -> None:
        outputs = self.decoder(self.maps, *self.initial(self.sizes))
        sum(self.criterion(outputs, self.objects).values()).backward()


def compared(
    sides: Sides, machine: Machine, precisions: Sequence[str], repeats: int
) -> list[dict[str, str]]:
    """A row for each side and precision."""
    variants = {(name, p): work for name, work in sides.work().items() for p in precisions}

    def once(variant: tuple[str, str]) -> None:
        with _autocast(sides.device, variant[1]), torch.set_grad_enabled(sides.train):
            variants[variant]()

    peaks: dict[tuple[str, str], float | None] = {}
    times: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    for variant in variants:
        once(variant)
        sides.forget_gradients()
        peaks[variant] = machine.peak_mib(functools.partial(once, variant))
    for _ in range(repeats):
        for variant in variants:
            sides.forget_gradients()
            times[variant].append(machine.seconds(functools.partial(once, variant)))
    rows = []
    for (name, precision), seconds in times.items():
        theirs = times["authors", precision]
        peak, their_peak = peaks[name, precision], peaks["authors", precision]
        rows.append(
            {
                "side": f"{name}, {precision}",
                "ms": f"{statistics.median(seconds) * 1e3:.0f}",
                "ratio": f"{statistics.median(a / b for a, b in zip(theirs, seconds)):.2f}",
                "peak, MiB": f"{peak:.0f}" if peak else "",
                "of theirs": f"{peak / their_peak:.2f}" if peak and their_peak else "",
            }
        )
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("release", metavar="RELEASE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--queries", nargs="+", type=int, default=[100, 300])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1])
    parser.add_argument("--image-size", nargs=2, type=int, default=[800, 1344],
                        metavar=("HEIGHT", "WIDTH"))  # fmt: skip
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if min(args.repeats, *args.queries, *args.batch_size, *args.image_size) < 1:
        parser.error("--repeats, --queries, --batch-size and --image-size must be at least 1")
    return args


@kept_memory()
def main() -> None:
    args = parse_args()
    device = choose_device(args.device)
    machine = Machine(device)
    print(json.dumps(machine.describe()))
    for queries in args.queries:
        for batch in args.batch_size:
            kind = "training" if args.train else "inference"
            print(f"\n{kind}, {queries} queries, {batch} images of {args.image_size}")
            sides = Sides(args.release, device, queries, batch, args)
            rows = compared(sides, machine, args.precision, args.repeats)
            lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
            for line in lines:
                print(
                    "| " + " | ".join("" if v is None else str(v) for v in line) + " |", flush=True
                )


if __name__ == "__main__":
    sys.exit(call("versus_release.py", main, mistake=1))
