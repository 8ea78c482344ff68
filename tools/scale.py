#!/usr/bin/env python
"""What work costs as it grows, and what several processes exchange in a training step.

python tools/scale.py --output scale.csv --plot scale.png     # time and memory, on what is there
python tools/scale.py --axes queries stages --modes training --clock cpu
python tools/scale.py --processes 1 2 4                       # gloo, processes on this CPU
python tools/scale.py --computed                              # 8 GPUs, and 4 nodes of 8, on paper

One of queries, image (pixels of a side), batch, points, stages and objects grows, the others stay
at --base. Time is the median of turns; memory what tensors hold at most beside weights and the
optimizer's state, as the allocator counts it. An exponent is the slope of log cost over log work:
1 is linear. Cost grows faster than linear from where on every slope is above 1.1; named with it is
the part that adds most to what a straight line would cost. The time between two borders is that of
the part in between, in a backward pass too; on a GPU each border waits for it.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import bare  # noqa: F401
import numpy as np
import torch
import torch.distributed as dist
from benchmark import Machine, configured
from checks.processes import free_port, join, leave
from checks.small import random_image, without_zeros
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stage_interactor.config import instantiate, load_config, without_pretrained_weights
from stage_interactor.d2.engine import HookBase
from stage_interactor.engine import Trainer
from stage_interactor.engine.process import build_optimizer, distributed
from stage_interactor.engine.signals import StopOnSignal
from stage_interactor.errors import call
from stage_interactor.inference.prepare import choose_device
from stage_interactor.modeling import InitialQueries
from stage_interactor.ops.memory import kept_memory

CONFIG = "configs/stage_interactor_r50_100q_12ep.py"
LIMIT = 1.1  # of a slope that counts as linear
SMALL = 0.01  # a part's share that is not worth a word


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the work; all but the one that grows stay at these, which one CPU core can bear."""

    queries: int = 100
    image: int = 320
    batch: int = 1
    points: int = 32  # of every stage
    stages: int = 6
    objects: int = 20  # in each image

    @property
    def overrides(self) -> list[str]:
        return [f"model.decoder.num_points={str([self.points] * self.stages).replace(' ', '')}"]


AXES = {
    "queries": (50, 100, 200, 400, 900),
    "image": (320, 480, 640, 960, 1280, 1600),
    "batch": (1, 2, 4, 8, 16),
    "points": (16, 32, 64, 128),
    "stages": (3, 4, 6, 9),
    "objects": (5, 20, 80, 320),
}
MODES = ("inference", "training")


def work_of(axis: str, value: float) -> float:
    return value**2 if axis == "image" else value  # pixels


# Time by part


