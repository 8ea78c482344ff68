"""A data set from anywhere is read right, or refused in a line; it reaches nothing but itself."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hostile_data import FORMATS, LAUGHS, YAML_LAUGHS, leading_out, mutated
from PIL import Image

from stage_interactor.commands import main
from stage_interactor.data.check import check_folder
from stage_interactor.data.coco import load_coco_dataset
from stage_interactor.data.folders import read_folder
from stage_interactor.data.formats.source import read_xml
from stage_interactor.pages import matching
from stage_interactor.pages.boxes import draw_boxes
from stage_interactor.untrusted.files import OutsideName, join_within, parse_yaml

SECONDS = 60
TINY = [
    "+model.backbone.channels=[16,16,16,16]", "+model.backbone.stem_width=8",
    "model.neck.in_channels=[16,16,16,16]", "model.queries.num_queries=8",
    "dataloader.train.mapper.augmentation.1.short_edge_length=[64]",
    "dataloader.test.mapper.augmentation.0.short_edge_length=[64]",
    "dataloader.train.num_workers=0", "dataloader.test.num_workers=0",
    "dataloader.train.total_batch_size=1", "train.max_iter=1", "train.eval_period=1",
    "train.log_period=1", "train.device=cpu", "train.amp.enabled=false",
]  # fmt: skip


def told(capsys, *arguments) -> tuple[int, str]:
    """The exit status of a command and what it said, without a stack trace."""
    start = time.process_time()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert time.process_time() - start < SECONDS
    assert "Traceback" not in err and "this is a bug" not in err, err
    assert status in (0, 1, 2)
    return status, out + err


@pytest.mark.cases(25)
def test_a_changed_data_set_is_read_or_refused_in_a_line(tmp_path, rng, cases, capsys):
    trained = 0
    for case in range(cases):
        root = tmp_path / str(case)
        name = mutated(root, rng)
        status, text = told(capsys, "data", "check", root)
        assert status == 0 or "Error" in text or str(root) in text, name
        if status == 0 and trained < max(cases // 10, 2):
            trained += 1
            out = tmp_path / f"run{case}"
            words = ("--preset", "nano", "--output-dir", out, *TINY)
            status, text = told(capsys, "train", root, *words)
            assert status == 0, f"{name}: {text[-500:]}"


WRITTEN = {
    "relative": lambda path: f"../elsewhere/{path.name}",
    "absolute": str,
    "from_inside": lambda path: f"sub/../../elsewhere/{path.name}",
    "of_windows": lambda path: f"..\\elsewhere\\{path.name}",
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_name_never_leads_out_of_the_data_set(tmp_path, kind, written):
    root, secret, name = leading_out(tmp_path, kind, WRITTEN[written])
    with pytest.raises(ValueError, match="leads outside of.*--allow-outside") as error:
        read_folder(root)
    assert name.replace("\\", "/") in str(error.value).replace("\\\\", "/")
    assert str(root) in str(error.value)
    folder = read_folder(root, allow_outside=True)
    read = {
        os.path.join(split.image_root, item["file_name"])
        for split in folder.splits.values()
        for item in split.content["images"]
    }
    assert {os.path.realpath(path) for path in read} == {str(root / "a.png"), str(secret)}
    assert any(f"outside of {root}" in note for note in folder.notes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "name",
    ["~root/x.png", "file:///etc/x.png", "%2e%2e/x.png", "http://127.0.0.1:9/x.png", "a\0b.png"],
)
def test_other_ways_to_write_a_place_are_names_like_all(tmp_path, kind, name):
    if "\0" in name and kind in ("voc", "cvat"):
        pytest.skip("XML has no NUL")
    root, _, _ = leading_out(tmp_path, kind, lambda path: name)
    try:
        folder = read_folder(root)
    except ValueError as error:
        assert str(root) in str(error)
    else:
        names = [item["file_name"] for item in folder.splits["train"].content["images"]]
        assert names == ["a.png"] and folder.splits["train"].problems


@pytest.mark.parametrize("key", ["train", "path", "names"])
def test_a_description_that_is_found_stays_inside_one_that_is_named_need_not(tmp_path, key):
    root, secret, _ = leading_out(tmp_path, "coco", str)
    (root / "train.json").unlink()
    (root / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (secret.parent / "classes.names").write_text("secret\n")
    content = {"train": ".", "names": "classes.txt", "path": "."}
    (root / "classes.txt").write_text("cat\n")
    content |= {
        "train": {"train": str(secret.parent)},
        "path": {"path": "../elsewhere"},
        "names": {"names": "../elsewhere/classes.names"},
    }[key]
    (root / "data.yaml").write_text("".join(f"{k}: {v}\n" for k, v in content.items()))
    try:
        found = read_folder(root)
    except ValueError as error:
        assert "leads outside of" in str(error)
    else:
        images = found.splits["train"].content["images"]
        assert [item["file_name"] for item in images] == ["a.png"]
        assert found.class_names == ["cat"]
    named = read_folder(root / "data.yaml")
    if key == "names":
        assert named.class_names == ["secret"]
    else:
        assert any(f"outside of {root}, such as {secret}" in note for note in named.notes)


def test_file_names_of_a_config_stay_in_its_folder_of_images(tmp_path):
    root, secret, name = leading_out(tmp_path, "coco", WRITTEN["relative"])
    files = str(root / "train.json"), str(root)
    with pytest.raises(OutsideName, match=f"{name}.*leads outside"):
        load_coco_dataset("outside", *files)
    records = load_coco_dataset("outside", *files, allow_outside=True)
    assert os.path.realpath(records[1]["file_name"]) == str(secret)
    content = json.loads((root / "train.json").read_text())
    (root / "sub").mkdir()
    os.symlink(secret, root / "linked.png")  # whoever made the folder may link what they like
    for inside in ("sub/../a.png", str(root / "a.png"), "linked.png"):
        content["images"][1]["file_name"] = inside
        (root / "train.json").write_text(json.dumps(content))
        path = load_coco_dataset("outside", *files)[1]["file_name"]
        assert Path(path).is_file() and ".." not in path


@pytest.mark.parametrize("name, inside", [
    ("a.png", True), ("a/b/../c.png", True), ("..a/x", True), ("a..", True), ("...", True),
    ("../x", False), ("a/../../x", False), ("/x", False), ("..", False), ("a/b/../../../x", False),
])  # fmt: skip
def test_which_names_lead_out_of_a_folder(tmp_path, name, inside):
    assert (join_within(str(tmp_path), name) is not None) == inside


def test_behind_a_link_two_points_are_the_folder_that_was_written(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "far/deep").mkdir(parents=True)
    os.symlink(tmp_path / "far/deep", tmp_path / "data/link")
    joined = join_within(str(tmp_path / "data"), "link/../x.png")
    assert joined == str(tmp_path / "data/x.png")


def two_pictures(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for name in "ab":
        Image.new("RGB", (40, 30)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "classes.txt").write_text("cat\n")


def test_folders_that_are_linked_in_circles_are_walked_once(tmp_path):
    two_pictures(tmp_path / "data")
    for name, target in (("self", "data"), ("above", "."), ("top", "/")):
        os.symlink(tmp_path / target, tmp_path / "data" / name)
    assert len(read_folder(tmp_path / "data").splits["train"].content["images"]) == 2


def test_folders_that_are_all_linked_to_one_another_are_refused(tmp_path):
    two_pictures(tmp_path / "data")
    folders = [tmp_path / f"data/f{n}" for n in range(12)]
    for folder in folders:
        folder.mkdir()
    for folder in folders:
        for other in folders:
            os.symlink(other, folder / f"to_{other.name}")
    with pytest.raises(ValueError, match="in very many ways: take the link away"):
        read_folder(tmp_path / "data")
    os.symlink("/proc/self", tmp_path / "data/kernel")
    with pytest.raises(ValueError, match="data/kernel leads to /proc/"):
        read_folder(tmp_path / "data")


@pytest.mark.parametrize("name, content, words", [
    ("data.yaml", YAML_LAUGHS + "train: .\nnames: *l\n", "aliases"),
    ("data.yaml", "train: .\nnames: &a [*a]\n", "aliases"),
    ("data.yaml", "train: .\nnames: " + "[" * 10_000, "recursion|nesting"),
    ("data.yaml", "train: .\nnames: [" + "cat, " * 10**6 + "dog]", "characters"),
    ("train.json", '{"images": ' + "[" * 10**6, "nested too deeply"),
    ("train.json", '{"images": [], "annotations": [], "categories": [{"id": 1'
     + "0" * 10**6 + "}]}", "not a JSON file"),
    ("a.xml", LAUGHS.decode() + "<annotation><filename>&j;</filename></annotation>", "entities"),
    ("a.xml", '<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;'
     "</filename></annotation>", "entities"),
])  # fmt: skip
def test_texts_that_explode_are_refused_by_name(tmp_path, name, content, words):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=words) as error:
        read_folder(tmp_path)
    assert name in str(error.value) and len(str(error.value)) < 2000
    assert time.process_time() - start < 20


def test_yaml_with_aliases_that_do_not_explode_is_read():
    assert parse_yaml("a: &a [x, y]\nb: *a\n", "f") == {"a": ["x", "y"], "b": ["x", "y"]}


@pytest.mark.parametrize(
    "name", ["classes.txt", "b.txt", "train.json", "data.yaml", "x.csv", "x.xml"]
)
def test_texts_that_would_be_waited_for_are_not(tmp_path, name, capsys):
    two_pictures(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    told(capsys, "data", "check", tmp_path)


@pytest.mark.parametrize("name", [b"\xff.png", b"\x1b[2J.png", b"a\nb.png"])
def test_names_that_are_no_text_are_told(tmp_path, name, capsys):
    two_pictures(tmp_path / "data")
    path = os.path.join(os.fsencode(tmp_path / "data"), name)
    with open(path, "wb") as file:
        file.write(b"no picture")
    with open(path[:-4] + b".txt", "w") as file:
        file.write("0 0.5 0.5 0.5 0.5\n")
    for words in (("check",), ("convert", tmp_path / "out")):
        status, text = told(capsys, "data", words[0], tmp_path / "data", *words[1:])
        assert status and "cannot be read as an image" in text and "\x1b" not in text


def test_names_of_classes_have_a_length(tmp_path, capsys):
    two_pictures(tmp_path)
    (tmp_path / "classes.txt").write_text("x" * 100_000)
    status, text = told(capsys, "data", "view", tmp_path, "--output", tmp_path / "view.html")
    assert status == 2 and "100,000 letters, more than 1,000" in text and len(text) < 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_annotations_declare_no_entities(tmp_path, encoding):
    declared = '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    (tmp_path / "a.xml").write_bytes(declared.encode(encoding))
    with pytest.raises(ValueError, match="declares entities"):
        read_xml(tmp_path / "a.xml")


def test_a_large_description_is_read_in_seconds():
    start = time.process_time()
    assert len(parse_yaml(f"[{'a,' * 500_000}a]", "x")) == 500_001
    assert time.process_time() - start < 15
    with pytest.raises(ValueError, match="no.? YAML|not a YAML"):
        parse_yaml("[" * 100_000, "x")


# 20,000 boxes in a picture.


def crowded(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4), xyxy, of a picture of 1000 pixels; and classes."""
    generator = np.random.default_rng(0)
    corner, size = generator.uniform(0, 900, (count, 2)), generator.uniform(3, 60, (count, 2))
    return np.concatenate([corner, corner + size], axis=1), np.zeros(count, dtype=int)


