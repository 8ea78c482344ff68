"""What a file means does not hang on how it is written; and what cannot be meant is told.

Annotation files that hold the same score the same, to the last digit. Junk in any place is an error
that names file and entry, or is left out and named.
"""

import copy
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_variants import VARIANTS
from layouts import (
    ALL,
    CLASSES,
    OFTEN_MET,
    ONE,
    PICTURES,
    coco,
    cvat,
    draw,
    each,
    labelme,
    plain_row,
    rows,
    via,
    voc,
    voc_object,
    write,
    write_json,
    yolo_parts,
)
from PIL import Image, ImageDraw, ImageOps, features

from stage_interactor.d2 import structures
from stage_interactor.d2.data import DatasetCatalog, MetadataCatalog
from stage_interactor.d2.evaluation import COCOEvaluator
from stage_interactor.data import ImageReadError, load_coco_dataset, read_image
from stage_interactor.data.check import check_folder
from stage_interactor.data.folders import DataFolder, describe, read_folder
from stage_interactor.data.sizes import read_sizes

LAYOUTS = OFTEN_MET.found | VARIANTS.found
_numbers = itertools.count()
NAN, INF = math.nan, math.inf


@pytest.fixture
def load():
    """Loads a file under a name of its own."""
    names = []

    def load(json_file, image_root, **how):
        names.append(f"test_reading_{next(_numbers)}")
        return names[-1], load_coco_dataset(names[-1], str(json_file), str(image_root), **how)

    yield load
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)


def told(folder: DataFolder) -> str:
    """What reading and checking say of a data set, without the folder of the test."""
    found = check_folder(folder)
    parts = [split.problems for split in folder.splits.values()]
    parts += [folder.notes, *found.errors.values(), *found.warnings.values()]
    texts = itertools.chain(*parts)
    root = Path(folder.path)
    return "\n".join(texts).replace(str(root if root.is_dir() else root.parent), "")


def boxes_of(folder: DataFolder, part: str = "train") -> list[list[float]]:
    return [item["bbox"] for item in folder.splits[part].content["annotations"]]


# The same annotations, written otherwise, score the same.

SIZE = 90, 70
NUM_PICTURES = 8


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Folder of pictures, the content of their annotation file, and detections by file name."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(7)
    images, annotations, detections = [], [], {}
    for number in range(1, NUM_PICTURES + 1):
        name = f"{number}.png"
        Image.new("RGB", SIZE, (20 * number, 9, 90)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        detections[name] = []
        for index in range(number % 4):
            x, y, w, h = (int(v) for v in rng.integers((2, 2, 12, 12), (35, 25, 50, 40)))
            crowd = int(number == 7 and index == 2)
            label = CLASSES[(number + index) % 2]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "bbox": [x, y, w, h],
                 "category_id": 1 + CLASSES.index(label), "area": w * h, "iscrowd": crowd}
            )  # fmt: skip
            shift = rng.integers(-4, 5, 4)
            box = [x + shift[0], y + shift[1], x + w + shift[2], y + h + shift[3]]
            wrong = rng.random() < 0.2
            detections[name].append((CLASSES[CLASSES.index(label) ^ wrong], box))
        detections[name].append((CLASSES[number % 2], [5, 5, 40, 40]))
        # Many scores are equal, of right and of wrong detections.
        detections[name] = [(*item, round(rng.random(), 1)) for item in detections[name]]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return folder, content, detections


def score(name: str, records: list[dict], detections: dict) -> dict[str, float]:
    """As the engine scores: with the evaluator, and the ids that the records have."""
    labels = MetadataCatalog.get(name).thing_classes
    evaluator = COCOEvaluator(name, ("bbox",), False, use_fast_impl=False)
    evaluator.reset()
    for record in records:
        found = detections[os.path.basename(record["file_name"])]
        instances = structures.Instances((record["height"], record["width"]))
        boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float).reshape(-1, 4)
        instances.pred_boxes = structures.Boxes(boxes)
        instances.scores = torch.tensor([value for _, _, value in found])
        instances.pred_classes = torch.tensor([labels.index(label) for label, _, _ in found])
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate().get("bbox", {"AP": NAN})  # a file may have no annotations


def numbered(section: str, number):
    """Ids of a list, ``number(0)``, ``number(1)`` ...; what refers to them follows."""
    key = {"images": "image_id", "categories": "category_id"}.get(section)

    def edit(content: dict) -> None:
        new = {item["id"]: number(n) for n, item in enumerate(content[section])}
        for item in content[section]:
            item["id"] = new[item["id"]]
        for item in content["annotations"]:
            if key:
                item[key] = new[item[key]]

    return edit


def everything_numbered(number):
    def edit(content: dict) -> None:
        for section in ("images", "annotations", "categories"):
            numbered(section, number)(content)

    return edit


