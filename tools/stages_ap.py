#!/usr/bin/env python
"""AP of every stage of a checkpoint, without parts of the stages, and of cascades that end early.

python tools/stages_ap.py --checkpoint output/quickstart/model_final.pth --data datasets/shapes

Prints tables, and writes stages_ap.json and .csv with all of them, and the charts stages_ap.svg (AP
by stage) and stages_ap_time.svg (AP against time), beside the checkpoint, or to --output-dir.
`stage-interactor report` shows what lies in the folder of a run.
"""

import argparse
import csv
import io
import json
import os
import sys
from dataclasses import asdict

from tabulate import tabulate

from stage_interactor.commands import add_checkpoint
from stage_interactor.engine.cascade import score_exits, score_stages
from stage_interactor.engine.judge import Judge
from stage_interactor.engine.writers import finite_or_null
from stage_interactor.errors import call
from stage_interactor.inference.blueprint import load_model
from stage_interactor.inference.prepare import choose_device
from stage_interactor.pages.cascade import (
    AGAINST_TIME,
    BY_STAGE,
    FILE,
    all_rows,
    exit_rows,
    query_rows,
    stage_charts,
    stage_rows,
)
from stage_interactor.writing import write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint(parser, ".pth or .safetensors")
    parser.add_argument("--data", required=True, help="folder, or the file that describes the data")
    parser.add_argument("--output-dir", help="where the files go (beside the checkpoint)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (a GPU if there is one)")
    parser.add_argument(
        "--exit-iou",
        type=_iou,
        nargs="*",
        default=[0.7, 0.8, 0.9, 0.95],
        help="mean IoU with the boxes of the stage before, at which a cascade ends (%(default)s)",
    )
    args = parser.parse_args()
    folder = args.output_dir or os.path.dirname(os.path.abspath(args.checkpoint))
    os.makedirs(folder, exist_ok=True)
    model, blueprint = load_model(args.checkpoint, args.config_file, averaged=args.averaged)
    model = model.to(choose_device(args.device))
    judge = Judge(args.data)
    classes = judge.classes(blueprint)

    def evaluator():
        return judge.evaluator(blueprint, classes)

    found = score_stages(model, judge.loader(blueprint, with_objects=True), evaluator, classes)
    exits = score_exits(model, judge.loader(blueprint), evaluator, args.exit_iou)
    written = {
        "checkpoint": os.path.basename(args.checkpoint),
        "data": f"{os.path.basename(os.path.abspath(judge.path))} ({judge.part})",
        "images": len(judge),
        **asdict(found),
        "exits": [item._asdict() for item in exits],
    }
    base = os.path.join(folder, FILE.removesuffix(".json"))
    written = finite_or_null(written)
    write_text(f"{base}.json", json.dumps(written, indent=1, allow_nan=False))
    table = io.StringIO()
    csv.writer(table).writerows(all_rows(written))
    write_text(f"{base}.csv", table.getvalue())
    drawn = dict(stage_charts(written))
    write_text(f"{base}.svg", drawn[BY_STAGE])
    write_text(f"{base}_time.svg", drawn[AGAINST_TIME])
    tables = stage_rows(written["metrics"]), query_rows(found.iou, found.best)
    for table_rows in (*tables, exit_rows(written["exits"])):
        print(tabulate(table_rows, headers="firstrow", tablefmt="github", disable_numparse=True))
        print()
    print(f"Wrote {base}.json, .csv, .svg and {base}_time.svg")


def _iou(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no IoU above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(call("stages_ap.py", main, mistake=1))
