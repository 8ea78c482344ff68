"""Annotation files: what is loaded, and what is said about those that are wrong."""

import itertools
import json
import logging
import math
import os
import re

import pytest

from stage_interactor.d2.data import DatasetCatalog, MetadataCatalog
from stage_interactor.data import (
    check_num_classes,
    class_names,
    count_classes,
    load_coco_dataset,
    match_classes,
)

_numbers = itertools.count()


@pytest.fixture
def name():
    name = f"test_pets_{next(_numbers)}"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_file_becomes_records_with_class_indices_by_rising_category_id(coco, name):
    records = load_coco_dataset(name, *coco.files)
    assert [record["image_id"] for record in records] == list(range(1, 11))
    assert records[0]["file_name"] == os.path.join(coco.files[1], "1.jpg")
    assert [item["category_id"] for item in records[0]["annotations"]] == [0, 1, 0]
    assert records[0]["annotations"][1]["bbox"] == [7, 3, 8, 10]
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}


def test_classes_are_read_from_the_file_or_the_registered_name(coco, name):
    assert class_names(coco.files[0]) == ["cat", "dog"]
    assert count_classes(json_file=coco.files[0]) == 2
    load_coco_dataset(name, *coco.files)
    assert count_classes(name=name) == 2
    assert count_classes(name="coco_2017_val") == 80
    with pytest.raises(ValueError, match="either json_file or name"):
        count_classes()


def test_a_wrong_num_classes_names_both_numbers(coco, name):
    load_coco_dataset(name, *coco.files)
    check_num_classes(name, 2)
    with pytest.raises(ValueError, match=rf"num_classes=80.*{name}.*2 classes \(cat, dog\)"):
        check_num_classes(name, 80)


def test_a_name_can_be_registered_again_with_the_same_or_other_files(coco, name, tmp_path):
    load_coco_dataset(name, *coco.files)
    assert len(load_coco_dataset(name, *coco.files)) == 10
    coco.content["categories"].append({"id": 9, "name": "fox"})
    coco.content["images"] = coco.content["images"][:4]
    coco.content["annotations"] = coco.content["annotations"][:12]
    coco.json_file = tmp_path / "other.json"
    coco.write()
    assert len(load_coco_dataset(name, *coco.files)) == 4
    assert count_classes(name=name) == 3


def test_a_file_that_was_rewritten_with_other_classes_is_read_anew(coco, name):
    load_coco_dataset(name, *coco.files)
    coco.content["categories"].append({"id": 1, "name": "ant"})
    coco.write()
    records = load_coco_dataset(name, *coco.files)
    assert [item["category_id"] for item in records[0]["annotations"]] == [1, 2, 1]
    assert class_names(name=name) == ["ant", "cat", "dog"]


def test_builtin_names_without_files_name_the_variable_and_the_path():
    with pytest.raises(FileNotFoundError, match="instances_train2017.json.*DETECTRON2_DATASETS"):
        load_coco_dataset("coco_2017_train")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(KeyError, match="coco_2017_trian.*coco_2017_train"):
        load_coco_dataset("coco_2017_trian")


def test_a_missing_file_and_a_missing_folder_are_named(coco, name):
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        load_coco_dataset(name, "nowhere.json", coco.files[1])
    with pytest.raises(ValueError, match="path of the COCO JSON is empty"):
        load_coco_dataset(name, "", coco.files[1])
    with pytest.raises(ValueError, match="needs image_root"):
        load_coco_dataset(name, coco.files[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "is not a JSON file"),
        ("\x89PNG", "is not a JSON file"),
        ("[1, 2]", "no COCO file: its top level is a list"),
        ('{"shapes": []}', "no COCO file: it has no list 'images'.*'shapes'"),
        ('{"images": []}', "no list 'categories'"),
        ('{"images": [], "categories": []}', "'categories' is empty"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "data set is empty"),
    ],
)
def test_a_file_that_is_no_coco_file_says_why(coco, name, text, message):
    coco.json_file.write_text(text)
    with pytest.raises(ValueError, match=f"train.json.*{message}"):
        load_coco_dataset(name, *coco.files)


def _unlisted_category(content):
    content["annotations"][4]["category_id"] = 5


def _repeated_annotation_id(content):
    content["annotations"][4]["id"] = 1


def _repeated_image_id(content):
    content["images"][4]["id"] = 1


def _repeated_category_id(content):
    content["categories"][1]["id"] = 7


def _no_height(content):
    del content["images"][4]["height"]


def _three_numbers(content):
    content["annotations"][4]["bbox"] = [1, 2, 3]


def _ignored(content):
    content["annotations"][4]["ignore"] = 1


