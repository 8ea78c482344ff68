"""What PyTorch finds in the environment of a program when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "stage_interactor.commands", "predict", "--help"]
TRAIN_NET = [sys.executable, str(ROOT / "train_net.py"), "--help"]
BEGIN = [
    sys.executable,
    "-c",
    "from stage_interactor.commands import begin_program; begin_program(); import torch",
]
OURS = "GOMP_SPINCOUNT = '20000'"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings libgomp on Linux")
@pytest.mark.parametrize(
    "command, set_by_user, expected",
    [
        (COMMAND, {}, OURS),
        (TRAIN_NET, {}, OURS),
        (BEGIN, {"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        (BEGIN, {"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_threads_that_wait_for_each_other_soon_sleep(command, set_by_user, expected):
    env = os.environ | {"PYTHONPATH": str(ROOT / "projects"), "OMP_DISPLAY_ENV": "VERBOSE"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        env.pop(name, None)
    told = subprocess.run(command, env=env | set_by_user, capture_output=True, text=True).stderr
    assert expected in told
    assert (OURS in told) == (not set_by_user)
