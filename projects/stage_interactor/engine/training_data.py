"""The data of a training, with the classes in the order of the weights that it begins with."""

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig

from ..config import build
from ..data import (
    categories_of,
    check_num_classes,
    class_names,
    match_classes,
    with_classes,
)
from ..inference.blueprint import class_names_in
from ..modeling import Criterion, StageInteractor
from .class_weights import class_weights
from .evaluation import wrong_records_told

logger = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """What a detector is trained on.

    Attributes:
        records: detectron2's dataset dicts.
        class_names, categories: by the model's class index.
        whose: how messages call it.
    """

    records: list[dict]
    class_names: list[str]
    categories: list[dict]
    whose: str

    @classmethod
    def read(
        cls, cfg: DictConfig, num_classes: int, content: Mapping[str, Any], start: str
    ) -> "TrainingData":
        """Of a config.

        Args:
            content: of the checkpoint that the training begins with or goes on from, whose classes
                keep their order; empty without one.
            start: its path, for messages.

        Raises:
            ValueError: the classes are others than those of the model or of the checkpoint.
            RecordError: there are records that are none.
        """
        with wrong_records_told(cfg, "train"):
            records = build(cfg, "dataloader.train.dataset")
        name = cfg.dataloader.train.dataset.get("name") or cfg.dataloader.train.dataset.names
        check_num_classes(name, num_classes)
        whose = f"data set {name!r}, which is trained on,"
        names, categories = class_names(name=name), categories_of(name)
        learned = class_names_in(content)
        if learned != names and sorted(learned) == sorted(names):
            logger.info(f"The classes keep the order that they have in {start}: {learned}")
            order = match_classes(learned, names, f"the checkpoint {start}", whose)
            records, categories = with_classes(records, order), [categories[i] for i in order]
            names = learned
        return cls(records, names, categories, whose)

    @property
    def fingerprint(self) -> str:
        """Of what the order of the images, and what is in them, depends on; not of where they lie.

        Other images, in another order, or with another number of objects, have another one.
        """
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            size = record.get("width"), record.get("height")
            count = len(record.get("annotations", ()))
            name = os.path.basename(str(record.get("file_name")))
            digest.update(repr((name, size, count)).encode(errors="surrogateescape"))
        return digest.hexdigest()


def weigh_classes(cfg: DictConfig, model: StageInteractor, data: TrainingData) -> None:
    """Gives the criterion what ``train.class_weights`` asks for."""
    names = data.class_names
    weights = class_weights(cfg.train.get("class_weights"), names, data.records)
    if weights is None or not isinstance(model.criterion, Criterion):
        return
    model.criterion.weigh_classes(weights)
    model.criterion.to(model.device)
    told = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights))
    logger.info(f"Weights of the classes in the focal loss: {told[:500]}")
