#!/usr/bin/env python
"""Trains and evaluates the rows of the paper's ablation tables, and prints them beside the paper's.

python tools/run_table.py --table 1                          # on COCO, as in the paper
python tools/run_table.py --table 1 2 --data quickstart      # on the generated shapes
python tools/run_table.py --table 3 --data configs/custom_data.py data.train_json=... ...

Rows are the configs of configs/ablations/. On other data a row is the difference between its model
and the paper's, applied to that config's model. Finished rows are skipped, an interrupted one goes
on where it was; a row that several tables share is trained once. The results are table<N>.txt, .csv
and .md in --output-dir.
"""

import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from experiments import FINISHED, METRICS, OURS, ROOT, give_model, paper_config, train_once
from omegaconf import DictConfig
from tabulate import tabulate

from stage_interactor.config import load_config
from stage_interactor.errors import call
from stage_interactor.writing import write_text


class Row(NamedTuple):
    """One line of a table: what it says, its config, and the paper's figures."""

    label: str
    config: str  # below configs/
    paper: tuple[float | None, ...]  # as METRICS; None where the paper has no figure
    weights_of: str | None = None  # evaluated only, with the weights of this config


OUR_AP = (44.8, 63.0, 48.4, 27.5, 48.0, 61.3)
DYNAMIC = (43.9, 62.2, 47.6, 26.6, 46.9, 60.8)
NONE = (None,) * 6
TABLES: dict[str, tuple[str, list[Row]]] = {
    "1": ("The modules in the cascade mixing", [
        Row("neither", "ablations/table1_neither", (44.1, 62.3, 47.6, 25.5, 47.5, 60.3)),
        Row("static", "ablations/table1_static", (43.5, 61.7, 46.8, 25.3, 47.0, 59.0)),
        Row("dynamic", "ablations/table1_dynamic", DYNAMIC),
        Row("dynamic + static", OURS, OUR_AP),
    ]),
    "2": ("The type of static mixing", [
        Row("none", "ablations/table1_dynamic", DYNAMIC),
        Row("channel", "ablations/table2_channel", (44.0, 62.3, 47.8, 26.2, 47.0, 61.1)),
        Row("spatial", "ablations/table2_spatial", (43.7, 61.8, 47.2, 25.7, 47.0, 59.9)),
        Row("channel-spatial", OURS, OUR_AP),
    ]),
    "3": ("The type of feature sampling", [
        Row("vanilla", "ablations/table3_vanilla", (43.7, 62.1, 47.2, 25.6, 47.4, 59.7)),
        Row("group init.", "ablations/table3_group_init", (44.1, 62.3, 47.9, 26.2, 47.0, 60.8)),
        Row("ours", OURS, OUR_AP),
    ]),
    "4": ("The number of sampling points at the first stage", [
        Row("baseline, 32", "adamixer_r50_100q_12ep", (42.5, 61.4, 45.7, 25.0, 45.1, 58.2)),
        Row("baseline, 64", "ablations/table4_baseline_64_points",
            (42.6, 61.4, 45.7, 24.4, 45.7, 58.2)),
        Row("StageInteractor, 32", "ablations/table4_32_points",
            (44.6, 62.6, 48.3, 26.2, 48.1, 61.1)),
        Row("StageInteractor, 64", OURS, OUR_AP),
    ]),
    "5": ("With and without NMS", [
        Row("NMS 0.5", "ablations/table5_nms_50", (44.1, None, 47.1, None, None, None), OURS),
        Row("NMS 0.75", "ablations/table5_nms_75", (44.8, None, 48.4, None, None, None), OURS),
        Row("NMS 0.9", "ablations/table5_nms_90", (44.8, None, 48.5, None, None, None), OURS),
        Row("none", OURS, OUR_AP),
    ]),
    "scope": ("The scope of cross-stage label assignment (the supplement gives no figures)", [
        Row("[i]", "ablations/scope_i", NONE),
        Row("[i, L]", "ablations/scope_i_L", NONE),
        Row("[i-1, L]", OURS, OUR_AP),
        Row("[0, L]", "ablations/scope_0_L", NONE),
    ]),
    "threshold": ("The threshold of label assignment (the supplement gives no figures)", [
        Row("0.3", "ablations/threshold_30", NONE),
        Row("0.4", "ablations/threshold_40", NONE),
        Row("0.5", OURS, OUR_AP),
        Row("0.6", "ablations/threshold_60", NONE),
        Row("0.7", "ablations/threshold_70", NONE),
    ]),
}  # fmt: skip


