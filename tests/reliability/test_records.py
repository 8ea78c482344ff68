"""A data set's own function: its records are read right, or refused in a line that names them."""

import contextlib

import numpy as np
import pytest
from hostile_records import record_of, rewritten, spoilt
from PIL import Image

from stage_interactor.config import build, load_config
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from stage_interactor.data import DetrDatasetMapper
from stage_interactor.data.coco import load_coco_dataset
from stage_interactor.data.loader import build_train_loader
from stage_interactor.data.records import RecordError
from stage_interactor.engine.evaluation import check_evaluation, wrong_records_told
from stage_interactor.errors import explain

NAME = "of_a_function"


@pytest.fixture
def records(tmp_path):
    """Two, of real images."""
    found = []
    for number in range(2):
        path = tmp_path / f"picture{number}.png"
        Image.fromarray(np.full((30, 40, 3), 9 * number, np.uint8)).save(path)
        found.append(record_of(path, number))
    return found


@contextlib.contextmanager
def registered(records, classes=("a", "b")):
    DatasetCatalog.register(NAME, lambda: records)
    if classes:
        MetadataCatalog.get(NAME).thing_classes = list(classes)
    try:
        yield NAME
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def loaded(records, is_train=True):
    with registered(records) as name:
        return load_coco_dataset(name, is_train=is_train)


def evaluated(records):
    return loaded(records, is_train=False)


def as_they_are(records):
    return records


def mapped(records):
    """By what trains, without having been loaded by a name."""
    loader = build_train_loader(
        records, mapper=DetrDatasetMapper(augmentation=[]), total_batch_size=len(records),
        aspect_ratio_grouping=False, num_workers=0, shuffle=False,
    )  # fmt: skip
    return next(iter(loader))


def boxes_and_classes(batch):
    return [
        (image["instances"].gt_boxes.tensor.tolist(), image["instances"].gt_classes.tolist())
        for image in batch
    ]


@pytest.mark.cases(60)
def test_other_types_of_the_same_values_mean_the_same(records, rng, cases):
    expected = boxes_and_classes(mapped(records))
    assert [len(classes) for _, classes in expected] == [2, 2]
    for _ in range(cases):
        others = [rewritten(record, rng) for record in records]
        assert boxes_and_classes(mapped(others)) == expected, others
        assert boxes_and_classes(mapped(loaded(others))) == expected, others
        evaluated(others)


@pytest.mark.cases(300)
@pytest.mark.parametrize("way", [loaded, evaluated, as_they_are])
def test_a_value_that_is_none_is_told_with_its_file(records, rng, cases, way):
    whole, refused = boxes_and_classes(mapped(records)), 0
    for _ in range(cases):
        wrong, what = spoilt(records[1], rng)
        try:
            found = boxes_and_classes(mapped(way([records[0], wrong])))
        except Exception as error:
            text, refused = explain(error), refused + 1
            assert text and "STAGE_INTERACTOR_TRACE" not in text, (what, repr(error))
            assert records[1]["file_name"] in text or "file_name must be" in text, (what, text)
            continue
        if "image_id" in what:  # nothing is told apart in training
            assert way is not evaluated and found == whole, what
        elif "bbox=" in what:  # left out with a warning, as it would be of a file
            assert way is not as_they_are and ("nan" in what or "inf" in what), what
        else:  # the model tells, which knows its classes
            assert way is as_they_are and what.endswith(("id=2", "id=3", "id=17")), what
    assert refused > cases / 2


@pytest.mark.parametrize("given", [None, {}, [], (), "records", 3, iter([]), [None], [[]], ["a"]])
def test_what_is_no_list_of_records_is_told(given):
    with pytest.raises(Exception) as caught:
        loaded(given)
    told = explain(caught.value)
    assert told.startswith(f"data set {NAME!r}") and (" must " in told or "empty" in told)


def test_an_image_may_have_no_annotations(records):
    del records[1]["annotations"]
    for way in (loaded, evaluated, as_they_are):
        kept = [record for record in way(records) if "annotations" not in record]
        assert len(kept) == (way is not loaded)  # in training images without objects are left out
    assert boxes_and_classes(mapped(records))[1] == ([], [])


def test_two_images_of_one_id_are_not_evaluated(records):
    records[1]["image_id"] = records[0]["image_id"]
    with pytest.raises(RecordError, match="picture1.png and .*picture0.png both have the image_id"):
        evaluated(records)
    assert len(loaded(records)) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_process_that_loads_tells_it_too(records, num_workers):
    del records[1]["annotations"][1]["category_id"]
    mapper = DetrDatasetMapper(augmentation=[])
    loader = build_detection_test_loader(records, mapper=mapper, num_workers=num_workers)
    with pytest.raises(RecordError) as caught:
        list(loader)
    assert explain(caught.value) == (
        f"{records[1]['file_name']}, annotation 1: category_id must be the index of a class, 0 or "
        "more, there is none"
    )


@pytest.mark.cases(60)
@pytest.mark.parametrize("part", ["train", "test"])
def test_detectron2s_own_loader_named_by_a_config_tells_it(records, rng, cases, tmp_path, part):
    """It does not look at records; what fails on the way to the first step names them."""
    refused, cfg = 0, load_config("configs/quickstart.py")
    cfg.dataloader[part].dataset = L(get_detection_dataset_dicts)(names=NAME, filter_empty=False)
    cfg.dataloader.evaluator.update(dataset_name=NAME, output_dir=str(tmp_path))
    for _ in range(cases):
        wrong, what = spoilt(records[1], rng)
        try:
            with registered([records[0], wrong]):
                if part == "test":
                    check_evaluation(cfg, ("a", "b"), "the model's")
                    continue
                with wrong_records_told(cfg, part):
                    build(cfg, "dataloader.train.dataset")
        except Exception as error:
            text, refused = explain(error), refused + 1
            assert text and "STAGE_INTERACTOR_TRACE" not in text, (what, repr(error))
            assert records[1]["file_name"] in text or "file_name must be" in text, (what, text)
    assert refused  # of training most are told by the mapper
