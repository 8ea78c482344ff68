"""Where a guess could be wrong without anyone noticing, it is refused, or told."""

import json
import os
import shutil
import unicodedata

import pytest
from layouts import (
    ALL,
    CLASSES,
    OFTEN_MET,
    PICTURES,
    coco,
    draw,
    rows,
    voc,
    write,
    write_json,
    yolo,
)
from layouts import plain_row as corners_row
from PIL import Image

from stage_interactor.commands import main
from stage_interactor.data.folders import read_folder

NAMES = "names: [cat, dog]"


def pictures_of(folder, part="train"):
    split = folder.splits[part]
    return sorted(os.path.relpath(os.path.join(split.image_root, image["file_name"]),
                                  os.path.realpath(folder.path))
                  for image in split.content["images"])  # fmt: skip


def names_in(folder_name, numbers=ALL, suffix=".jpg"):
    return [f"{folder_name}/{number}{suffix}" for number in numbers]


def notes(folder):
    return "\n".join(folder.notes)


# Pictures of one name.


@pytest.mark.parametrize("masks", ["masks", "annotations/trimaps", "SegmentationClass", "vis",
                                   "my_masks", "thumbnails", "predictions"])  # fmt: skip
@pytest.mark.parametrize("written", ["{}", "{}.jpg", "old_{}"])
def test_masks_are_no_pictures(tmp_path, masks, written):
    draw(tmp_path / "images")
    draw(tmp_path / masks, names="{}.png")
    voc(tmp_path / "annotations/xmls", file_name=written)
    assert pictures_of(read_folder(tmp_path)) == names_in("images")


def test_masks_do_not_stand_in_for_pictures_that_are_missing(tmp_path):
    draw(tmp_path / "masks", names="{}.png")
    write_json(tmp_path / "train.json", coco())
    with pytest.raises(ValueError, match="0.jpg' is not below .*--images"):
        read_folder(tmp_path)
    write_json(tmp_path / "train.json", coco(names="masks/{}.png"))  # unless they are meant
    assert pictures_of(read_folder(tmp_path)) == names_in("masks", suffix=".png")


def test_another_suffix_is_told(tmp_path):
    draw(tmp_path / "images", names="{}.png")
    write_json(tmp_path / "annotations.json", coco())
    folder = read_folder(tmp_path)
    assert pictures_of(folder) == names_in("images", suffix=".png")
    assert "6 pictures have another suffix than is written (0.jpg is images/0.png, ...)" in notes(
        folder
    )


def test_pictures_of_another_part_are_never_taken(tmp_path):
    draw(tmp_path / "train/images")
    write_json(tmp_path / "train.json", coco(names="images/{}.jpg"))
    write_json(tmp_path / "val.json", coco((0, 1), names="images/{}.jpg"))
    with pytest.raises(ValueError, match="val.json: the picture 'images/0.jpg' is not below"):
        read_folder(tmp_path)
    write_json(tmp_path / "val.json", coco((0, 1), names="train/images/{}.jpg"))  # it says so
    folder = read_folder(tmp_path)
    assert "2 of the 2 pictures of val are in train as well" in notes(folder)


def test_letters_that_a_system_takes_apart_are_the_same(tmp_path):
    written = unicodedata.normalize("NFC", "é{}.jpg")
    draw(tmp_path / "images", names=unicodedata.normalize("NFD", written))
    write_json(tmp_path / "annotations.json", coco(names=written))
    assert len(pictures_of(read_folder(tmp_path))) == 6


def test_two_links_to_one_pool_are_both_followed(tmp_path):
    pool = tmp_path / "pool"
    draw(pool)
    (tmp_path / "data/images").mkdir(parents=True)
    for part, numbers in (("train", (0, 1, 2)), ("val", (3, 4))):
        (tmp_path / "data/images" / part).symlink_to(pool)
        write_json(tmp_path / f"data/annotations/{part}.json", coco(numbers))
    (pool / "back").symlink_to(tmp_path / "data")  # and where that leads round, not
    splits = read_folder(tmp_path / "data").splits
    assert [len(split.content["images"]) for split in splits.values()] == [3, 2]


# Labels of one name.


