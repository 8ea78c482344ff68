"""What stages of a cascade are worth, as table, chart and part of a report."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .page import section

FILE = "stages_ap.json"  # in the folder of a run
_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_ALWAYS = ("AP", "AP50", "AP75")


def read_stages(path: str) -> dict[str, Any]:
    """What tools/stages_ap.py has written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    with open(path) as file:
        text = file.read()
    try:
        found = json.loads(text)
        stages = [name for name in found["metrics"] if name.startswith("stage ")]
        values = [found["metrics"][name][key] for name in found["metrics"] for key in _ALWAYS]
        values += [item["metrics"]["AP"] for item in found["exits"]]
        values += [item[key] for item in found["exits"] for key in ("stages", "milliseconds")]
        values += [*found["iou"], *found["best"]]
        right = (
            all(isinstance(value, (int, float)) for value in values)
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


def stage_charts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Titles and SVG."""
    metrics = found["metrics"]
    stages = [name for name in metrics if name.startswith("stage ")]
    x = list(range(1, len(stages) + 1))
    curves = {name: (x, [metrics[stage][name] for stage in stages]) for name in _ALWAYS}
    drawn = [("AP by stage", charts.lines(curves, x="stage", y="%", bottom=0))]
    lost = {
        name: metrics[stages[-1]]["AP"] - values["AP"]
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
            aps.append(item["metrics"]["AP"])
        svg = charts.lines(groups, x="ms an image", y="AP, %", bottom=0)
        drawn.append(("AP against time, ending early", svg))
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