class Parts:
    """Where the time of a model's passes goes.

    Forward passes of modules end one another. A backward pass begins when the gradient of what the
    module gave is there, and has ended when that of what it was given is.
    """

    def __init__(self, model: nn.Module, now: Callable[[], float]):
        self.seconds: Counter[str] = Counter()
        self._now, self._last = now, now()
        self._open = ["rest"]  # parts whose forward pass runs, the innermost last
        self._current = "rest"
        decoder, criterion = model.decoder, model.criterion
        for name, modules in {
            "backbone": [model.backbone],
            "neck": [model.neck],
            "pyramid": [decoder],  # and what is between the parts of stages
            "attention": [stage.attention for stage in decoder.stages],
            "sampling": [stage.sampler for stage in decoder.stages],
            "mixing": [stage.mixing for stage in decoder.stages],
            "feed-forward": [stage.feedforward for stage in decoder.stages],
            "heads": [stage.head for stage in decoder.stages],
            "losses": [criterion],
            "matching": [criterion.matcher],
            "labels": [criterion.assigner],
        }.items():
            for module in modules:
                module.register_forward_pre_hook(functools.partial(self._enter, name))
                module.register_forward_hook(functools.partial(self._leave, name))

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call, in the order in which they began."""
        self._switch("rest")
        taken, self.seconds = dict(self.seconds), Counter()
        return taken

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._switch(name)
        yield
        self._switch("rest")

    def _switch(self, name: str) -> None:
        now = self._now()
        self.seconds[self._current] += now - self._last
        self._last, self._current = now, name

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        outer = self._open[-1]
        self._open.append(name)
        self._switch(name)
        _when_known(inputs, lambda: self._current == name and self._switch(outer))

    def _leave(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._open.pop()
        self._switch(self._open[-1])
        _when_known(outputs, lambda: self._switch(name))


def _when_known(values: Any, then: Callable[[], object]) -> None:
    """Calls when autograd comes to what made the first of the tensors."""
    tensors = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.requires_grad]
    if tensors:
        register_multi_grad_hook(tensors, lambda _: then(), mode="any")


DECODER = ("pyramid", "attention", "sampling", "mixing", "feed-forward", "heads", "losses",
           "matching", "labels")  # fmt: skip


class Built:
    """A model with an optimizer, and a clock for its parts."""

    def __init__(self, config: str, opts: Sequence[str], device: torch.device, clock: str):
        torch.manual_seed(0)
        model, _ = configured(config, opts, None)
        without_zeros(model.decoder)
        self.model = model.to(device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True)
        read = time.process_time if clock == "cpu" else time.perf_counter

        def now() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return read()

        self.parts = Parts(self.model, now)


class Work:
    """Detection and training steps of one setting."""

    def __init__(self, built: Built, setting: Setting, device: torch.device):
        self.model, self.trained, self.parts = built.model, built.trained, built.parts
        self.optimizer, self.device = built.optimizer, device
        width = self.model.queries.content.shape[1]
        self.queries = InitialQueries(num_queries=setting.queries, embed_dim=width).to(device)
        sides = (setting.image, setting.image)
        self.images = [
            random_image(setting.objects, sides, num_classes=self.model.num_classes, seed=seed)
            for seed in range(setting.batch)
        ]

    def inference(self) -> None:
        self.model.eval()
        with torch.inference_mode():
            self.model(self.images)

    def training(self) -> None:
        self.gradients()
        with self.parts.of("optimizer"):
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()

    def gradients(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.model(self.images)
        sum(losses.values()).backward()

    def seconds(self, mode: str) -> dict[str, float]:
        """By part, and of the ``decoder`` (with losses, in training) and whole ``detector``."""
        self.model.queries = self.queries
        self.parts.take()
        getattr(self, mode)()
        parts = self.parts.take()
        self.optimizer.zero_grad(set_to_none=True)  # the memory is another model's now
        decoder = sum(parts.get(name, 0.0) for name in DECODER)
        return {"detector": sum(parts.values()), "decoder": decoder, **parts}

    def memory(self, mode: str) -> dict[str, float]:
        """MiB of the decoder and of the detector."""
        model = self.model
        model.queries = self.queries
        detector = peak_bytes(self.gradients if mode == "training" else self.inference, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            batch = model.preprocess(self.images, model.ground_truth(self.images))
            maps = [level.clone() for level in model.neck(model.backbone(batch.tensor))]
        trains = mode == "training"

        def decode() -> None:
            leaves = [level.requires_grad_(trains) for level in maps]
            with torch.set_grad_enabled(trains):
                outputs = model.decoder(leaves, *model.queries(batch.sizes))
                if trains:
                    sum(model.criterion(outputs, batch.targets).values()).backward()

        decoder = peak_bytes(decode, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return {"detector": detector / 2**20, "decoder": decoder / 2**20}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """What the tensors that the work makes hold at most, as the allocator counts them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


class Row(NamedTuple):
    """A cost of a part; what ``detector`` and ``decoder`` need of memory as well."""

    axis: str
    value: int
    mode: str
    part: str
    milliseconds: float
    mib: float | None


def grow(
    axis: str,
    values: Sequence[int],
    modes: Sequence[str],
    make: Callable[[Setting], Any],
    base: Setting,
    repeats: int,
) -> list[Row]:
    """Costs along an axis; the values take turns."""
    works = {value: make(dataclasses.replace(base, **{axis: value})) for value in values}
    rows = []
    for mode in modes:
        memory = {value: work.memory(mode) for value, work in works.items()}  # and warms up
        times: dict[int, list[dict[str, float]]] = {value: [] for value in values}
        for _ in range(repeats):
            for value, work in works.items():
                times[value].append(work.seconds(mode))
        for value, turns in times.items():
            for part in turns[0]:
                seconds = statistics.median(turn.get(part, 0.0) for turn in turns)
                mib = memory[value].get(part)
                rows.append(Row(axis, value, mode, part, 1e3 * seconds, mib))
    return rows


def slopes(work: Sequence[float], cost: Sequence[float]) -> list[float]:
    """Exponents between neighbours."""
    return (np.diff(np.log(cost)) / np.diff(np.log(work))).tolist()


