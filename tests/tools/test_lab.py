"""The laboratory: its statistics against SciPy's and by hand, its arms, and runs that are kept."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lab
import numpy as np
import pytest
from experiments import OURS, difference, paper_config
from lab import Arm, Results, Trial, adjusted, estimate, factorial, find_arm, power, seeds_needed
from scipy import stats

from stage_interactor.config import ConfigError
from stage_interactor.d2.config import instantiate
from stage_interactor.errors import UserError

ROOT = Path(__file__).parents[2]
PLACES = os.pathsep.join((f"{ROOT}/projects", f"{ROOT}/tools"))
TINY = "tests/tiny_config.py"


def test_an_interval_and_a_p_value_are_those_of_the_t_test():
    values = np.random.default_rng(0).normal(0.7, 1.0, 7)
    found = estimate(values)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert found.p == pytest.approx(test.pvalue) and found.size == 7
    assert str(estimate([3.0])) == "3.0" and np.isnan(estimate([]).mean)
    assert estimate([0.0, 0.0]).p == 1.0 and estimate([1.0, 1.0]).p == 0.0


def test_several_tests_at_once_are_corrected_by_holm():
    # 4 x 0.01, 3 x 0.015, 2 x 0.03 and 1 x 0.04, none smaller than the one before.
    assert adjusted([0.04, 0.01, float("nan"), 0.03, 0.015])[:2] == pytest.approx([0.06, 0.04])
    assert adjusted([0.04, 0.01, 0.03, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert np.isnan(adjusted([float("nan"), 0.5])[0])


def test_the_number_of_seeds_is_that_of_the_power_of_the_test():
    drawn = np.random.default_rng(1).normal(1.0, 1.3, (20000, 9))
    share = (stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean()
    assert power(9, 1.3, 1.0) == pytest.approx(share, abs=0.015)
    assert seeds_needed(1.0, 1.0) == 10  # as tables of the paired t-test have it
    assert seeds_needed(1.0, 0.5) == 34
    assert seeds_needed(0.0, 1.0) == 2 and seeds_needed(1.0, 1e-4) is None


def test_arms_are_found_by_the_end_of_their_names():
    assert find_arm("mal").configs == ("extensions/stage_interactor_r50_100q_12ep_mal",)
    assert find_arm("scope_i").configs == ("ablations/scope_i",)  # and not scope_i_L
    both = find_arm("both=mal + layer_gates")
    assert both.label == "both" and len(both.configs) == 2
    assert find_arm("paper").configs == () == find_arm(f"x={OURS}").configs
    one = find_arm("one=decoder.max_reused_filters:1+mal")
    assert one.configs[0] == "decoder.max_reused_filters:1" and len(one.configs) == 2
    config = lab.trial_config(Trial(one, 5, 1), str(lab.BENCHMARK), [])
    assert config.model.decoder.max_reused_filters == 1 and "class_loss" in config.model.criterion
    for wrong in ("nothing_like_it", "a/../b=mal", "L", "=", "x=mal,sqr"):
        with pytest.raises(UserError, match="arm"):
            find_arm(wrong)


def test_a_factorial_has_all_combinations_and_tells_effects_apart():
    arms = factorial(["labels=scope_i,paper", "reuse=table1_neither,paper"])
    assert [arm.label for arm in arms] == ["none", "labels", "reuse", "labels + reuse"]
    assert [len(arm.configs) for arm in arms] == [2, 1, 1, 0]
    # 10, labels give 3, reuse gives 1, and together 2 more; a seed adds the same to all.
    of = dict(zip([arm.label for arm in arms], (10.0, 13.0, 11.0, 16.0)))
    metrics = {
        Trial(arm, 5, seed): {"AP": of[arm.label] + seed} for arm in arms for seed in (1, 2, 3)
    }
    del metrics[Trial(arms[1], 5, 3)]
    results = Results(metrics, arms, [5], "AP")
    effects = results.effects(5)
    assert effects == {"labels": [4, 4], "reuse": [2, 2], "labels x reuse": [1, 1]}
    assert results.differences(arms[1], 5) == [3, 3] and results.deviation(5) == (0, 5)
    assert results.effects(6) == {"labels": [], "reuse": [], "labels x reuse": []}
    for wrong in (["labels=paper"], ["a=paper,mal", "a=paper,sqr"], ["mal"]):
        with pytest.raises(UserError, match="a factor is"):
            factorial(wrong)


NAMES = [path.stem for path in sorted((ROOT / "configs" / "extensions").glob("*.py"))]
NAMES += [path.stem for path in sorted((ROOT / "configs" / "ablations").glob("*.py"))]
NAMES += ["adamixer_r50_100q_12ep"]


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_keeps_the_sizes_of_the_benchmark(name):
    trial = Trial(find_arm(name), 10, 3)
    config = lab.trial_config(trial, str(lab.BENCHMARK), [])
    plain = lab.trial_config(Trial(Arm("paper", ()), 10, 3), str(lab.BENCHMARK), [])
    assert (config.train.max_iter, config.train.seed) == (10, 3)
    sizes = ("num_queries", "embed_dim", "num_classes", "feedforward_dim", "in_channels")
    for part in ("queries", "decoder", "neck"):
        for key in set(sizes) & set(plain.model[part]):
            assert config.model[part][key] == plain.model[part][key], (part, key)
    theirs = paper_config(trial.arm.configs[0]).model
    assert len(config.model.decoder.num_points) == len(theirs.decoder.num_points)
    if "one_to_many_queries" in theirs.queries:  # as many times those that detect
        assert config.model.queries.one_to_many_queries == 5 * 30
    model = instantiate(config.model)
    assert model.num_classes == 5
    # What differs from the plain model is what the config changes in the paper's.
    changed = difference(paper_config(OURS).model, theirs)
    assert set(difference(plain.model, config.model)) == set(changed)
    lab.check_arms([trial.arm], str(lab.BENCHMARK), [])


def test_a_deviation_of_one_arm_is_that_of_a_difference_of_two():
    arm = Arm("paper", ())
    metrics = {Trial(arm, 5, seed): {"AP": value} for seed, value in enumerate((1.0, 2.0, 4.0))}
    deviation, degrees = Results(metrics, [arm], [5], "AP").deviation(5)
    assert deviation == pytest.approx(2**0.5 * np.std([1.0, 2.0, 4.0], ddof=1)) and degrees == 2
    assert Results({}, [arm], [5], "AP").deviation(5) is None


def test_tables_say_how_many_pairs_there_are_and_what_is_not_known():
    arms = [find_arm("paper"), find_arm("mal"), find_arm("sqr"), find_arm("groups")]
    found = {(0, 1): 10.0, (0, 2): 11.0, (0, 3): 13.0, (1, 1): 12.0, (1, 2): 14.0, (1, 4): 99.0}
    metrics = {Trial(arms[i], 5, seed): {"AP": ap} for (i, seed), ap in found.items()}
    metrics[Trial(arms[3], 5, 9)] = {"AP": 50.0, "made_by": "another revision"}
    results = Results(metrics, arms, [5, 6], "AP")
    text = lab.tables(results, {Trial(arms[1], 5, 1): 0.25})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    mal = next(row for row in rows if row and row[0] == "mal")
    assert mal[1] == "3" and mal[3].startswith("2.5 ± 6.4") and mal[4] == "2" and mal[-1] == "250"
    assert next(row for row in rows if row and row[0] == "groups")[3:7] == ["-", "0", "-", "-"]
    assert not any(row and row[0] == "sqr" for row in rows) and "nan" not in text
    assert "standard deviation of 0.71" in text and "not all made by the same" in text
    assert "more seeds tell" in text.partition("## 6")[2]  # of a length without runs
    assert "<svg" in lab.chart(results)
    # Of two differences a deviation is hardly known: between 0.32 and 22.6.
    assert f"takes {seeds_needed(0.5**0.5, 1.0)} seeds (" in text
    assert f"({seeds_needed(0.3155, 1.0)} to more than 999, by" in text
    alone = Results({Trial(arms[0], 5, 1): {"AP": 0.0}}, arms, [5], "AP")
    assert "more seeds tell" in lab.tables(alone, {}) and "<svg" in lab.chart(alone)


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        # What one of them would undo without a word.
        (["sqr+groups"], "both change model.decoder.parts.cascade"),
        (["fixed_point+hybrid"], "both change model.decoder.parts.cascade"),
        (["one_to_one+mal"], "both change model.criterion.assigner"),
        (["mal+soft_labels"], "both change model.criterion.class_loss"),
        (["mal+groups"], "both change model.criterion._target_"),
        (["x=scope_i", "y=scope_i"], "x and y are the same model"),
        (["paper", "x=paper"], "paper and x are the same model"),
        (["x=mal", "x=sqr"], "need names of their own"),
        (["paper=mal"], "paper is the paper's"),
        (["denoising+fixed_point"], "denoising does not go with FixedPointDecoder"),
        (["x=decoder.exit_stage:9"], "exit_stage must be one of 6 stages"),
    ],
)
def test_arms_that_would_not_be_what_their_names_say_are_refused(arms, told):
    with pytest.raises((UserError, ConfigError), match=told):
        lab.check_arms([find_arm(arm) for arm in arms], str(lab.BENCHMARK), [])


def test_a_factorial_whose_factors_undo_each_other_is_refused():
    for factors in (
        ["labels=one_to_one,paper", "scores=paper,mal"],
        ["reuse=table1_neither,paper", "cascade=paper,fixed_point"],
    ):
        with pytest.raises(ConfigError, match="both change"):
            lab.check_arms(factorial(factors), str(lab.BENCHMARK), [])
    arms = factorial(["mal=paper,mal", "gates=paper,layer_gates"])
    lab.check_arms(arms, str(lab.BENCHMARK), [])
    with pytest.raises(UserError, match="need names of their own"):  # else one folder for two
        lab.check_arms([*arms, find_arm("mal+gates=scope_i")], str(lab.BENCHMARK), [])
    with pytest.raises(UserError, match="train.seed: set by --seeds"):
        lab.check_arms(arms, str(lab.BENCHMARK), ["train.seed=3"])


def start(tmp_path, *arguments, folder="out"):
    return subprocess.Popen(
        [sys.executable, "tools/lab.py", "--data", TINY, "--output-dir", str(tmp_path / folder),
         "--jobs", "2", *arguments, f"shapes.root={tmp_path}/shapes"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": PLACES, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_runs_are_made_once_and_told(tmp_path):
    factors = ["--factors", "labels=scope_i,paper"]
    run = start(tmp_path, *factors, "--seeds", "2", "--lengths", "4")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("*/4_iterations/seed_*/finished.json")):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.1)
    run.send_signal(signal.SIGHUP)  # of a terminal that is closed
    out, err = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGHUP, out + err
    assert not list((tmp_path / "out").rglob("*.lock"))  # no run goes on
    ended = len(list((tmp_path / "out").rglob("finished.json")))
    assert 0 < ended < 4

    (tmp_path / "out").rename(tmp_path / "moved")  # and go on there
    run = start(tmp_path, *factors, "--seeds", "2", "--lengths", "4", folder="moved")
    out, err = run.communicate(timeout=300)
    assert f"{ended} of 4 runs are there" in out, out + err
    with open(tmp_path / "moved" / "lab.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["arm"], row["seed"]) for row in rows} == {
        (arm, seed) for arm in ("none", "labels") for seed in "12"
    }
    text = (tmp_path / "moved" / "lab.md").read_text()
    assert "## 4 iterations" in text and "less none" in text and "effect on AP" in text
    assert "<svg" in (tmp_path / "moved" / "lab.svg").read_text()

    # Another config is not taken for the same; one arm that fails does not stop the others.
    run = start(tmp_path, "--factors", "labels=scope_i,paper", "--seeds", "2", "--lengths", "4",
                "train.log_period=3", folder="moved")  # fmt: skip
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1 and "begun with another config: train.log_period" in err, out + err
    run = start(tmp_path, "--arms", "paper", "--seeds", "1", "--lengths", "4",
                "dataloader.train.total_batch_size=0", folder="moved")  # fmt: skip
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1 and "paper, 4 iterations, seed 1 failed, in" in err, out + err
    assert "total_batch_size" in err and "has no finished run" in err  # what the run said, too


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--arms", "mal", "--nothing", "3"], "unrecognized arguments: --nothing"),
        (["--arms", "nothing"], "no config of the ablations or extensions"),
        (["--arms", "x=mal", "x=sqr"], "need names of their own"),
        (["--tables-only"], "is not there: leave out --tables-only"),
        (["--arms", "x=decoder.nothing:3"], "nothing"),
        (["--data", "nothing.py"], "nothing.py"),
        (["--arms", "mal", "model.nothing=3"], "nothing"),
    ],
)
def test_what_makes_no_sense_is_told_before_a_run(arguments, told, monkeypatch, capsys, tmp_path):
    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["lab.py", "--output-dir", str(output), *arguments])
    try:
        status = lab.call("lab.py", lab.main, mistake=1)
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status in (1, 2) and told in err and "Traceback" not in err, err
    assert not output.exists()
