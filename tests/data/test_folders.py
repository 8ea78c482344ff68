"""COCO, YOLO and Pascal VOC versions of one data set are one data set; and what can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from dataset_formats import write_voc, write_yolo
from PIL import Image

from stage_interactor.commands import main
from stage_interactor.data import load_coco_dataset
from stage_interactor.data.folders import read_folder, split_name, write_coco

NAMES = ["zebra", "ant", "cow"]
BOXES = [
    (0, [0, 0, 30, 20]),
    (2, [5, 7, 91, 33]),
    (1, [40.5, 20.25, 10.75, 9.5]),
    (2, [119, 79, 1, 1]),
    (0, [60, 0, 60, 80]),
]


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """One data set of 12 + 5 images as COCO, as YOLO and as VOC."""
    root = tmp_path_factory.mktemp("formats")
    coco = root / "coco"
    (coco / "annotations").mkdir(parents=True)
    for name, count in (("train", 12), ("val", 5)):
        (coco / name).mkdir()
        images, annotations = [], []
        for index in range(count):
            file_name = f"{name}_{index:02d}.png"
            colour = (index * 20, 9 * len(name), 77)
            Image.new("RGB", (120, 80), colour).save(coco / name / file_name)
            images.append({"id": index + 1, "file_name": file_name, "width": 120, "height": 80})
            for index_of_class, box in BOXES[: index % 6]:
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": index + 1, "bbox": box, "iscrowd": 0,
                     "category_id": 10 * (index_of_class + 1), "area": box[2] * box[3]}
                )  # fmt: skip
        categories = [{"id": 10 * (i + 1), "name": label} for i, label in enumerate(NAMES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (coco / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    json_files = {name: coco / f"annotations/instances_{name}.json" for name in ("train", "val")}
    image_root = {name: coco / name for name in json_files}
    for kind, write in (("yolo", write_yolo), ("voc", write_voc)):
        (root / kind).mkdir()
        write(json_files, image_root, root / kind)
    return root


def records(path, out):
    """What training gets, by image."""
    folder = read_folder(path)
    found = {}
    for name, json_file in write_coco(folder, out).items():
        split = folder.splits[name]
        assert not split.problems
        for record in load_coco_dataset(
            f"{folder.kind}_{name}", json_file, split.image_root, filter_empty=False
        ):
            stem = Path(record["file_name"]).stem[-2:]
            objects = [(a["category_id"], a["bbox"], a["iscrowd"]) for a in record["annotations"]]
            found[name, stem] = objects, record["height"], record["width"]
    return folder, found


@pytest.mark.parametrize(("kind", "called"), [("yolo", "YOLO"), ("voc", "Pascal VOC")])
def test_every_format_gives_the_same_annotations(formats, tmp_path, kind, called):
    coco, expected = records(formats / "coco", tmp_path / "coco")
    assert coco.kind == "COCO"
    folder, found = records(formats / kind, tmp_path / kind)
    assert folder.kind == called and folder.class_names == coco.class_names == NAMES
    assert sum(len(objects) for objects, _, _ in expected.values()) == 30 + 10
    assert found == expected


def test_the_file_itself_can_be_named(formats):
    assert read_folder(formats / "yolo/data.yaml").splits.keys() == {"train", "val"}
    found = read_folder(formats / "coco/annotations/instances_val.json")
    assert list(found.splits) == ["val"] and found.splits["val"].image_root.endswith("coco/val")


def test_voc_without_an_order_of_classes_is_sorted(formats, tmp_path):
    shutil.copytree(formats / "voc", tmp_path / "voc")
    (tmp_path / "voc/classes.txt").unlink()
    folder = read_folder(tmp_path / "voc")
    assert folder.class_names == sorted(NAMES) and any("alphabetical" in n for n in folder.notes)


def test_voc_corners_from_0_and_difficult_objects(formats, tmp_path):
    shutil.copytree(formats / "voc", tmp_path / "voc")
    path = tmp_path / "voc/Annotations/train_train_01.xml"
    text = path.read_text()
    text = text.replace("<xmin>1<", "<xmin>0<").replace("<ymin>1<", "<ymin>0<")
    path.write_text(text.replace("<difficult>0", "<difficult>1"))
    folder = read_folder(tmp_path / "voc")
    assert any("start at 0" in note for note in folder.notes)
    first = folder.splits["train"].content["annotations"][0]
    assert first["bbox"] == [0, 0, 30, 20] and first["iscrowd"] == 1


def test_roboflow_s_layouts(formats, tmp_path):
    """train/_annotations.coco.json; and ../train/images in a data.yaml beside train/."""
    for name, folder in (("train", "train"), ("val", "valid")):
        shutil.copytree(formats / "coco" / name, tmp_path / "coco" / folder)
        source = formats / f"coco/annotations/instances_{name}.json"
        shutil.copy(source, tmp_path / "coco" / folder / "_annotations.coco.json")
        for kind in ("images", "labels"):
            shutil.copytree(formats / "yolo" / kind / name, tmp_path / "yolo" / folder / kind)
    found = read_folder(tmp_path / "coco").splits
    assert [split.image_root for split in found.values()] == [
        str(tmp_path / "coco/train"),
        str(tmp_path / "coco/valid"),
    ]
    content = dict(train="../train/images", val="../valid/images", names=dict(enumerate(NAMES)))
    (tmp_path / "yolo/data.yaml").write_text(yaml.safe_dump(content))
    splits = read_folder(tmp_path / "yolo").splits
    assert [len(splits[name].content["annotations"]) for name in ("train", "val")] == [30, 10]


@pytest.mark.parametrize(
    ("text", "name"),
    [("instances_train2017", "train"), ("valid", "val"), ("my-Test", "test"), ("trains", None)],
)
def test_names_of_parts(text, name):
    assert split_name(text) == name


def test_yolo_s_problems_are_named_and_left_out(formats, tmp_path, capsys):
    shutil.copytree(formats / "yolo", tmp_path / "yolo")
    labels = tmp_path / "yolo/labels/train"
    lines = "0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n1 0.5 0.5\nx y\n2 .1 .1 .5 .1 .5 .75 .1 .75\n"
    (labels / "train_00.txt").write_text(lines)
    (tmp_path / "yolo/images/train/train_01.png").write_bytes(b"no image")
    split = read_folder(tmp_path / "yolo").splits["train"]
    first = [a for a in split.content["annotations"] if a["image_id"] == 1]
    assert [a["bbox"] for a in first] == [[48, 32, 24, 16], [12, 8, 48, 52]]
    assert len(split.content["images"]) == 11
    problems = "\n".join(split.problems)
    for text in (
        "train_00.txt, line 2: class 7, but there are 3 classes",
        "line 3: 2 numbers after the class; a box has 4",
        "line 4: not numbers: 'x y'",
        "train_01.png cannot be read as an image",
    ):
        assert text in problems
    assert main(["data", "check", str(tmp_path / "yolo")]) == 1
    assert "Error in train: " in capsys.readouterr().out


def test_voc_s_problems_are_named_and_left_out(formats, tmp_path):
    shutil.copytree(formats / "voc", tmp_path / "voc")
    xml = tmp_path / "voc/Annotations"
    (xml / "train_train_05.xml").write_text("<annotation>")
    (xml / "train_train_04.xml").unlink()
    (tmp_path / "voc/JPEGImages/train_train_03.png").unlink()
    text = (xml / "train_train_02.xml").read_text()
    (xml / "train_train_02.xml").write_text(text.replace("<xmin>1<", "<xmin>one<", 1))
    problems = "\n".join(read_folder(tmp_path / "voc").splits["train"].problems)
    for text in (
        "train_train_05.xml is not XML",
        "train.txt: there is no train_train_04.xml",
        "train_train_03.xml: the picture 'train_train_03.png' is not below",
        "object 1, 'zebra', has no box of four numbers",
    ):
        assert text in problems


def test_what_is_no_data_set_is_refused(formats, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no data set that is known; it holds no files"):
        read_folder(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: images\n")
    with pytest.raises(ValueError, match="train: images is not there"):
        read_folder(tmp_path)
    (tmp_path / "data.yaml").write_text("names: 3\n")
    with pytest.raises(ValueError, match="'names' must be the list"):
        read_folder(tmp_path)
    shutil.copytree(formats / "voc", tmp_path / "voc")
    (tmp_path / "voc/classes.txt").write_text("ant\n")
    with pytest.raises(ValueError, match=r"lacks the classes \['cow', 'zebra'\]"):
        read_folder(tmp_path / "voc")


def test_a_sound_data_set_has_nothing_wrong(formats, capsys):
    assert main(["data", "check", str(formats / "yolo")]) == 0
    out = capsys.readouterr().out
    assert ": YOLO\n" in out and "Error" not in out
    # The box of one pixel is what is there to be warned of.
    assert out.count("Warning") == 6 and "less than 2 pixels wide" in out
    assert "few objects: 6 of 'ant'" in out and "not used" not in out
    for row in (["zebra", "12", "4"], ["all", "30", "10"], ["images", "12", "5"]):
        assert row in [line.split() for line in out.splitlines()]


def test_what_is_wrong_in_coco_is_found(formats, tmp_path, capsys):
    root = tmp_path / "coco"
    shutil.copytree(formats / "coco", root)
    path = root / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    boxes = [[0, 0, 0, 5], [200, 1, 5, 5], [-20, 0, 30, 5], [0, 0, 120, 3], [0, 0, 30, 20]]
    content["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 10, "bbox": box, "area": 1, "iscrowd": 0}
        for i, box in enumerate([*boxes, [0, 0, 30, 20]])
    ]
    content["images"][1]["width"] = 99
    content["annotations"].append(content["annotations"][4] | {"id": 99, "image_id": 2})
    path.write_text(json.dumps(content))
    (root / "train/train_05.png").unlink()
    (root / "train/train_06.png").write_bytes((root / "train/train_07.png").read_bytes()[:60])
    shutil.copy(root / "train/train_08.png", root / "val/val_00.png")
    assert main(["data", "check", str(root), "--all"]) == 1
    out = capsys.readouterr().out
    for text in (
        "annotation 0: box [0, 0, 0, 5] (x, y, w, h) has no width or height",
        "annotation 1: box [200, 1, 5, 5] (x, y, w, h) lies outside of its image",
        "annotation 2: box [-20, 0, 30, 5] (x, y, w, h) leaves its image",
        "annotation 3: box [0, 0, 120, 3] (x, y, w, h) is more than 30 times as long as wide",
        "annotation 4 and annotation 5 are nearly the same box",
        "train_01.png is 120 x 80 pixels",
        "says 99 x 80",
        "the picture 'train_05.png' is not below",
        "train_06.png cannot be read",
        "val_00.png (val) is the same picture as",
        "Warning in train: no object of the classes ['ant', 'cow']",
    ):
        assert text in out
    path.write_text(path.read_text().replace('"category_id": 10', '"category_id": 11', 1))
    assert main(["data", "check", str(root)]) == 1
    assert "category_id 11, which is not in 'categories'" in capsys.readouterr().out


def test_conversion_to_coco(formats, tmp_path, capsys):
    assert main(["data", "convert", str(formats / "voc"), str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out/train.json").read_text())
    assert [c["name"] for c in content["categories"]] == NAMES
    assert "images in" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_a_page_of_what_training_gets(formats, tmp_path, kind, capsys):
    output = tmp_path / "page.html"
    arguments = ["data", "view", str(formats / kind), "--output", str(output), "--pictures", "3"]
    assert main([*arguments, "--config-file", "configs/custom/nano.py"]) == 0
    text = output.read_text()
    assert text.count("data:image/jpeg") == 3 and text.count("objects, ") == 6  # alt and caption
    for part in ("RandomFlip", "Objects by class, val", "<b>12</b><span>images in train</span>",
                 "less than 2 pixels wide"):  # fmt: skip
        assert part in text
    assert capsys.readouterr().out == f"Wrote {output}\n"


def test_voc_with_a_folder_for_each_part(formats, tmp_path):
    for name, part in (("train", "train"), ("test", "val")):
        for folder in ("Annotations", "JPEGImages"):
            (tmp_path / "voc" / name / folder).mkdir(parents=True)
            for path in (formats / "voc" / folder).glob(f"{part}_*"):
                shutil.copy(path, tmp_path / "voc" / name / folder)
    splits = read_folder(tmp_path / "voc").splits
    assert {name: len(s.content["images"]) for name, s in splits.items()} == {
        "train": 12,
        "test": 5,
    }
    (tmp_path / "voc/test").rename(tmp_path / "voc/VOC2012")
    with pytest.raises(ValueError, match="holds several data sets, .*VOC2012"):
        read_folder(tmp_path / "voc")


def test_voc_s_trainval_without_train(formats, tmp_path):
    shutil.copytree(formats / "voc", tmp_path / "voc")
    sets = tmp_path / "voc/ImageSets/Main"
    both = (sets / "train.txt").read_text() + "\n" + (sets / "val.txt").read_text()
    (sets / "trainval.txt").write_text(both)
    (sets / "train.txt").unlink()
    splits = read_folder(tmp_path / "voc").splits
    assert [len(splits[name].content["images"]) for name in ("train", "val")] == [12, 5]


def test_yolo_s_names_keypoints_and_numbers(formats, tmp_path):
    shutil.copytree(formats / "yolo", tmp_path / "yolo")
    description = tmp_path / "yolo/data.yaml"
    content = yaml.safe_load(description.read_text())
    description.write_text(yaml.safe_dump(content | {"names": {1: "a", 2: "b"}}))
    with pytest.raises(ValueError, match="the keys of 'names' must be 0, 1, ..., got"):
        read_folder(tmp_path / "yolo")
    description.write_text(yaml.safe_dump(content | {"names": ["a", "b", "a"]}))
    with pytest.raises(ValueError, match="data.yaml: several classes have the name 'a'"):
        read_folder(tmp_path / "yolo")
    description.write_text(yaml.safe_dump(content | {"kpt_shape": [2, 2]}))
    label = tmp_path / "yolo/labels/train/train_00.txt"
    label.write_text("0 .5 .5 .2 .2 .1 .1 .9 .9\n1 inf .5 .2 .2\n")
    (tmp_path / "yolo/labels/train/train_01.txt").write_bytes(b"0 .5\x80")
    split = read_folder(tmp_path / "yolo").splits["train"]
    first = [a["bbox"] for a in split.content["annotations"] if a["image_id"] == 1]
    assert first == [[48, 32, 24, 16]]
    assert "line 2: not finite" in split.problems[0]
    assert "train_01.txt is no text in UTF-8" in split.problems[1]


def test_classes_go_by_the_order_of_their_ids(formats, tmp_path):
    shutil.copytree(formats / "coco", tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["categories"].reverse()
    path.write_text(json.dumps(content))
    assert read_folder(path).class_names == NAMES
    assert main(["data", "check", str(tmp_path / "coco")]) == 0


def test_what_stops_an_evaluation_is_found(formats, tmp_path, capsys):
    shutil.copytree(formats / "coco", tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val.json"
    content = json.loads(path.read_text())
    del content["annotations"][3]["category_id"]
    path.write_text(json.dumps(content))
    assert main(["data", "check", str(tmp_path / "coco")]) == 1
    assert "annotations[3] has no 'category_id'" in capsys.readouterr().out


def test_files_are_not_overwritten(formats, tmp_path, capsys):
    (tmp_path / "train.json").write_text("mine")
    assert main(["data", "convert", str(formats / "voc"), str(tmp_path)]) == 2
    assert "train.json is there already" in capsys.readouterr().err
    assert (tmp_path / "train.json").read_text() == "mine"