def exponent(work: Sequence[float], cost: Sequence[float]) -> float:
    """Of the power of work that fits the cost best, in least squares of logarithms."""
    return float(np.polyfit(np.log(work), np.log(cost), 1)[0])


def knee(work: Sequence[float], cost: Sequence[float]) -> int | None:
    """The index from which on cost grows faster than linear, up to the end; None if it does not."""
    steep = [slope > LIMIT for slope in slopes(work, cost)]
    if not steep[-1]:
        return None
    return len(steep) - next((i for i, s in enumerate(reversed(steep)) if not s), len(steep))


def culprit(work: Sequence[float], start: int, parts: Mapping[str, Sequence[float]]) -> str:
    """The part that adds most to what all would cost at the end on straight lines from a start."""
    ratio = work[-1] / work[start]
    return max(parts, key=lambda name: parts[name][-1] - ratio * parts[name][start])


class Growth:
    """The costs of an axis and mode, to be told."""

    def __init__(self, rows: Iterable[Row], axis: str, mode: str):
        rows = [row for row in rows if (row.axis, row.mode) == (axis, mode)]
        self.axis, self.mode = axis, mode
        self.values = list(dict.fromkeys(row.value for row in rows))
        self.work = [work_of(axis, value) for value in self.values]
        self.times: dict[str, list[float]] = {}
        self.memory: dict[str, list[float]] = {}
        for row in rows:
            self.times.setdefault(row.part, []).append(row.milliseconds)
            if row.mib is not None:
                self.memory.setdefault(row.part, []).append(row.mib)

    @property
    def parts(self) -> dict[str, list[float]]:
        return {k: v for k, v in self.times.items() if k not in ("detector", "decoder")}

    def told(self) -> list[str]:
        """Where it is not linear: a line for the decoder, the detector, and parts that are not."""
        lines = []
        for whole in ("decoder", "detector"):
            start = knee(self.work, self.times[whole])
            what = f"{self.axis}, {self.mode}, {whole}: "
            if start is None:
                lines.append(f"{what}linear or below up to {self.values[-1]}")
                continue
            known = self.parts.items()
            parts = {k: v for k, v in known if whole == "detector" or k in DECODER}
            part = culprit(self.work, start, parts)
            last = slopes(self.work, self.times[whole])[-1]
            own = slopes(self.work, parts[part])[-1]
            lines.append(
                f"{what}faster than linear from {self.values[start]} on, at the end with exponent "
                f"{last:.2f}; most of it is {part}, {own:.2f} there"
            )
        steep = []
        for name, cost in self.parts.items():
            share = cost[-1] / self.times["detector"][-1]
            if share < SMALL or min(cost) <= 0 or (start := knee(self.work, cost)) is None:
                continue
            steep.append(
                f"{name} from {self.values[start]} on, at the end with exponent "
                f"{slopes(self.work, cost)[-1]:.2f} and {share:.0%} of the time"
            )
        if steep:
            lines.append(f"{self.axis}, {self.mode}, parts: {'; '.join(steep)}")
        return lines


