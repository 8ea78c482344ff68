"""Stands in for ``detectron2.evaluation.evaluator`` and ``detectron2.evaluation.testing``.

Left out: ``verify_results``, several evaluators at once, callbacks.
"""

import datetime
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from . import comm

logger = logging.getLogger(__name__)


class DatasetEvaluator:
    """Collects the outputs of a model over a data set and scores them."""

    def reset(self) -> None:
        """Forget everything, before a new round."""

    def process(self, inputs: list, outputs: list) -> None:
        """Take a batch: what the model got and what it returned."""

    def evaluate(self) -> dict | None:
        """Score what was collected: ``{task: {metric: number}}`` on the main process."""


def inference_on_dataset(model: Callable, data_loader: Any, evaluator: DatasetEvaluator) -> dict:
    """Run a model over a data set without gradients, and evaluate its outputs.

    Args:
        model: called with each batch; a module is in evaluation mode meanwhile.
        data_loader: the batches; its length is how many there are.

    Returns:
        What the evaluator returned, an empty dict for None.
    """
    total = len(data_loader)
    logger.info("Start inference on %d batches", total)
    evaluator.reset()

    warmup = min(5, total - 1)  # batches at the start that are not timed
    start = time.perf_counter()
    seconds = {"data": 0.0, "inference": 0.0, "evaluation": 0.0}
    last_logged = -math.inf
    with ExitStack() as stack:
        if isinstance(model, torch.nn.Module):
            stack.enter_context(_evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        data_start = time.perf_counter()
        for index, inputs in enumerate(data_loader):
            inference_start = time.perf_counter()
            if index == warmup:
                start = inference_start
                seconds = dict.fromkeys(seconds, 0.0)
            else:
                seconds["data"] += inference_start - data_start

            outputs = model(inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            evaluation_start = time.perf_counter()
            seconds["inference"] += evaluation_start - inference_start
            evaluator.process(inputs, outputs)
            data_start = time.perf_counter()
            seconds["evaluation"] += data_start - evaluation_start

            timed = index + 1 - warmup * (index >= warmup)
            due = index >= warmup * 2 or seconds["inference"] / timed > 5
            if due and data_start - last_logged >= 5:
                last_logged = data_start
                per_batch = (data_start - start) / timed
                parts = ", ".join(f"{name} {s / timed:.4f}" for name, s in seconds.items())
                eta = datetime.timedelta(seconds=int(per_batch * (total - index - 1)))
                logger.info(
                    f"Inference done {index + 1}/{total}. Seconds per batch: {parts}, "
                    f"total {per_batch:.4f}. ETA={eta}"
                )

    for what, spent in (
        ("inference time", time.perf_counter() - start),
        ("inference pure compute time", seconds["inference"]),
    ):
        logger.info(
            "Total %s: %s (%.6f s / iter per device, on %d devices)",
            what,
            datetime.timedelta(seconds=int(spent)),
            spent / max(1, total - warmup),
            comm.get_world_size(),
        )
    results = evaluator.evaluate()
    return {} if results is None else results


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def print_csv_format(results: Mapping) -> None:
    """Log the main metrics as comma-separated lines, to paste; those with ``-`` are left out."""
    for task, metrics in results.items():
        if isinstance(metrics, Mapping):
            main = {name: value for name, value in metrics.items() if "-" not in name}
            logger.info("copypaste: Task: %s", task)
            logger.info("copypaste: %s", ",".join(main))
            logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in main.values()))
        else:
            logger.info("copypaste: %s=%s", task, metrics)