def every_annotation(**values):
    def edit(content: dict) -> None:
        for item in content["annotations"]:
            item.update(values)

    return edit


def without(key: str):
    def edit(content: dict) -> None:
        for item in content["annotations"]:
            if key != "iscrowd" or not item["iscrowd"]:
                del item[key]

    return edit


def only_crowds_keep(value):
    """``iscrowd`` of the others is ``value``."""

    def edit(content: dict) -> None:
        for item in content["annotations"]:
            item["iscrowd"] = item["iscrowd"] or value

    return edit


def boxes_alone(content: dict) -> None:
    for key in ("area", "iscrowd"):
        without(key)(content)


def more_boxes(*boxes):
    """Of what can be no object; 20 of them."""

    def edit(content: dict) -> None:
        for number, box in zip(range(20), itertools.cycle(boxes)):
            item = copy.deepcopy(content["annotations"][number % 3])
            x, y, w, h = box
            content["annotations"].append(item | {"id": 1000 + number, "bbox": box, "area": w * h})

    return edit


def segmented(outline):
    def edit(content: dict) -> None:
        for item in content["annotations"]:
            x, y, w, h = item["bbox"]
            item["segmentation"] = outline(x, y, x + w, y + h)

    return edit


def strays(content: dict) -> None:
    for number in range(5):
        item = content["annotations"][number]
        content["annotations"].append(item | {"id": 500 + number, "image_id": 900 + number})


def a_class_without_objects(content: dict) -> None:
    content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})


def in_another_order(section: str):
    return lambda content: content[section].reverse()


def as_decimals(content: dict) -> None:
    """As a table of numbers writes them."""
    for item in content["annotations"]:
        for key in ("id", "image_id", "category_id", "area"):
            item[key] = float(item[key])
        item["bbox"] = [float(value) for value in item["bbox"]]


def more_keys(content: dict) -> None:
    content.update(info={"year": 2024}, licenses=[], type="instances")
    every_annotation(attributes={"occluded": False}, keypoints=[1, 2, 2], score=0.5)(content)
    for section in ("images", "categories"):
        for item in content[section]:
            item.update(license=1, supercategory="pets", date_captured="", flickr_url=None)


SAME = {
    "annotation_ids_from_0": numbered("annotations", lambda n: n),
    "annotation_ids_with_gaps": numbered("annotations", lambda n: 17 * n + 5),
    "annotation_ids_falling": numbered("annotations", lambda n: 999 - n),
    "annotation_ids_around_0": numbered("annotations", lambda n: n - 4),
    "annotation_ids_as_texts": numbered("annotations", lambda n: f"a{n:03}"),
    "annotation_ids_beyond_doubles": numbered("annotations", lambda n: 2**53 + n),
    "annotation_ids_beyond_64_bits": numbered("annotations", lambda n: 2**63 - 3 + n),
    "image_ids_from_0": numbered("images", lambda n: n),
    "image_ids_with_gaps": numbered("images", lambda n: 1000 * n + 139),
    "image_ids_around_0": numbered("images", lambda n: n - 4),
    "image_ids_as_texts": numbered("images", lambda n: f"picture {n:03}"),
    "image_ids_as_digits": numbered("images", lambda n: f"{n:012}"),
    "image_ids_beyond_doubles": numbered("images", lambda n: 2**53 + n),
    "image_ids_beyond_64_bits": numbered("images", lambda n: 2**63 - 3 + n),
    "category_ids_from_0": numbered("categories", lambda n: n),
    "category_ids_with_gaps": numbered("categories", lambda n: 40 * n + 18),
    "category_ids_as_texts": numbered("categories", lambda n: f"c{n}"),
    "category_ids_beyond_64_bits": numbered("categories", lambda n: 2**63 - 1 + n),
    "all_ids_from_0": everything_numbered(lambda n: n),
    "all_ids_as_texts": everything_numbered(lambda n: f"{n:05}"),
    "numbers_as_decimals": as_decimals,
    "images_in_another_order": in_another_order("images"),
    "annotations_in_another_order": in_another_order("annotations"),
    "categories_in_another_order": in_another_order("categories"),
    "boxes_without_width": more_boxes([9, 9, 0, 20]),
    "boxes_of_nothing": more_boxes([0, 0, 0, 0]),
    "boxes_of_negative_size": more_boxes([30, 30, -10, -10], [30, 30, 10, -10]),
    "boxes_that_are_not_numbers": more_boxes([NAN, 9, 9, 9], [9, 9, NAN, 9], [NAN] * 4),
    "boxes_that_are_infinite": more_boxes([9, 9, INF, 9], [-INF, 9, 9, 9]),
    "boxes_outside": more_boxes([91, 9, 9, 9], [9, 71, 9, 9], [-30, 9, 20, 9], [9, -30, 9, 30]),
    "boxes_of_all_these": more_boxes([9, 9, 0, 9], [NAN] * 4, [200, 9, 9, 9], [9, 9, -1, 9]),
    "segmentation_empty": every_annotation(segmentation=[]),
    "segmentation_of_an_empty_outline": every_annotation(segmentation=[[]]),
    "segmentation_null": every_annotation(segmentation=None),
    "segmentation_of_two_points": segmented(lambda *corners: [list(corners)]),
    "segmentation_of_one_point": segmented(lambda left, top, *_: [[left, top]]),
    "segmentation_of_outlines": segmented(lambda a, b, c, d: [[a, b, c, b, c, d, a, d]]),
    "segmentation_of_another_outline": segmented(lambda a, b, *_: [[a, b, a + 2, b, a, b + 2]]),
    "segmentation_by_lengths": every_annotation(
        segmentation={"counts": [100, 50, 6150], "size": [70, 90]}
    ),
    "segmentation_by_lengths_of_another_size": every_annotation(
        segmentation={"counts": [5, 5], "size": [2, 5]}
    ),
    "segmentation_that_is_none": every_annotation(segmentation="polygon"),
    "iscrowd_missing": without("iscrowd"),
    "iscrowd_null": only_crowds_keep(None),
    "iscrowd_false": only_crowds_keep(False),
    "area_missing": without("area"),
    "area_null": every_annotation(area=None),
    "boxes_alone": boxes_alone,
    "annotations_of_images_that_are_not_listed": strays,
    "a_class_without_objects": a_class_without_objects,
    "more_keys": more_keys,
}  # fmt: skip


