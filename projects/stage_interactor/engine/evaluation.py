"""Evaluating: on data of the config, with what makes an evaluation fail found early."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from ..config import build, instantiate
from ..d2 import comm
from ..d2.data import MetadataCatalog
from ..d2.evaluation import (
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from ..d2.screening import COCOEvaluator, Screen, Screened
from ..data import (
    DetrDatasetMapper,
    check_num_classes,
    check_readable,
    check_shared_memory,
    class_names,
    match_classes,
)
from ..data.check import COUNTED
from ..data.coco import count_objects, records_of_function
from ..data.grouping import BySize
from ..data.records import RecordError, require_ids
from ..errors import naming
from ..inference.prepare import prepare_for_inference, replayed_on_gpu
from ..inference.weights import write_atomically
from ..locking import keep_lock
from ..modeling import StageInteractor
from ..pages.boxes import save_detection_grid
from ..pages.thresholds import choose_thresholds
from .early_stopping import EarlyStopping, sign_of
from .flight_recorder import FlightRecorder
from .validation import TASK, ValidationLoss, has_losses
from .writers import finite_or_null

logger = logging.getLogger(__name__)

PLAIN_INFERENCE = {"dtype": "float32", "compile": False, "bucket": 1}  # the model as it is


def do_test(
    cfg: DictConfig, model: StageInteractor, draw: bool = False, iteration: int | None = None
) -> dict:
    """Evaluates on ``dataloader.test``: results.json, and with ``draw`` a grid of detections.

    ``iteration`` is that of a training, for the name of what ``train.flight_recorder`` keeps.

    The classes of the model, if it knows their names, are matched with those of the data by name.
    A metric without any object to find, such as the AP of a class that the data lack, is NaN in
    what is returned and printed, and null in the file. On the main process ``model.thresholds`` are
    those of this evaluation, see :func:`~stage_interactor.pages.thresholds.choose_thresholds`.

    Raises:
        ValueError: the data have other classes than the model.
        UnusableDetectionsError: there are unusable detections, on every process; see ``Screen``.
        FolderInUseError: the folder has been removed, and is another run's now.
    """
    keep_lock(cfg.train.output_dir)
    dataset = build(cfg, "dataloader.test.dataset")  # registers it, if it is not builtin
    check_shared_memory(cfg.dataloader.test.get("num_workers") or 0)
    loss_too = bool(cfg.train.get("validation_loss"))
    recorded = dict(cfg.train.get("flight_recorder") or {})
    with_objects = loss_too or recorded.get("enabled", False)
    if with_objects and not has_losses(model):
        logger.warning(
            "train.validation_loss, train.flight_recorder: another criterion than this package's "
            "does not tell the losses and labels of an image: there are none"
        )
        with_objects = loss_too = False
    changes = _with_objects(cfg) if with_objects else {}
    loader = build(cfg, "dataloader.test", dataset=dataset, **changes)
    num_classes = instantiate(cfg.model.num_classes)
    check_num_classes(evaluated_name(cfg), num_classes)
    screen = Screen(cfg.train.get("unusable_detections", "error"))
    order = match_order(
        model.class_names, class_names(name=evaluated_name(cfg)), "the model", "the data"
    )
    scorer = build(cfg, "dataloader.evaluator")
    evaluator = Screened(scorer, screen, order)
    inference = dict(cfg.train.get("inference") or {})
    prepared: Any = None
    if any(inference.get(key, plain) != plain for key, plain in PLAIN_INFERENCE.items()):
        prepared = prepare_for_inference(model, **inference)
    recorder = loss = None
    if with_objects:
        if recorded.get("enabled"):
            names = model.class_names or class_names(name=evaluated_name(cfg))
            recorder = FlightRecorder(names, recorded.get("images"))
        loss = ValidationLoss(model, prepared, order, recorder)
    prepared = loss or prepared or replayed_on_gpu(model)
    with naming(cfg.dataloader.evaluator.get("output_dir") or cfg.train.output_dir):
        results = scores(prepared, loader, evaluator)
        if recorder and loss and loss.knows_objects:
            recorder.write(cfg.train.output_dir, iteration)
        elif recorder:
            logger.warning("train.flight_recorder: images come without objects: nothing is kept")
    losses = numbers(loss.results()) if loss and loss_too else {}
    results = {**results, **losses}
    model.thresholds = None
    if comm.is_main_process():
        model.thresholds = _thresholds(scorer, results, order)
        print_csv_format({task: of for task, of in results.items() if task != TASK})
        for name, value in losses.get(TASK, {}).items():
            if not name[-1].isdigit():  # of the last stage
                logger.info(f"{TASK}/{name}: {value:.4f}")
        path = os.path.join(cfg.train.output_dir, "results.json")
        text = json.dumps(finite_or_null(results), indent=2, allow_nan=False)
        write_atomically(path, lambda file: file.write(text.encode()))
        if draw:
            draw_detections(cfg, dataset)
    return results


def _with_objects(cfg: DictConfig) -> dict[str, Any]:
    """What has a loader of images to evaluate give their objects as well, where its mapper can."""
    mapper = build(cfg, "dataloader.test.mapper")
    if isinstance(mapper, DetrDatasetMapper):
        mapper.with_objects = True
    return {"mapper": mapper}


def _thresholds(
    evaluator: DatasetEvaluator, results: Mapping[str, Any], order: Sequence[int] | None
) -> list[float] | None:
    """Of an evaluation that is done, by the model's class index; ``order`` is that of the data.

    They are not worth a result: what keeps them from being chosen is a warning.
    """
    if not isinstance(evaluator, COCOEvaluator) or "bbox" not in results:
        return None
    if not (path := evaluator.results_file):
        return None
    try:
        with open(path) as file:
            judged = evaluator.judged(json.load(file))
        chosen = choose_thresholds(evaluator.ground_truth, judged)
    except Exception as error:
        logger.warning(f"No thresholds are chosen: {type(error).__name__}: {error}")
        return None
    if chosen is None:
        return None
    logger.info(f"Thresholds of the best F1 at IoU 0.5: {chosen.told()}")
    by_id = {item.category_id: item.threshold for item in chosen.classes}
    values = [by_id[category] for category in evaluator.category_ids]
    return values if order is None else [values[index] for index in order]


def match_order(
    names: Sequence[str] | None, others: Sequence[str], whose: str, whose_others: str
) -> list[int] | None:
    """See :func:`stage_interactor.data.match_classes`; None if both are in one order."""
    if names is None or list(names) == list(others):
        return None
    order = match_classes(names, others, whose, whose_others)
    if comm.is_main_process():
        logger.info(f"Classes in another order are matched by name: {list(others)}")
    return order


def numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluator returned, as plain numbers: ``{task: {metric: number}}``, or ``{metric:
    number}``. Ten decimals of them: in what comes after, the order of the classes would show.

    Raises:
        ValueError: for anything else.
    """

    def number(name: str, value: Any) -> float:
        try:
            return round(float(value), 10)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the evaluator gave {name}={value!r}, which is no number") from error

    return {
        task: {name: number(f"{task}/{name}", value) for name, value in metrics.items()}
        if isinstance(metrics, Mapping)
        else number(task, metrics)
        for task, metrics in results.items()
    }