def test_pairs_of_boxes_are_compared_a_part_at_a_time(monkeypatch):
    boxes, classes = crowded(700)
    images = [{"id": 1, "file_name": "a.png"}]
    items = [
        {"image_id": 1, "category_id": 1, "bbox": [x, y, z - x, t - y], "iscrowd": n % 5 == 0}
        for n, (x, y, z, t) in enumerate(boxes.tolist())
    ]
    truth = {"images": images, "annotations": items, "categories": [{"id": 1, "name": "cat"}]}
    found = [{**item, "score": 0.9} for item in items]
    (at_once,) = matching.match_images(truth, found, 0.5)
    compared = []
    iou = matching.box_iou

    def watched(first, second):
        compared.append(len(first) * len(second))
        return iou(first, second)

    monkeypatch.setattr(matching, "box_iou", watched)
    monkeypatch.setattr(matching, "_MOST_PAIRS", 10_000)
    (in_parts,) = matching.match_images(truth, found, 0.5)
    assert len(compared) > 30 and max(compared) <= 10_000
    assert np.array_equal(at_once.object_of, in_parts.object_of)
    assert np.array_equal(
        matching.confusion_matrix([at_once], 1), matching.confusion_matrix([in_parts], 1)
    )


def test_of_many_boxes_the_largest_have_names_and_all_are_drawn():
    boxes, classes = crowded(5000)
    start = time.process_time()
    drawn = draw_boxes(np.zeros((1000, 1000, 3), np.uint8), boxes, classes, class_names=["cat"])
    assert time.process_time() - start < SECONDS
    smallest = np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(1))[:50]
    assert all(drawn[int(y), int(x)].any() for x, y, _, _ in boxes[smallest])


def test_equal_boxes_are_told_by_number(tmp_path):
    count = 3000
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    boxes = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30]}
        for n in range(1, count + 1)
    ]
    images = [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    warnings = check_folder(read_folder(tmp_path)).warnings["train"]
    assert len(warnings) < 200 and "more pairs of boxes are nearly the same" in warnings[-1]
