#!/usr/bin/env python
"""Asks with many short runs what a part of the model is worth: arms, seeds, intervals, a test.

python tools/lab.py --seeds 4                                # the spread of the paper's model alone
python tools/lab.py --seeds 8 --jobs 2 --lengths 1000 2000 \\
    --factors labels=scope_i,paper reuse=table1_neither,paper
python tools/lab.py --seeds 8 --jobs 2 --arms mal sqr mal+layer_gates \\
    --data configs/custom/nano.py data.train_json=... [key=value ...]

An arm is the model of a config of configs/ablations or configs/extensions, by its name or the end
of it, or of several joined with +: what that changes in the paper's model, and in learning rates
by part, is changed in that of --data. It also takes values of the model, as in
one=decoder.max_reused_filters:1. Arms have the same images, iterations and seeds, so runs of a seed
are compared with each other. Finished runs are kept, and the same command goes on where it stopped,
also with more arms, seeds or lengths. The folder then has lab.csv (every run), lab.md (tables) and
lab.svg.
"""

import argparse
import csv
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from experiments import (
    FINISHED,
    METRICS,
    OURS,
    ROOT,
    RunFailed,
    give_model,
    seconds_an_iteration,
    train_once,
)
from omegaconf import DictConfig, OmegaConf
from scipy import stats
from tabulate import tabulate

from stage_interactor.config import load_config
from stage_interactor.d2.config import instantiate
from stage_interactor.errors import NUMBERS, UserError, call, explain, legible
from stage_interactor.locking import folder_lock
from stage_interactor.modeling.backbone import OnMeta
from stage_interactor.modeling.extensions.combined import require_parts_that_fit
from stage_interactor.pages.charts import intervals
from stage_interactor.writing import write_text

BENCHMARK = ROOT / "configs" / "lab" / "crowded_shapes.py"
PAPER = "paper"  # the arm that changes nothing
OUTPUT = "output.txt"  # of a run: what it printed
CONFIDENCE, POWER = 0.95, 0.8
_LABEL = re.compile(r"[\w.-]*\w( ?\+ ?[\w.-]*\w)*")
_OVERRIDE = re.compile(r"\w+(\.\w+)+=")
_MOST_SEEDS = 1000


class Arm(NamedTuple):
    """Attributes: what it is called, its configs, and the factors that it has, if it is of any."""

    label: str
    configs: tuple[str, ...]
    factors: frozenset[str] | None = None

    @property
    def folder(self) -> str:
        return self.label.replace(" ", "")


class Trial(NamedTuple):
    arm: Arm
    length: int  # iterations
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.label}, {self.length} iterations, seed {self.seed}"


class Estimate(NamedTuple):
    """Of so many numbers: the mean, half the width of its interval, the p-value of a mean of 0."""

    size: int
    mean: float
    half_width: float  # NaN of a single number
    p: float

    def __str__(self) -> str:
        if not self.size:
            return "-"
        return f"{self.mean:.1f}" + (f" ± {self.half_width:.1f}" if self.size > 1 else "")


def estimate(values: Sequence[float]) -> Estimate:
    """By Student's t; of differences, p is that of the paired test."""
    count = len(values)
    mean = float(np.mean(values)) if count else float("nan")
    if count < 2:
        return Estimate(count, mean, float("nan"), float("nan"))
    error = float(np.std(values, ddof=1)) / count**0.5
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return Estimate(count, mean, half_width, p)


def adjusted(values: Sequence[float]) -> list[float]:
    """p-values of several tests at once, by Holm; NaN stays, and does not count."""
    order = sorted((i for i, p in enumerate(values) if p == p), key=lambda i: values[i])
    found, highest = list(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * values[index]))
        found[index] = highest
    return found


def power(seeds: int, deviation: float, difference: float) -> float:
    """With which probability the paired test finds a difference, at the level of the intervals."""
    limit = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
    shift = difference * seeds**0.5 / deviation
    beyond = stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift)
    return float(np.nan_to_num(beyond, nan=1.0))  # SciPy's, far out


def seeds_needed(deviation: float, difference: float) -> int | None:
    """From how many seeds on a difference is found, see :data:`POWER`; None if of no number below
    a thousand."""
    enough = (n for n in range(2, _MOST_SEEDS) if power(n, deviation, difference) >= POWER)
    return 2 if deviation == 0 else next(enough, None)