@pytest.mark.parametrize("variant", SAME)
def test_ap_is_that_of_the_annotations_however_they_are_written(variant, scored, load, tmp_path):
    folder, content, detections = scored
    write_json(tmp_path / "plain.json", content)
    expected = score(*load(tmp_path / "plain.json", folder, is_train=False), detections)
    assert 20 < expected["AP"] < 80 and 10 < expected["AP75"] < expected["AP50"]
    changed = copy.deepcopy(content)
    SAME[variant](changed)
    write_json(tmp_path / "changed.json", changed)
    name, records = load(tmp_path / "changed.json", folder, is_train=False)
    found = score(name, records, detections)
    assert {key: repr(found[key]) for key in expected} == {
        key: repr(value) for key, value in expected.items()
    }


def trained_on(records: list[dict]) -> dict[str, list]:
    return {
        os.path.basename(record["file_name"]): sorted(
            item["bbox"] for item in record["annotations"] if not item.get("iscrowd")
        )
        for record in records
    }


@pytest.mark.parametrize("variant", SAME)
def test_what_is_trained_on_are_the_annotations_however_written(variant, scored, load, tmp_path):
    folder, content, _ = scored
    changed = copy.deepcopy(content)
    SAME[variant](changed)
    write_json(tmp_path / "plain.json", content)
    write_json(tmp_path / "changed.json", changed)
    _, expected = load(tmp_path / "plain.json", folder)
    _, found = load(tmp_path / "changed.json", folder)
    assert trained_on(found) == trained_on(expected) and len(trained_on(found)) == 6


def test_ap_with_a_byte_order_mark_is_that_without(scored, load, tmp_path):
    folder, content, detections = scored
    write_json(tmp_path / "plain.json", content)
    write_json(tmp_path / "marked.json", content, encoding="utf-8-sig")
    one, other = (
        score(*load(tmp_path / f"{name}.json", folder, is_train=False), detections)
        for name in ("plain", "marked")
    )
    assert repr(one) == repr(other)


def test_an_area_that_is_given_tells_what_is_small(scored, load, tmp_path):
    """An area may be that of an outline; it sorts objects into sizes, and AP is not changed."""
    folder, content, detections = scored
    content = copy.deepcopy(content)
    write_json(tmp_path / "plain.json", content)
    plain = score(*load(tmp_path / "plain.json", folder, is_train=False), detections)
    assert plain["APm"] > 0
    every_annotation(area=500)(content)
    write_json(tmp_path / "small.json", content)
    small = score(*load(tmp_path / "small.json", folder, is_train=False), detections)
    assert repr(small["AP"]) == repr(plain["AP"]) and math.isnan(small["APm"])


def test_boxes_that_are_left_out_are_told(scored, tmp_path):
    _, content, _ = scored
    draw(tmp_path / "images")
    content = coco()
    more_boxes([9, 9, 0, 9], [NAN] * 4, [200, 9, 9, 9])(content)
    write_json(tmp_path / "annotations.json", content)
    folder = read_folder(tmp_path)
    assert "annotation 1000" in told(folder) and "annotation 1002" in told(folder)
    assert all(map(math.isfinite, itertools.chain(*boxes_of(folder))))


# Junk in any place of an annotation file.


