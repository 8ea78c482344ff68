"""Every layout that data sets are kept in is read as what it is, or refused; nothing is lost."""

import shutil
from pathlib import Path

import pytest
from layout_variants import VARIANTS
from layouts import (
    ALL,
    CLASSES,
    OFTEN_MET,
    ONE,
    PICTURES,
    TWO,
    Layout,
    coco,
    draw,
    each,
    list_sets,
    voc,
    write,
    write_json,
    yolo,
    yolo_parts,
)
from PIL import Image

from stage_interactor.data.folders import DataFolder, read_folder

LAYOUTS = OFTEN_MET.found | VARIANTS.found
TOLERANCE = 0.51  # pixels: a tool may count them from 1, or round
SIZES = [picture.size for picture in PICTURES]


def told(folder: DataFolder) -> str:
    """Without the folder of the test, in whose name there are words too."""
    text = "\n".join(folder.notes + problems(folder))
    return text.replace(str(Path(folder.path).absolute().parent), "")


def problems(folder: DataFolder) -> list[str]:
    return [problem for split in folder.splits.values() for problem in split.problems]


def objects_by_picture(split, *, one_class=False) -> dict[int, list[tuple]]:
    """By number of the picture, which its file's size tells: names and boxes, in order."""
    names = {category["id"]: category["name"] for category in split.content["categories"]}
    assert one_class or set(CLASSES) <= set(split.class_names)
    by_image = {image["id"]: [] for image in split.content["images"]}
    for item in split.content["annotations"]:
        name = "" if one_class else names[item["category_id"]]
        by_image[item["image_id"]].append((name, *item["bbox"]))
        assert not item["iscrowd"] and item["area"] > 0
    assert sum(split.count_objects().values()) == len(split.content["annotations"])
    found = {}
    for image in split.content["images"]:
        path = Path(split.image_root, image["file_name"])
        with Image.open(path) as picture:
            assert picture.size == (image["width"], image["height"])
            found[SIZES.index(picture.size)] = sorted(by_image[image["id"]])
    assert len(found) == len(split.content["images"]), "a picture is listed twice"
    return found


