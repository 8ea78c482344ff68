"""Several runs on one page: curves over each other, AP beside each other, where they differ."""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..config import Saved, by_number, flatten
from ..d2.screening import detection_limits
from ..errors import explain
from . import charts
from .matching import ImageResult
from .page import section, write_page
from .precision import SIZES, Precision, precision_of, short_names
from .report import LEGEND, match_given, picture_of, require_options
from .run import Curve, metric_of, read_ground_truth, read_predictions, read_run, usable_ones
from .thresholds import choose_thresholds

logger = logging.getLogger(__name__)

_MOST_RUNS, _MOST_KEYS, _LONGEST = 10, 300, 60  # of values in letters
_CURVES = (
    ("Loss", "total_loss", "sum of all losses", {"bottom": 0}),
    ("Validation loss", "validation/total_loss", "sum of all losses", {"bottom": 0}),
    ("AP", "bbox/AP", "AP, %", {"bottom": 0, "top": 100}),
    ("AP50", "bbox/AP50", "AP50, %", {"bottom": 0, "top": 100}),
    ("Learning rate", "lr", "learning rate", {"bottom": 0}),
    ("Throughput", "images_per_second", "images a second", {"bottom": 0}),
)
# What is different in any two runs, and says nothing.
_PLACES = ("train.output_dir", "dataloader.evaluator.output_dir")


class _Evaluated(NamedTuple):
    content: dict  # of the COCO file that was evaluated on
    image_root: str
    precision: Precision | None  # None where nothing was detected
    matched: dict[Any, ImageResult]  # by image id


class _Run(NamedTuple):
    name: str
    config: Saved
    metrics: dict[str, Curve]
    evaluated: _Evaluated | None  # None where there was none, or it cannot be shown


def write_comparison(
    output_dirs: Sequence[str | os.PathLike],
    path: str | os.PathLike,
    *,
    threshold: float | None = None,
    num_pictures: int = 6,
    allow_outside: bool = False,
) -> str:
    """Writes the page and returns its path.

    Args:
        output_dirs: of two runs or more; see :func:`stage_interactor.pages.report.write_report`.
        path: of the page.
        threshold: least score of the detections in pictures; by default those that each run's
            evaluation chooses, by class.
        num_pictures: images in which the runs differ most.
        allow_outside: of runs whose data have ``allow_outside``: theirs is read.

    Whoever made the folders, nothing in them is called. What cannot be shown is told in the page.

    Raises:
        FileNotFoundError: a folder is not of a run.
        OSError, ValueError: a file of one is of no use, or the page cannot be written.
    """
    folders = [os.fspath(folder) for folder in output_dirs]
    if not 2 <= len(folders) <= _MOST_RUNS:
        raise ValueError(f"runs to compare must be 2 to {_MOST_RUNS}, got {len(folders)}")
    if repeated := [f for f, n in Counter(map(os.path.realpath, folders)).items() if n > 1]:
        raise ValueError(f"{repeated[0]} is named twice")
    require_options(threshold, num_pictures)
    told: list[str] = []
    runs = [
        _read(folder, name, threshold, allow_outside, told)
        for folder, name in zip(folders, _names(folders))
    ]
    sections = [_training(runs), *_precisions(runs, told)]
    sections += [_differences(runs), *_pictures(runs, num_pictures)]
    metrics = [metric_of(run.config) for run in runs]
    if len(set(metrics)) > 1:
        told.append("The runs were evaluated by different metrics; the table of AP is COCO's.")
    if told:
        sections[0]["text"] = " ".join(told)
    aps = [_last(run, "bbox/AP") for run in runs]
    tiles = [
        ("none" if math.isnan(ap) else f"{ap:.1f}", f"{metric}AP, {run.name}")
        for run, metric, ap in zip(runs, metrics, aps)
    ]
    title = "Comparison"
    write_page(path, title, ", ".join(run.name for run in runs), tiles, sections)
    return os.fspath(path)


