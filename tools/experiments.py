"""Runs of train_net.py whose model is a config's and whose data are another's, each made once."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from stage_interactor import __version__
from stage_interactor.config import ConfigError, load_config, read_saved, save_config
from stage_interactor.engine.training import Run
from stage_interactor.errors import UserError
from stage_interactor.untrusted.files import read_json
from stage_interactor.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
OURS = "stage_interactor_r50_100q_12ep"  # the paper's model; other configs differ from it
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FINISHED = "finished.json"  # in the folder of a run: its metrics


class RunFailed(UserError):
    """A run of train_net.py ended otherwise than by finishing."""


def paper_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A config of configs/ by its name, such as ``ablations/scope_i``."""
    return load_config(str(ROOT / "configs" / f"{name}.py"), list(overrides))


def difference(base: Any, changed: Any, path: str = "") -> dict[str, Any]:
    """What to set in ``base`` to get ``changed``: dotted keys to values.

    Of a part of another class the keys that differ are set, as long as it has all that the part of
    ``base`` has: a subclass keeps the sizes of the model that it comes into. Else it replaces it.
    """
    if not (isinstance(base, DictConfig) and isinstance(changed, DictConfig)) or (
        base.get("_target_") != changed.get("_target_") and not set(base) <= set(changed)
    ):
        return {path: changed}
    found: dict[str, Any] = {}
    raw_base, raw = (dict(OmegaConf.to_container(c, resolve=False)) for c in (base, changed))
    for key, value in raw.items():
        child = f"{path}.{key}".lstrip(".")
        if key in base and isinstance(changed[key], DictConfig):
            found |= difference(base[key], changed[key], child)
        elif key not in base or value != raw_base[key]:
            found[child] = value  # with its references, to what is there in the other model
    return found


def changes_of(name: str) -> dict[str, Any]:
    """What a config changes in the paper's, of the model and of learning rates by part: dotted keys
    to values."""
    ours, changed = paper_config(OURS), paper_config(name)
    return difference(ours.model, changed.model, "model") | difference(
        ours.optimizer.params.lr_factors,
        changed.optimizer.params.lr_factors,
        "optimizer.params.lr_factors",
    )


def give_model(config: DictConfig, *names: str) -> None:
    """Changes a config's model as the configs of these names change the paper's.

    Raises:
        ConfigError: two of them change one thing in different ways.
    """
    changes: dict[str, Any] = {}
    whose: dict[str, str] = {}
    for name in names:
        for key, value in changes_of(name).items():
            for other, theirs in changes.items():
                inside = f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
                if inside and value != theirs:
                    raise ConfigError(
                        f"{whose[other]} and {name} both change {min(key, other)}: "
                        "they go together in a config of their own only"
                    )
            changes[key], whose[key] = value, name
    for key, value in changes.items():
        value = _in_proportion(key, value, config.model)
        OmegaConf.update(config, key, value, merge=False, force_add=True)


def _in_proportion(key: str, value: Any, model: DictConfig) -> Any:
    """What a number of the paper's size is in a model of another size."""
    ours = paper_config(OURS).model
    if key == "model.decoder.num_points":
        # Keep the ratio of the first stage and of the rest, and what is equal equal. Fewer stages
        # than the paper's are those of a cascade that needs so few.
        first, rest = (value[i] / ours.decoder.num_points[i] for i in (0, 1))
        old = model.decoder.num_points[: len(value)]
        if len(set(value)) == 1:
            return [round(old[0] * first)] * len(old)
        return [round(points * (rest if i else first)) for i, points in enumerate(old)]
    if key == "model.queries.one_to_many_queries":  # so many times those that detect
        return value * model.queries.num_queries // ours.queries.num_queries
    if key == "model.decoder.level_shift":
        # The data's config may look at finer levels than the paper's (by 1).
        return value + model.decoder.get("level_shift", 1.0) - 1.0
    return value


def train_once(
    config: DictConfig,
    output: Path,
    label: str,
    arguments: Sequence[str],
    start: Callable[[list[str]], int],
) -> dict[str, Any]:
    """The metrics of a run, from what it left when it finished, or by making it now.

    Args:
        config: of the run, whose output folder is set here.
        output: the folder.
        label: what it is called in messages.
        arguments: of train_net.py, but the config.
        start: runs a command; its exit status.

    Raises:
        ConfigError: it was begun with another config.
        RunFailed: it failed, or was stopped.
        ValueError: what it left cannot be read.
    """
    config.train.output_dir = str(output)
    path = output / "row.yaml"
    _save(config, path)
    finished = output / FINISHED
    if finished.is_file():
        return _metrics(finished, read_json(finished))
    train_net = str(ROOT / "train_net.py")
    if start([sys.executable, train_net, "--config-file", str(path), *arguments]):
        raise RunFailed(f"{label} failed, in {output}; the same command goes on where it stopped")
    metrics = _metrics(output / "results.json", Run.in_folder(output).metrics.get("bbox"))
    metrics |= {"made_by": _made_by()}
    write_text(finished, json.dumps(metrics))
    return metrics


def _made_by() -> str:
    """Of what another run may differ from this one by, whose config is the same."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True)
    revision = found.stdout.strip() if found.returncode == 0 else __version__
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{revision}, PyTorch {torch.__version__}, {threads} threads"


def seconds_an_iteration(output: Path) -> float | None:
    """Of a run: the median; None of one that trained nothing."""
    path = output / "metrics.json"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        with suppress(ValueError):  # of a line that a kill has cut
            time = json.loads(line).get("time")
            found += [time] if isinstance(time, float) else []
    return statistics.median(found) if found else None


def _save(config: DictConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new.yaml")
    save_config(config, new)
    if path.is_file():
        now, before = (_flat(read_saved(item).content) for item in (new, path))
        compared = (now | before).keys() - {"train.output_dir"}  # the folder may have been moved
        differing = sorted(key for key in compared if now.get(key) != before.get(key))
        if differing:
            new.unlink()
            raise ConfigError(
                f"{path.parent} was begun with another config: {', '.join(differing[:5])}; name "
                "another --output-dir, or remove this one"
            )
    new.replace(path)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, item in items for k, v in _flat(item, f"{path}.{key}").items()}
    return {path.lstrip("."): tree}


def _metrics(path: Path, content: Any) -> dict[str, Any]:
    values = content if isinstance(content, dict) else {}
    if not all(type(values.get(name, "")) in (int, float, type(None)) for name in METRICS):
        raise ValueError(f"{path} does not hold {', '.join(METRICS)}: remove it to evaluate again")
    return values
