"""Several data sets as one."""

import json

import pytest
from PIL import Image

from stage_interactor.commands import main
from stage_interactor.data import load_coco_dataset
from stage_interactor.data.folders import read_folder
from stage_interactor.data.joining import join_folders, read_folders
from stage_interactor.engine.presets import fit_to_data


def write(folder, classes, splits, size=(40, 30), objects=(0,)):
    """COCO files of a folder; object i of a class at (i, i)."""
    for part, number in splits.items():
        (folder / part).mkdir(parents=True)
        images, annotations = [], []
        for index in range(number):
            Image.new("RGB", size, (index, 0, 0)).save(folder / part / f"{index}.png")
            images.append(
                {"id": index, "file_name": f"{index}.png", "width": size[0], "height": size[1]}
            )
            for position in objects:
                annotations.append(
                    {
                        "id": len(annotations), "image_id": index, "iscrowd": 0, "area": 25,
                        "category_id": 7 + position % len(classes),
                        "bbox": [position, position, 5, 5],
                    }
                )  # fmt: skip
        categories = [{"id": 7 + i, "name": name} for i, name in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / part / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def two(tmp_path):
    cells = write(
        tmp_path / "a" / "cells", ["red", "white"], {"train": 4, "valid": 2}, objects=(0, 1)
    )
    more = write(tmp_path / "more", ["blue", "white"], {"train": 8}, (50, 60), objects=(0, 1, 3))
    return cells, more


def objects(split):
    """Of each picture by its path, names and boxes."""
    names = {item["id"]: item["name"] for item in split.content["categories"]}
    paths = {i["id"]: f"{split.image_root}/{i['file_name']}" for i in split.content["images"]}
    found = {path: [] for path in paths.values()}
    for item in split.content["annotations"]:
        found[paths[item["image_id"]]].append((names[item["category_id"]], tuple(item["bbox"])))
    return found


def test_classes_are_joined_by_name_and_objects_stay_what_they_were(two):
    folders = [read_folder(path) for path in two]
    joined = join_folders(folders)
    assert joined.class_names == ["red", "white", "blue"]
    assert [len(joined.splits[part].content["images"]) for part in ("train", "val")] == [10, 4]
    expected = {}
    for folder in folders:
        for split in folder.splits.values():
            expected |= objects(split)
    found = objects(joined.splits["train"]) | objects(joined.splits["val"])
    assert found == expected
    for split in joined.splits.values():
        for key in ("images", "annotations"):
            ids = [item["id"] for item in split.content[key]]
            assert ids == list(range(1, len(ids) + 1))


def test_what_the_others_lack_is_told(two):
    told = " ".join(read_folders(two).notes)
    assert f"{two[0]} does not have the classes blue: such objects" in told
    assert f"{two[1]} does not have the classes red: such objects" in told
    assert f"{two[1]} has no 'val': 2 of its images are held out" in told


def test_names_that_are_nearly_equal_are_told(two):
    first, second = map(read_folder, two)
    assert "are different classes" not in " ".join(join_folders([first, second]).notes)
    for split in second.splits.values():
        for category in split.content["categories"]:
            category["name"] = {"white": "White "}.get(category["name"], category["name"])
    joined = join_folders([first, second])
    assert len(joined.class_names) == 4
    assert "'white', 'White ' are different classes: only names" in " ".join(joined.notes)


def test_pictures_that_several_have_are_told(two):
    assert "8 pictures of train" not in " ".join(read_folders(two).notes)
    whole = [read_folder(two[1]), read_folder(two[1])]
    notes = " ".join(join_folders(whole, evaluated=False).notes)
    assert "8 pictures of train are in more than one of the data sets" in notes


def test_one_data_set_stays_as_it_is(two):
    folder = read_folder(two[1])
    assert join_folders([folder]) is folder and list(folder.splits) == ["train"]


@pytest.mark.parametrize(
    ("weights", "told"),
    [([1.0], "1 weights .* for 2 data sets"), ([1.0, 0.0], "more than 0, got 0"),
     ([1.0, float("nan")], "more than 0, got nan"), ([float("inf"), 1.0], "more than 0, got inf")],
)  # fmt: skip
def test_weights_that_make_no_sense_are_told(two, weights, told):
    with pytest.raises(ValueError, match=told):
        read_folders(two, weights)


def test_what_is_for_one_data_set_is_told(two):
    with pytest.raises(ValueError, match="--format: for one data set, not for 2"):
        read_folders(two, format="coco")


def test_weights_reach_the_records_of_a_training(two, tmp_path):
    fitted = fit_to_data(
        two, preset="nano", output_dir=tmp_path / "out", weights=[2.0, 0.5], dry_run=True
    )
    values = dict(line.partition("=")[::2] for line in fitted.overrides)
    assert values["data.name"].strip("'") == "cells+more"
    root = values["data.image_root"].strip("'")
    train = load_coco_dataset("joined_t", values["data.train_json"].strip("'"), root)
    weights = {record["file_name"]: record["sampling_weight"] for record in train}
    assert len(weights) == 10
    assert all(weight == (2.0 if "cells" in path else 0.5) for path, weight in weights.items())
    val = load_coco_dataset("joined_v", values["data.val_json"].strip("'"), root, is_train=False)
    assert len(val) == 4 and not any("sampling_weight" in record for record in val)


@pytest.mark.parametrize("weight", ["2", True, 0, -1, [1]])
def test_a_weight_in_a_file_that_is_none_is_told(two, weight):
    path = two[0] / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["images"][2]["sampling_weight"] = weight
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[2\].sampling_weight is .* more than 0"):
        read_folder(two[0])


def test_the_commands_take_several(two, tmp_path, capsys):
    paths = [str(path) for path in two]
    assert main(["data", "check", *paths, "--no-decode"]) in (0, 1)
    assert "blue" in capsys.readouterr().out
    assert main(["data", "convert", *paths, str(tmp_path / "joined")]) == 0
    content = json.loads((tmp_path / "joined" / "train.json").read_text())
    assert len(content["images"]) == 10
    options = ["--preset", "nano", "--dry-run", "--output-dir", str(tmp_path / "out")]
    assert main(["train", *paths, *options, "--weights", "1,3"]) == 0
    out = capsys.readouterr().out
    assert "data.name=cells+more" in out
    assert main(["train", *paths, *options, "--weights", "1,3,4"]) == 2
    assert "3 weights (--weights) for 2 data sets" in capsys.readouterr().err
    assert main(["train", "quickstart.py", paths[0]]) == 2
    assert "name data sets, or one config" in capsys.readouterr().err