def _names(folders: Sequence[str]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    parts = [os.path.abspath(folder).split(os.sep) for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return short_names(names)


def _read(
    folder: str, name: str, threshold: float | None, allow_outside: bool, told: list[str]
) -> _Run:
    config, metrics, wrong = read_run(folder, [key for _, key, *_ in _CURVES])
    if wrong:
        told.append(f"{name}: {wrong} lines of metrics.json are no values, and are left out.")
    results = os.path.join(folder, "coco_instances_results.json")
    evaluated = None
    if not os.path.isfile(results):
        told.append(f"{name}: there was no evaluation yet.")
        return _Run(name, config, metrics, None)
    try:
        evaluated = _evaluated(results, config, threshold, allow_outside)
    except Exception as error:  # the rest is still worth a page
        if (reason := explain(error)) is None:
            raise
        told.append(f"{name}: its evaluation cannot be shown: {reason}")
        logger.warning(told[-1])
    return _Run(name, config, metrics, evaluated)


def _evaluated(
    results: str, config: Saved, threshold: float | None, allow_outside: bool
) -> _Evaluated:
    content, image_root = read_ground_truth(config, allow_outside)
    predictions, _ = usable_ones(read_predictions(results, content)[0])
    limits = detection_limits(config.get("dataloader.evaluator.max_dets_per_image"))
    precision = precision_of(content, predictions, limits)
    chosen = choose_thresholds(content, predictions) if threshold is None else None
    matched, _ = match_given(content, predictions, threshold, chosen)
    return _Evaluated(content, image_root, precision, {item.image_id: item for item in matched})


def _last(run: _Run, key: str) -> float:
    return run.metrics[key][1][-1] if key in run.metrics else math.nan


def _training(runs: Sequence[_Run]) -> dict:
    drawn = []
    for title, key, y, limits in _CURVES:
        found = {run.name: run.metrics[key] for run in runs if key in run.metrics}
        if found:
            drawn.append((title, charts.lines(found, x="iteration", y=y, **limits)))
    return section("Training", charts=drawn)


def _is_same_data(runs: Sequence[_Run]) -> bool:
    """Whether all were evaluated on the same images, objects and classes."""

    def content(run: _Run) -> Any:
        assert run.evaluated is not None
        of = run.evaluated.content
        images = sorted(
            (str(i["id"]), i["file_name"], i["width"], i["height"]) for i in of["images"]
        )
        names = sorted((str(c["id"]), c["name"]) for c in of["categories"])
        objects = Counter(
            (str(a["image_id"]), str(a["category_id"]), *map(float, a["bbox"]), a.get("iscrowd", 0))
            for a in of["annotations"]
        )
        return images, names, objects

    first, *others = map(content, runs)
    return all(other == first for other in others)


def _precisions(runs: Sequence[_Run], told: list[str]) -> list[dict]:
    shown = [run for run in runs if run.evaluated and run.evaluated.precision]
    if not shown:
        return []
    text = None
    if not _is_same_data(shown):
        text = "The runs were evaluated on different images, objects or classes: their AP is not "
        text += "of one thing."
        told.append(text)
    found = [run.evaluated.precision for run in shown if run.evaluated]
    names = list(dict.fromkeys(name for one in found if one for name in one.names))

    def row(title: str, value: Callable[[Precision], float]) -> tuple:
        values = [value(one) if one else math.nan for one in found]
        known = [v for v in values if not math.isnan(v)]
        spread = f"{max(known) - min(known):.1f}" if len(known) > 1 else ""
        return (title, *("" if math.isnan(v) else f"{v:.1f}" for v in values), spread)

    def of_class(name: str) -> Callable[[Precision], float]:
        return lambda one: one.ap(one.names.index(name)) if name in one.names else math.nan

    head = ("AP, %", *(run.name for run in shown), "difference")
    rows = [row("all", lambda one: one.ap())]
    rows += [row("AP50", lambda one: one.ap(iou=0)), row("AP75", lambda one: one.ap(iou=5))]
    rows += [row(name, lambda one, size=size: one.ap(size=size)) for name, size in SIZES.items()]  # type: ignore[misc]
    if len(names) > 1:
        rows += [row(name, of_class(name)) for name in names]
    return [section("Average precision", text=text, table=[head, *rows])]


def _differences(runs: Sequence[_Run]) -> dict:
    try:
        flat = [flatten(by_number(run.config.content), ".") for run in runs]
    except RecursionError:
        return section("Config", text="A config is nested too deeply to be compared.")
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if key not in _PLACES]

    def shown(run: _Run, values: Mapping[str, Any], key: str) -> str:
        if key not in values:
            return "—"
        value = values[key]
        if isinstance(value, str) and "${" in value:  # what it means in this run
            value = run.config.get(key)
        text = "null" if value is None else str(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

    rows = []
    for key in keys:
        if all(key in one and one[key] == flat[0].get(key) for one in flat):
            continue  # a reference to what differs is no difference of its own
        values = [shown(run, one, key) for run, one in zip(runs, flat)]
        if len(set(values)) > 1:
            rows.append((key, *values))
    title = "Config"
    if not rows:
        return section(title, text="The configs are the same, but for their folders.")
    text = f"{len(rows)} keys differ"
    text += f", of which {_MOST_KEYS} are shown." if len(rows) > _MOST_KEYS else "."
    head = ("key", *(run.name for run in runs))
    return section(title, text=text, table=[head, *rows[:_MOST_KEYS]])


def _pictures(runs: Sequence[_Run], count: int) -> list[dict]:
    """The images in which the runs differ most, by F1: one picture for each run."""
    shown = [(run.name, run.evaluated) for run in runs if run.evaluated]
    if len(shown) < 2 or not count or not _is_same_data([r for r in runs if r.evaluated]):
        return []

    def spread(image: Any) -> float:
        values = [evaluated.matched[image].f1 for _, evaluated in shown]
        return max(values) - min(values)

    images: Iterable[Any] = sorted(shown[0][1].matched, key=lambda image: -spread(image))
    pictures = []
    for image in [image for image in images if spread(image) > 0][:count]:
        for name, evaluated in shown:
            names = [
                c["name"] for c in sorted(evaluated.content["categories"], key=lambda c: c["id"])
            ]
            result = evaluated.matched[image]
            found = picture_of(result, short_names(names), evaluated.image_root, f"{name}, ")
            pictures += [found] if found else []
    if not pictures:
        return []
    text = "The images whose share of objects found and detections right differs most."
    return [section("Where they differ", text=text, legend=LEGEND, pictures=pictures)]