def scores(detect: Any, loader: Any, evaluator: DatasetEvaluator) -> dict[str, Any]:
    """What an evaluator makes of the images of a loader, as :func:`numbers`.

    Images of one padded size go through ``detect``, the model or what takes its place, together.
    """
    loader = BySize(loader, detect.size_divisibility)
    return numbers(inference_on_dataset(detect, loader, loader.in_order(evaluator)))


def check_evaluation(
    cfg: DictConfig, names: Sequence[str], whose: str
) -> tuple[list[dict], DatasetEvaluator]:
    """Finds early what would be the end of an evaluation; gives its data and its evaluator.

    Raises:
        ValueError: the data have other classes than ``names``, which are ``whose``, or a value of
            the evaluator is wrong.
    """
    check_shared_memory(cfg.dataloader.test.get("num_workers") or 0)
    with wrong_records_told(cfg, "test"):
        records = build(cfg, "dataloader.test.dataset")  # registers it, if it is not builtin
        evaluated = evaluated_name(cfg)
        what = f"data set {evaluated!r}, which is evaluated on,"
        match_classes(names, class_names(name=evaluated), whose, what)
        Screen(cfg.train.get("unusable_detections", "error"))
        evaluator = build(cfg, "dataloader.evaluator")
    if isinstance(evaluator, COCOEvaluator) and isinstance(records, list):
        require_ids(records)
    return records, evaluator


@contextmanager
def wrong_records_told(cfg: DictConfig, part: str) -> Iterator[None]:
    """What fails in here at a record that is none raises a RecordError which names it.

    Args:
        part: ``"train"`` or ``"test"``; of its data those that detectron2's own loader has loaded
            by their names, which does not look at them.
    """
    try:
        yield
    except Exception:
        names = cfg.dataloader[part].dataset.get("names") or ()
        for name in [names] if isinstance(names, str) else names:
            try:
                records_of_function(name, f"data set {name!r}", part == "train")
            except RecordError:
                raise
            except Exception:  # of the data set's function itself
                break
        raise