def deep(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


JUNK = {
    "null": None, "true": True, "false": False, "a_word": "x", "a_digit": "1", "no_text": "",
    "a_space": " ", "minus_one": -1, "zero": 0, "a_fraction": 1.5, "nan": NAN, "infinity": INF,
    "beyond_floats": 1e308, "ten_to_30": 10**30, "no_list": [], "no_object": {},
    "two_numbers": [1, 2], "four_texts": ["1"] * 4, "four_nans": [NAN] * 4,
    "four_trues": [True] * 4, "four_lists": [[1]] * 4, "an_object": {"a": 1}, "deep": deep(300),
    "half_a_letter": "\ud800", "a_nul": "a\0b", "a_line_end": "a\nb",
    "a_path_out": "../../../../../../../../etc/passwd", "a_root": "/etc/passwd", "a_folder": ".",
    "long": "n" * 5000, "markup": "<script>alert(1)</script>", "missing": "MISSING",
}  # fmt: skip
FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
PLACES = [(section, field) for section, fields in FIELDS.items() for field in fields]
PLACES += [(section, what) for section in FIELDS for what in ("the_list", "an_entry")]
WORDS = {"images": ("image",), "annotations": ("annotation",), "categories": ("categor", "class")}


def with_junk(section: str, field: str, junk: object) -> dict:
    content = coco((0, 1, 3), names="pictures/{}.jpg")
    if field == "the_list":
        content[section] = copy.deepcopy(junk)
    elif field == "an_entry":
        content[section][1] = copy.deepcopy(junk)
    else:
        content[section][1][field] = copy.deepcopy(junk)
    if junk == "MISSING":
        if field == "the_list":
            del content[section]
        elif field != "an_entry":
            del content[section][1][field]
    return content


def require_named(error: Exception, root: Path, section: str, field: str) -> None:
    """The file and what is wrong in it; where a picture is not there, the picture."""
    message = str(error).replace(str(root), "")
    message.encode()  # can be printed
    if field == "file_name" and not isinstance(error, ValueError):
        return
    assert "pets.json" in message
    assert field in message or any(word in message for word in WORDS[section]), message


@pytest.fixture
def pets(tmp_path):
    draw(tmp_path / "pictures", (0, 1, 3))
    return tmp_path


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(("section", "field"), PLACES)
def test_junk_in_a_data_set_is_named_or_does_no_harm(section, field, junk, pets):
    write_json(pets / "pets.json", with_junk(section, field, JUNK[junk]))
    try:
        folder = read_folder(pets / "pets.json")
    except (ValueError, FileNotFoundError) as error:
        require_named(error, pets, section, field)
        return
    text = told(folder)
    (text + describe(folder)).encode()
    for split in folder.splits.values():
        json.dumps(split.content)
        assert all(isinstance(name, str) for name in split.class_names)
        listed = {image["id"] for image in split.content["images"]}
        for item in split.content["annotations"]:
            assert all(map(math.isfinite, item["bbox"])) and item["image_id"] in listed
        for image in split.content["images"]:
            size = size_of(Path(split.image_root, image["file_name"]))
            if size != (image["width"], image["height"]):
                assert image["file_name"] in text
    if sum(len(split.content["annotations"]) for split in folder.splits.values()) < 4:
        assert "pets.json" in text or "pictures" in text


def size_of(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError:
        return None


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(("section", "field"), PLACES)
def test_junk_in_a_file_to_evaluate_on_is_named_or_does_no_harm(section, field, junk, pets, load):
    write_json(pets / "pets.json", with_junk(section, field, JUNK[junk]))
    try:
        name, records = load(pets / "pets.json", pets, is_train=False)
    except (ValueError, FileNotFoundError, ImageReadError) as error:
        require_named(error, pets, section, field)
        return
    labels = MetadataCatalog.get(name).thing_classes
    detections = {}
    for record in records:
        assert os.path.isfile(record["file_name"])
        found = detections.setdefault(os.path.basename(record["file_name"]), [])
        for item in record["annotations"]:
            x, y, w, h = item["bbox"]
            assert all(map(math.isfinite, (x, y, w, h)))
            found.append((labels[item["category_id"]], [x, y, x + w, y + h], 0.5))
    scores = score(name, records, detections)
    assert math.isnan(scores["AP"]) or scores["AP"] > 0


GOOD = json.dumps(coco((0, 1, 3), names="pictures/{}.jpg"))
RAW = {
    "nothing": b"",
    "spaces": b" \n ",
    "null": b"null",
    "no_list": b"[]",
    "a_number": b"1",
    "a_text": b'"images"',
    "an_empty_object": b"{}",
    "half": GOOD[: len(GOOD) // 2].encode(),
    "without_its_end": GOOD[:-1].encode(),
    "two_documents": 2 * GOOD.encode(),
    "lines": b"\n".join([GOOD.encode()] * 2),
    "more_behind_it": GOOD.encode() + b"x",
    "nested_without_end": b"[" * 100_000,
    "nested_100000_deep": b"[" * 100_000 + b"]" * 100_000,
    "nested_in_a_key": b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "utf_16": GOOD.encode("utf-16"),
    "utf_32": GOOD.encode("utf-32"),
    "latin_1": GOOD.replace("dog", "hündin").encode("latin-1"),
    "zeros": bytes(1000),
    "a_picture": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "a_comment": b"// pets\n" + GOOD.encode(),
    "a_comma_too_many": GOOD.encode()[:-1] + b",}",
    "a_huge_number": GOOD.replace('"width": 64', '"width": 6' + "4" * 6000).encode(),
    "nan_as_a_size": GOOD.replace('"width": 64', '"width": NaN').encode(),
    "infinity_as_a_box": GOOD.replace("[9, 5, ", "[-Infinity, 5, ").encode(),
    "a_page": b"<!DOCTYPE html><html>404</html>",
    "a_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_a_file_that_is_no_annotation_file_is_named(kind, pets, load):
    (pets / "pets.json").write_bytes(RAW[kind])
    for read in (read_folder, lambda path: load(path, pets, is_train=False)[1]):
        try:
            found = read(pets / "pets.json")
        except ValueError as error:
            assert "pets.json" in str(error)
            continue
        if isinstance(found, DataFolder):  # nothing is lost in silence
            assert len(boxes_of(found)) == 4 or "pets.json" in told(found)
        else:
            assert sum(len(record["annotations"]) for record in found) >= 2


@pytest.mark.parametrize("kind", ["half", "nested_100000_deep", "zeros", "a_page", "latin_1"])
def test_a_broken_file_of_a_folder_is_named(kind, pets):
    """The only annotation file that is there."""
    (pets / "annotations.json").write_bytes(RAW[kind])
    with pytest.raises(ValueError, match="annotations.json"):
        read_folder(pets)


# Names of classes.


def class_lists(names):
    quoted = ", ".join(f"'{name}'" for name in names)

    def of_coco(root):
        draw(root / "images")
        content = coco()
        content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        write_json(root / "pets.json", content)

    def of_yolo(root):
        yolo_parts(root, ONE)
        write(root / "pets.yaml", "train: train/images", f"names: [{quoted}]")

    def of_yolo_without_yaml(root):
        yolo_parts(root, ONE)
        write(root / "classes.txt", *names)

    def of_voc(root):
        draw(root / "JPEGImages")
        voc(root / "Annotations")
        write(root / "classes.txt", *names)

    def of_keras(root):
        LAYOUTS["keras_text_files"].build(root)
        write(root / "classes.txt", *names)

    return of_coco, of_yolo, of_yolo_without_yaml, of_voc, of_keras


@pytest.mark.parametrize("build", class_lists(["cat", "dog", "cat"]), ids=lambda f: f.__name__)
def test_two_classes_of_one_name_are_refused(build, tmp_path):
    """Where objects have names instead of numbers, the second can be passed over as well."""
    build(tmp_path)
    if build.__name__ == "of_voc" and (names := classes_read(tmp_path)):
        assert names == ["cat", "dog"]
        return
    with pytest.raises(ValueError, match="'cat'"):
        read_folder(tmp_path)


def classes_read(root: Path) -> list[str] | None:
    try:
        return read_folder(root).class_names
    except ValueError:
        return None


@pytest.mark.parametrize("build", class_lists(["cat"]), ids=lambda f: f.__name__)
def test_objects_of_a_class_that_is_not_listed_are_refused_or_told(build, tmp_path):
    build(tmp_path)
    try:
        folder = read_folder(tmp_path)
    except ValueError as error:
        assert any(name in str(error) for name in ("pets", "classes.txt"))
        return
    assert sum(len(boxes_of(folder, part)) for part in folder.splits) == 4
    assert any(split.problems for split in folder.splits.values())


# Files that are passed over.

PILLOW_NEEDS = {"avif": "avif", "jp2": "jpg_2000", "webp": "webp"}


@pytest.mark.parametrize(
    "suffix",
    ["gif", "avif", "jfif", "ppm", "pgm", "jp2", "jpe", "tif", "TIFF", "webp", "bmp", "dib", "tga"],
)
def test_a_picture_of_a_rare_format_is_read_or_named(suffix, tmp_path):
    needs = PILLOW_NEEDS.get(suffix)
    if needs and not features.check(needs):
        pytest.skip(f"Pillow cannot write {suffix}")
    yolo_parts(tmp_path, ONE)
    write(tmp_path / "data.yaml", "train: train/images", "names: [cat, dog]")
    (tmp_path / "train/images/5.jpg").unlink()
    kind = {"jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM"}.get(suffix)
    Image.new("RGB", PICTURES[5].size).save(tmp_path / f"train/images/5.{suffix}", kind)
    folder = read_folder(tmp_path)
    text = told(folder)
    assert len(boxes_of(folder)) == 8 or f"5.{suffix}" in text or "5.txt" in text


@pytest.mark.parametrize("name", ["5.heic", "5.dng", "5.pdf", None])
def test_labels_without_a_picture_that_is_read_are_named(name, tmp_path):
    """In a folder of YOLO; the picture is of a kind that is not read, or is not there."""
    yolo_parts(tmp_path, ONE)
    write(tmp_path / "data.yaml", "train: train/images", "names: [cat, dog]")
    picture = tmp_path / "train/images/5.jpg"
    if name:
        picture.with_name(name).write_bytes(b"no picture that is known")
    picture.unlink()
    folder = read_folder(tmp_path)
    assert len(boxes_of(folder)) == 7
    assert "5.txt" in told(folder) or name and name in told(folder)


def test_labels_in_two_places_that_differ_are_told(tmp_path):
    yolo_parts(tmp_path, ONE, "{kind}/{part}")
    write(tmp_path / "data.yaml", "train: images/train", "names: [cat, dog]")
    write(tmp_path / "images/train/0.txt", "1 .5 .5 .2 .2")
    assert "0.txt" in told(read_folder(tmp_path))


def test_a_folder_that_leads_into_itself_is_read_once(tmp_path):
    yolo_parts(tmp_path, ONE)
    write(tmp_path / "data.yaml", "train: train/images", "names: [cat, dog]")
    loop = tmp_path / "train/images/loop"
    loop.symlink_to(tmp_path / "train/images", target_is_directory=True)
    (tmp_path / "train/images/nowhere").symlink_to(tmp_path / "not there")
    assert len(read_folder(tmp_path).splits["train"].content["images"]) == 6


# Parts that a description names and that are not there.


@pytest.mark.parametrize(
    "missing", ["val: ../nothing/images", "test: nothing.txt", "val: [nothing]"]
)
def test_a_part_that_is_not_there_is_told(missing, tmp_path):
    yolo_parts(tmp_path, ONE)
    write(tmp_path / "data.yaml", "train: train/images", missing, "names: [cat, dog]")
    folder = read_folder(tmp_path)
    assert list(folder.splits) == ["train"] and "nothing" in told(folder)


def test_one_of_several_folders_that_is_not_there_is_told(tmp_path):
    yolo_parts(tmp_path, ONE)
    write(tmp_path / "data.yaml", "train: [train/images, nothing/images]", "names: [cat, dog]")
    folder = read_folder(tmp_path)
    assert len(boxes_of(folder)) == 8 and "nothing" in told(folder)


def test_a_description_of_which_no_part_is_there_is_refused(tmp_path):
    yolo_parts(tmp_path, ONE)
    write(tmp_path / "data.yaml", "train: nothing/at/all", "val: nothing/too", "names: [cat, dog]")
    with pytest.raises(ValueError, match="nothing/at/all"):
        read_folder(tmp_path)


# Pictures that are not of the size that their annotations say.


def yolo_has_no_sizes(root):
    yolo_parts(root, ONE)
    write(root / "data.yaml", "train: train/images", "names: [cat, dog]")


SIZED = {
    "coco": LAYOUTS["coco_one_json"],
    "voc": LAYOUTS["voc_annots_images"],
    "cvat": LAYOUTS["cvat_xml"],
    "labelme": LAYOUTS["labelme_json_in_a_folder_of_its_own"],
    "csv": LAYOUTS["csv_with_semicolons"],
}


def replace_picture(root: Path, number: int, size: tuple[int, int], orientation: int = 1) -> Path:
    path = next(path for path in root.rglob(f"{number}.*") if path.suffix in (".jpg", ".png"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 99, 9)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", SIZED)
@pytest.mark.parametrize(
    ("size", "orientation", "upright"),
    [((48, 64), 1, "48"), ((640, 480), 1, "640"), ((480, 640), 6, "640")],
    ids=["lying", "ten_times_as_large", "and_turned_by_its_tag"],
)
def test_a_picture_of_another_size_is_told(kind, size, orientation, upright, tmp_path):
    SIZED[kind].build(tmp_path)
    path = replace_picture(tmp_path, 0, size, orientation)
    try:
        text = told(read_folder(tmp_path))
    except ValueError as error:
        text = str(error)
    line = next(line for line in text.splitlines() if path.name in line or "0.xml" in line)
    assert upright in line and "64" in line


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", SIZED)
def test_boxes_of_before_a_turn_are_turned_or_told(kind, orientation, tmp_path):
    """The size that the annotations say is that of the file, not of the picture upright."""
    SIZED[kind].build(tmp_path)
    size, objects = PICTURES[0]
    path = replace_picture(tmp_path, 0, size, orientation)
    with Image.open(path) as picture:
        drawn, exif = picture.convert("RGB"), picture.getexif()
    for item, colour in zip(objects, ("red", "blue")):
        ImageDraw.Draw(drawn).rectangle(
            (*item.corners[:2], *(v - 1 for v in item.corners[2:])), colour
        )
    drawn.save(path, exif=exif, quality=100)
    try:
        folder = read_folder(tmp_path)
    except ValueError as error:
        assert path.name in str(error) or "0.xml" in str(error)
        return
    content = folder.splits["train"].content
    image = next(i for i in content["images"] if Path(i["file_name"]).name == path.name)
    if path.name in told(folder):
        return
    assert "EXIF" in told(folder) and (image["width"], image["height"]) == size[::-1]
    with Image.open(path) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).astype(int)
    of_picture = [item for item in content["annotations"] if item["image_id"] == image["id"]]
    for item, channel in zip(sorted(of_picture, key=lambda item: item["category_id"]), (0, 2)):
        x, y, w, h = (round(value) for value in item["bbox"])
        inside = upright[y + 1 : y + h - 1, x + 1 : x + w - 1, channel]
        assert inside.min() > 180 and inside.size == (w - 2) * (h - 2)


@pytest.mark.parametrize("kind", SIZED)
def test_a_picture_that_its_tag_turns_to_the_size_that_is_said_is_right(kind, tmp_path):
    SIZED[kind].build(tmp_path)
    replace_picture(tmp_path, 0, PICTURES[0].size[::-1], 8)
    folder = read_folder(tmp_path)
    assert len(boxes_of(folder)) == 8 and not any(check_folder(folder).errors.values())


def test_yolo_s_shares_are_of_the_picture_as_it_is_turned(tmp_path):
    yolo_has_no_sizes(tmp_path)
    replace_picture(tmp_path, 0, PICTURES[0].size[::-1], 6)
    assert [float(value) for value in PICTURES[0].objects[0][1:]] in [
        pytest.approx(box, abs=0.01) for box in boxes_of(read_folder(tmp_path))
    ]


# Pascal VOC.


@pytest.mark.parametrize("column", ["", "  1", " -1", "  0", "\t1"])
@pytest.mark.parametrize("name", ["pet {}", "my photo {} (1)", "写真 {}", "{}.5", "a -1 {}"])
def test_a_list_of_voc_names_pictures_and_may_have_a_column(name, column, tmp_path):
    draw(tmp_path / "JPEGImages", names=name + ".jpg")
    voc(tmp_path / "Annotations", file_name=name + ".jpg", names=name + ".xml")
    for part, numbers in {"train": (0, 1, 2, 3), "val": (4, 5)}.items():
        write(tmp_path / f"ImageSets/Main/{part}.txt", *each(name + column, numbers))
    folder = read_folder(tmp_path)
    assert [len(boxes_of(folder, part)) for part in ("train", "val")] == [4, 4]
    assert not any(split.problems for split in folder.splits.values())


@pytest.mark.parametrize(
    ("text", "crowd"), [("1", 1), ("True", 1), ("true", 1), ("0", 0), ("False", 0), ("", 0)]
)
def test_difficult_objects_are_crowds_however_it_is_written(text, crowd, tmp_path):
    draw(tmp_path / "JPEGImages")
    voc(
        tmp_path / "Annotations", edit=lambda xml: xml.replace("<difficult>0", f"<difficult>{text}")
    )
    content = read_folder(tmp_path).splits["train"].content
    assert [item["iscrowd"] for item in content["annotations"]] == [crowd] * 8


def test_corners_from_0_are_known_by_a_corner_of_0(tmp_path):
    """Of any part: 0 is no corner where they are counted from 1."""
    draw(tmp_path / "JPEGImages")
    voc(tmp_path / "Annotations", of_object=lambda item: voc_object(item, first=0))
    text = (tmp_path / "Annotations/5.xml").read_text()
    (tmp_path / "Annotations/5.xml").write_text(text.replace("<xmin>13<", "<xmin>0<"))
    expected = [list(map(float, item[1:])) for number in ALL for item in PICTURES[number].objects]
    expected[-1][0], expected[-1][2] = 0, 50
    assert sorted(boxes_of(read_folder(tmp_path))) == sorted(expected)


# What is left out of a part is named with its file and entry; the rest is read.


def a_bad_line_of_yolo(root):
    yolo_has_no_sizes(root)
    bad = "0 .3 .4 .2", "2 .3 .4 .2 .5", "0 a .4 .2 .5", "0 .3 nan .2 .5", "-1 .3 .4 .2 .5"
    write(root / "train/labels/1.txt", "1 .3 .4 .2 .5", *bad)
    return "1.txt", ("line 2", "line 3", "line 4", "line 5", "line 6")


def a_bad_object_of_voc(root):
    SIZED["voc"].build(root)
    more = "<object><name>dog</name></object><object><bndbox/></object>"
    text = (root / "annots/1.xml").read_text()
    (root / "annots/1.xml").write_text(text.replace("</annotation>", more + "</annotation>"))
    return "1.xml", ("'dog'",)


def a_bad_row_of_csv(root):
    draw(root / "images")
    lines = rows(ALL, plain_row, "{}.jpg,,,,,")
    bad = (
        "1.jpg,a,3,9,9,cat",
        "1.jpg,3,3,9,9,",
        "1.jpg,3,3,inf,9,cat",
        "9.jpg,3,3,9,9,cat",
        "1.jpg,3",
    )
    write(root / "labels.csv", *lines, *bad)
    return "labels.csv", ("line 10", "line 11", "line 12", "line 13", "line 14")


def a_bad_region_of_via(root):
    draw(root)
    entries = via(ALL)
    regions = entries["1.jpg601"]["regions"]
    regions.append(
        {"shape_attributes": {"name": "rect", "x": 3}, "region_attributes": {"name": "cat"}}
    )
    regions.append({"shape_attributes": regions[0]["shape_attributes"], "region_attributes": {}})
    write_json(root / "via_region_data.json", entries)
    return "via_region_data.json", ("1.jpg",)


def a_bad_box_of_cvat(root):
    draw(root / "images")
    bad = '<box label="cat" xtl="a" ytl="1" xbr="9" ybr="9"/><box label="dog" xtl="1" ytl="1"/>'
    text = cvat().replace("</image>", bad + "</image>", 1)
    write(root / "annotations.xml", text)
    return "annotations.xml", ("0.jpg",)


def a_bad_shape_of_labelme(root):
    draw(root)
    labelme(root)
    content = json.loads((root / "1.json").read_text())
    shapes = {"label": "cat", "points": [[1, 2]]}, {"points": [[1, 2], [9, 9]]}, {"label": "cat"}
    content["shapes"] += [shape | {"shape_type": "rectangle"} for shape in shapes]
    write_json(root / "1.json", content)
    return "1.json", ()


def a_bad_box_of_keras(root):
    LAYOUTS["keras_text_files"].build(root)
    text = (root / "train.txt").read_text().splitlines()
    text[1] += " 1,2,9,9,7 1,2,9 a,2,9,9,0"
    write(root / "train.txt", *text)
    return "train.txt", ("line 2",)


BAD = [
    a_bad_line_of_yolo,
    a_bad_object_of_voc,
    a_bad_row_of_csv,
    a_bad_region_of_via,
    a_bad_box_of_cvat,
    a_bad_shape_of_labelme,
    a_bad_box_of_keras,
]


@pytest.mark.parametrize("build", BAD, ids=lambda build: build.__name__)
def test_a_bad_entry_is_named_and_the_others_are_read(build, tmp_path):
    file, entries = build(tmp_path)
    folder = read_folder(tmp_path)
    problems = "\n".join(folder.splits["train"].problems)
    assert file in problems
    for entry in entries:
        assert entry in problems
    assert len(boxes_of(folder)) == (4 if file == "train.txt" else 8)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\0\1", b"{", b"<annotation>", b"\0" * 99])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("yolo_classes_txt_no_yaml", "labels/1.txt"),
        ("voc_annots_images", "annots/1.xml"),
        ("labelme_json_beside_images", "1.json"),
        ("cvat_xml", "annotations.xml"),
        ("via_json", "train/via_region_data.json"),
        ("csv_roboflow_and_retinanet", "train/_annotations.csv"),
        ("darknet_obj_data", "train.txt"),
        ("darknet_obj_data", "obj.names"),
        ("yolo_yaml_missing_valid", "data.yaml"),
        ("keras_text_files", "train.txt"),
        ("voc_annotations_lowercase", "ImageSets/Main/train.txt"),
    ],
)
def test_a_broken_file_is_named_or_refused(name, file, text, tmp_path):
    """An empty file of labels is a picture without objects, and no word need be lost on it."""
    LAYOUTS[name].build(tmp_path)
    whole = sum(len(PICTURES[n].objects) for part in LAYOUTS[name].parts.values() for n in part)
    (tmp_path / file).write_bytes(text)
    try:
        folder = read_folder(tmp_path)
    except ValueError as error:
        assert os.path.basename(file) in str(error) or str(tmp_path) in str(error)
        return
    found = sum(len(boxes_of(folder, part)) for part in folder.splits)
    if not text and file == "labels/1.txt" or "train" not in folder.splits or found == whole:
        return
    assert os.path.basename(file) in told(folder) or folder.splits["train"].problems


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_sizes_are_those_of_the_upright_picture_whatever_its_format(tmp_path, suffix, orientation):
    path = str(tmp_path / f"a{suffix}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    height, width = read_image(path).shape[:2]
    size = read_sizes([path])[path]
    assert size.upright == (width, height)
    assert size.orientation == orientation and size[:2] == (40, 20)