def test_masks_get_no_labels_of_pictures(tmp_path):
    draw(tmp_path / "images")
    draw(tmp_path / "masks")
    yolo(tmp_path / "labels")
    write(tmp_path / "classes.txt", *CLASSES)
    assert pictures_of(read_folder(tmp_path)) == names_in("images")


@pytest.mark.parametrize("description", [None, ("train: train", "val: val", NAMES)])
def test_a_label_file_of_two_pictures_is_refused(tmp_path, description):
    draw(tmp_path / "train")
    draw(tmp_path / "val")
    yolo(tmp_path / "labels")
    write(tmp_path / "classes.txt", *CLASSES)
    if description:
        write(tmp_path / "data.yaml", *description)
    with pytest.raises(ValueError, match="labels/0.txt could be of .*train/0.jpg and of .*val/0"):
        read_folder(tmp_path)


def test_two_pictures_of_one_label_file_in_a_folder_are_told(tmp_path):
    draw(tmp_path / "images")
    draw(tmp_path / "images", (3,), names="{}.png")
    yolo(tmp_path / "labels")
    write(tmp_path / "classes.txt", *CLASSES)
    split = read_folder(tmp_path).splits["train"]
    assert len(split.content["images"]) == 6
    (problem,) = split.problems
    assert "3.png: its labels, " in problem and "are those of" in problem


def test_keypoints_are_no_outlines(tmp_path):
    draw(tmp_path / "images", (0,))
    write(tmp_path / "labels/0.txt", "0 .5 .5 .2 .2 .45 .5 2 .55 .5 1 0 0 0")
    write(tmp_path / "classes.txt", *CLASSES)
    width, height = PICTURES[0].size
    (item,) = read_folder(tmp_path).splits["train"].content["annotations"]
    assert item["bbox"] == pytest.approx(
        [0.4 * width, 0.4 * height, 0.2 * width, 0.2 * height], abs=0.01
    )


def test_what_a_list_names_and_is_not_there_is_told(tmp_path):
    draw(tmp_path / "pool", (0, 1, 3))
    yolo(tmp_path / "pool", (0, 1, 3))
    write(tmp_path / "classes.txt", *CLASSES)
    write(tmp_path / "train.txt", *names_in("pool", (0, 1, 3, 7)))
    (problem,) = read_folder(tmp_path).splits["train"].problems
    assert "train.txt: the picture 'pool/7.jpg' is not below" in problem


# What a person says.


def test_images_that_a_person_names_come_before_those_of_a_description(tmp_path):
    for part in ("train", "val"):
        draw(tmp_path / "images" / part)
        draw(tmp_path / "large" / part, names="{}.png")
        yolo(tmp_path / "labels" / part)
    write(tmp_path / "data.yaml", "train: images/train", "val: images/val", NAMES)
    folder = read_folder(tmp_path, images=tmp_path / "large")
    for part in ("train", "val"):
        assert pictures_of(folder, part) == names_in(f"large/{part}", suffix=".png")
        assert len(folder.splits[part].content["annotations"]) == 8
    with pytest.raises(ValueError, match="no 'train': no picture is where data.yaml says"):
        read_folder(tmp_path, images=tmp_path / "labels")


def test_classes_beside_the_data_are_known_to_annotations_that_are_named(tmp_path):
    draw(tmp_path / "images")
    yolo(tmp_path / "labels", line=lambda item, size: "0 .5 .5 .1 .1")
    yolo(tmp_path / "corrected")
    write(tmp_path / "classes.txt", *CLASSES)
    folder = read_folder(tmp_path, annotations=tmp_path / "corrected")
    assert folder.splits["train"].count_objects() == {"cat": 4, "dog": 4}


def test_more_classes_than_names_are_told(tmp_path):
    draw(tmp_path / "images")
    yolo(tmp_path / "labels")
    write(tmp_path / "data.yaml", "train: images", "nc: 3", NAMES)
    assert "nc is '3', but there are 2 names" in notes(read_folder(tmp_path))


