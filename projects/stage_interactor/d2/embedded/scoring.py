"""COCO's metric of boxes: by pycocotools, or by faster-coco-eval, to the same bit."""

import contextlib
import copy
import io
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)


def evaluated(
    truth: COCO, results: Sequence[Mapping], limits: Sequence[int], *, fast: bool = True
) -> COCOeval:
    """pycocotools' evaluation of boxes, evaluated and accumulated.

    Args:
        truth: the annotations.
        results: in COCO's format; not empty.
        limits: ``maxDets``, ascending.
        fast: by faster-coco-eval, if that is installed.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(list(results)), "bbox")
        evaluation.params.maxDets = list(limits)
        told = _accumulate_fast(evaluation) if fast else "use_fast_impl=false"
        if told:
            evaluation.evaluate()
            evaluation.accumulate()
    logger.info(
        f"Scored by pycocotools (faster-coco-eval: {told})"
        if told
        else f"Scored by faster-coco-eval {version('faster-coco-eval')}"
    )
    return evaluation


def _accumulate_fast(evaluation: COCOeval) -> str:
    """Does what ``evaluate`` and ``accumulate`` of an evaluation do; says why, if it cannot.

    pycocotools divides the true positives by a number that is 2e-16 larger than that of all
    detections, which shows where that is 1: the precision of a detection that is right and before
    all others is below 1. It is 1 here, so it is put right where the second one is not right too.
    That is told by recalls that are asked for beside COCO's, between those of one object and two.
    """
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return "not installed; the extra fast-eval has it"
    params, truth = evaluation.params, evaluation.cocoGt
    params.imgIds, params.catIds = list(np.unique(params.imgIds)), list(np.unique(params.catIds))
    objects = _count_objects(truth, params)
    between = 1.5 / np.maximum(objects, 1)
    recalls = np.union1d(params.recThrs, between)
    try:
        fast = COCOeval_faster(truth, evaluation.cocoDt, "bbox", print_function=lambda *_: None)
        fast.params.__dict__ |= copy.deepcopy(params.__dict__) | {"recThrs": recalls}
        fast.evaluate()
        fast.accumulate()
        found = {key: np.asarray(fast.eval[key]) for key in ("precision", "recall", "scores")}
    except Exception as error:  # of a package that takes less: ids that are texts, for example
        return f"{type(error).__name__}: {error}"
    chosen = np.searchsorted(recalls, params.recThrs)
    # (IoU thresholds, 1, classes, areas, limits)
    second = np.take_along_axis(
        found["precision"], np.searchsorted(recalls, between)[None, None, :, :, None], 1
    )
    precision = found["precision"][:, chosen]
    precision[(precision == 1) & (second != 1)] = 1 / (1 + np.spacing(1))
    evaluation._paramsEval = copy.deepcopy(params)
    evaluation.eval = {
        "params": params,
        "counts": list(precision.shape),
        "precision": precision,
        "recall": found["recall"],
        "scores": found["scores"][:, chosen],
    }
    return ""


def _count_objects(truth: COCO, params: Any) -> np.ndarray:
    """Those that are to be found, (classes, areas)."""
    anns = truth.loadAnns(truth.getAnnIds(imgIds=params.imgIds, catIds=params.catIds))
    anns = [ann for ann in anns if not ann.get("iscrowd", 0)]
    classes = np.searchsorted(params.catIds, [ann["category_id"] for ann in anns])
    areas = np.array([ann["area"] for ann in anns], dtype=float)
    counts = [
        np.bincount(
            classes[(areas >= least) & (areas <= most)], minlength=len(params.catIds)
        ) for least, most in params.areaRng
    ]  # fmt: skip
    return np.stack(counts, 1)