def check_before_training(
    cfg: DictConfig, names: Sequence[str], whose: str, trained: Sequence[Mapping]
) -> None:
    """Finds what would be the end of the first evaluation, hours later.

    Args:
        cfg: of the run.
        names: of the classes of the data that are trained on, which are ``whose``.
        trained: the records of these data.

    Raises:
        ValueError: as :func:`check_evaluation`, or the best weights would be chosen by a metric
            that COCO's evaluator does not have, or there are too few images to train or evaluate.
        ImageReadError: on the main process, for pictures that cannot be read.
    """
    records, evaluator = check_evaluation(cfg, names, whose)
    metrics = {"best_checkpointer.val_metric": cfg.train.best_checkpointer.val_metric}
    stopping = EarlyStopping(**cfg.train.get("early_stopping", {}))
    if stopping.patience:
        metrics["early_stopping.metric"] = stopping.metric
    if isinstance(evaluator, COCOEvaluator):
        known = [f"bbox/{name}" for name in evaluator.metric_names(names)]
        if cfg.train.get("validation_loss"):
            terms = ("total_loss", "loss_class", "loss_bbox", "loss_giou")
            known += [f"{TASK}/{name}" for name in terms]
        for key, metric in metrics.items():
            if metric not in known:
                raise ValueError(f"train.{key}={metric}: the evaluator has {known}")
            part = key.partition(".")[0]
            mode = cfg.train[part].get("mode")
            if mode and sign_of(metric, mode) != sign_of(metric):
                right = "smaller" if mode == "max" else "larger"
                raise ValueError(
                    f"train.{part}.mode={mode}: of {metric} {right} values are better; take it "
                    "away, or give null, which goes by the metric"
                )
    if comm.is_main_process():
        files = [record["file_name"] for record in records if "file_name" in record]
        check_readable(list(dict.fromkeys(files)))
    batch = cfg.dataloader.train.get("total_batch_size") or 1
    if len(trained) < batch:
        raise ValueError(
            f"{whose} has {len(trained)} images, fewer than a batch of {batch}: set "
            f"dataloader.train.total_batch_size={len(trained)} or less"
        )
    if len(records) < 2:
        raise ValueError(
            f"data set {evaluated_name(cfg)!r}, which is evaluated on, has {len(records)} images: "
            "an AP of it means nothing; name more"
        )
    annotated = [record for record in records if "annotations" in record]
    if annotated and not any(map(count_objects, annotated)):
        raise ValueError(
            f"data set {evaluated_name(cfg)!r}, which is evaluated on, has no objects: there is "
            "nothing that an AP could be of"
        )
    counted = evaluator.most_counted if isinstance(evaluator, COCOEvaluator) else COUNTED
    _warn_of_crowded_images(cfg, trained, counted)


def _warn_of_crowded_images(
    cfg: DictConfig, records: Sequence[Mapping], counted: int | None
) -> None:
    most = max(map(count_objects, records), default=0)
    queries = cfg.model.queries.get("num_queries")
    for key, limit in (
        ("model.queries.num_queries", queries),
        ("dataloader.evaluator.max_dets_per_image", counted),
    ):
        if comm.is_main_process() and limit is not None and most > limit:
            logger.warning(
                f"An image has {most} objects, more than {key}={limit}: the rest cannot be found"
            )


def evaluated_name(cfg: DictConfig) -> str:
    """Of the data set; an evaluator of a user's own need not name it."""
    return cfg.dataloader.evaluator.get("dataset_name") or cfg.dataloader.test.dataset.name


def draw_detections(cfg: DictConfig, dataset: list[dict]) -> None:
    """A grid of images with detections beside ground truth, from the evaluator's results file.

    Pictures are not worth a result: what keeps them from being drawn is a warning.
    """
    path = os.path.join(cfg.train.output_dir, "detections.jpg")
    try:
        folder = cfg.dataloader.evaluator.get("output_dir") or cfg.train.output_dir
        with open(os.path.join(folder, "coco_instances_results.json")) as file:
            predictions = json.load(file)
        metadata = MetadataCatalog.get(cfg.dataloader.evaluator.dataset_name)
        to_dataset_id = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
        save_detection_grid(
            path, dataset, predictions, metadata.thing_classes, to_dataset_id, **cfg.train.pictures
        )
    except Exception as error:
        logger.warning(f"{path} could not be drawn: {type(error).__name__}: {error}")
    else:
        logger.info(f"Detections beside ground truth: {path}")