@pytest.mark.parametrize(
    ("train", "val", "count"), [("images", "images/val", 3), ("images/val", "images/val", 3)]
)
def test_pictures_that_two_parts_share_are_told(tmp_path, train, val, count, capsys):
    draw(tmp_path / "images/train", (0, 1, 2))
    draw(tmp_path / "images/val", (3, 4, 5))
    for part, numbers in (("train", (0, 1, 2)), ("val", (3, 4, 5))):
        yolo(tmp_path / "labels" / part, numbers)
    write(tmp_path / "data.yaml", f"train: {train}", f"val: {val}", NAMES)
    told = f"{count} of the 3 pictures of val are in train as well"
    assert told in notes(read_folder(tmp_path))
    arguments = ["train", str(tmp_path), "--preset", "nano", "--dry-run"]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out


# Tables.


def table(root, header, line, numbers=ALL):
    draw(root / "images")

    def row(number, picture, item):
        return line(number, *picture.size, *item)

    write(root / "boxes.csv", header, *rows(numbers, row))
    return read_folder(root)


def boxes(folder):
    return [item["bbox"] for item in folder.splits["train"].content["annotations"]]


EXPECTED = [list(item[1:]) for picture in PICTURES for item in picture.objects]


@pytest.mark.parametrize(
    ("header", "line", "told"),
    [
        ("image,class,x,y,width,height",
         lambda n, W, H, name, x, y, w, h: f"{n},{name},{x},{y},{w},{h}", "left upper corner"),
        ("image,class,x_center,y_center,w,h",
         lambda n, W, H, name, x, y, w, h: f"{n},{name},{x + w / 2},{y + h / 2},{w},{h}",
         "of the centre"),
        ("image,class,x,y,w,h",
         lambda n, W, H, name, x, y, w, h: f"{n},{name},{x / W},{y / H},{w / W},{h / H}",
         "in shares"),
        ("image,class,bbox",
         lambda n, W, H, name, x, y, w, h: f'{n},{name},"[{x}, {y}, {x + w}, {y + h}]"',
         "xmin, ymin, xmax, ymax"),
        ("image,class,bbox",
         lambda n, W, H, name, x, y, w, h: f'{n},{name},"({x} {y} {w} {h})"',
         "left upper corner"),
    ],
    ids=["corner", "centre", "shares", "corners", "box"],
)  # fmt: skip
def test_what_four_numbers_mean_is_found_and_told(tmp_path, header, line, told):
    folder = table(tmp_path, header, line)
    assert boxes(folder) == [pytest.approx(box, abs=0.01) for box in EXPECTED]
    assert told in notes(folder)


def test_a_table_of_all_beside_those_of_parts_is_not_read_twice(tmp_path):
    draw(tmp_path / "images")
    header = "filename,class,xmin,ymin,xmax,ymax"

    def row(number, picture, item):
        left, top, right, bottom = item.corners
        return f"{number}.jpg,{item.name},{left},{top},{right},{bottom}"

    for name, numbers in (("train_labels", (0, 1)), ("test_labels", (3, 4)), ("labels", ALL)):
        write(tmp_path / f"{name}.csv", header, *rows(numbers, row))
    folder = read_folder(tmp_path)
    counts = {name: len(split.content["images"]) for name, split in folder.splits.items()}
    assert counts == {"train": 2, "test": 2}
    assert "1 .csv (labels.csv)" in notes(folder)


def test_pictures_without_a_row_among_others_parts_are_none_without_objects(tmp_path):
    draw(tmp_path / "images")
    write(tmp_path / "train_labels.csv", "filename,class,xmin,ymin,xmax,ymax", "0.jpg,cat,1,2,9,9")
    folder = read_folder(tmp_path)
    assert pictures_of(folder) == ["images/0.jpg"] and "5 .jpg" in notes(folder)


def test_a_picture_whose_name_is_not_clear_is_not_one_without_objects(tmp_path):
    draw(tmp_path / "a", (0, 1))
    draw(tmp_path / "a/b", (0,))
    write(tmp_path / "a/labels.csv", *(f"{n}.jpg,1,2,9,9,cat" for n in (0, 1)))
    shutil.move(tmp_path / "a/labels.csv", tmp_path / "labels.csv")
    folder = read_folder(tmp_path)
    assert pictures_of(folder) == ["a/1.jpg"]
    assert "could be any of a/0.jpg, a/b/0.jpg" in folder.splits["train"].problems[0]