def _no_objects(content):
    for item in content["annotations"]:
        item["iscrowd"] = 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unlisted_category, r"annotation 5 has category_id 5.*\[3, 7\]"),
        (_repeated_annotation_id, "id 1 occurs more than once in 'annotations'"),
        (_repeated_image_id, "id 1 occurs more than once in 'images'"),
        (_repeated_category_id, "id 7 occurs more than once in 'categories'"),
        (_no_height, r"images\[4\] has no 'height'"),
        (_three_numbers, r"bbox of annotation 5 is \[1, 2, 3\]"),
        (_ignored, "annotation 5 sets 'ignore'"),
        (_no_objects, "none of its 10 images has an object"),
    ],
)
def test_a_contradiction_in_the_file_is_an_error_that_names_it(coco, name, damage, message):
    damage(coco.content)
    coco.write()
    with pytest.raises(ValueError, match=f"train.json.*{message}"):
        load_coco_dataset(name, *coco.files)


def test_bad_boxes_and_stray_annotations_are_left_out_with_one_warning(coco, name, caplog):
    boxes = [[5, 5, 0, 4], [5, 5, 4, -1], [math.nan, 5, 4, 4], [41, 5, 4, 4], [-9, 5, 4, 4]]
    for item, box in zip(coco.content["annotations"], boxes):
        item["bbox"] = box
    coco.content["annotations"][9]["image_id"] = 99
    coco.write()
    with caplog.at_level(logging.WARNING, logger="stage_interactor"):
        records = load_coco_dataset(name, *coco.files)
    assert [len(record["annotations"]) for record in records[:3]] == [1, 3, 2]  # image 1 is gone
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "stage_interactor.data.coco"]
    assert "train.json" in warning
    assert "1 annotations belong to images" in warning and "annotation 10" in warning
    assert "3 boxes have a zero, negative or non-finite" in warning and "1.jpg" in warning
    assert "2 boxes lie wholly outside" in warning


def test_a_box_partly_outside_is_kept(coco, name):
    coco.content["annotations"][0]["bbox"] = [-4, -4, 8, 8]
    coco.write()
    assert len(load_coco_dataset(name, *coco.files)[0]["annotations"]) == 3


def test_all_boxes_bad_is_an_error(coco, name):
    for item in coco.content["annotations"]:
        item["bbox"][2] = 0
    coco.write()
    with pytest.raises(ValueError, match="no image is left that has a usable object"):
        load_coco_dataset(name, *coco.files)


def test_images_without_objects_stay_in_evaluation_only(coco, name):
    coco.content["annotations"] = coco.content["annotations"][3:]
    coco.write()
    assert len(load_coco_dataset(name, *coco.files)) == 9
    assert len(load_coco_dataset(name, *coco.files, is_train=False)) == 10
    assert len(load_coco_dataset(name, *coco.files, filter_empty=False)) == 10


def test_a_missing_image_is_a_warning_in_training_and_an_error_in_evaluation(coco, name, caplog):
    (coco.image_root / "4.jpg").unlink()
    assert 4 not in [record["image_id"] for record in load_coco_dataset(name, *coco.files)]
    assert "1 image files do not exist" in caplog.text and "4.jpg" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"1 of 10 images do not exist.*4\.jpg"):
        load_coco_dataset(name, *coco.files, is_train=False)


@pytest.mark.parametrize("is_train", [True, False])
def test_a_wrong_image_root_is_named(coco, name, tmp_path, is_train):
    with pytest.raises(FileNotFoundError, match="none of its 10 images.*image_root=.*elsewhere"):
        load_coco_dataset(name, coco.files[0], str(tmp_path / "elsewhere"), is_train=is_train)


def test_a_test_set_without_annotations_loads_for_evaluation(coco, name):
    del coco.content["annotations"]
    coco.write()
    assert len(load_coco_dataset(name, *coco.files, is_train=False)) == 10
    with pytest.raises(ValueError, match="none of its 10 images has an object"):
        load_coco_dataset(name, *coco.files)


def test_a_registered_data_set_with_other_classes_than_its_file_is_an_error(coco, name):
    load_coco_dataset(name, *coco.files)
    coco.content["categories"][0]["name"] = "wolf"
    coco.json_file.write_text(json.dumps(coco.content))
    with pytest.raises(ValueError, match="wolf.*registered with.*dog"):
        load_coco_dataset(name)


@pytest.mark.parametrize("is_train", [True, False])
def test_two_classes_of_one_name_are_refused(coco, is_train):
    coco.content["categories"][0]["name"] = "cat"
    coco.write()
    with pytest.raises(ValueError, match="train.json: several classes have the name 'cat'"):
        load_coco_dataset("one_name", *coco.files, is_train=is_train)


@pytest.mark.parametrize("others", [["a"], ["a", "c"], ["a", "b", "c"], []])
def test_other_classes_are_an_error_that_lists_both(others):
    told = r"the checkpoint has the classes \['a', 'b'\], but data set 'val' has others: "
    with pytest.raises(ValueError, match=told + re.escape(str(others))):
        match_classes(["a", "b"], others, "the checkpoint", "data set 'val'")


def test_classes_in_another_order_are_matched_by_name():
    assert match_classes(["a", "b"], ("a", "b"), "one", "other") == [0, 1]
    assert match_classes(["c", "a", "b"], ["a", "b", "c"], "one", "other") == [2, 0, 1]