def table(rows: Sequence[Row], axis: str, modes: Sequence[str]) -> str:
    """Markdown: costs of the decoder and of the detector at each value, and their exponents."""
    growths = [Growth(rows, axis, mode) for mode in modes]
    wholes = list(itertools.product(growths, ("decoder", "detector")))
    heads = [axis] + [f"{growth.mode}, {whole}: ms / MiB" for growth, whole in wholes]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for index, value in enumerate(growths[0].values):
        cells = [f"{g.times[w][index]:,.0f} / {g.memory[w][index]:,.0f}" for g, w in wholes]
        lines.append(f"| {value} | {' | '.join(cells)} |")
    cells = [
        f"{exponent(g.work, g.times[w]):.2f} / {exponent(g.work, g.memory[w]):.2f}"
        for g, w in wholes
    ]
    lines.append(f"| exponent | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_parts(rows: Sequence[Row], axes: Sequence[str], mode: str) -> str:
    """Markdown: of each part the exponent of time along each axis, and its share at the end."""
    growths = [Growth(rows, axis, mode) for axis in axes]
    heads = [f"{mode}, part"] + [f"{g.axis}, {g.values[0]} to {g.values[-1]}" for g in growths]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for part in growths[0].parts:
        cells = []
        for growth in growths:
            cost = growth.times.get(part, [0.0])
            share = cost[-1] / growth.times["detector"][-1]
            fits = min(cost) > 0
            cells.append(f"{exponent(growth.work, cost):.2f}, {share:.0%}" if fits else "")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: str) -> None:
    """Time of the whole, of the decoder and of its dearest parts, along each axis."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.mode, row.axis) for row in rows))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for place in grid.flat[len(panels) :]:
        place.remove()
    for (mode, axis), place in zip(panels, grid.flat):
        growth = Growth(rows, axis, mode)
        dearest = sorted(growth.parts, key=lambda name: -growth.parts[name][-1])[:5]
        for name in ("detector", "decoder", *dearest):
            style = {} if name in dearest else {"linewidth": 2.5, "color": "black"}
            line = "--" if name == "decoder" else "-"
            place.loglog(growth.work, growth.times[name], line, marker=".", label=name, **style)
        start = growth.times["detector"][0] / growth.work[0]
        straight = [start * work for work in growth.work]
        place.loglog(growth.work, straight, ":", color="grey", label="linear")
        place.set_title(f"{mode}, ms over {axis}", fontsize=9)
        place.set_xticks(growth.work, [str(value) for value in growth.values])
        place.set_xticks([], minor=True)
        place.legend(fontsize=6)
    figure.savefig(path, dpi=90)


# Several processes


class Collectives(TorchDispatchMode):
    """Counts what a process gives to collective operations while it is entered."""

    # Where an operation has what it sends, if not first.
    _SENT = {"allgather_": 1, "gather_": 1, "scatter_": 1, "reduce_scatter_": 1}

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._opname
            sent = tree_leaves(args[self._SENT.get(name, 0)])
            self.calls[name.strip("_")] += 1
            self.bytes[name.strip("_")] += sum(t.nbytes for t in sent if isinstance(t, Tensor))
        return func(*args, **kwargs or {})


class Exchange(HookBase):
    """When buckets of gradients are ready, and when they are exchanged, in the last iteration.

    Args:
        half: exchanged in half precision.
    """

    def __init__(self, half: bool):
        self._exchange = fp16_compress_hook if half else allreduce_hook
        self._share = 0.5 if half else 1.0
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.exposed: list[float] = []
        self.busy: list[float] = []

    def bucket(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        row = [time.perf_counter(), math.nan, bucket.buffer().nbytes * self._share]
        self.buckets.append(row)

        def done(future):
            row[1] = time.perf_counter()
            return future.value()

        return self._exchange(None, bucket).then(done)

    def before_step(self) -> None:
        self.buckets: list[list[float]] = []
        self._start = time.perf_counter(), time.process_time()

    def after_backward(self) -> None:
        self._end = time.perf_counter()

    def after_step(self) -> None:
        wall, cpu = self._start
        self.walls.append(time.perf_counter() - wall)
        self.cpus.append(time.process_time() - cpu)
        last = max((ready for ready, _, _ in self.buckets), default=self._end)
        self.exposed.append(self._end - last)
        self.busy.append(covered([(ready, done) for ready, done, _ in self.buckets]))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of a union of spans."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def train_in_processes(rank: int, processes: int, port: int, setting: dict, path: str) -> None:
    """One of the processes; the first one writes what it has seen."""
    torch.set_num_threads(1)
    if processes > 1:
        join(rank, port, processes)
    sizes = Setting(**setting["sizes"])
    cfg = load_config(setting["config"], setting["overrides"])
    without_pretrained_weights(cfg)
    cfg.train.device = "cpu"
    half, cfg.train.ddp.fp16_compression = cfg.train.ddp.fp16_compression, False
    torch.manual_seed(0)
    model = instantiate(cfg.model).train()
    without_zeros(model.decoder)
    optimizer = build_optimizer(cfg, model)
    wrapped = distributed(cfg, model)
    exchange = Exchange(half)
    if isinstance(wrapped, DistributedDataParallel):  # there is one hook alone
        wrapped.register_comm_hook(None, exchange.bucket)
    sides = (sizes.image, sizes.image)
    images = [
        random_image(sizes.objects, sides, num_classes=model.num_classes, seed=seed)
        for seed in range(rank * sizes.batch, (rank + 1) * sizes.batch)
    ]
    steps = setting["repeats"]
    trainer = Trainer(
        wrapped,
        [images] * (steps + 4),
        optimizer,
        amp={**cfg.train.amp, "enabled": cfg.train.amp.enabled is True},
        clip_grad=cfg.train.clip_grad,
        accumulation_steps=cfg.train.accumulation_steps,
    )
    trainer.register_hooks([exchange, StopOnSignal(lambda name: None)])
    with kept_memory():
        trainer.train(0, steps + 2)
    buckets, exchange.walls, exchange.cpus = exchange.buckets, exchange.walls[2:], exchange.cpus[2:]
    exchange.exposed, exchange.busy = exchange.exposed[2:], exchange.busy[2:]
    walls, cpus, exposed, busy = (
        1e3 * statistics.median(times)
        for times in (exchange.walls, exchange.cpus, exchange.exposed, exchange.busy)
    )
    with Collectives() as counted:
        trainer.train(steps + 2, steps + 3)
    peak = peak_bytes(lambda: trainer.train(steps + 3, steps + 4), torch.device("cpu"))
    if rank == 0:
        with open(path, "w") as file:
            json.dump(
                dict(
                    processes=processes, ms=walls, cpu_ms=cpus, exposed_ms=exposed, busy_ms=busy,
                    buckets=[size / 2**20 for _, _, size in buckets], mib=peak / 2**20,
                    calls=dict(counted.calls), bytes=dict(counted.bytes),
                ),
                file,
            )  # fmt: skip
    if processes > 1:
        leave()


def in_processes(processes: int, setting: dict) -> dict:
    """What the first of several processes has seen of its steps."""
    import tempfile

    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "seen.json")
        arguments = processes, free_port(), setting, path
        mp.spawn(train_in_processes, arguments, nprocs=processes)
        with open(path) as file:
            return json.load(file)


def table_of_processes(seen: Sequence[dict], cores: int) -> str:
    """Markdown; efficiency is time of one process over that of several, at equal work each."""
    heads = ["processes", "step, ms", "CPU of one, ms", "efficiency", "by CPU time", "buckets",
             "their MiB", "other collectives", "their bytes", "exchange, ms",
             "after the backward pass, ms", "hidden", "peak, MiB"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    first = seen[0]
    for one in seen:
        many, alone = one["processes"] > 1, first["processes"] == 1
        fits = one["processes"] <= cores
        calls = dict(one["calls"])
        buckets = len(one["buckets"])
        calls["allreduce"] = calls.get("allreduce", 0) - buckets
        sizes = dict(one["bytes"])
        sizes["allreduce"] = sizes.get("allreduce", 0) - sum(one["buckets"]) * 2**20
        other = ", ".join(f"{count} {name}" for name, count in calls.items() if count)
        hidden = 1 - one["exposed_ms"] / one["busy_ms"] if one["busy_ms"] else 0.0
        cells = [
            str(one["processes"]), f"{one['ms']:,.0f}" if fits else "",
            f"{one['cpu_ms']:,.0f}",
            f"{first['ms'] / one['ms']:.0%}" if fits and alone else "",
            f"{first['cpu_ms'] / one['cpu_ms']:.0%}" if alone else "",
            *((str(buckets), f"{sum(one['buckets']):,.1f}", other, f"{sum(sizes.values()):,.0f}",
               *((f"{one['busy_ms']:,.0f}", f"{one['exposed_ms']:,.0f}", f"{max(hidden, 0):.0%}")
                 if fits else ("", "", "")))
              if many else ("", "", "", "", "", "", "")),
            f"{one['mib']:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# On paper


class Network(NamedTuple):
    """What GPUs exchange over; ``rate`` is NCCL's bus bandwidth, that of the slowest link."""

    name: str
    gpus: int
    rate: float  # GB/s a GPU
    latency: float  # ms of an all-reduce of nothing; assumed