def test_a_table_of_masks_is_no_table_of_boxes(tmp_path):
    OFTEN_MET.found["coco_custom_json_names"].build(tmp_path)
    write(tmp_path / "masks.csv", "ImageId,EncodedPixels", f"0.jpg,{'1 2 ' * 50_000}")
    assert read_folder(tmp_path).kind == "COCO"


# Files that have nothing to do with it.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "tree\ncar"), ("labels.txt", "tree"), ("hparams.yaml", "names: [tree]"),
        ("results.csv", "image,x1,y1,x2,y2\n"), ("train_log.json", '{"loss": [1, 2]}'),
        ("config.json", "{"), ("model.yaml", "- [:"), ("notes.txt", "a.jpg 1,2,3,4,0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["yolo_yaml_absolute_path_of_another_machine",
                                    "coco_custom_json_names", "voc_annots_images"])  # fmt: skip
def test_a_stray_file_above_is_no_obstacle(tmp_path, layout, name, text):
    OFTEN_MET.found[layout].build(tmp_path / "deep/data")
    alone = read_folder(tmp_path / "deep/data")
    write(tmp_path / name, text)
    found = read_folder(tmp_path)
    assert found.kind == alone.kind
    counts = [{n: s.count_objects() for n, s in f.splits.items()} for f in (found, alone)]
    assert counts[0] == counts[1]


def test_a_folder_is_looked_at_anew_every_time(tmp_path):
    draw(tmp_path / "images")
    write(tmp_path / "data.yaml", "train: images", NAMES)
    with pytest.raises(ValueError, match="no picture of train has a label file; looked for in"):
        read_folder(tmp_path)
    yolo(tmp_path / "labels")
    assert len(boxes(read_folder(tmp_path))) == 8


@pytest.mark.parametrize("regions", ["null", "5", '"a"'])
def test_regions_that_are_none_are_refused(tmp_path, regions):
    draw(tmp_path / "train", (0,))
    text = f'{{"0.jpg1": {{"filename": "0.jpg", "size": 1, "regions": {regions}}}}}'
    write(tmp_path / "train/via_region_data.json", text)
    with pytest.raises(ValueError, match="is no data set that is known"):
        read_folder(tmp_path)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_picture_upside_down_is_told_as_its_size_tells_nothing(tmp_path, orientation):
    draw(tmp_path / "images")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", PICTURES[0].size).save(tmp_path / "images/0.jpg", exif=exif)
    write_json(tmp_path / "annotations.json", coco())
    assert "1 pictures are turned by their EXIF tag; boxes are taken" in notes(
        read_folder(tmp_path)
    )


def test_what_is_held_out_is_checked_before_it_is(tmp_path, capsys):
    draw(tmp_path / "images", (0, 1, 2, 3))
    content = coco((0, 1, 2, 3))
    content["annotations"] = content["annotations"][:1]
    write_json(tmp_path / "annotations.json", content)
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "Error: held out of train, val has no objects" in capsys.readouterr().out


