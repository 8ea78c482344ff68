"""Runs that are killed, at any moment and in any setting, end as if nobody had killed them.

A run is started by a fork server that has imported everything, so that it costs what it computes.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback

import pytest
import torch
from checks.processes import free_port

CONFIG = "quickstart.py"
SMALL = (
    "shapes.num_train=24",
    "shapes.num_val=6",
    "shapes.image_size=64",
    "dataloader.train.total_batch_size=4",
    "dataloader.test.batch_size=2",
    "model.backbone.channels=[8,16,32,64]",
    "model.backbone.stem_width=8",
    "model.neck.in_channels=[8,16,32]",
    "model.neck.norm_groups=4",
    "model.queries.num_queries=8",
    "model.decoder.embed_dim=32",
    "model.decoder.feedforward_dim=32",
    "model.decoder.num_points=[8,8,8]",
    "model.decoder.out_points=8",
    "optimizer.lr=0.003",
    "lr_multiplier.warmup_iters=2",
    "train.max_iter=8",
    "train.eval_period=3",
    "train.checkpointer.period=2",
    "train.log_period=2",
    "train.pictures.num_images=1",
)
ITERATIONS = 8
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds", "images_per_second", "memory_gib"}
MOMENTS = ("step", "before_evaluation", "after_evaluation", "half_a_file", "after_a_file")

SETTINGS = list(
    itertools.product(
        ("averages", "no averages"),
        ("float32", "bfloat16", "float16"),
        (1, 2),  # parts of a batch
        (1, 2),  # processes
        ("frozen norms", "trained norms"),
    )
)
# What `make test` has time for: each value of each setting twice or more.
FEW = [
    ("averages", "float32", 1, 1, "trained norms"),
    ("no averages", "bfloat16", 2, 1, "frozen norms"),
    ("averages", "float16", 2, 2, "trained norms"),
]


def kill_at(moment, number):
    """Ends this process by SIGKILL at the given moment; ``number`` is an iteration or a file."""
    from stage_interactor.d2.events import get_event_storage
    from stage_interactor.engine import Trainer, evaluation

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    run_step, inference = Trainer.run_step, evaluation.inference_on_dataset
    save, replace, count = torch.save, os.replace, itertools.count()

    def killed_step(self):
        if self.iter == number:
            kill()
        run_step(self)

    def killed_inference(*arguments):
        here = get_event_storage().iter == number
        if here and moment == "before_evaluation":
            kill()
        results = inference(*arguments)
        if here:
            kill()
        return results

    def half_a_file(data, file):
        save(data, file)
        if next(count) == number:
            file.truncate(file.tell() // 2)
            file.flush()
            kill()

    def after_a_file(source, target):
        replace(source, target)
        if str(target).endswith(".pth") and next(count) == number:
            kill()

    if moment == "step":
        Trainer.run_step = killed_step
    elif moment.endswith("evaluation"):
        evaluation.inference_on_dataset = killed_inference
    elif moment == "half_a_file":
        torch.save = half_a_file
    else:
        os.replace = after_a_file


def work(log, environment, calls, killed):
    """One process: trains or evaluates, as :func:`stage_interactor.train` is told by ``calls``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    import stage_interactor

    if killed:
        kill_at(*killed)
    try:
        for overrides, options in calls:
            stage_interactor.train(CONFIG, overrides, **options)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "timm", "pycocotools.cocoeval", "stage_interactor.engine.training"]
    )
    return context


def start(server, folder, processes, calls, killed=None):
    """Waits until all processes have ended; gives their log, and whether all ended well."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    running = []
    for rank in range(processes):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment["TORCHELASTIC_RUN_ID"] = "test"  # as torchrun starts them
        log = str(folder / f"output_{rank}.txt")
        only = environment if processes > 1 else {}
        process = server.Process(target=work, args=(log, only, calls, killed))
        process.start()
        running.append(process)
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in running):
        ended = [p.exitcode for p in running if not p.is_alive()]
        if any(code != 0 for code in ended) or time.monotonic() > deadline:
            time.sleep(0.1)
            for process in running:
                process.kill()
        time.sleep(0.02)
    return (folder / "output_0.txt").read_text(), all(p.exitcode == 0 for p in running)


def overrides_of(setting, shapes):
    averages, dtype, parts, _, norms = setting
    return [
        *SMALL,
        f"shapes.root={shapes}",
        f"train.model_ema.enabled={str(averages == 'averages').lower()}",
        f"train.amp.enabled={str(dtype != 'float32').lower()}",
        f"train.amp.dtype={'bfloat16' if dtype == 'float32' else dtype}",
        f"train.accumulation_steps={parts}",
        f"model.backbone.freeze_norm={str(norms == 'frozen norms').lower()}",
    ]


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(ours, theirs, where=""):
    """To the bit, whatever is in a checkpoint."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        names = [part.keys() - {"output_dir"} for part in (ours, theirs)]
        assert names[0] == names[1], where
        for key in names[0]:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs)):
            assert_same(one, other, f"{where}.{index}")
    else:
        assert ours == theirs or ours != ours, where