def find_arm(text: str) -> Arm:
    """Of ``[LABEL=]NAME[+NAME ...]``, where a name is a config's, or ``key:value`` of the model.

    Raises:
        UserError: there is no such config, or several whose names end so.
    """
    label, _, names = text.partition("=")
    if not names:
        label, names = text.replace(":", "_"), text
    if not _LABEL.fullmatch(label):
        raise UserError(
            f"{text!r}: an arm is [LABEL=]NAME[+NAME ...], a label of letters, digits, ., _ and -"
        )
    parts = [part.strip() for part in names.split("+")]
    return Arm(label, tuple(n for part in parts for n in ([part] if ":" in part else _find(part))))


def _find(name: str) -> list[str]:
    """The config with this name, below configs/ and without ending; none of :data:`PAPER`."""
    if name == PAPER:
        return []
    if (ROOT / "configs" / f"{name}.py").is_file():
        return [] if name == OURS else [name]
    folders = ("ablations", "extensions")
    known = [p for folder in folders for p in sorted((ROOT / "configs" / folder).glob("*.py"))]
    found = [path for path in known if path.stem == name or path.stem.endswith(f"_{name}")]
    exact = [path for path in found if path.stem == name]
    found = exact or found
    if len(found) != 1:
        told = "several configs end" if found else "no config of the ablations or extensions ends"
        names = ", ".join(path.stem for path in found or known)
        raise UserError(f"arm {name!r}: {told} so: {names}")
    return [f"{found[0].parent.name}/{found[0].stem}"]


def factorial(factors: Sequence[str]) -> list[Arm]:
    """Of ``NAME=WITHOUT,WITH`` each, where the two are arms: all combinations, without any first.

    Raises:
        UserError: it is not of this form.
    """
    levels: dict[str, tuple[Arm, Arm]] = {}
    for text in factors:
        name, equals, arms = text.partition("=")
        if not equals or arms.count(",") != 1 or name in levels or not _LABEL.fullmatch(name):
            raise UserError(f"a factor is NAME=WITHOUT,WITH, each name once; got {text!r}")
        without, with_it = map(find_arm, arms.split(","))
        levels[name] = without, with_it
    found = []
    for size in range(len(levels) + 1) if levels else ():
        for on in itertools.combinations(levels, size):
            configs = [c for name, of in levels.items() for c in of[name in on].configs]
            found.append(Arm(" + ".join(on) or "none", tuple(configs), frozenset(on)))
    return found


def trial_config(trial: Trial, data: str, overrides: list[str]) -> DictConfig:
    own = [f"model.{part.replace(':', '=', 1)}" for part in trial.arm.configs if ":" in part]
    config = load_config(data, [*overrides, *own])
    give_model(config, *(name for name in trial.arm.configs if ":" not in name))
    config.train.max_iter = trial.length
    config.train.seed = trial.seed
    return config


def check_arms(arms: Sequence[Arm], data: str, overrides: list[str]) -> None:
    """Before hours of runs.

    Raises:
        UserError: an arm cannot be built or trained, or two arms are one.
    """
    ours = {f"train.{key}" for key in ("seed", "max_iter", "output_dir")}
    if taken := ours & {text.partition("=")[0] for text in overrides}:
        raise UserError(f"{', '.join(sorted(taken))}: set by --seeds, --lengths and --output-dir")
    known: dict[str, Arm] = {}
    for arm in arms:
        config = trial_config(Trial(arm, 1, 1), data, overrides)
        settings = OmegaConf.to_yaml(config)
        if settings in known:
            raise UserError(f"arms {known[settings].label} and {arm.label} are the same model")
        known[settings] = arm
        for key in {"pretrained", "weights"} & set(config.model.backbone):
            config.model.backbone[key] = None if key == "weights" else False
        try:
            with OnMeta():
                require_parts_that_fit(instantiate(config.model))
        except (TypeError, ValueError) as error:
            raise UserError(f"arm {arm.label}: {error}") from error
    folders = [arm.folder for arm in arms]
    if len(set(folders)) < len(folders) or PAPER in [arm.label for arm in arms if arm.configs]:
        raise UserError(
            f"arms need names of their own, and {PAPER} is the paper's: "
            f"{', '.join(arm.label for arm in arms)}"
        )