# NVLink 4 has 450 GB/s in each direction, NDR InfiniBand 400 Gbit/s (data sheets), of which NCCL's
# tests reach 460 to 480 (switches add up) and 400 to 450 with eight adapters a node.
NETWORKS = (
    Network("8 GPUs, NVLink 4", 8, 450, 0.03),
    Network("4 nodes of 8, 8 x 400 Gbit/s each", 32, 400, 0.08),
    Network("4 nodes of 8, 400 Gbit/s each", 32, 50, 0.08),
    Network("4 nodes of 8, 100 Gbit/s each", 32, 12.5, 0.08),
)


class Step(NamedTuple):
    """A training step on one GPU, in ms."""

    name: str
    whole: float
    decoder: float  # its backward pass
    rest: float  # the backward pass of backbone and neck, which comes last
    at_once: bool  # the decoder's gradients are there together: its graph is replayed


# Of the table of one H100 in docs/benchmarks.md: R50, 8 images. 76.2 ms of decoder less 29.9 of its
# forward pass; 63.8 of backward less these. Replayed: all time is in kernels, 20.2 of 68 ms in the
# decoder; a backward pass is two thirds, of all but 3 ms for clipping and optimizer.
STEPS = (
    Step("8 images, decoder computed", 126, 46.3, 17.5, False),
    Step("8 images, decoder replayed", 68, 20.2 * 2 / 3, (68 - 20.2 - 3) * 2 / 3, True),
    Step("2 images, decoder replayed", 17 + 3, 20.2 / 6, (68 - 20.2 - 3) / 6, True),
)


