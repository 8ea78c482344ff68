"""The report of a run: from its files to one HTML page that needs no network."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from ..config import Saved
from ..d2.detections import THRESHOLD
from ..d2.screening import detection_limits
from ..data import read_image
from ..errors import explain
from . import charts
from .boxes import picture_with_boxes
from .cascade import stage_sections
from .flight import Flight, matching_section, missed_section, read_flights
from .matching import ImageResult, best_of_each_box, confusion_matrix, match_images
from .page import section, write_page
from .precision import SIZES, Precision, precision_of, short_names
from .run import (
    Curve,
    metric_of,
    read_ground_truth,
    read_predictions,
    read_run,
    usable_ones,
)
from .thresholds import FEWEST, Thresholds, choose_thresholds

logger = logging.getLogger(__name__)

FOUND, MISSED, FALSE_ALARM = (22, 163, 74), (234, 136, 12), (220, 38, 38)
LEGEND = [
    (f"rgb{colour}", name)
    for colour, name in ((FOUND, "found"), (MISSED, "missed"), (FALSE_ALARM, "false alarm"))
]
_MOST_CURVES, _MOST_CLASSES, _MOST_BARS = 10, 20, 2000
_FEW_OBJECTS = 50  # of a class to train on; with fewer, AP is that of chance as much as of a class
_NOT_TRAINED = "Nothing was trained in this folder: weights were evaluated."
# Losses that an evaluation has not, by one of their names, which extensions add.
_OF_TRAINING_ALONE = {
    "dn_loss_class": "also of noised objects",
    "o2m_loss_class": "also of the second set of queries",
}
_SHOWN = (
    *_OF_TRAINING_ALONE,
    "total_loss", "loss_class", "loss_bbox", "loss_giou", "validation/total_loss",
    "validation/loss_class", "validation/loss_bbox", "validation/loss_giou", "bbox/AP", "bbox/AP50",
    "bbox/AP75", "lr", "images_per_second", "grad_norm", "time", "memory_gib",
)  # fmt: skip


def write_report(
    output_dir: str | os.PathLike,
    path: str | os.PathLike | None = None,
    *,
    threshold: float | None = None,
    num_pictures: int = 6,
    allow_outside: bool = False,
) -> str:
    """Writes the page and returns its path.

    Args:
        output_dir: of a run: ``config_resolved.yaml``, ``metrics.json``, and after an evaluation
            ``coco_instances_results.json`` and the data that it was made on; or of ``--eval-only``.
        path: of the page; ``report.html`` in ``output_dir`` by default.
        threshold: least score of the detections in pictures and confusion matrix; by default those
            that the page chooses, by class.
        num_pictures: of each kind.
        allow_outside: of a run whose data have ``allow_outside``: theirs is read.

    Whoever made the folder, nothing in it is called. What cannot be shown is told in the page.

    Raises:
        FileNotFoundError: ``output_dir`` is not of a run.
        OSError, ValueError: a file of it is of no use, or the page cannot be written.
    """
    output_dir = os.fspath(output_dir)
    require_options(threshold, num_pictures)
    config, metrics, num_wrong = read_run(output_dir, _SHOWN)
    tiles = _tiles(config, metrics)
    trained = os.path.lexists(os.path.join(output_dir, "metrics.json"))
    sections = [_training(metrics)] if trained else [section("Training", text=_NOT_TRAINED)]
    if num_wrong:
        told = f"{num_wrong} lines of metrics.json are no values of an iteration, and are left out."
        sections[0]["text"] = told
    flights: dict[int, Flight] = {}
    sections += _shown("Matching", lambda: _matching(output_dir, flights))
    results = os.path.join(output_dir, "coco_instances_results.json")
    at = metrics["bbox/AP"][0][-1] if trained and "bbox/AP" in metrics else -1
    if os.path.isfile(results):
        sections += _shown(
            "Evaluation",
            lambda: _of_evaluation(
                results, config, allow_outside, threshold, num_pictures, flights, at
            ),
        )
    else:
        told = "There was no evaluation yet: more is shown after the first one."
        sections[0]["text"] = " ".join(filter(None, (sections[0].get("text"), told)))
    sections += _shown("Stages", lambda: stage_sections(output_dir))
    title = os.path.basename(os.path.abspath(output_dir))
    path = os.fspath(path or os.path.join(output_dir, "report.html"))
    write_page(path, title, _subtitle(config), tiles, sections)
    return path


def _matching(output_dir: str, flights: dict[int, Flight]) -> list[dict]:
    """What a flight recorder kept, which is put into ``flights``."""
    flights |= read_flights(output_dir)
    return [matching_section(flights)] if flights else []


def _shown(title: str, make: Callable[[], list[dict]]) -> list[dict]:
    """Sections, or why they cannot be shown: the rest is still worth a page."""
    try:
        return make()
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        text = f"The {title.lower()} cannot be shown: {reason}"
        logger.warning(text)
        return [section(title, text=text)]


def _of_evaluation(
    results: str,
    config: Saved,
    allow_outside: bool,
    threshold: float | None,
    num_pictures: int,
    flights: Mapping[int, Flight],
    evaluated: int,
) -> list[dict]:
    content, image_root = read_ground_truth(config, allow_outside)
    predictions, num_others = read_predictions(results, content)
    predictions, left_out = _usable(predictions, content)
    if num_others:
        told = (
            f"{num_others} entries of {os.path.basename(results)} are no detections in the images "
            "and classes of the data, and are left out of all figures."
        )
        logger.warning(told)
        left_out.append(section("Entries of no use", text=told))
    most = config.get("dataloader.evaluator.max_dets_per_image")
    precision = precision_of(content, predictions, detection_limits(most))
    evaluation = [_evaluation(precision), *_rare_classes(config, precision, content, allow_outside)]
    categories = sorted(content["categories"], key=lambda c: c["id"])
    names = short_names([c["name"] for c in categories])
    chosen = choose_thresholds(content, predictions)
    matched, told = match_given(content, predictions, threshold, chosen)
    confusions = _confusions(matched, names, told)
    pictures = _pictures(matched, names, image_root, told, num_pictures)
    if flights:
        least = least_scores(content, threshold, chosen)
        of_classes = [least[category["id"]] for category in categories]
        all_names = [c["name"] for c in categories]
        missed = missed_section(flights, evaluated, matched, all_names, of_classes)
        pictures += [missed] if missed else []
    return [*left_out, *evaluation, _thresholds(chosen, names), confusions, *pictures]


def require_options(threshold: float | None, num_pictures: int) -> None:
    """Raises a ValueError for what a page cannot be told."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
    if num_pictures < 0:
        raise ValueError(f"num_pictures must not be less than 0, got {num_pictures}")


