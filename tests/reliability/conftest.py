"""What breaks a run, made at random: every test draws from a seed, and may be given more to do.

``SEED`` (0) and ``CASES`` (each test's own, small number) in the environment say which and how many
there are; ``make soak`` runs all of it with a new seed in each round.
"""

import os
import random
import signal

import pytest


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("SEED", "0"))


@pytest.fixture
def rng(seed, request) -> random.Random:
    """Of a test's own, whatever tests ran before."""
    return random.Random(f"{seed} {request.node.nodeid}")


@pytest.fixture
def cases(request) -> int:
    """How many random inputs to try: ``CASES``, or what ``@pytest.mark.cases(N)`` says."""
    mark = request.node.get_closest_marker("cases")
    return int(os.environ.get("CASES") or (mark.args[0] if mark else 10))


@pytest.fixture(autouse=True)
def hear_the_terminal():
    """Runs under nohup do not hear SIGHUP, which is right; those of these tests shall."""
    number = getattr(signal, "SIGHUP", None)
    before = number and signal.signal(number, signal.SIG_DFL)
    yield
    if number:
        signal.signal(number, before)