def all_reduce_ms(size: float, network: Network) -> float:
    """Of so many bytes by a ring: each GPU sends and receives 2 (n - 1) / n of them."""
    volume = 2 * (network.gpus - 1) / network.gpus * size
    return network.latency + volume / network.rate / 1e6


def buckets_of(config: str, opts: Sequence[str]) -> list[tuple[str, int]]:
    """Of a config: which half of the model a bucket ends in, and its bytes, in DDP's order."""
    cfg = load_config(config, opts)
    without_pretrained_weights(cfg)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad][::-1]
    limit = int((cfg.train.ddp.bucket_cap_mb or 25) * 2**20)
    first = limit if cfg.train.ddp.bucket_cap_mb else dist._DEFAULT_FIRST_BUCKET_BYTES
    tensors = [p for _, p in named]
    groups, _ = dist._compute_bucket_assignment_by_size(tensors, [first, limit])
    return [
        (
            "decoder" if named[max(group)][0].startswith("decoder.") else "rest",
            sum(tensors[index].nbytes for index in group),
        )
        for group in groups
    ]


def exposed_ms(
    buckets: Sequence[tuple[str, int]], step: Step, network: Network, half: bool = False
) -> tuple[float, float]:
    """Of the exchange of a step: how long it takes, and how long the backward pass is over by then.

    A bucket is ready when the backward pass has come to the last of its bytes, at an even pace
    within the decoder and within the rest; one is exchanged after the other.
    """
    totals = Counter({"decoder": 0, "rest": 0})
    for half_of_model, size in buckets:
        totals[half_of_model] += size
    seen: Counter[str] = Counter()
    free = busy = 0.0  # when the network is, and for how long it was not
    for part, size in sorted(buckets, key=lambda bucket: bucket[0]):  # decoder first
        seen[part] += size
        done = seen[part] / totals[part]
        if part == "rest":
            ready = step.decoder + done * step.rest
        else:
            ready = step.decoder * (1.0 if step.at_once else done)
        time_ = all_reduce_ms(size / 2 if half else size, network)
        free = max(free, ready) + time_
        busy += time_
    return busy, max(0.0, free - step.decoder - step.rest)