def match_given(
    content: dict,
    predictions: Sequence[dict],
    threshold: float | None,
    chosen: Thresholds | None,
) -> tuple[list[ImageResult], str]:
    """The detections that are given, matched with the objects, and which they are in words.

    They have ``threshold``, or else the thresholds that were chosen for their classes.
    """
    least = least_scores(content, threshold, chosen)
    if threshold is None and chosen:
        told = "with the thresholds of their classes"
    else:
        score = THRESHOLD if threshold is None else threshold
        told = f"with a score of at least {score:g}"
    given = [item for item in predictions if item["score"] >= least[item["category_id"]]]
    return match_images(content, best_of_each_box(given), 0.0), told


def least_scores(
    content: dict, threshold: float | None, chosen: Thresholds | None
) -> dict[int, float]:
    """From which score on detections of a category are given, by its id."""
    if threshold is None and chosen:
        return {item.category_id: item.threshold for item in chosen.classes}
    score = THRESHOLD if threshold is None else threshold
    return {category["id"]: score for category in content["categories"]}


def _thresholds(chosen: Thresholds | None, names: Sequence[str]) -> dict:
    if chosen is None:
        text = (
            f"None can be chosen: there are fewer than {FEWEST} objects, or none is found. "
            f"Detections are given from a score of {THRESHOLD:g} on."
        )
        return section("Thresholds", text=text)
    shown = list(range(len(names)))
    if len(names) > _MOST_CURVES:
        by_f1 = sorted(shown, key=lambda i: -_f1(chosen, i))
        shown = by_f1[: _MOST_CURVES // 2] + by_f1[-_MOST_CURVES // 2 :]
    scores = np.linspace(0, 1, 201)
    x = scores.tolist()
    precision, recall, f1 = (values.tolist() for values in chosen.curve.at(scores))
    curves = {"all classes": (x, f1)} | {
        names[i]: (x, chosen.classes[i].curve.at(scores)[2].tolist())
        for i in shown
        if len(names) > 1 and chosen.classes[i].curve.right.any()
    }
    limits: dict[str, Any] = dict(x="score, at least", bottom=0, top=1.02)
    both = {"precision": (x, precision), "recall": (x, recall), "F1": (x, f1)}
    drawn = [
        ("F1 over the score", charts.lines(curves, y="F1", **limits)),
        ("Precision and recall over the score, all classes", charts.lines(both, y="", **limits)),
    ]
    table: list[tuple] = [("class", "threshold", "precision", "recall", "F1", "objects", "")]
    rows = [("all classes", chosen.curve, chosen.threshold, "")] if len(names) > 1 else []
    rows += [
        (name, item.curve, item.threshold, item.reason and f"of all classes: {item.reason}")
        for name, item in zip(names, chosen.classes)
    ]
    for name, curve, threshold, note in rows:
        values = ("" if np.isnan(value) else f"{value:.2f}" for value in curve.at(threshold))
        table.append((name, f"{threshold:g}", *values, curve.objects, note))
    text = (
        "Scores from which on detections are given: those of the best F1 at IoU 0.5, a box of a "
        "query once. Checkpoints keep those of their own evaluation, and predict takes them unless "
        "it is told others."
    )
    return section("Thresholds", text=text, charts=drawn, table=table)


def _f1(chosen: Thresholds, index: int) -> float:
    item = chosen.classes[index]
    return float(np.nan_to_num(item.curve.at(item.threshold)[2], nan=-1))


def _subtitle(config: Saved) -> str:
    backbone = config.get("model.backbone.name") or config.get("model.backbone._target_")
    parts = [
        f"backbone {backbone}",
        f"{config.get('model.queries.num_queries')} queries",
        f"batches of {config.get('dataloader.train.total_batch_size')}",
        f"learning rate {config.get('optimizer.lr')}",
        f"evaluated on {config.get('dataloader.evaluator.dataset_name')}",
    ]
    return ", ".join(f"{part:.200}" for part in parts if "None" not in part)


def _tiles(config: Saved, metrics: Mapping[str, Curve]) -> list[tuple[str, str]]:
    def last(name: str) -> float | None:
        return metrics[name][1][-1] if name in metrics else None

    iterations = max(metrics["total_loss"][0], default=0) + 1 if "total_loss" in metrics else 0
    tiles = [
        (f"{value:.1f}", metric_of(config) + name)
        for name in ("AP", "AP50", "AP75")
        if (value := last(f"bbox/{name}")) is not None
    ]
    if iterations or not tiles:
        tiles.append((f"{iterations} of {config.get('train.max_iter')}"[:40], "iterations"))
    seconds = float(np.median(metrics["time"][1])) * iterations if "time" in metrics else -1.0
    if 0 <= seconds < 1e9:
        tiles.append((str(timedelta(seconds=round(seconds))), "of training, h:mm:ss"))
    if "images_per_second" in metrics:
        tiles.append((f"{np.median(metrics['images_per_second'][1]):.1f}", "images a second"))
    if (memory := last("memory_gib")) is not None:
        tiles.append((f"{memory:.1f} GiB", "memory at most"))
    return tiles


def _training(metrics: Mapping) -> dict:
    terms = {"class": "loss_class", "L1": "loss_bbox", "GIoU": "loss_giou"}
    more = [told for key, told in _OF_TRAINING_ALONE.items() if key in metrics]
    training = ", ".join(["training", *more])
    shown: list[tuple[str, dict[str, str], str, dict[str, Any]]] = [
        (
            "Loss",
            {training: "total_loss", "validation": "validation/total_loss"},
            "sum of all losses",
            {"bottom": 0},
        ),
        ("Losses of the last stage", terms, "weighted loss", {"bottom": 0}),
        (
            "Losses of the last stage, validation",
            {name: f"validation/{key}" for name, key in terms.items()},
            "weighted loss",
            {"bottom": 0},
        ),
        (
            "AP during training",
            {name: f"bbox/{name}" for name in ("AP", "AP50", "AP75")},
            "AP, %",
            {"bottom": 0, "top": 100},
        ),
        ("Learning rate", {"lr": "lr"}, "learning rate", {"bottom": 0}),
        ("Throughput", {"images": "images_per_second"}, "images a second", {"bottom": 0}),
        ("Gradient norm", {"norm": "grad_norm"}, "before clipping", {"bottom": 0}),
    ]
    drawn = []
    for title, curves, y, limits in shown:
        found = {name: metrics[key] for name, key in curves.items() if key in metrics}
        if title == "Loss":  # the first iterations would make all others look equal
            values = np.array(metrics.get("total_loss", ([], [0.0]))[1])
            limits = limits | {"top": float(np.percentile(values, 95) * 1.1) or None}
        if found:
            drawn.append((title, charts.lines(found, x="iteration", y=y, **limits)))
    return section("Training", charts=drawn)


def _usable(predictions: Sequence[dict], truth: Mapping) -> tuple[list[dict], list[dict]]:
    """The predictions that can be judged, and a section about the others, if there are any."""
    kept, others = usable_ones(predictions)
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    counts = Counter(str(names.get(item["image_id"], item["image_id"])) for item in others)
    if not counts:
        return kept, []
    shown = ", ".join(f"{name} ({count})" for name, count in counts.most_common(_MOST_CURVES))
    text = (
        f"{sum(counts.values())} detections in {len(counts)} images are NaN, infinite or of "
        f"negative size, and are left out of all figures: {shown}"
        + (", ..." if len(counts) > _MOST_CURVES else "")
    )
    logger.warning(text)
    return kept, [section("Unusable detections", text=text)]


def _evaluation(found: Precision | None) -> dict:
    if found is None:
        return section("Evaluation", text="Nothing was detected.")
    by_class = {name: found.ap(index) for index, name in enumerate(found.names)}
    by_size = {name: found.ap(size=size) for name, size in SIZES.items()}
    by_rank = sorted(by_class, key=lambda name: -np.nan_to_num(by_class[name], nan=-1))
    curves = by_rank
    if len(by_rank) > _MOST_CURVES:
        curves = by_rank[: _MOST_CURVES // 2] + by_rank[-_MOST_CURVES // 2 :]
    bars = by_rank
    if len(by_rank) > _MOST_BARS:
        bars = by_rank[: _MOST_BARS // 2] + by_rank[-_MOST_BARS // 2 :]
    recalls = (100 * found.recalls).tolist()
    pr = {}
    for name in curves:
        values = found.values[0, :, found.names.index(name), 0, -1]
        if (values > -1).any():
            pr[name] = (recalls, (100 * values).tolist())
    drawn = [
        ("AP by class", charts.bars({name: by_class[name] for name in bars}, x="AP, %")),
        ("AP by size of the object", charts.bars(by_size, x="AP, %")),
    ]
    if pr:
        title = "Precision and recall at IoU 0.5"
        title += "" if len(curves) == len(by_rank) else ", best and worst classes"
        svg = charts.lines(pr, x="recall, %", y="precision, %", bottom=0, top=102)
        drawn.append((title, svg))
    table: list[tuple] = [("class", "objects", "AP", "AP50", "AP75")]
    for name in by_rank:
        index = found.names.index(name)
        aps = (found.ap(index, iou=at) for at in (slice(None), 0, 5))
        table.append((name, found.objects[index], *(f"{value:.1f}" for value in aps)))
    return section("Evaluation", charts=drawn, table=table)


def _rare_classes(
    config: Saved, found: Precision | None, evaluated: Mapping, allow_outside: bool
) -> list[dict]:
    """Classes with too few objects to learn from, and what they cost; nothing if there are none."""
    try:
        trained, _ = read_ground_truth(config, allow_outside, "train")
    except Exception as error:  # the data need not be here any more
        if (reason := explain(error)) is None:
            raise
        logger.info(f"The classes of the training are not counted: {reason}")
        return []
    names = {category["id"]: category["name"] for category in trained["categories"]}
    objects: Counter[str] = Counter()
    images: defaultdict[str, set] = defaultdict(set)
    for item in trained["annotations"]:
        if not item.get("iscrowd"):
            objects[names[item["category_id"]]] += 1
            images[names[item["category_id"]]].add(item["image_id"])
    categories = sorted(evaluated["categories"], key=lambda category: category["id"])
    aps = {
        category["name"]: np.nan if found is None else found.ap(index)
        for index, category in enumerate(categories)
    }
    rare = [name for name in aps if objects[name] < _FEW_OBJECTS]
    if not rare:
        return []
    scored = [name for name in aps if not np.isnan(aps[name])]
    others = [aps[name] for name in scored if name not in rare]
    text = f"{len(rare)} of {len(aps)} classes have fewer than {_FEW_OBJECTS} objects to train on. "
    costs = {}
    if others and any(name in rare for name in scored):
        mean = float(np.mean(others))
        costs = {name: (mean - aps[name]) / len(scored) for name in scored if name in rare}
        lost = sum(costs.values())
        cost = f"they cost {lost:.1f}" if lost > 0 else "these do not lower it"
        text += (
            f"AP is {np.mean([aps[name] for name in scored]):.1f}, and {mean:.1f} of the other "
            f"classes: {cost}. "
        )
    if not costs or max(costs.values()) > 0:
        text += (
            "More pictures of them help most; dataloader.train.repeat_threshold shows those that "
            "there are more often, train.class_weights=balanced weighs their losses."
        )
    rows: list[tuple] = [("class", "AP", "costs AP", "objects to train on", "in images")]
    for name in sorted(rare, key=lambda name: (-costs.get(name, -np.inf), objects[name])):
        told = ("" if np.isnan(aps[name]) else f"{aps[name]:.1f}",
                f"{max(costs[name], 0):.2f}" if name in costs else "")  # fmt: skip
        rows.append((name, *told, objects[name], len(images[name])))
    return [section("Rare classes", text=text, table=rows[: _MOST_CLASSES + 1])]


def _confusions(matched: Sequence[ImageResult], names: Sequence[str], told: str) -> dict:
    counts = confusion_matrix(matched, len(names))
    shown = list(range(len(names) + 1))
    if len(names) > _MOST_CLASSES:  # those that are confused the most
        wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        shown = sorted(np.argsort(-wrong[:-1], kind="stable")[:_MOST_CLASSES]) + [len(names)]
    labels = [*names, "nothing"]
    svg = charts.matrix(
        counts[np.ix_(shown, shown)], [labels[i] for i in shown], rows="object", columns="detection"
    )
    right = sum(int((r.object_of >= 0).sum()) for r in matched)
    detections, objects = (sum(len(part) for part in parts) for parts in
                           zip(*((r.boxes, r.object_boxes) for r in matched)))  # fmt: skip
    return section(
        "Confusions",
        text=f"Detections {told}, IoU 0.5, whatever the class. Of "
        f"{objects} objects {right} are found with the right class, {objects - right} are not; of "
        f"{detections} detections {detections - right} are false alarms. The last row: detections "
        "of nothing; the last column: objects that were missed.",
        charts=[("Objects by what they were detected as", svg)],
    )


def picture_of(
    result: ImageResult, names: Sequence[str], image_root: str, whose: str = ""
) -> tuple[str, str] | None:
    """An image with what was found, missed and imagined, and a caption; None if it cannot be read.

    ``whose`` comes first in the caption.
    """
    try:
        image = read_image(os.path.join(image_root, result.file_name))
    except Exception as error:  # a picture less; the page is still worth having
        logger.warning(f"not shown: {error}")
        return None
    found = result.object_of >= 0
    caption = (
        f"{whose}{os.path.basename(result.file_name)}: {found.sum()} found, "
        f"{result.missed.sum()} missed, {(~found).sum()} false alarms"
    )
    boxes = np.concatenate((result.object_boxes[result.missed], result.boxes))
    classes = np.concatenate((result.object_classes[result.missed], result.classes))
    colours = [MISSED] * int(result.missed.sum())
    colours += [FOUND if right else FALSE_ALARM for right in found]
    return picture_with_boxes(image, boxes, classes, names, colours), caption


def _pictures(
    matched: Sequence[ImageResult],
    names: Sequence[str],
    image_root: str,
    which: str,
    count: int,
) -> list[dict]:
    def wrong(result: ImageResult) -> int:
        return int((result.object_of < 0).sum() + result.missed.sum())

    def false_alarm(result: ImageResult) -> float:
        alarms = result.scores[result.object_of < 0]
        return alarms.max() if len(alarms) else 0.0

    with_objects = [result for result in matched if len(result.object_boxes)]
    by_quality = sorted(with_objects, key=lambda r: (r.f1, -len(r.object_boxes)))
    worst = [result for result in by_quality if wrong(result)][:count]
    best = sorted(with_objects, key=lambda r: (-r.f1, -len(r.object_boxes)))[:count]
    alarms = sorted(matched, key=lambda r: -false_alarm(r))[:count]
    alarms = [result for result in alarms if false_alarm(result) > 0]
    sections = []
    for title, text, chosen in (
        ("Worst images", "The least share of objects found and detections right.", worst),
        ("Surest false alarms", "Detections of nothing, or of another class, by score.", alarms),
        ("Best images", "Everything right, or nearly, on as many objects as possible.", best),
    ):
        pictures = [
            picture for result in chosen if (picture := picture_of(result, names, image_root))
        ]
        if pictures:
            told = f"{text} Detections {which}. Pictures of {image_root}."
            sections.append(section(title, text=told, legend=LEGEND, pictures=pictures))
    return sections