def test_train_net_tells_what_is_wrong_with_data_in_a_line(tmp_path, monkeypatch, capsys):
    from stage_interactor.commands.train import train_net

    draw(tmp_path / "images")
    content = coco()
    content["categories"][1]["name"] = content["categories"][0]["name"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    overrides = [f"data.{part}_json={tmp_path}/train.json" for part in ("train", "val")]
    monkeypatch.setattr("sys.argv", ["train_net.py", "--config-file", "custom/nano.py", *overrides,
                                     f"data.image_root={tmp_path}/images", "data.name=twice",
                                     f"train.output_dir={tmp_path}/out"])  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        train_net()
    told = capsys.readouterr().err.splitlines()[-1]
    assert "train.json: several classes have the name" in told


def test_the_rows_of_retinanet_are_read(tmp_path):
    draw(tmp_path / "images")
    write(tmp_path / "train.csv", *rows(ALL, corners_row, "{}.jpg,,,,,"))
    assert boxes(read_folder(tmp_path)) == EXPECTED


# Parts.


def voc_of_another_part(root):
    draw(root / "train/images")
    voc(root / "train/labels", file_name="images/{}.jpg")
    voc(root / "valid/labels", (0, 1), file_name="images/{}.jpg")


def list_of_another_part(root, line="/x/data/val/images/{}.jpg"):
    draw(root / "train/images")
    yolo(root / "train/labels")
    write(root / "data.yaml", "train: train/images", "val: val.txt", NAMES)
    write(root / "val.txt", *(line.format(number) for number in (0, 1)))


def list_without_a_part(root):
    list_of_another_part(root, "/x/data/images/{}.jpg")


def table_of_another_part(root):
    draw(root / "train")
    write(root / "train.csv", *rows(ALL, corners_row, "{}.jpg,,,,,"))
    write(root / "val.csv", *rows((0, 1), corners_row, "{}.jpg,,,,,"))


@pytest.mark.parametrize(
    "build", [voc_of_another_part, list_of_another_part, list_without_a_part, table_of_another_part]
)
def test_a_part_is_never_read_from_the_pictures_of_another(tmp_path, build):
    build(tmp_path)
    try:
        folder = read_folder(tmp_path)
    except ValueError as error:
        assert "not below" in str(error) or "not there" in str(error)
        return
    val = folder.splits.get("val")
    assert val is None or not val.content["images"]
    problems = "\n".join(val.problems) if val else ""
    assert "is not below" in problems + notes(folder) or "no 'val'" in notes(folder)


@pytest.mark.parametrize("line", ["{}", "{} -1", "images/{}.jpg", "C:\\data\\images\\{}.jpg"])
@pytest.mark.parametrize("folder_name", ["", "ImageSets/Main", "ImageSets", "lists"])
def test_lists_of_xml_files_divide_them_wherever_they_lie(tmp_path, folder_name, line):
    draw(tmp_path / "images")
    voc(tmp_path / "xml")
    for part, numbers in (("train", (0, 1, 2, 3)), ("val", (4, 5))):
        write(tmp_path / folder_name / f"{part}.txt", *(line.format(n) for n in numbers))
    splits = read_folder(tmp_path).splits
    assert {name: len(split.content["images"]) for name, split in splits.items()} == {
        "train": 4,
        "val": 2,
    }


def test_one_file_for_the_pictures_of_all_parts_is_divided_by_their_folders(tmp_path):
    draw(tmp_path / "train", (0, 1, 2, 3))
    draw(tmp_path / "val", (4, 5))
    write_json(tmp_path / "annotations.json", coco())
    folder = read_folder(tmp_path)
    assert pictures_of(folder) == names_in("train", (0, 1, 2, 3))
    assert pictures_of(folder, "val") == names_in("val", (4, 5))
    assert len(folder.splits["val"].content["annotations"]) == 4


def test_a_line_without_a_class_among_others_is_refused(tmp_path):
    draw(tmp_path / "images")
    yolo(tmp_path / "labels")
    write(tmp_path / "classes.txt", "cat", "", "dog")
    with pytest.raises(ValueError, match="classes.txt: line 2 is empty"):
        read_folder(tmp_path)
    write(tmp_path / "classes.txt", "cat", "dog", "", "")
    assert read_folder(tmp_path).class_names == ["cat", "dog"]


def test_two_data_sets_of_two_kinds_are_refused(tmp_path):
    OFTEN_MET.found["coco_custom_json_names"].build(tmp_path / "a")
    OFTEN_MET.found["yolo_classes_txt_no_yaml"].build(tmp_path / "b")
    with pytest.raises(ValueError, match="holds several data sets, .*/a, .*/b: name one of them"):
        read_folder(tmp_path)


# Annotations that are of no use where better ones lie deeper.


def test_annotations_without_any_object_do_not_hide_others(tmp_path):
    draw(tmp_path / "images")
    empty = coco((0,))
    empty["annotations"] = []
    write_json(tmp_path / "annotations.json", empty)
    write_json(tmp_path / "corrected/annotations.json", coco())
    folder = read_folder(tmp_path)
    assert boxes(folder) == EXPECTED
    assert "annotations.json: the COCO annotations name no object" in notes(folder)


def test_files_of_via_for_each_picture_are_one_part(tmp_path):
    draw(tmp_path)
    for number in ALL:
        regions = [
            {"shape_attributes": dict(zip(("name", "x", "y", "width", "height"),
                                          ("rect", *item[1:]))),
             "region_attributes": {"class": item.name}}
            for item in PICTURES[number].objects
        ]  # fmt: skip
        entry = {"filename": f"{number}.jpg", "size": 1, "regions": regions}
        write_json(tmp_path / f"via_{number}.json", {f"{number}.jpg1": entry})
    assert boxes(read_folder(tmp_path)) == EXPECTED


@pytest.mark.parametrize("head", ["id", "fname", "Bild"])
def test_the_column_of_pictures_may_be_called_anything(tmp_path, head):
    draw(tmp_path / "images")

    def row(number, picture, item):
        left, top, right, bottom = item.corners
        return f"{number},{number}.jpg,{item.name},{left},{top},{right},{bottom}"

    write(tmp_path / "boxes.csv", f",{head},class,x1,y1,x2,y2", *rows(ALL, row))
    assert boxes(read_folder(tmp_path)) == EXPECTED


def test_labels_may_lie_anywhere_if_a_person_names_the_pictures(tmp_path):
    draw(tmp_path / "all")
    yolo(tmp_path / "all_label")
    write(tmp_path / "all_label/classes.txt", *CLASSES)
    for named in ({"path": tmp_path / "all_label", "images": tmp_path / "all"},
                  {"path": tmp_path / "all", "annotations": tmp_path / "all_label"}):  # fmt: skip
        folder = read_folder(**named)
        assert folder.splits["train"].count_objects() == {"cat": 4, "dog": 4}
        assert "not used" not in notes(folder)


def test_paths_may_begin_with_the_folder_that_the_data_lie_in(tmp_path):
    root = tmp_path / "data"
    draw(root / "images")
    yolo(root / "labels")
    write(root / "data.yaml", "train: data/train.txt", NAMES)
    write(root / "train.txt", *names_in("data/images"))
    write(root / "lists/train.txt", "something else")
    assert len(boxes(read_folder(root))) == 8


def test_tags_of_pictures_are_no_objects(tmp_path):
    draw(tmp_path / "images", (0,))
    image = '<image id="0" name="0.jpg" width="64" height="48">{}</image>'
    text = "<annotations><version>1.1</version>" + image.format('<tag label="cat"></tag>')
    write(tmp_path / "annotations.xml", text + "</annotations>")
    with pytest.raises(ValueError, match="1 tags of whole pictures and no shapes"):
        read_folder(tmp_path)


def test_the_first_pixel_is_decided_by_all_files_whose_pictures_are_there_or_not(tmp_path):
    draw(tmp_path / "images", (0,))
    voc(tmp_path / "xml", (0,))
    text = (tmp_path / "xml/0.xml").read_text().replace("0.jpg", "9.jpg")
    write(tmp_path / "xml/9.xml", text.replace("<xmin>", "<xmin>0</xmin><xmin>", 1))
    folder = read_folder(tmp_path)
    assert "corners start at 0" in notes(folder) and len(folder.splits["train"].problems) == 1


def test_a_class_of_useless_boxes_alone_need_not_be_listed(tmp_path):
    draw(tmp_path / "images", (0,))
    nothing = "<object><name>none</name><bndbox>" + "".join(
        f"<{key}>0</{key}>" for key in ("xmin", "ymin", "xmax", "ymax")
    )
    end = f"{nothing}</bndbox></object></annotation>"
    voc(tmp_path / "xml", (0,), edit=lambda xml: xml.replace("</annotation>", end))
    write(tmp_path / "classes.txt", *CLASSES)
    assert read_folder(tmp_path).class_names == list(CLASSES)


def test_images_must_be_a_folder(tmp_path):
    draw(tmp_path / "images", (0,))
    with pytest.raises(ValueError, match="--images .*0.jpg: it must be the folder"):
        read_folder(tmp_path, images=tmp_path / "images/0.jpg")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_annotations_of_no_part_beside_those_to_test_on_are_to_train_on(tmp_path, kind):
    draw(tmp_path / "images")
    for name, numbers in (("annotations", (0, 1, 3)), ("test_annotations", (4, 5))):
        if kind == "csv":
            write(tmp_path / "annotations.csv".replace("annotations", name),
                  *rows(numbers, corners_row, "{}.jpg,,,,,"))  # fmt: skip
        else:
            write_json(tmp_path / f"{name}.json", coco(numbers))
    splits = read_folder(tmp_path).splits
    assert {name: len(split.content["images"]) for name, split in splits.items()} == {
        "train": 3,
        "test": 2,
    }


def test_copies_of_a_file_are_no_question(tmp_path):
    draw(tmp_path / "images")
    yolo(tmp_path / "labels")
    write(tmp_path / "obj.data", "train = x/train.txt", "names = y/obj.names")
    write(tmp_path / "train.txt", *names_in("images"))
    for folder in (tmp_path, tmp_path / "data"):
        write(folder / "obj.names", *CLASSES)
    assert boxes(read_folder(tmp_path)) == [pytest.approx(box, abs=0.01) for box in EXPECTED]
    write(tmp_path / "data/obj.names", "tree", "car")
    with pytest.raises(ValueError, match="could be any of data/obj.names, obj.names"):
        read_folder(tmp_path)


# What else may be in the files.


def test_names_of_labels_may_differ_in_case(tmp_path):
    draw(tmp_path / "images", names="IMG_{}.JPG")
    yolo(tmp_path / "labels", names="img_{}.txt")
    write(tmp_path / "classes.txt", *CLASSES)
    assert len(boxes(read_folder(tmp_path))) == 8


def test_an_empty_parent_of_its_only_class_s_name_is_no_class(tmp_path):
    draw(tmp_path / "images")
    content = coco(ALL)
    content["categories"] = [
        {"id": 0, "name": "cat", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cat"},
        {"id": 2, "name": "dog", "supercategory": "cat"},
    ]
    write_json(tmp_path / "annotations.json", content)
    assert read_folder(tmp_path).class_names == ["cat", "dog"]
    content["annotations"][0]["category_id"] = 0
    write_json(tmp_path / "annotations.json", content)
    with pytest.raises(ValueError, match="several classes have the name 'cat'"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["person_keypoints_all.json", "captions_all.json"])
def test_a_file_that_is_named_may_be_called_anything(tmp_path, name):
    draw(tmp_path / "images")
    write_json(tmp_path / name, coco())
    with pytest.raises(ValueError, match="is no data set that is known"):
        read_folder(tmp_path)
    assert len(boxes(read_folder(tmp_path, annotations=tmp_path / name))) == 8


def test_two_spellings_of_a_picture_in_a_table_are_one(tmp_path):
    draw(tmp_path / "images", (0,))
    write(tmp_path / "train.csv", "images/0.jpg,1,2,9,9,cat", "0.jpg,3,4,9,9,dog")
    folder = read_folder(tmp_path)
    assert boxes(folder) == [[1, 2, 8, 7], [3, 4, 6, 5]]
    assert not folder.splits["train"].problems


@pytest.mark.parametrize("name", ["a.json", "classes.txt", "train.csv", "data.yaml", "a.xml"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    OFTEN_MET.found["coco_custom_json_names"].build(tmp_path)
    os.mkfifo(tmp_path / name)
    assert read_folder(tmp_path).kind == "COCO"


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_numbers_beyond_all_are_named(tmp_path, number):
    OFTEN_MET.found["labelme_json_beside_images"].build(tmp_path)
    path = tmp_path / "0.json"
    content = json.loads(path.read_text())
    content["shapes"][0]["points"][0][0] = number
    path.write_text(json.dumps(content))
    (problem,) = read_folder(tmp_path).splits["train"].problems
    assert "0.json, shape 0" in problem


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "\ud800"])
def test_classes_are_called_by_letters(tmp_path, name):
    OFTEN_MET.found["labelme_json_beside_images"].build(tmp_path)
    text = (tmp_path / "0.json").read_text().replace('"cat"', json.dumps(name))
    (tmp_path / "0.json").write_text(text)
    with pytest.raises(ValueError, match="a class is called"):
        read_folder(tmp_path)


def test_what_is_trained_on_is_registered_as_it_was_read(tmp_path):
    from stage_interactor.d2.data import MetadataCatalog
    from stage_interactor.data import load_coco_dataset

    draw(tmp_path / "images")
    content = coco()
    content["annotations"][0]["bbox"][2] = 0
    write_json(tmp_path / "train.json", content)
    load_coco_dataset("as_read", str(tmp_path / "train.json"), str(tmp_path / "images"))
    metadata = MetadataCatalog.get("as_read")
    assert metadata.source_file == str(tmp_path / "train.json") != metadata.json_file
    with open(metadata.json_file) as file:
        assert len(json.load(file)["annotations"]) == 7


# A picture that is missing is not another one of its name.


@pytest.mark.parametrize("kind", ["coco", "csv", "list"])
@pytest.mark.parametrize("also", [True, False], ids=["names_repeat", "most_have_their_folder"])
def test_a_missing_picture_is_not_one_of_its_name_elsewhere(tmp_path, kind, also):
    draw(tmp_path / "day", (0, 1, 2))
    draw(tmp_path / "dusk", (3, 4, 5))
    named = [*names_in("day", (0, 1, 2)), *names_in("dusk", (3, 4, 5)), "night/3.jpg"]
    named = named if also else [name for name in named if name != "dusk/3.jpg"]
    if kind == "coco":
        content = {"categories": [{"id": 1, "name": "cat"}]}
        content["images"] = [
            dict(zip(("id", "file_name", "width", "height"),
                     (n, name, *PICTURES[int(name[-5])].size)))
            for n, name in enumerate(named)
        ]  # fmt: skip
        content["annotations"] = [
            {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [1, 2, 5, 5]}
            for n in range(len(named))
        ]
        write_json(tmp_path / "annotations.json", content)
    elif kind == "csv":
        write(tmp_path / "boxes.csv", *(f"{name},1,2,9,9,cat" for name in named))
    else:
        write(tmp_path / "train.txt", *named)
        write(tmp_path / "classes.txt", *CLASSES)
        for folder_name in ("day", "dusk"):
            yolo(tmp_path / folder_name)
    split = read_folder(tmp_path).splits["train"]
    assert len(split.content["images"]) == len(named) - 1
    assert [problem for problem in split.problems if "'night/3.jpg' is not below" in problem]


def test_names_without_folders_are_found_in_any(tmp_path):
    draw(tmp_path / "somewhere/else")
    write_json(tmp_path / "annotations.json", coco(names="C:\\Users\\me\\photos\\{}.jpg"))
    assert len(pictures_of(read_folder(tmp_path))) == 6


def test_a_file_of_classes_without_any_is_refused(tmp_path):
    draw(tmp_path / "images")
    yolo(tmp_path / "labels")
    write(tmp_path / "classes.txt")
    with pytest.raises(ValueError, match="classes.txt is empty: it must name the classes"):
        read_folder(tmp_path)


def test_the_reason_that_most_pictures_have_is_told(tmp_path):
    draw(tmp_path / "images", (0, 1, 3))
    content = coco((0, 1, 3, 4))
    for image in content["images"]:
        image.update(width=image["width"] * 4, height=image["height"] * 4)
    write_json(tmp_path / "annotations.json", content)
    with pytest.raises(ValueError, match=r"resized by 0.25 after .* \(as 2 more\)"):
        read_folder(tmp_path)


def test_what_is_not_read_is_called_by_its_name(tmp_path):
    draw(tmp_path / "images")
    write_json(tmp_path / "_annotations.createml.json", [{"image": "0.jpg", "annotations": []}])
    with pytest.raises(ValueError, match="CreateML's format is not read; export it as COCO"):
        read_folder(tmp_path)


@pytest.mark.parametrize("folder_name", ["annotated", "predictions"])
def test_what_annotations_lie_in_may_be_called_anything(tmp_path, folder_name):
    draw(tmp_path / folder_name / "images")
    voc(tmp_path / folder_name / "xml")
    assert pictures_of(read_folder(tmp_path)) == names_in(f"{folder_name}/images")


def test_names_of_classes_are_text_as_they_are_written(tmp_path):
    draw(tmp_path / "images", (0,))
    names = ["yes", "no", "007", "1e3", "2024-01-01", "null"]
    write(tmp_path / "labels/0.txt", *(f"{index} .5 .5 .2 .2" for index in range(len(names))))
    write(tmp_path / "data.yaml", "train: images", f"names: [{', '.join(names)}]")
    assert read_folder(tmp_path).splits["train"].count_objects() == dict.fromkeys(names, 1)