def table_on_paper(buckets: Sequence[tuple[str, int]]) -> str:
    """Markdown: of each network and precision, what is sent, and the efficiency of each step."""
    size = sum(size for _, size in buckets)
    heads = ["network", "gradients", "MB sent by a GPU", "exchange, ms"]
    heads += [f"{step.name}: ms not hidden, efficiency" for step in STEPS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for network, half in itertools.product(NETWORKS, (False, True)):
        sent = 2 * (network.gpus - 1) / network.gpus * size / (2 if half else 1)
        cells = [network.name, "float16" if half else "float32", f"{sent / 1e6:,.0f}"]
        cells.append(f"{exposed_ms(buckets, STEPS[0], network, half)[0]:.1f}")
        for step in STEPS:
            _, exposed = exposed_ms(buckets, step, network, half)
            cells.append(f"{exposed:.1f}, {step.whole / (step.whole + exposed):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=CONFIG, metavar="FILE")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--base", nargs="+", default=[], metavar="AXIS:NUMBER",
                        help=f"what does not grow; default: {Setting()}")  # fmt: skip
    parser.add_argument("--values", nargs="+", type=int,
                        help="of the axis, if there is one; default: see the table")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: time of the processor, where others use it too")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="FILE", help="CSV with all figures")
    parser.add_argument("--plot", metavar="FILE", help="PNG or SVG")
    parser.add_argument("--read", nargs="+", default=[], metavar="FILE",
                        help="instead: tables and plot of what --output has written")  # fmt: skip
    parser.add_argument("--processes", nargs="+", type=int, default=[],
                        help="instead: training steps of processes, on the CPU")  # fmt: skip
    parser.add_argument("--computed", action="store_true", help="instead: GPUs, on paper")
    parser.add_argument("opts", nargs="*", help="overrides of the config, key=value, after --")
    args = parser.parse_args(argv)
    sizes = dataclasses.asdict(Setting())
    for pair in args.base:
        name, _, number = pair.partition(":")
        if name not in sizes or not number.isdigit() or int(number) < 1:
            parser.error(f"--base: one of {list(sizes)} and a number above 0, not {pair!r}")
        sizes[name] = int(number)
    args.base = Setting(**sizes)
    if min(args.repeats, *args.processes, *(args.values or [1])) < 1:
        parser.error("--repeats, --processes and --values must be at least 1")
    if args.values and (len(args.axes) > 1 or len(set(args.values)) < 2):
        parser.error("--values needs two different ones or more, and one of --axes")
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path and not os.access(os.path.dirname(path) or ".", os.W_OK):
            parser.error(f"{flag} {path}: its folder is not there, or not to be written to")
    if args.plot and not args.plot.lower().endswith((".png", ".svg")):
        parser.error(f"--plot {args.plot}: name a .png or .svg file")
    if args.device != "cpu" and args.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.computed:
        buckets = buckets_of(args.config_file, args.opts)
        total = sum(size for _, size in buckets)
        print(f"{len(buckets)} buckets, {total / 1e6:.0f} MB of gradients in float32")
        print(table_on_paper(buckets))
        return
    if args.processes:
        queries = f"model.queries.num_queries={args.base.queries}"
        overrides = [queries, *args.base.overrides, *args.opts]
        load_config(args.config_file, overrides)  # what is wrong with it, once
        setting = dict(config=args.config_file, overrides=overrides, repeats=args.repeats,
                       sizes=dataclasses.asdict(args.base))  # fmt: skip
        print(table_of_processes([in_processes(n, setting) for n in args.processes],
                                 len(os.sched_getaffinity(0))))  # fmt: skip
        return
    rows = [row for path in args.read for row in read(path)]
    rows = [row for row in rows if row.axis in args.axes and row.mode in args.modes]
    if not args.read:
        rows = measured(args)
    if not rows:
        raise ValueError(f"{' '.join(args.read)} has nothing of --axes and --modes")
    modes = list(dict.fromkeys(row.mode for row in rows))
    axes = list(dict.fromkeys(row.axis for row in rows))
    for axis in axes:
        print(f"\n{table(rows, axis, modes)}\n")
        for mode in modes:
            print("\n".join(Growth(rows, axis, mode).told()))
    for mode in modes:
        print(f"\n{table_of_parts(rows, axes, mode)}")
    if args.plot:
        plot(rows, args.plot)


def measured(args: argparse.Namespace) -> list[Row]:
    device = choose_device(args.device)
    print(json.dumps(Machine(device).describe()), args.base, flush=True)
    built = functools.cache(
        lambda overrides: Built(args.config_file, overrides, device, args.clock)
    )

    def make(setting: Setting) -> Work:
        return Work(built((*setting.overrides, *args.opts)), setting, device)

    rows: list[Row] = []
    with kept_memory():
        for axis in args.axes:
            values = sorted(set(args.values or AXES[axis]))
            rows += grow(axis, values, args.modes, make, args.base, args.repeats)
            built.cache_clear()
            if args.output:  # after every axis: a long run may be cut off
                with open(args.output, "w", newline="") as file:
                    csv.writer(file).writerows([Row._fields, *rows])
    return rows


def read(path: str) -> list[Row]:
    """What ``--output`` has written."""
    with open(path, newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != list(Row._fields):
        raise ValueError(f"{path} is no file that --output of this tool has written")
    return [
        Row(axis, int(value), mode, part, float(ms), float(mib) if mib else None)
        for axis, value, mode, part, ms, mib in lines[1:]
    ]


if __name__ == "__main__":
    sys.exit(call("scale.py", main, mistake=1))
