import csv
import os
import subprocess
import sys
from pathlib import Path

import experiments
import pytest
import run_table

from stage_interactor.config import load_config

ROOT = Path(__file__).parents[2]
PLACES = os.pathsep.join((f"{ROOT}/projects", f"{ROOT}/tools"))
ROWS = sorted({row.config for _, rows in run_table.TABLES.values() for row in rows})


@pytest.mark.parametrize("config", ROWS)
def test_a_row_changes_the_quick_start_as_it_changes_the_paper_s_run(config):
    ours = load_config(str(ROOT / "configs" / f"{run_table.OURS}.py")).model
    row = load_config(str(ROOT / "configs" / f"{config}.py")).model
    changes = experiments.difference(ours, row)
    assert bool(changes) == (config != run_table.OURS)
    quickstart = load_config(str(ROOT / "configs" / "quickstart.py"))
    experiments.give_model(quickstart, config)
    decoder = quickstart.model.decoder
    same = load_config(str(ROOT / "configs" / "quickstart.py")).model.decoder
    for key in ("static_mixing", "dynamic_reuse", "sampler", "first_reusing_stage"):
        assert decoder[key] == row.decoder[key]
    # The level that an untrained query looks at is the data's choice, whatever the sampler.
    shift = decoder.level_shift - decoder.get("initial_dz", 0.0)
    assert shift == same.level_shift
    assert quickstart.model.criterion.assigner == row.criterion.assigner
    assert quickstart.model.get("nms_threshold") == row.nms_threshold
    assert decoder.embed_dim == same.embed_dim and len(decoder.num_points) == 3
    first = row.decoder.num_points[0] / ours.decoder.num_points[0]
    assert list(decoder.num_points) == [same.num_points[0] * first, *same.num_points[1:]]


def test_a_table_is_trained_printed_and_not_trained_again(tmp_path):
    def run(*arguments):
        command = [sys.executable, "tools/run_table.py", "--table", "5", *arguments]
        options = ["--data", "tests/tiny_config.py", "--output-dir", str(tmp_path / "out")]
        return subprocess.run(
            [*command, *options, f"shapes.root={tmp_path}/shapes", "train.max_iter=2"],
            cwd=ROOT, capture_output=True, text=True, timeout=500,
            env=os.environ | {"PYTHONPATH": PLACES, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    with open(tmp_path / "out" / "table5.csv") as file:
        header, *lines = csv.reader(file)
    assert [line[0] for line in lines] == ["NMS 0.5", "NMS 0.75", "NMS 0.9", "none"]
    assert lines[0][header.index("paper AP")] == "44.1"
    assert (tmp_path / "out" / "table5.md").read_text().count("|") > 50
    again = run()
    assert again.stdout.count("finished before") == 4 and "Starting training" not in again.stdout

    other = run("train.seed=3")
    assert other.returncode == 1 and "was begun with another config" in other.stderr
    assert "train.seed" in other.stderr
    wrong = subprocess.run(
        [sys.executable, "tools/run_table.py", "--table", "1", "--nms", "3"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2 and "neither a flag nor a key=value override" in wrong.stderr
