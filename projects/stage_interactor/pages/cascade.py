"""What stages of a cascade are worth, as table, chart and part of a report."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..untrusted.files import read_json
from . import charts
from .page import section
from .run import is_number

BY_STAGE, AGAINST_TIME = "AP by stage", "AP against time, ending early"
FILE = "stages_ap.json"  # in the folder of a run
_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_ALWAYS = ("AP", "AP50", "AP75")
_LARGEST = 1e6


def read_stages(path: str) -> dict[str, Any]:
    """What tools/stages_ap.py has written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    found = read_json(path)
    try:
        stages = [name for name in found["metrics"] if name.startswith("stage ")]
        evaluated = [*found["metrics"].values(), *(item["metrics"] for item in found["exits"])]
        figures = [of[key] for of in evaluated for key in _ALWAYS]
        figures += [of.get(key) for of in evaluated for key in _COLUMNS]
        values = [item[key] for item in found["exits"] for key in ("stages", "milliseconds")]
        values += [*found["iou"], *found["best"]]
        right = (
            all(map(is_number, values))
            and all(value is None or is_number(value, _LARGEST) for value in figures)
            and all(isinstance(item["name"], str) for item in found["exits"])
            and len(stages) == len(found["iou"]) == len(found["best"]) > 0
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"{path} is not what tools/stages_ap.py writes: remove it")
    return found


def stage_rows(metrics: Mapping[str, Mapping[str, float]]) -> list[tuple]:
    """A table of what was evaluated, the first row is the head."""
    columns = [name for name in _COLUMNS if any(name in values for values in metrics.values())]
    rows: list[tuple] = [("of", *columns)]
    for name, values in metrics.items():
        rows.append((name, *(number(values.get(column)) for column in columns)))
    return rows


def query_rows(iou: Sequence[float], best: Sequence[int]) -> list[tuple]:
    """Of the objects' queries by stage, the first row is the head."""
    rows: list[tuple] = [("stage", "mean IoU with the object", "objects with their best box here")]
    return rows + [(f"{i + 1}", f"{x:.3f}", n) for i, (x, n) in enumerate(zip(iou, best))]


def exit_rows(exits: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Of cascades that ended early, the first row is the head."""
    rows: list[tuple] = [("exit", "stages", "ms an image", "AP")]
    for item in exits:
        ap = number(item["metrics"].get("AP"))
        rows.append((item["name"], f"{item['stages']:.2f}", f"{item['milliseconds']:.1f}", ap))
    return rows


def number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.1f}"


def _ap(metrics: Mapping[str, Any], name: str = "AP") -> float:
    """NaN where there was nothing to find."""
    return math.nan if metrics[name] is None else metrics[name]


def all_rows(found: Mapping[str, Any]) -> list[tuple]:
    """All that was evaluated as one table for programs; the first row is the head."""
    stages = len(found["iou"])
    rows: list[tuple] = [("of", *_COLUMNS, "mean_iou", "best_boxes", "stages", "milliseconds")]
    for index, (name, metrics) in enumerate(found["metrics"].items()):
        own = (found["iou"][index], found["best"][index]) if index < stages else ("", "")
        rows.append((name, *map(metrics.get, _COLUMNS), *own, "", ""))
    for item in found["exits"]:
        figures = map(item["metrics"].get, _COLUMNS)
        rows.append(
            (f"exit {item['name']}", *figures, "", "", item["stages"], item["milliseconds"])
        )
    return rows


def stage_charts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Titles and SVG."""
    metrics = found["metrics"]
    stages = [name for name in metrics if name.startswith("stage ")]
    x = list(range(1, len(stages) + 1))
    curves = {name: (x, [_ap(metrics[stage], name) for stage in stages]) for name in _ALWAYS}
    drawn = [(BY_STAGE, charts.lines(curves, x="stage", y="%", bottom=0))]
    lost = {
        name: _ap(metrics[stages[-1]]) - _ap(values)
        for name, values in metrics.items()
        if name.startswith("no ")
    }
    if lost:
        drawn.append(("AP lost without", charts.bars(lost, x="AP, %")))
    drawn.append(
        ("Mean IoU by stage", charts.lines({"IoU": (x, found["iou"])}, x="stage", y="IoU"))
    )
    if found["exits"]:
        groups: dict[str, tuple[list, list]] = {}
        for item in found["exits"]:
            kind = "after a stage" if item["name"].startswith("stage") else "by settled boxes"
            times, aps = groups.setdefault(kind, ([], []))
            times.append(item["milliseconds"])
            aps.append(_ap(item["metrics"]))
        svg = charts.lines(groups, x="ms an image", y="AP, %", bottom=0)
        drawn.append((AGAINST_TIME, svg))
    return drawn


def stage_sections(output_dir: str) -> list[dict]:
    """For the report of a run; nothing if its stages were not evaluated.

    Raises:
        OSError, ValueError: see :func:`read_stages`.
    """
    path = os.path.join(output_dir, FILE)
    if not os.path.isfile(path):
        return []
    found = read_stages(path)
    text = (
        f"{found.get('checkpoint', 'A checkpoint')} on {found.get('data', 'data')}, "
        f"{found.get('images', 0)} images: each stage as if it was the last; the last with each "
        "object's box of the stage where it overlaps the object best; the last without filters of "
        "earlier stages or without static mixing. Labels across stages are of the training alone."
    )
    sections = [
        section(
            "Stages", text=text, charts=stage_charts(found), table=stage_rows(found["metrics"])
        ),
        section("Queries by stage", table=query_rows(found["iou"], found["best"])),
    ]
    if found["exits"]:
        sections.append(section("Ending early", table=exit_rows(found["exits"])))
    return sections