def checkpoints(folder):
    return {
        path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("model_*"))
    }


def scores(folder):
    """Of the last evaluation, by picture and class, best first; batches round otherwise."""
    found = json.loads((folder / "coco_instances_results.json").read_text())
    by_score = sorted((d["image_id"], d["category_id"], -d["score"]) for d in found)
    return [-score for *_, score in by_score]


def evaluated(server, folder, setting, shapes):
    """AP of every checkpoint of a run, by --eval-only in one process."""
    paths = sorted(folder.glob("model_*.pth"))
    calls = [
        (
            overrides_of(setting, shapes),
            dict(
                checkpoint=str(path),
                output_dir=str(folder / f"of_{path.stem}"),
                eval_only=True,
            ),
        )
        for path in paths
    ]
    log, good = start(server, folder / "evaluations", 1, calls)
    assert good, log
    results = [folder / f"of_{path.stem}" / "results.json" for path in paths]
    return {p.name: json.loads(r.read_text())["bbox"]["AP"] for p, r in zip(paths, results)}


def moment_of(setting):
    """When a run is killed: by chance, but the same each time."""
    chance = random.Random(repr(setting))
    moment = chance.choice(MOMENTS)
    if moment == "step":
        return moment, chance.randrange(1, ITERATIONS)
    if moment.endswith("evaluation"):
        return moment, chance.choice((2, 5, 7))
    return moment, chance.randrange(8)  # files: 4 checkpoints, 2 again, the best ones


def check(server, setting, killed, shapes, tmp_path):
    processes = setting[3]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    call = overrides_of(setting, shapes)
    log, good = start(server, whole, processes, [(call, dict(output_dir=str(whole)))])
    assert good, log
    log, good = start(server, folder, processes, [(call, dict(output_dir=str(folder)))], killed)
    assert not good, f"{killed} never came: {log}"
    for path in folder.glob("model_*.pth"):  # what has the name is whole
        torch.load(path, weights_only=True)
    resume = [(call, dict(output_dir=str(folder), resume=True))]
    log, good = start(server, folder, processes, resume)
    assert good, log

    for ours, theirs in zip(metrics_of(folder), metrics_of(whole), strict=True):
        assert set(ours.items()) ^ set(theirs.items()) == set()
    ours, theirs = checkpoints(folder), checkpoints(whole)
    assert ours.keys() == theirs.keys() >= {"model_final.pth", "model_best.pth"}
    for name in ours:
        assert_same(ours[name], theirs[name], name)
    figures = evaluated(server, folder, setting, shapes)
    assert figures == evaluated(server, whole, setting, shapes)
    trained = {
        line["iteration"]: line["bbox/AP"] for line in metrics_of(whole) if "bbox/AP" in line
    }
    for name, content in theirs.items():
        if content["iteration"] in trained:
            assert figures[name] == trained[content["iteration"]], name
    # An AP of so short a run may be 0 whatever is evaluated: the scores are not.
    for of in (whole, folder):
        found, expected = (scores(place) for place in (of / "of_model_final", whole))
        assert found == pytest.approx(expected, abs=1e-5)
    best = theirs["model_best.pth"]["run"]["best"]
    assert best["value"] == max(trained.values()) == trained[best["iteration"]]


def name_of(setting):
    return "-".join(map(str, setting)).replace(" ", "_")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, server):
    """The generated images, made once."""
    folder = tmp_path_factory.mktemp("data")
    call = [*SMALL, f"shapes.root={folder}/shapes", "train.max_iter=1"]
    log, good = start(server, folder, 1, [(call, dict(output_dir=str(folder / "run")))])
    assert good, log
    return folder / "shapes"


@pytest.mark.parametrize("setting", FEW, ids=name_of)
def test_a_killed_run_ends_as_if_it_had_not_been(setting, server, shapes, tmp_path):
    check(server, setting, moment_of(setting), shapes, tmp_path)


def drawn():
    """By ``SEED``, as many as ``CASES`` says: of each setting at each moment once, 240 in all."""
    chance = random.Random(os.environ.get("SEED", "0"))
    every = list(itertools.product(SETTINGS, MOMENTS))
    for setting, moment in chance.sample(every, min(int(os.environ.get("CASES", 12)), len(every))):
        # An evaluation has its iterations, and a file its number.
        late = moment.endswith("evaluation")
        number = chance.choice((2, 5, 7)) if late else chance.randrange(1, 8)
        yield pytest.param(setting, moment, number, id=f"{name_of(setting)}-{moment}-{number}")


@pytest.mark.soak
@pytest.mark.parametrize("setting, moment, number", list(drawn()))
def test_in_any_setting_at_any_moment(setting, moment, number, server, shapes, tmp_path):
    check(server, setting, (moment, number), shapes, tmp_path)
