"""Signals: a run saves once and leaves in time, and goes on as if it had never been stopped."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from endings import Ending, processes, processes_of

from stage_interactor.engine.signals import NUMBERS, WORKERS_DEATHS, Signals, Stopped
from stage_interactor.errors import explain, signals_wait

CONFIG = ("--config-file", "tests/tiny_config.py", "train.max_iter=16", "train.eval_period=5")
GRACE = 30


@pytest.fixture
def signals():
    found = Signals()
    with found.taken():
        yield found


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", NUMBERS)
def test_before_the_training_a_signal_ends_a_run_at_once(number, signals):
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.code == 128 + number
    send(number)  # another one, while it is saving or leaving, changes nothing
    send(signal.SIGINT)


def test_in_an_iteration_a_signal_waits_and_in_an_evaluation_it_does_not(signals):
    signals.hold()
    send(signal.SIGTERM)
    send(signal.SIGINT)
    assert signals.received == signal.SIGTERM
    with pytest.raises(Stopped), signals.at_once():
        raise AssertionError("the evaluation began")
    send(signal.SIGTERM)


def test_a_signal_in_a_finalizer_is_not_lost(signals):
    class Slow:
        def __del__(self):
            send(signal.SIGTERM)

    with pytest.raises(Stopped):
        Slow()
        time.sleep(5)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        time.sleep(0.02)
        return index


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_death_of_a_worker_is_told_where_data_are_waited_for(number, signals):
    """And nowhere else: PyTorch would raise it in this loop, or where gradients are given back."""
    before = set(multiprocessing.active_children())
    numbers = iter(torch.utils.data.DataLoader(Numbers(), num_workers=2))
    next(numbers)
    worker = (set(multiprocessing.active_children()) - before).pop()
    os.kill(worker.pid, number)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        with torch.no_grad():
            assert next(iter(torch.utils.data.DataLoader([7]))) == 7  # without workers
    assert not worker.is_alive()
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        list(numbers)
    assert time.monotonic() - start < 3  # PyTorch looks after its workers every 5 s
    assert f"is killed by signal: {signal.strsignal(number)}" in explain(caught.value)
    time.sleep(0.3)
    assert list(torch.utils.data.DataLoader([7], num_workers=1)) == [7]  # told once


def test_a_worker_that_outlives_a_run_disturbs_nobody_when_it_dies():
    before = set(multiprocessing.active_children())
    with Signals().taken():
        numbers = iter(torch.utils.data.DataLoader(Numbers(), num_workers=2))
        next(numbers)
    worker = (set(multiprocessing.active_children()) - before).pop()
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        sum(range(10))
    assert not worker.is_alive()
    assert list(torch.utils.data.DataLoader(Numbers(), num_workers=1))  # one that is whole
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(numbers)
    others = iter(torch.utils.data.DataLoader(Numbers(), num_workers=1))  # as PyTorch has it
    next(others)
    with pytest.raises(RuntimeError, match="is killed by signal"):
        os.kill(others._workers[0].pid, signal.SIGKILL)
        time.sleep(2)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGSEGV, "is killed by signal: Segmentation fault"),
        (signal.SIGBUS, "is killed by signal: Bus error): enlarge it (docker run --shm-size"),
        (0, "has ended with status 3"),
    ],
)
@pytest.mark.parametrize("seen", ["before", "while", "in a thread"])
def test_a_death_first_seen_as_a_lost_connection_has_its_reason(number, told, seen, signals):
    numbers = iter(torch.utils.data.DataLoader(Quitting(), num_workers=2))
    first = numbers._workers[0]

    def end():
        os.kill(first.pid, number or signal.SIGUSR1)

    def get(timeout):
        end()
        refused = ConnectionRefusedError(111, "Connection refused")
        if seen == "in a thread":  # that pins memory, as what PyTorch makes of it there
            raise ConnectionRefusedError(
                "Caught ConnectionRefusedError in pin memory thread for device 0.\nOriginal "
                f"Traceback (most recent call last):\nConnectionRefusedError: {refused}\n"
            )
        raise refused

    assert next(numbers) == 0
    if seen == "before":
        end()
        first.join()
    numbers._data_queue.get = get
    with pytest.raises((RuntimeError, ConnectionRefusedError)) as caught:
        list(numbers)
    assert f"DataLoader worker (pid {first.pid}) {told}" in explain(caught.value)


class Quitting(Numbers):
    """Of which a process ends when it is asked to."""

    def __getitem__(self, index):
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))
        return super().__getitem__(index)


def test_a_death_is_told_of_its_own_loader(signals):
    numbers = iter(torch.utils.data.DataLoader(Numbers(), num_workers=1))
    next(numbers)
    os.kill(numbers._workers[0].pid, signal.SIGKILL)
    assert len(list(torch.utils.data.DataLoader(Numbers(), num_workers=2))) == 100
    for _ in range(20):  # each of which ends with the same signal
        subprocess.run(["true"], check=True)
    waiting = [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
    assert len(waiting) < 5  # one, and those that are just ending
    looks = set()
    for _ in range(50):
        looks.add(WORKERS_DEATHS._again)
        time.sleep(0.02)
    assert len(looks - {None}) > 3  # one after the other, as long as it is not told
    with pytest.raises(RuntimeError) as caught:
        list(numbers)
    assert "is killed by signal: Killed" in explain(caught.value)


def test_a_handler_of_somebody_else_may_call_the_one_before_it():
    with Signals().taken():
        pass
    before, called = signal.getsignal(signal.SIGCHLD), []

    def theirs(number, frame):
        called.append(number)
        before(number, frame)

    signal.signal(signal.SIGCHLD, theirs)
    try:
        with Signals().taken():
            subprocess.run(["true"], check=True)
        assert called and signal.getsignal(signal.SIGCHLD) is theirs
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_fork_of_a_run_the_death_of_its_worker_is_pytorchs():
    with Signals().taken():
        child = os.fork()
        if child == 0:
            try:
                numbers = iter(torch.utils.data.DataLoader(Numbers(), num_workers=1))
                next(numbers)
                os.kill(numbers._workers[0].pid, signal.SIGKILL)
                list(numbers)
            except RuntimeError as error:
                os._exit(7 if "DataLoader worker" in str(error) else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_handlers_are_given_back_and_what_is_ignored_stays_so():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals().taken():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in NUMBERS} == before


@pytest.mark.parametrize("number", NUMBERS)
def test_what_belongs_together_is_done_before_a_signal_and_a_second_does_not_wait(number):
    def stop(number, _):
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in NUMBERS}
    done = []
    try:
        with pytest.raises(Stopped) as stopped, signals_wait():
            send(number)
            with signals_wait():
                done.append("inner")
            done.append("outer")
        assert done == ["inner", "outer"] and stopped.value.number == number
        with pytest.raises(Stopped) as stopped, signals_wait():
            send(signal.SIGHUP)
            send(number)
            done.append("never")
        with pytest.raises(Stopped), signals_wait(), signals_wait():
            send(number)
            send(number)
            done.append("never")
        assert "never" not in done and stopped.value.number == number
        assert [signal.getsignal(number) for number in NUMBERS] == [stop] * len(NUMBERS)
        signal.signal(number, signal.SIG_DFL)
        with signals_wait():  # it would end the process, with no exception
            assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_another_thread_nothing_is_touched():
    before = [signal.getsignal(number) for number in NUMBERS]
    found = []

    def train():
        with Signals().taken(), signals_wait():
            found.extend(signal.getsignal(number) for number in NUMBERS)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == before


def arguments(folder, shapes, ending):
    more = ("--num-gpus", ending.processes, "--dist-url", "auto") if ending.processes > 1 else ()
    loaders = f"dataloader.train.num_workers={ending.loaders}"
    return (*more, *CONFIG, f"train.output_dir={folder}", f"shapes.root={shapes}", loaders)


@pytest.fixture(scope="module")
def whole(train_net, tmp_path_factory):
    """Runs that nobody has stopped, by their number of processes."""
    found = {}

    def run(shapes, processes):
        if processes not in found:
            folder = tmp_path_factory.mktemp("whole")
            ending = Ending(processes, 0, "", (), "", 0)
            process = train_net(*arguments(folder, shapes, ending))
            assert process.returncode == 0, process.output
            found[processes] = torch.load(folder / "model_final.pth", weights_only=True)
        return found[processes]

    return run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


def end(train_net, folder, shapes, ending, rng, env=None):
    """Starts a run and ends it; its status, its log and the seconds that it took to leave."""
    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        process = train_net(*arguments(folder, shapes, ending), wait=False, env=env, stdout=file)
    deadline = time.monotonic() + 240
    while process.poll() is None and not ending.has_come(folder, log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    time.sleep(ending.delay)
    start = time.monotonic()
    ending.strike(process.pid, rng)
    left = processes_of(process.pid)
    while left and time.monotonic() - start < GRACE + 30:
        process.poll()
        time.sleep(0.1)
        left = processes_of(process.pid)
    seconds = time.monotonic() - start
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{ending} left {left}: {log.read_text()}"
    return process.wait(), log.read_text(), seconds


def check_end(ending, status, told):
    assert "Traceback" not in told, told
    assert told.count("Stopped by") <= 1, told
    numbers = {getattr(signal, name) for name, _ in ending.signals}
    if signal.SIGKILL in numbers and ending.target != "launcher":
        assert status in {-signal.SIGKILL, 0, 1} | {128 + n for n in numbers}, told
    else:
        expected = {0, -signal.SIGKILL} | {128 + n for n in numbers}
        if "Finished." in told:  # what Python itself still does at its end is not guarded
            expected |= {-n for n in numbers}
        assert status in expected, (ending, told)


def check_resumed(train_net, folder, shapes, ending, whole):
    for path in folder.glob("model_*.pth"):
        torch.load(path, weights_only=True)
    resumed = train_net("--resume", *arguments(folder, shapes, ending))
    assert resumed.returncode == 0, f"{ending}: {resumed.output}"
    final = torch.load(folder / "model_final.pth", weights_only=True)
    expected = whole(shapes, ending.processes)
    for part in ("model", "ema"):
        for key, value in expected[part].items():
            assert torch.equal(final[part][key], value), f"{ending}: {part} {key}"
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert Counter(line["iteration"] for line in lines) == Counter(range(16)), ending
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [4, 9, 14, 15], ending
    assert not list(folder.glob("*.tmp")) and not (folder / "train.lock").exists()


@pytest.mark.cases(1)
def test_however_a_run_is_ended_it_leaves_in_time_and_goes_on_as_the_same(
    train_net, shapes, whole, rng, cases, tmp_path
):
    for number in range(cases):
        ending, folder = Ending.drawn(rng), tmp_path / f"run{number}"
        status, told, seconds = end(train_net, folder, shapes, ending, rng)
        print(f"{ending}: status {status} after {seconds:.1f} s", flush=True)
        check_end(ending, status, told)
        check_resumed(train_net, folder, shapes, ending, whole)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_torchrun_starts_a_run_again_that_goes_on_by_itself(
    name, train_net, shapes, whole, rng, free_port, tmp_path
):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")
    ending = Ending(1, 0, "", (), "", 0)
    process = train_net(
        *arguments(tmp_path, shapes, ending),
        wait=False,
        launcher=(sys.executable, *launcher, "--master-port", str(free_port)),
    )
    while not (tmp_path / "last_checkpoint").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    # torchrun gives each process a session of its own.
    found = processes().items()
    ranks = [pid for pid, (parent, _, _) in found if parent == process.pid]
    os.kill(rng.choice(ranks), getattr(signal, name))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "goes on with its run" in output and not (tmp_path / "earlier_run_1").exists()
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    for key, value in whole(shapes, 2)["model"].items():
        assert torch.equal(final["model"][key], value), key
