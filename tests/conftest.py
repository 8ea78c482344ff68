import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # The CUDA kernels run on Triton's interpreter; Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # where tests import onnxruntime themselves

from checks import processes

from stage_interactor.d2.logger import setup_logger
from stage_interactor.ops import use_ops
from stage_interactor.untrusted.pictures import limit_restored

ROOT = Path(__file__).parents[1]
# Programs that tests start import this tree, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT / "projects"), os.environ.get("PYTHONPATH")))
)


@pytest.fixture(params=["fast", "reference"])
def operations(request, monkeypatch):
    """Runs a test on the fast operations, whatever the sizes, and on the reference."""
    monkeypatch.setattr("stage_interactor.ops.backend._SMALLEST_WIDTH", 1)
    monkeypatch.setattr("stage_interactor.ops.dense._SMALLEST_PRODUCT", 1)
    with use_ops(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def loggers_of_their_own():
    """A logger that an earlier test has set up writes into the output of that test."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "stage_interactor")]
    before = [(list(item.handlers), item.level) for item in loggers]
    for item in loggers:  # a fixture of a module may have set it up before
        item.propagate = True
    yield
    for item, (handlers, item.level) in zip(loggers, before):
        item.propagate = True
        for handler in set(item.handlers) - set(handlers):
            item.removeHandler(handler)
    if hasattr(setup_logger, "cache_clear"):  # detectron2's remembers what it has set up
        setup_logger.cache_clear()


@pytest.fixture(autouse=True)
def limit_of_pixels_of_its_own():
    """What a test allows is not what later ones do."""
    with limit_restored():
        yield


@pytest.fixture
def free_port():
    return processes.free_port()


@pytest.fixture(scope="session")
def train_net():
    """Runs train_net.py as a user does; gives the finished process, or the running one."""

    def start(*arguments, wait=True, env=None, launcher=(sys.executable,), stdout=subprocess.PIPE):
        command = [*launcher, "train_net.py", *map(str, arguments)]
        env = dict(env or {})
        if "PYTHONPATH" in env:
            env["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            start_new_session=True,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not wait:
            return process
        output, _ = process.communicate(timeout=300)
        process.output = output
        return process

    return start


@pytest.fixture(scope="session")
def small_run(train_net, tmp_path_factory):
    """The output folder of a quick start of a few iterations; generated images lie in shapes/."""
    output = tmp_path_factory.mktemp("small_run")
    process = train_net(
        "--config-file",
        "configs/quickstart.py",
        f"train.output_dir={output}",
        f"shapes.root={output}/shapes",
        "shapes.num_train=16",
        "shapes.num_val=6",
        "shapes.image_size=64",
        "train.max_iter=4",
        "train.amp.enabled=false",
        "train.log_period=1",
        "dataloader.train.total_batch_size=4",
        "model.queries.num_queries=8",
    )
    assert process.returncode == 0, process.output
    return output