def folder_of(trial: Trial, root: Path) -> Path:
    return root / trial.arm.folder / f"{trial.length}_iterations" / f"seed_{trial.seed}"


class Results:
    """What the runs of a laboratory found.

    Args:
        metrics: of each trial that has finished.
        arms, lengths: in the order of the tables; the others are compared with the first arm.
        metric: of :data:`METRICS`.
    """

    def __init__(
        self,
        metrics: Mapping[Trial, Mapping[str, Any]],
        arms: Sequence[Arm],
        lengths: Sequence[int],
        metric: str,
    ):
        self.metrics = metrics
        self.arms = arms
        self.lengths = lengths
        self.metric = metric

    def values(self, arm: Arm, length: int, metric: str | None = None) -> dict[int, float]:
        """By the seed; without runs that have none."""
        return {
            trial.seed: found[metric or self.metric]
            for trial, found in self.metrics.items()
            if trial[:2] == (arm, length) and found.get(metric or self.metric) is not None
        }

    def differences(self, arm: Arm, length: int) -> list[float]:
        """To the first arm, of the seeds that both have."""
        base, own = self.values(self.arms[0], length), self.values(arm, length)
        return [own[seed] - base[seed] for seed in own if seed in base]

    def effects(self, length: int) -> dict[str, list[float]]:
        """Of a factorial, by the seed: of each factor the mean of the runs with it less that of
        those without; of several, half of what the others change in the effect of one."""
        arms = [arm for arm in self.arms if arm.factors is not None]
        names = [name for arm in arms if len(arm.factors) == 1 for name in arm.factors]
        of_arms = [self.values(arm, length) for arm in arms]
        seeds = sorted(set.intersection(*map(set, of_arms))) if arms else []
        found: dict[str, list[float]] = {}
        for size in range(1, len(names) + 1):
            for factors in itertools.combinations(names, size):
                signs = [(-1) ** len(set(factors) - arm.factors) for arm in arms]
                found[" x ".join(factors)] = [
                    sum(sign * of[seed] for sign, of in zip(signs, of_arms)) / (len(arms) / 2)
                    for seed in seeds
                ]
        return found

    def deviation(self, length: int) -> tuple[float, int] | None:
        """Of a seed's difference to the first arm, pooled over the others, with its degrees of
        freedom; None where there are not two seeds."""
        samples = [self.differences(arm, length) for arm in self.arms[1:]]
        if len(self.arms) == 1:  # what two arms differ by whose runs have nothing in common
            samples = [[2**0.5 * v for v in self.values(self.arms[0], length).values()]]
        samples = [sample for sample in samples if len(sample) > 1]
        if not samples:
            return None
        squares = sum(float(np.var(sample)) * len(sample) for sample in samples)
        degrees = sum(len(sample) - 1 for sample in samples)
        return (squares / degrees) ** 0.5, degrees


def tables(results: Results, speeds: Mapping[Trial, float | None]) -> str:
    """All of them, as Markdown."""
    base = results.arms[0].label
    others = [name for name in METRICS if name != results.metric]
    header = ["", "seeds", results.metric, f"less {base}", "pairs", "p", "p (Holm)"]
    header += [*others, "ms an iteration"]
    parts = []
    for length in results.lengths:
        differences = [estimate(results.differences(arm, length)) for arm in results.arms[1:]]
        rows = []
        for arm, compared in zip(results.arms, [["-"] * 4, *_with_holm(differences)]):
            values = list(results.values(arm, length).values())
            if not values:
                continue
            more = [list(results.values(arm, length, name).values()) for name in others]
            times = [t for trial, t in speeds.items() if trial[:2] == (arm, length) and t]
            rows.append([
                arm.label, len(values), estimate(values), *compared,
                *(f"{np.mean(of):.1f}" if of else "-" for of in more),
                f"{1000 * np.median(times):.0f}" if times else "-",
            ])  # fmt: skip
        parts.append(f"## {length} iterations\n\n" + _table(rows, header))
        effects = {name: estimate(of) for name, of in results.effects(length).items() if of}
        if effects:
            lines = [[n, *c] for n, c in zip(effects, _with_holm(list(effects.values())))]
            parts.append(
                _table(lines, ["factor", f"effect on {results.metric}", "seeds", "p", "p (Holm)"])
            )
        parts.append(_about_seeds(results, length))
    parts.append(
        f"± is half of the {CONFIDENCE:.0%} interval of the mean over the seeds (Student's t), p "
        "that of the paired test; Holm's is of all in a table at once."
    )
    makers = sorted({str(of.get("made_by", "not known")) for of in results.metrics.values()})
    if len(makers) > 1:
        parts.append("These runs were not all made by the same: " + "; ".join(makers) + ".")
    return "\n\n".join(parts) + "\n"