def check(folder: DataFolder, layout: Layout) -> None:
    assert folder.kind == layout.kind
    assert {name: len(split.content["images"]) for name, split in folder.splits.items()} == {
        name: len(numbers) for name, numbers in layout.parts.items()
    }
    for name, numbers in layout.parts.items():
        found = objects_by_picture(folder.splits[name], one_class=layout.one_class)
        assert sorted(found) == list(numbers)
        for number in numbers:
            truth = sorted(
                ("" if layout.one_class else item.name, *item[1:])
                for item in PICTURES[number].objects
            )
            assert [item[0] for item in found[number]] == [item[0] for item in truth]
            for box, expected in zip(found[number], truth):
                assert box[1:] == pytest.approx(expected[1:], abs=TOLERANCE), f"number {number}"
    for text in layout.told:
        assert text in told(folder)
    assert layout.told or not problems(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_what_it_is(name, tmp_path):
    layout = LAYOUTS[name]
    root = tmp_path / "data"
    layout.build(root)
    try:
        folder = read_folder(root / layout.at)
    except ValueError as error:
        assert layout.or_told, error
        assert str(root) in str(error)
        return
    if not (layout.or_told and problems(folder)):
        check(folder, layout)


# What a layout may look like besides; none of it changes what is read.


def texts(root: Path) -> list[Path]:
    suffixes = {".txt", ".json", ".csv", ".yaml", ".xml", ".names", ".data", ".labels"}
    return [path for path in sorted(root.rglob("*")) if path.suffix in suffixes]


def with_byte_order_marks(root: Path) -> Path:
    """As Notepad saves text."""
    for path in texts(root):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return root


def with_ends_of_lines_of_windows(root: Path) -> Path:
    for path in texts(root):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return root


def without_the_last_end_of_line(root: Path) -> Path:
    for path in texts(root):
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    return root


def two_folders_down(root: Path) -> Path:
    outer = root.parent / "outer"
    (outer / "archive").mkdir(parents=True)
    root.rename(outer / "archive/pets")
    return outer


def below_folders_of_names_that_mean_something(root: Path) -> Path:
    place = root.parent / "images/val/labels"
    place.mkdir(parents=True)
    return root.rename(place / "pets")


def with_spaces_and_other_letters_in_its_path(root: Path) -> Path:
    place = root.parent / "мои данные [1] 100%"
    place.mkdir()
    return root.rename(place / "写真 #2 {a}")


def by_a_link(root: Path) -> Path:
    link = root.parent / "link"
    link.symlink_to(root, target_is_directory=True)
    return link


def by_a_relative_path(root: Path) -> Path:
    return Path("data")


def with_what_systems_leave(root: Path) -> Path:
    """Of macOS, Windows and Jupyter; and texts that are about the data."""
    for folder in {path.parent for path in root.rglob("*") if path.is_file()}:
        write(folder / ".DS_Store", "\0")
        write(folder / "Thumbs.db", "\0")
        write(folder / "desktop.ini", "[ViewState]")
        write(root / "__MACOSX" / folder.relative_to(root) / "._0.jpg", "\0\5\26\7")
        draw(folder / ".ipynb_checkpoints", (1,), "{}-checkpoint.jpg")
    write(root / "README.md", "# Pets", "train: 4 pictures")
    write(root / "README.dataset.txt", "pets > 2023-01-02", "https://example.org/pets")
    write(root / "requirements.txt", "torch>=2", "numpy")
    return root


def with_files_of_other_programs(root: Path) -> Path:
    write(root / "pipeline.yaml", "steps: [", "\t- {")
    write(root / "compose.yml", "services: {web: {image: x}}")
    write(root / "package.json", '{"name": "pets", "files": []}')
    write(root / "tsconfig.json", "{", "  // a comment", "}")
    write(root / "pom.xml", "<project><name>pets</name></project>")
    write(root / "results.csv", "epoch,loss", "1,2.5")
    return root


DISGUISES = [
    with_byte_order_marks,
    with_ends_of_lines_of_windows,
    without_the_last_end_of_line,
    two_folders_down,
    below_folders_of_names_that_mean_something,
    with_spaces_and_other_letters_in_its_path,
    by_a_link,
    by_a_relative_path,
    with_what_systems_leave,
    with_files_of_other_programs,
]


@pytest.mark.parametrize("name", OFTEN_MET.found)
@pytest.mark.parametrize("disguise", DISGUISES, ids=lambda disguise: disguise.__name__)
def test_a_layout_is_read_whatever_it_looks_like_besides(disguise, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LAYOUTS[name].build(tmp_path / "data")
    check(read_folder(disguise(tmp_path / "data")), LAYOUTS[name])


# What could be meant in two ways is refused, and both are named.


def one_name_of_a_json_fits_two_pictures(root):
    for folder in ("farm", "street"):
        draw(root / folder)
    write_json(root / "annotations.json", coco())
    return "farm", "street"


def one_name_of_a_csv_fits_two_pictures(root):
    for folder in ("farm", "street"):
        draw(root / folder)
    write(root / "labels.csv", *each("{}.jpg,1,2,9,9,cat", ALL))
    return "farm", "street"


def one_xml_fits_two_pictures(root):
    for folder in ("farm", "street"):
        draw(root / folder)
    voc(root / "Annotations")
    return "farm", "street"


def an_xml_without_a_file_name_fits_two_suffixes(root):
    for suffix in ("jpg", "png"):
        draw(root / "JPEGImages", names="{}." + suffix)
    voc(root / "Annotations", edit=lambda text: text.replace("filename>", "x>"))
    return "0.jpg", "0.png"


def two_yolo_data_sets_side_by_side(root):
    for name in ("farm", "street"):
        yolo_parts(root / name, TWO, "{kind}/{part}")
        lines = "train: images/train", "val: images/val", "names: [cat, dog]"
        write(root / name / "data.yaml", *lines)
    return "farm", "street"


def two_voc_data_sets_side_by_side(root):
    for name in ("VOC2007", "VOC2012"):
        draw(root / "VOCdevkit" / name / "JPEGImages")
        voc(root / "VOCdevkit" / name / "Annotations")
        list_sets(root / "VOCdevkit" / name, TWO)
    return "VOC2007", "VOC2012"


def data_sets_of_two_kinds_side_by_side(root):
    draw(root / "farm/images")
    write_json(root / "farm/annotations.json", coco())
    draw(root / "street/JPEGImages")
    voc(root / "street/Annotations")
    return "farm", "street"


def two_yamls_of_other_pictures(root):
    for name in ("farm", "street"):
        yolo_parts(root / name, ONE)
        write(root / f"{name}.yaml", f"train: {name}/train/images", "names: [cat, dog]")
    return "farm.yaml", "street.yaml"


def two_jsons_that_are_both_train(root):
    draw(root / "images")
    for name, numbers in (("train", (0, 1, 3)), ("train_old", (0, 1)), ("val", (4,))):
        write_json(root / f"annotations/{name}.json", coco(numbers))
    return "train.json", "train_old.json"


def two_jsons_of_no_part(root):
    draw(root / "images")
    for name, numbers in (("first", (0, 1, 3)), ("second", (4, 5))):
        write_json(root / f"annotations/{name}.json", coco(numbers))
    return "first.json", "second.json"


AMBIGUOUS = [
    one_name_of_a_json_fits_two_pictures,
    one_name_of_a_csv_fits_two_pictures,
    one_xml_fits_two_pictures,
    an_xml_without_a_file_name_fits_two_suffixes,
    two_yolo_data_sets_side_by_side,
    two_voc_data_sets_side_by_side,
    data_sets_of_two_kinds_side_by_side,
    two_yamls_of_other_pictures,
    two_jsons_that_are_both_train,
    two_jsons_of_no_part,
]


@pytest.mark.parametrize("build", AMBIGUOUS, ids=lambda build: build.__name__)
def test_what_has_two_meanings_is_refused_and_both_are_named(build, tmp_path):
    both = build(tmp_path / "data")
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path / "data")
    for text in both:
        assert text in str(error.value)


def test_one_of_two_data_sets_can_be_named(tmp_path):
    two_yolo_data_sets_side_by_side(tmp_path)
    check(read_folder(tmp_path / "street"), Layout(print, "YOLO", TWO))


def test_pictures_and_annotations_can_be_named_where_they_are_not_found(tmp_path):
    one_name_of_a_json_fits_two_pictures(tmp_path)
    shutil.move(tmp_path / "annotations.json", tmp_path / "of last year.json")
    folder = read_folder(
        tmp_path, images=tmp_path / "street", annotations=tmp_path / "of last year.json"
    )
    check(folder, Layout(print, "COCO", ONE))
    assert Path(folder.splits["train"].image_root).resolve() == tmp_path / "street"


@pytest.mark.parametrize(("name", "kind"), [("coco", "COCO"), ("yolo", "YOLO")])
def test_the_kind_can_be_named_where_there_are_two(name, kind, tmp_path):
    OFTEN_MET.found["coco_json_beside_images_folder"].build(tmp_path)
    write(tmp_path / "data.yaml", "train: train/images", "val: valid/images", "names: [cat, dog]")
    check(read_folder(tmp_path, format=name), Layout(print, kind, TWO))


def test_an_image_of_a_list_that_is_not_there_is_told(tmp_path):
    draw(tmp_path / "images", (0, 1, 2))
    yolo(tmp_path / "labels", (0, 1, 2))
    write(tmp_path / "train.txt", *each("images/{}.jpg", (0, 1, 2, 3)))
    write(tmp_path / "data.yaml", "train: train.txt", "names: [cat, dog]")
    folder = read_folder(tmp_path)
    assert len(folder.splits["train"].content["images"]) == 3
    assert "3.jpg" in told(folder)