def row_config(row: Row, data: str, overrides: list[str]) -> DictConfig:
    if data == "coco":
        return paper_config(row.config, overrides)
    path = str(ROOT / "configs" / "quickstart.py") if data == "quickstart" else data
    config = load_config(path, overrides)
    give_model(config, row.config)
    return config


def run_row(row: Row, data: str, overrides: list[str], folder: Path, num_gpus: int) -> dict:
    """The row's metrics, from a finished run or by running it now."""
    output = folder / Path(row.config).name
    config = row_config(row, data, overrides)
    arguments = ["--num-gpus", str(num_gpus), "--eval-only" if row.weights_of else "--resume"]
    if row.weights_of:
        config.train.init_checkpoint = str(folder / row.weights_of / "model_final.pth")
    if (output / FINISHED).is_file():
        print(f"{row.label}: finished before, in {output}", flush=True)
    return train_once(config, output, row.label, arguments, start)


def start(command: list[str]) -> int:
    print(" ".join(command), flush=True)
    return subprocess.run(command).returncode


def write_table(number: str, rows: list[Row], measured: list[dict], data: str, folder: Path) -> str:
    """Writes table<N>.txt, .csv and .md; the text."""
    header = ["", *METRICS, *(f"paper {name}" for name in METRICS)]
    lines = [
        [
            row.label,
            *(None if metrics[name] is None else round(metrics[name], 1) for name in METRICS),
            *row.paper,
        ]
        for row, metrics in zip(rows, measured)
    ]
    caption = TABLES[number][0]
    where = "COCO val2017" if data == "coco" else data
    title = f"Table {number}: {caption}. Measured on {where}; the paper's on COCO val2017."
    options = dict(headers=header, floatfmt=".1f", missingval="-")
    text = f"{title}\n\n{tabulate(lines, tablefmt='simple', **options)}\n"
    marked = f"{title}\n\n{tabulate(lines, tablefmt='github', **options)}\n"
    table = io.StringIO(newline="")
    csv.writer(table).writerows([header, *lines])
    for suffix, content in {"txt": text, "md": marked, "csv": table.getvalue()}.items():
        write_text(folder / f"table{number}.{suffix}", content)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", nargs="+", required=True, metavar="N", help=", ".join(TABLES))
    parser.add_argument("--data", default="coco", help="coco, quickstart, or a config file")
    parser.add_argument("--output-dir", help="default: output/tables_<data>")
    parser.add_argument("--num-gpus", type=int, default=1)
    args, rest = parser.parse_known_args()
    numbers = [item for item in args.table if "=" not in item]
    overrides = [item for item in args.table if "=" in item] + rest
    unknown = [item for item in overrides if "=" not in item or item.startswith("--")]
    if unknown:
        parser.error(f"neither a flag nor a key=value override: {unknown}")
    if not numbers or not set(numbers) <= set(TABLES):
        parser.error(f"--table takes one or more of {', '.join(TABLES)}; got {numbers}")
    folder = Path(args.output_dir or f"output/tables_{Path(args.data).stem}").resolve()
    for number in numbers:
        rows = TABLES[number][1]
        measured = {}
        # A row that is only evaluated waits for the one whose weights it takes.
        for row in sorted(rows, key=lambda row: row.weights_of is not None):
            measured[row.config] = run_row(row, args.data, overrides, folder, args.num_gpus)
        print(write_table(number, rows, [measured[row.config] for row in rows], args.data, folder))
        print(f"Written to {folder}/table{number}.txt, .csv and .md", flush=True)


if __name__ == "__main__":
    sys.exit(call("run_table.py", main, mistake=1))