def _with_holm(estimates: Sequence[Estimate]) -> list[list[str]]:
    holm = adjusted([item.p for item in estimates])
    return [[str(e), str(e.size), _p(e.p), _p(p)] for e, p in zip(estimates, holm)]


def _about_seeds(results: Results, length: int) -> str:
    found = results.deviation(length)
    if found is None or not found[0]:
        return "How far runs of two seeds differ is not known yet: more seeds tell."
    deviation, degrees = found
    ends = [stats.chi2.ppf((1 + sign * CONFIDENCE) / 2, degrees) for sign in (1, -1)]
    spread = [deviation, *(float(deviation * (degrees / end) ** 0.5) for end in ends)]
    needed, least, most = (seeds_needed(d, 1.0) or f"more than {_MOST_SEEDS - 1}" for d in spread)
    return (
        f"A seed's difference of two arms has a standard deviation of {deviation:.2f}. To find a "
        f"difference of 1 {results.metric} with a probability of {POWER:.0%} takes {needed} seeds "
        f"({least} to {most}, by the interval of the deviation)."
    )


def _p(value: float) -> str:
    return "-" if value != value else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def chart(results: Results) -> str:
    """Differences to the first arm with their intervals; where there is none yet, of the means."""
    several = any(results.differences(a, n) for a in results.arms[1:] for n in results.lengths)
    rows = {}
    for length, arm in itertools.product(results.lengths, results.arms[several:]):
        values = list(results.values(arm, length).values())
        found = estimate(results.differences(arm, length) if several else values)
        if found.size:
            place = f"{arm.label}, {length}" if len(results.lengths) > 1 else arm.label
            rows[place] = found.mean, 0.0 if found.size < 2 else found.half_width
    title = f"{results.metric} less that of {results.arms[0].label}" if several else results.metric
    return intervals(rows, x=title, zero=several)


class Bench:
    """Makes the runs that are missing, some at a time, each in a process of its own.

    Args:
        root: the folder of all.
        jobs: how many at a time; they share the machine's cores.
    """

    def __init__(self, root: Path, data: str, overrides: list[str], jobs: int):
        self.root = root
        self.data = data
        self.overrides = overrides
        self.jobs = jobs
        self._running: set[subprocess.Popen] = set()
        self._changes = threading.Lock()
        self._ended = False
        # Not to be set anew for each run: how many threads add up is part of what they find.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def run(self, trials: Sequence[Trial]) -> list[str]:
        """Makes them; what went wrong with those that failed."""
        missing = [t for t in trials if not (folder_of(t, self.root) / FINISHED).is_file()]
        if missing:
            print(f"{len(trials) - len(missing)} of {len(trials)} runs are there", flush=True)
        failed: list[str] = []
        start = time.monotonic()
        with self._told_to_end(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = {pool.submit(self.make, trial): trial for trial in missing}
                for done, future in enumerate(as_completed(futures), 1):
                    left = (time.monotonic() - start) / done * (len(missing) - done)
                    if error := future.exception():
                        failed.append(self._what_went_wrong(futures[future], error))
                        told = failed[-1]
                    else:
                        told = f"{futures[future]}: AP {future.result()['AP'] or 0:.1f}"
                    said = f"[{done}/{len(missing)}] {told}; {left / 60:.0f} minutes left"
                    print(said, flush=True)
            except BaseException:
                self._end()
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def make(self, trial: Trial) -> dict[str, Any]:
        """The metrics of a trial, which runs unless it has finished."""
        config = trial_config(trial, self.data, self.overrides)
        folder = folder_of(trial, self.root)
        return train_once(
            config, folder, str(trial), ["--resume"], lambda c: self._start(c, folder)
        )

    def _start(self, command: list[str], folder: Path) -> int:
        with open(folder / OUTPUT, "wb") as file:
            with self._changes:
                if self._ended:
                    return 1
                process = subprocess.Popen(command, stdout=file, stderr=file)
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._changes:
                    self._running.discard(process)

    def _what_went_wrong(self, trial: Trial, error: BaseException) -> str:
        """With the last line of the run, if it has written any."""
        output = folder_of(trial, self.root) / OUTPUT
        lines = output.read_text(errors="replace").splitlines() if output.is_file() else []
        said = f" ({legible(lines[-1])})" if lines and isinstance(error, RunFailed) else ""
        return f"{explain(error) or repr(error)}{said}"

    def _end(self) -> None:
        """Runs save what they have, and end."""
        with self._changes:
            self._ended = True
            for process in self._running:
                process.terminate()

    @contextmanager
    def _told_to_end(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in NUMBERS}
        taken = [n for n, handler in before.items() if handler == signal.SIG_DFL]  # not nohup's
        for number in taken:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, before[number])


def main() -> int:
    args, overrides = parse()
    arms = factorial(args.factors) or [Arm(PAPER, ())]
    arms += [arm for arm in map(find_arm, args.arms) if arm not in arms]
    check_arms(arms, args.data, overrides)
    lengths = args.lengths or [load_config(args.data, overrides).train.max_iter]
    # Seed by seed: what is there at any time can be compared.
    seeds = range(1, args.seeds + 1)
    trials = [Trial(*t[::-1]) for t in itertools.product(seeds, sorted(set(lengths)), arms)]
    root = Path(args.output_dir or f"output/lab_{Path(args.data).stem}").resolve()
    if args.tables_only and not root.is_dir():
        raise UserError(f"{root} is not there: leave out --tables-only to make runs")
    with folder_lock(str(root), 0.0, "lab.lock", "--output-dir"):
        bench = Bench(root, args.data, overrides, args.jobs)
        failed = [] if args.tables_only else bench.run(trials)
        for text in failed:
            print(f"lab.py: {text}", file=sys.stderr)
        found = [t for t in trials if (folder_of(t, root) / FINISHED).is_file()]
        if not found:
            raise UserError(f"{root} has no finished run of these arms, lengths and seeds")
        # Nothing is trained here: a finished run is looked at, and one of another config told.
        metrics = {trial: bench.make(trial) for trial in found}
        speeds = {trial: seconds_an_iteration(folder_of(trial, root)) for trial in found}
        write(Results(metrics, arms, sorted(set(lengths)), args.metric), speeds, root)
    return 1 if failed else 0


def write(results: Results, speeds: Mapping[Trial, float | None], root: Path) -> None:
    """lab.csv, lab.md and lab.svg; the tables are printed as well."""
    rows = [["arm", "iterations", "seed", *METRICS, "seconds an iteration"]] + [
        [t.arm.label, t.length, t.seed, *(of[name] for name in METRICS), speeds[t]]
        for t, of in results.metrics.items()
    ]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(root / "lab.csv", text.getvalue())
    written = tables(results, speeds)
    write_text(root / "lab.md", written)
    write_text(root / "lab.svg", chart(results))
    print(f"\n{written}\nWritten to {root}/lab.csv, .md and .svg", flush=True)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=[], metavar="[LABEL=]NAME[+NAME]")
    parser.add_argument("--factors", nargs="+", default=[], metavar="NAME=WITHOUT,WITH",
                        help="arms of all combinations, and the effect of each")  # fmt: skip
    parser.add_argument("--seeds", type=_positive, default=4, help="1 to N (%(default)s)")
    parser.add_argument("--lengths", type=_positive, nargs="+", metavar="N",
                        help="iterations, each a schedule of its own (the config's)")  # fmt: skip
    parser.add_argument("--data", default=str(BENCHMARK), help="a config file (crowded shapes)")
    parser.add_argument("--metric", default="AP", choices=METRICS, help="to compare (%(default)s)")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--output-dir", help="default: output/lab_<data>")
    parser.add_argument("--tables-only", action="store_true", help="of runs that are there")
    parser.epilog = "key=value anywhere changes the config of all arms"
    # A flag that takes several values would take what comes behind it for more of them.
    overrides = [item for item in sys.argv[1:] if _OVERRIDE.match(item)]
    return parser.parse_args([i for i in sys.argv[1:] if i not in overrides]), overrides


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(call("lab.py", main, mistake=1))
