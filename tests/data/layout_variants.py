"""More layouts of the kinds in ``layouts.py``: other names, other writings, other tools."""

import json
from pathlib import Path

from layouts import (
    ALL,
    CLASSES,
    ONE,
    PICTURES,
    ROBOFLOW_NAMES,
    TENSORFLOW_HEADER,
    THREE,
    TWO,
    WITH_TEST,
    Layouts,
    Object,
    Picture,
    box_line,
    coco,
    cvat,
    cvat_box,
    draw,
    each,
    labelme,
    labelme_rectangle,
    outline_line,
    plain_row,
    rows,
    tensorflow_row,
    via,
    via_polygon,
    via_rectangle,
    voc,
    write,
    write_json,
    yolo,
    yolo_parts,
)

VARIANTS = Layouts()
add = VARIANTS.add
NAMES = "names: [cat, dog]"
LISTED = ("train: images/train", "val: images/val", NAMES)  # of a data.yaml
TOOLS_FOLDERS = "{kind}/{part}"


# YOLO


@add("YOLO", TWO)
def yolo_path_of_another_machine(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", "path: /home/someone/datasets/pets", *LISTED)


@add("YOLO", TWO)
def yolo_path_is_an_old_name_of_the_folder(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "pets.yaml", "path: ../datasets/pets  # dataset root dir", *LISTED)


@add("YOLO", TWO)
def yolo_only_the_last_parts_of_the_path_exist(root: Path) -> None:
    yolo_parts(root / "pets", TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", r"path: D:\work\datasets\pets", *LISTED)


@add("YOLO", TWO)
def yolo_yaml_with_backslashes(root: Path) -> None:
    yolo_parts(root, TWO)
    write(root / "data.yaml", r"train: .\train\images", r"val: ..\val\images", NAMES)


@add("YOLO", TWO)
def yolo_names_with_numbers_as_keys(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", *LISTED[:2], "names:", "  1: dog", "  0: cat")


@add("YOLO", TWO)
def yolo_names_with_texts_as_keys(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", *LISTED[:2], "names: {'0': cat, '1': dog}")


@add("YOLO", TWO, or_told=True)
def yolo_names_with_numbers_behind_them(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", *LISTED[:2], "names:", "  dog: 1", "  cat: 0")


@add("YOLO", TWO)
def yolo_names_in_a_file_of_their_own(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", *LISTED[:2], "nc: 2")
    write(root / "obj.names", *CLASSES)


@add("YOLO", TWO)
def yolo_train_of_several_folders(root: Path) -> None:
    yolo_parts(root, {"a": (0, 1), "b": (2, 3), "val": (4,)})
    write(root / "data.yaml", "train: [a/images, b/images]", "val: [val/images]", NAMES)


@add("YOLO", TWO)
def yolo_valid_instead_of_val(root: Path) -> None:
    yolo_parts(root, {"train": TWO["train"], "valid": TWO["val"]})
    write(root / "data.yaml", "train: train/images", "valid: valid/images", NAMES)


@add("YOLO", {"train": ALL, "val": ALL})
def yolo_val_is_train(root: Path) -> None:
    yolo_parts(root, ONE, TOOLS_FOLDERS)
    write(root / "data.yaml", "train: images/train", "val: images/train", NAMES)


@add("YOLO", TWO)
def yolo_lists_from_their_own_folder(root: Path) -> None:
    draw(root / "images")
    yolo(root / "labels")
    for part, numbers in TWO.items():
        write(root / f"{part}.txt", *each("./images/{}.jpg", numbers))
    write(root / "data.yaml", "train: train.txt", "val: ./val.txt", NAMES)


@add("YOLO", TWO)
def yolo_lists_of_another_machine(root: Path) -> None:
    draw(root / "images")
    yolo(root / "labels")
    for part, numbers in TWO.items():
        write(root / f"{part}.txt", *each("/mnt/disk 2/pets/images/{}.jpg", numbers))
    write(root / "data.yaml", "train: train.txt", "val: val.txt", NAMES)


@add("YOLO", TWO)
def yolo_of_cvat_with_lists(root: Path) -> None:
    """The lists name ``data/``, the folder of the export itself."""
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    for part, numbers in TWO.items():
        write(root / f"{part}.txt", *each(f"data/images/{part}/{{}}.jpg", numbers))
    write(root / "data.yaml", "names:", "  0: cat", "  1: dog", "path: .", "train: train.txt",
          "val: val.txt")  # fmt: skip


@add("YOLO", TWO)
def yolo_folders_in_upper_case(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / "Images" / part, numbers)
        yolo(root / "Labels" / part, numbers)
    write(root / "data.yaml", "train: Images/train", "val: Images/val", NAMES)


@add("YOLO", TWO)
def yolo_label_txt_folders(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / part / "images", numbers)
        yolo(root / part / "labelTxt", numbers, line=outline_line)
    write(root / "data.yaml", "train: train/images", "val: val/images", NAMES)


@add("YOLO", TWO)
def yolo_labels_in_the_folder_of_the_pictures(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / "images" / part, numbers)
        yolo(root / "images" / part, numbers)
    write(root / "data.yaml", *LISTED)


@add("YOLO", TWO)
def yolo_some_labels_beside_their_pictures(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "data.yaml", *LISTED)
    for number in (0, 3):
        name = f"train/{number}.txt"
        (root / "labels" / name).rename(root / "images" / name)


@add("YOLO", TWO)
def yolo_parts_without_a_yaml(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "classes.txt", *CLASSES)


@add("YOLO", THREE)
def yolo_folder_a_part_without_a_yaml(root: Path) -> None:
    yolo_parts(root, {ROBOFLOW_NAMES[part]: numbers for part, numbers in THREE.items()})
    write(root / "classes.txt", *CLASSES)


@add("YOLO", ONE)
def yolo_flat_folder_of_labelimg(root: Path) -> None:
    draw(root)
    yolo(root)
    write(root / "classes.txt", *CLASSES)


@add("YOLO", ONE)
def yolo_of_label_studio(root: Path) -> None:
    """Its notes.json has categories as a COCO file does."""
    draw(root / "images", names="1a2b3c4d-{}.jpg")
    yolo(root / "labels", names="1a2b3c4d-{}.txt")
    write(root / "classes.txt", *CLASSES)
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    notes = {"categories": categories, "info": {"year": 2024, "contributor": "Label Studio"}}
    write_json(root / "notes.json", notes)


@add("YOLO", TWO)
def yolo_two_folders_down(root: Path) -> None:
    yolo_parts(root / "archive/pets", TWO, TOOLS_FOLDERS)
    write(root / "archive/pets/data.yaml", *LISTED)


@add("YOLO", ONE)
def yolo_suffixes_in_upper_case(root: Path) -> None:
    for numbers, suffix in (((0, 1), "JPG"), ((2, 3), "PNG"), ((4, 5), "JPEG")):
        draw(root / "images", numbers, "{}." + suffix)
    yolo(root / "labels")
    write(root / "data.yaml", "train: images", NAMES)


@add("YOLO", ONE)
def yolo_other_suffixes(root: Path) -> None:
    for numbers, suffix in (((0, 1), "bmp"), ((2, 3), "webp"), ((4,), "jfif"), ((5,), "gif")):
        draw(root / "images", numbers, "{}." + suffix)
    yolo(root / "labels")
    write(root / "data.yaml", "train: images", NAMES)


@add("YOLO", ONE)
def yolo_names_with_spaces_and_dots(root: Path) -> None:
    draw(root / "my images/images", names="my photo.{} (1).final.jpg")
    yolo(root / "my images/labels", names="my photo.{} (1).final.txt")
    write(root / "data.yaml", "train: my images/images", NAMES)


@add("YOLO", TWO)
def yolo_letters_of_other_scripts(root: Path) -> None:
    """In names of files, in lists of them."""
    draw(root / "данные/images", names="写真 ä{}.jpg")
    yolo(root / "данные/labels", names="写真 ä{}.txt")
    for part, numbers in TWO.items():
        write(root / f"{part}.txt", *each("данные/images/写真 ä{}.jpg", numbers))
    write(root / "data.yaml", "train: train.txt", "val: val.txt", NAMES)


@add("YOLO", ONE)
def yolo_boxes_and_segments_mixed(root: Path) -> None:
    def line(item: Object, size: tuple[int, int]) -> str:
        text = (outline_line if item.name == "dog" else box_line)(item, size)
        index, *values = text.split()
        if item.name == "dog":
            values += values[:2]  # the outline is closed
        return " ".join([f"{float(index)}", *values]) + "  "

    yolo_parts(root, ONE, line=line)
    write(root / "data.yaml", "train: train/images", NAMES)


@add("YOLO", ONE)
def yolo_turned_boxes_of_four_corners(root: Path) -> None:
    yolo_parts(root, ONE, line=outline_line)
    write(root / "data.yaml", "train: train/images", NAMES)


@add("YOLO", ONE)
def yolo_keypoints(root: Path) -> None:
    yolo_parts(root, ONE, line=lambda item, size: box_line(item, size) + " 0.1 0.2 2 0.9 0.8 1")
    write(root / "data.yaml", "train: train/images", NAMES, "kpt_shape: [2, 3]")


@add("YOLO", ONE)
def yolo_linked_folders(root: Path) -> None:
    draw(root / "store/jpg")
    yolo(root / "store/txt")
    for kind, store in (("images", "jpg"), ("labels", "txt")):
        (root / kind / "train").mkdir(parents=True)
        (root / kind / "train/first").symlink_to(root / "store" / store, target_is_directory=True)
    write(root / "data.yaml", "train: images/train", NAMES)


@add("YOLO", ONE)
def yolo_without_the_label_file_of_a_background(root: Path) -> None:
    yolo_parts(root, ONE)
    (root / "train/labels/2.txt").unlink()
    write(root / "data.yaml", "train: train/images", NAMES)


@add("YOLO", TWO)
def yolo_yaml_in_a_folder_beside_the_pictures(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "configs/pets.yaml", "path: ..", *LISTED)


@add("YOLO", TWO)
def yolo_with_other_yamls(root: Path) -> None:
    yolo_parts(root, TWO, TOOLS_FOLDERS)
    write(root / "args.yaml", "task: detect", "model: [best.pt")
    write(root / "hyp.yaml", "lr0: 0.01", "names: 3")
    write(root / "pets.yaml", *LISTED)


@add("YOLO", TWO, at="archive/data.yaml")
def yolo_the_yaml_itself_is_named(root: Path) -> None:
    yolo_parts(root / "archive", TWO, TOOLS_FOLDERS)
    write(root / "archive/data.yaml", *LISTED)


@add("YOLO", TWO)
def darknet_of_another_machine(root: Path) -> None:
    """The pictures in images/, the labels in labels/, everything else in cfg/."""
    draw(root / "images")
    yolo(root / "labels")
    for part, numbers in TWO.items():
        write(root / f"cfg/{part}.txt", *each("/content/darknet/build/pets/images/{}.jpg", numbers))
    write(root / "cfg/pets.names", *CLASSES)
    start = "/content/darknet/build/pets/cfg"
    lines = f"train={start}/train.txt", f"valid={start}/val.txt", f"names={start}/pets.names"
    write(root / "cfg/pets.data", "classes=2", *lines)


# Pascal VOC


@add("Pascal VOC", TWO)
def voc_2012(root: Path) -> None:
    """A list may have a second column, -1, 0 or 1; the folder is that of the archive."""
    devkit = root / "VOCdevkit/VOC2012"
    draw(devkit / "JPEGImages")
    voc(devkit / "Annotations")
    write(devkit / "ImageSets/Main/train.txt", "0  1", "1 -1", "2  0", "3  1")
    write(devkit / "ImageSets/Main/val.txt", "4 -1")
    write(devkit / "ImageSets/Segmentation/train.txt", "0")


@add("Pascal VOC", TWO, or_told=True)
def voc_lists_of_classes_only(root: Path) -> None:
    draw(root / "JPEGImages", (0, 1, 2, 3, 4))
    voc(root / "Annotations", (0, 1, 2, 3, 4))
    for name in CLASSES:
        for part, numbers in TWO.items():
            there = {n: any(o.name == name for o in PICTURES[n].objects) for n in numbers}
            lines = [f"{number} {1 if there[number] else -1:2}" for number in numbers]
            write(root / f"ImageSets/Main/{name}_{part}.txt", *lines)


@add("Pascal VOC", ONE)
def voc_annotations_in_upper_case(root: Path) -> None:
    draw(root / "IMAGES")
    voc(root / "ANNOTATIONS")


@add("Pascal VOC", ONE)
def voc_flat_folder_of_labelimg(root: Path) -> None:
    draw(root)
    voc(root)


@add("Pascal VOC", THREE)
def voc_of_roboflow(root: Path) -> None:
    for part, numbers in THREE.items():
        folder = root / ROBOFLOW_NAMES[part]
        draw(folder, numbers, "{}_jpg.rf.0af.jpg")
        voc(folder, numbers, "{}_jpg.rf.0af.jpg", "{}_jpg.rf.0af.xml")


@add("Pascal VOC", ONE)
def voc_xmls_in_annotations(root: Path) -> None:
    draw(root / "images")
    voc(root / "annotations/xmls")


@add("Pascal VOC", TWO)
def voc_parts_below_annotations_and_pictures(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / "JPEGImages" / part, numbers)
        voc(root / "Annotations" / part, numbers)


@add("Pascal VOC", TWO)
def voc_folder_a_part(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / ROBOFLOW_NAMES[part] / "images", numbers)
        voc(root / ROBOFLOW_NAMES[part] / "annotations", numbers)


@add("Pascal VOC", TWO)
def voc_lists_with_suffixes(root: Path) -> None:
    draw(root / "JPEGImages")
    voc(root / "Annotations")
    for part, numbers in TWO.items():
        write(root / f"ImageSets/Main/{part}.txt", *each("{}.jpg", numbers))


@add("Pascal VOC", TWO)
def voc_names_with_spaces(root: Path) -> None:
    draw(root / "JPEGImages", names="my photo {}.jpg")
    voc(root / "Annotations", file_name="my photo {}.jpg", names="my photo {}.xml")
    for part, numbers in TWO.items():
        write(root / f"ImageSets/Main/{part}.txt", *each("my photo {}", numbers))


@add("Pascal VOC", ONE)
def voc_file_name_without_a_suffix(root: Path) -> None:
    draw(root / "JPEGImages", names="{}.JPG")
    voc(root / "Annotations", file_name="{}")


@add("Pascal VOC", ONE)
def voc_file_name_with_another_suffix(root: Path) -> None:
    draw(root / "JPEGImages", names="{}.png")
    voc(root / "Annotations", file_name="{}.jpg")


@add("Pascal VOC", ONE)
def voc_file_name_of_before_a_renaming(root: Path) -> None:
    draw(root / "JPEGImages", names="pet_{}.jpg")
    voc(root / "Annotations", file_name="IMG_20{}.jpg", names="pet_{}.xml")


@add("Pascal VOC", ONE)
def voc_file_name_is_that_of_another_picture(root: Path) -> None:
    """Renumbered from 1 to 0: every name but the last is that of the next picture."""
    draw(root / "JPEGImages")
    for number in ALL:
        voc(root / "Annotations", (number,), file_name=f"{number + 1}.jpg")


@add("Pascal VOC", ONE)
def voc_file_name_finds_the_picture_where_the_xml_has_another_name(root: Path) -> None:
    draw(root / "JPEGImages", names="pet_{}.jpg")
    voc(root / "Annotations", file_name="pet_{}.jpg", names="annotation-{}.xml")


@add("Pascal VOC", ONE)
def voc_file_name_is_a_path_of_windows(root: Path) -> None:
    draw(root / "JPEGImages")
    voc(root / "Annotations", file_name=r"C:\Users\someone\pets\{}.jpg")


@add("Pascal VOC", ONE)
def voc_size_of_zero(root: Path) -> None:
    def edit(text: str) -> str:
        start, end = text.index("<size>"), text.index("</size>")
        size = "<size><width>0</width><height>0</height><depth>0</depth>"
        return text[:start] + size + text[end:]

    draw(root / "JPEGImages")
    voc(root / "Annotations", edit=edit)


@add("Pascal VOC", ONE)
def voc_without_sizes_and_names(root: Path) -> None:
    draw(root / "JPEGImages")
    voc(
        root / "Annotations",
        edit=lambda text: "<annotation>" + text.partition("</size>")[2],
    )


@add("Pascal VOC", ONE)
def voc_corners_with_decimals(root: Path) -> None:
    """Half way between those from 0 and those from 1."""

    def of_object(item: Object) -> str:
        left, top, right, bottom = item.corners
        return (
            f"<object><name>{item.name}</name><bndbox><xmin>{left}.5</xmin><ymin>{top}.50</ymin>"
            f"<xmax>{right}.0</xmax><ymax>{bottom}.0</ymax></bndbox></object>"
        )

    draw(root / "JPEGImages")
    voc(root / "Annotations", of_object=of_object)


@add("Pascal VOC", ONE, or_told=True)
def voc_corners_in_another_order(root: Path) -> None:
    def edit(text: str) -> str:
        for one, other in (("xmin", "xmax"), ("ymin", "ymax")):
            text = text.replace(one, "z").replace(other, one).replace("z>", f"{other}>")
        return text

    draw(root / "JPEGImages")
    voc(root / "Annotations", edit=edit)


@add("Pascal VOC", ONE)
def voc_parts_of_objects_have_boxes_too(root: Path) -> None:
    box = "<xmin>4</xmin><ymin>4</ymin><xmax>8</xmax><ymax>8</ymax>"
    head = f"<part><name>head</name><bndbox>{box}</bndbox></part></object>"
    draw(root / "JPEGImages")
    voc(root / "Annotations", edit=lambda text: text.replace("</object>", head))


@add("Pascal VOC", ONE)
def voc_elements_in_another_order_and_spaces(root: Path) -> None:
    def of_object(item: Object) -> str:
        left, top, right, bottom = item.corners
        return (
            f"<object>\n <bndbox> <ymax> {bottom} </ymax> <xmax>{right}</xmax>\n"
            f"<xmin> {left + 1}</xmin><ymin>{top + 1} </ymin></bndbox>"
            f"<pose/><name>\n  {item.name} </name></object>\n"
        )

    draw(root / "JPEGImages")
    voc(root / "Annotations", file_name="\n {}.jpg\n", of_object=of_object)


# COCO


@add("COCO", ONE)
def coco_of_cvat(root: Path) -> None:
    draw(root / "images/default")
    write_json(root / "annotations/instances_default.json", coco())


@add("COCO", ONE)
def coco_of_cvat_with_pictures_in_one_folder(root: Path) -> None:
    draw(root / "images")
    write_json(root / "annotations/instances_default.json", coco())


@add("COCO", TWO)
def coco_of_datumaro(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / "images" / part, numbers)
        write_json(root / f"annotations/instances_{part}.json", coco(numbers))


@add("COCO", TWO)
def coco_as_it_is_published(root: Path) -> None:
    """Other tasks have JSON files of their own."""
    for part, numbers in TWO.items():
        draw(root / f"{part}2017", numbers)
        content = coco(numbers)
        write_json(root / f"annotations/instances_{part}2017.json", content)
        write_json(root / f"annotations/person_keypoints_{part}2017.json", content)
        captions = [{"id": 1, "image_id": 1, "caption": "A pet."}]
        content = {"images": content["images"], "annotations": captions}
        write_json(root / f"annotations/captions_{part}2017.json", content)


@add("COCO", ONE)
def coco_of_label_studio(root: Path) -> None:
    draw(root / "images", names="1a2b3c4d-{}.jpg")
    write_json(root / "result.json", coco(names="images/1a2b3c4d-{}.jpg", first_class=0))


@add("COCO", ONE)
def coco_of_label_studio_on_windows(root: Path) -> None:
    draw(root / "images", names="1a2b3c4d-{}.jpg")
    names = "..\\..\\label-studio\\data\\media\\upload\\3\\1a2b3c4d-{}.jpg"
    write_json(root / "result.json", coco(names=names, first_class=0))


@add("COCO", ONE)
def coco_of_fiftyone(root: Path) -> None:
    draw(root / "data")
    write_json(root / "labels.json", coco())


@add("COCO", ONE)
def coco_json_in_annotations(root: Path) -> None:
    draw(root / "images")
    write_json(root / "annotations/coco.json", coco())


@add("COCO", TWO)
def coco_json_beside_a_folder_of_its_name(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / part, numbers)
        write_json(root / f"{part}.json", coco(numbers))


@add("COCO", TWO)
def coco_json_beside_a_folder_one_down(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / "dataset" / part, numbers)
        write_json(root / f"dataset/{part}.json", coco(numbers))


@add("COCO", TWO)
def coco_one_folder_of_pictures(root: Path) -> None:
    draw(root / "images")
    for part, numbers in TWO.items():
        write_json(root / f"annotations/{part}.json", coco(numbers))


@add("COCO", THREE)
def coco_of_roboflow(root: Path) -> None:
    """Number 0 of the categories is what the others are kinds of, and has no objects."""
    for part, numbers in THREE.items():
        draw(root / ROBOFLOW_NAMES[part], numbers, "{}_jpg.rf.0af.jpg")
        content = coco(numbers, "{}_jpg.rf.0af.jpg", segmentation=[])
        kinds = [category | {"supercategory": "pets"} for category in content["categories"]]
        content["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}, *kinds]
        write_json(root / ROBOFLOW_NAMES[part] / "_annotations.coco.json", content)


@add("COCO", ONE)
def coco_json_among_its_pictures(root: Path) -> None:
    draw(root)
    write_json(root / "_annotations.coco.json", coco())


@add("COCO", TWO)
def coco_json_in_the_folder_of_its_part(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / part / "images", numbers)
        write_json(root / part / "annotations.json", coco(numbers))


@add("COCO", ONE)
def coco_file_names_with_folders(root: Path) -> None:
    """Two pictures of one name, in two folders."""
    content = coco()
    for number, image in enumerate(content["images"]):
        image["file_name"] = f"camera {number % 2}/{number // 2}.jpg"
        draw(root / "images", (number,), image["file_name"])
    write_json(root / "annotations/instances.json", content)


@add("COCO", ONE)
def coco_file_names_of_another_machine(root: Path) -> None:
    draw(root / "pictures")
    write_json(root / "annotations.json", coco(names="/home/someone/pets/pictures/{}.jpg"))


@add("COCO", ONE)
def coco_file_names_of_windows(root: Path) -> None:
    draw(root / "JPEGImages")
    write_json(root / "annotations.json", coco(names="JPEGImages\\{}.jpg"))


@add("COCO", ONE)
def coco_file_names_in_letters_of_other_scripts(root: Path) -> None:
    draw(root / "images", names="写真 ä{}.jpg")
    write(root / "annotations.json", json.dumps(coco(names="写真 ä{}.jpg"), ensure_ascii=False))


@add("COCO", ONE)
def coco_segmentation_in_every_form(root: Path) -> None:
    draw(root / "images")
    content = coco()
    forms = [[], [[]], [[5, 5, 9, 9]], None, {"counts": [5, 5], "size": [9, 9]}, "x", [[0] * 7]]
    for item, form in zip(content["annotations"], forms):
        item["segmentation"] = form
    write_json(root / "annotations.json", content)


@add("COCO", ONE, at="labels/made by hand.json")
def coco_the_json_itself_is_named(root: Path) -> None:
    draw(root / "pictures")
    write_json(root / "labels/made by hand.json", coco())


# CSV


@add("CSV", THREE)
def csv_of_roboflow(root: Path) -> None:
    for part, numbers in THREE.items():
        folder = root / ROBOFLOW_NAMES[part]
        draw(folder, numbers)
        write(folder / "_annotations.csv", TENSORFLOW_HEADER, *rows(numbers, tensorflow_row))


@add("CSV", ONE, one_class=True)
def csv_of_a_competition(root: Path) -> None:
    """One class without a name; pictures without suffixes; numbers in brackets."""
    draw(root / "train", names="b6{}a.jpg")

    def row(number: int, picture: Picture, item: Object) -> str:
        (width, height), (_, x, y, w, h) = picture.size, item
        return f'b6{number}a,{width},{height},"[{x}.0, {y}.0, {w}.0, {h}.0]",usask_{number}'

    write(root / "train.csv", "image_id,width,height,bbox,source", *rows(ALL, row))


@add("CSV", ONE)
def csv_of_retinanet(root: Path) -> None:
    """A row without a box is a picture without objects; the classes are in another file."""
    draw(root / "images")
    lines = [f"images/{line}" for line in rows(ALL, plain_row, "{}.jpg,,,,,")]
    write(root / "annotations.csv", *lines)
    write(root / "classes.csv", "cat,0", "dog,1")


@add("CSV", {"train": (0, 1, 3, 4, 5)}, told=("2.jpg",))
def csv_with_semicolons(root: Path) -> None:
    draw(root / "images")
    text = "\n".join([TENSORFLOW_HEADER, *rows(ALL, tensorflow_row)])
    write(root / "annotations.csv", text.replace(",", ";"))


@add("CSV", {"train": (0, 1, 3, 4), "test": (5,)})
def csv_of_a_tutorial(root: Path) -> None:
    for part, numbers in {"train": (0, 1, 3, 4), "test": (5,)}.items():
        draw(root / "images" / part, numbers)
        text = rows(numbers, tensorflow_row)
        write(root / f"images/{part}_labels.csv", TENSORFLOW_HEADER, *text)


@add("CSV", {"train": (0, 1, 3, 4), "test": (5,)})
def csv_in_a_folder_beside_the_pictures(root: Path) -> None:
    for part, numbers in {"train": (0, 1, 3, 4), "test": (5,)}.items():
        draw(root / "images" / part, numbers)
        write(root / f"data/{part}_labels.csv", TENSORFLOW_HEADER, *rows(numbers, tensorflow_row))


@add("CSV", ONE)
def csv_paths_with_folders(root: Path) -> None:
    for number in ALL:
        draw(root / f"pictures/camera {number % 2}", (number,))

    def row(number: int, picture: Picture, item: Object) -> str:
        return f"./pictures/camera {number % 2}/{plain_row(number, picture, item)}"

    lines = rows(ALL, row, "./pictures/camera 0/{}.jpg,,,,,")
    write(root / "labels.csv", "image,xmin,ymin,xmax,ymax,label", *lines)


@add("CSV", ONE)
def csv_paths_of_windows(root: Path) -> None:
    draw(root / "pictures")
    lines = rows(ALL, plain_row, "{}.jpg,,,,,")
    write(root / "labels.csv", *("C:\\Users\\someone\\pictures\\" + line for line in lines))


@add("CSV", ONE)
def csv_quoted_and_in_another_order(root: Path) -> None:
    draw(root / "images", names="a, {}.jpg")

    def row(number: int, picture: Picture, item: Object) -> str:
        left, top, right, bottom = item.corners
        return f'"{item.name}","{bottom}","{left}","{right}","{top}","a, {number}.jpg"'

    header = '"class","ymax","xmin","xmax","ymin","filename"'
    write(root / "images/labels.csv", header, *rows(ALL, row, ',,,,,"a, {}.jpg"'))


@add("CSV", ONE, or_told=True)
def csv_with_widths_and_heights(root: Path) -> None:
    draw(root / "images")

    def row(number: int, picture: Picture, item: Object) -> str:
        return f"{number}.jpg,{item.x},{item.y},{item.w},{item.h},{item.name}"

    write(root / "labels.csv", "filename,x,y,width,height,class", *rows(ALL, row, "{}.jpg,,,,,"))


@add("CSV", {"train": (0, 1, 3, 4, 5)}, told=("2.jpg",), or_told=True)
def csv_of_open_images(root: Path) -> None:
    """Corners as shares of width and height."""
    draw(root / "images")

    def row(number: int, picture: Picture, item: Object) -> str:
        (width, height), (left, top, right, bottom) = picture.size, item.corners
        shares = left / width, right / width, top / height, bottom / height
        return f"{number},{item.name},{','.join(map(str, shares))}"

    header = "ImageID,LabelName,XMin,XMax,YMin,YMax"
    write(root / "annotations-bbox.csv", header, *rows(ALL, row))


# VIA


@add("VIA", TWO)
def via_of_its_first_version(root: Path) -> None:
    """Regions by number; the annotations alone."""
    for part, numbers in TWO.items():
        draw(root / part, numbers)
        entries = via(numbers, via_polygon, lambda name: {"class": name})
        for entry in entries.values():
            entry["regions"] = {str(i): region for i, region in enumerate(entry["regions"])}
        write_json(root / part / "via_region_data.json", entries)


@add("VIA", ONE)
def via_project_beside_its_pictures(root: Path) -> None:
    draw(root)
    entries = via(ALL, attributes=lambda name: {"type": name})
    settings = {"core": {"default_filepath": ""}, "project": {"name": "pets"}}
    content = {"_via_settings": settings, "_via_img_metadata": entries, "_via_attributes": {}}
    write_json(root / "via_project_3May2021_14h6m.json", content)


@add("VIA", ONE)
def via_project_above_its_pictures(root: Path) -> None:
    draw(root / "images")
    entries = via(ALL, attributes=lambda name: {"label": name})
    write_json(root / "via_project.json", {"_via_settings": {}, "_via_img_metadata": entries})


@add("VIA", ONE)
def via_circles_and_ellipses(root: Path) -> None:
    def shape(item: Object) -> dict:
        _, x, y, w, h = item
        middle = {"cx": x + w / 2, "cy": y + h / 2}
        if w == h:
            return {"name": "circle", "r": w / 2, **middle}
        return {"name": "ellipse", "rx": w / 2, "ry": h / 2, **middle}

    draw(root)
    write_json(root / "via_region_data.json", via(ALL, shape))


@add("VIA", ONE, or_told=True)
def via_polylines(root: Path) -> None:
    draw(root)
    entries = via(ALL, lambda item: via_polygon(item) | {"name": "polyline"})
    write_json(root / "via_region_data.json", entries)


@add("VIA", ONE, told=("1.jpg", "point"))
def via_points_are_no_boxes(root: Path) -> None:
    draw(root)
    entries = via(ALL)
    point = {"name": "point", "cx": 9, "cy": 9}
    region = {"shape_attributes": point, "region_attributes": {"name": "cat"}}
    entries["1.jpg601"]["regions"].append(region)
    write_json(root / "via_region_data.json", entries)


@add("VIA", ONE, or_told=True)
def via_classes_as_boxes_that_are_ticked(root: Path) -> None:
    draw(root)
    write_json(root / "via.json", via(ALL, via_rectangle, lambda name: {"kind": {name: True}}))


@add("VIA", ONE, or_told=True)
def via_as_csv(root: Path) -> None:
    draw(root)
    lines = []
    for entry in via(ALL).values():
        for number, region in enumerate(entry["regions"]):
            texts = [json.dumps(region[f"{kind}_attributes"]) for kind in ("shape", "region")]
            quoted = ",".join('"' + text.replace('"', '""') + '"' for text in texts)
            total = len(entry["regions"])
            lines.append(f'{entry["filename"]},{entry["size"]},"{{}}",{total},{number},{quoted}')
    lines.append('2.jpg,602,"{}",0,0,"{}","{}"')
    header = "filename,file_size,file_attributes,region_count,region_id"
    write(root / "via_export.csv", f"{header},region_shape_attributes,region_attributes", *lines)


# CVAT


@add("CVAT", THREE)
def cvat_subsets(root: Path) -> None:
    draw(root / "images")
    names = {**dict.fromkeys(TWO["train"], "Train"), 4: "Validation", 5: "Test"}
    text = cvat(attributes=lambda n: f' subset="{names[n]}"', task="a test of pets")
    write(root / "annotations.xml", text)


@add("CVAT", TWO)
def cvat_folders_in_its_names(root: Path) -> None:
    text = ""
    for part, numbers in TWO.items():
        draw(root / "images" / part, numbers)
        images = cvat(numbers, names=part + "/{}.jpg", attributes=lambda n: ' subset="default"')
        text += images[images.index("<image ") : images.index("</annotations>")]
    write(root / "annotations.xml", cvat(()).replace("</annotations>", text + "</annotations>"))


@add("CVAT", ONE)
def cvat_polygons(root: Path) -> None:
    def shape(item: Object) -> str:
        points = ";".join(f"{x}.00,{y}.00" for x, y in item.outline)
        return f'<polygon label="{item.name}" points="{points}" z_order="0"></polygon>'

    draw(root)
    write(root / "annotations.xml", cvat(shape=shape, task="valid boxes"))


@add("CVAT", ONE, or_told=True)
def cvat_polylines(root: Path) -> None:
    def shape(item: Object) -> str:
        points = ";".join(f"{x}.00,{y}.00" for x, y in item.outline)
        return f'<polyline label="{item.name}" points="{points}"></polyline>'

    draw(root / "images")
    write(root / "annotations.xml", cvat(shape=shape))


@add("CVAT", ONE, or_told=True)
def cvat_turned_boxes(root: Path) -> None:
    """A box by its centre, before it is turned by a right angle."""

    def shape(item: Object) -> str:
        _, x, y, w, h = item
        x, y = x + (w - h) / 2, y + (h - w) / 2
        corners = f'xtl="{x}" ytl="{y}" xbr="{x + h}" ybr="{y + w}"'
        return f'<box label="{item.name}" {corners} rotation="90.00"></box>'

    draw(root / "images")
    write(root / "annotations.xml", cvat(shape=shape))


@add("CVAT", ONE, or_told=True)
def cvat_ellipses_and_masks(root: Path) -> None:
    def shape(item: Object) -> str:
        _, x, y, w, h = item
        middle = f'cx="{x + w / 2}" cy="{y + h / 2}" rx="{w / 2}" ry="{h / 2}"'
        mask = f'rle="0, {w * h}" left="{x}" top="{y}" width="{w}" height="{h}"'
        kind, how = ("ellipse", middle) if item.name == "cat" else ("mask", mask)
        return f'<{kind} label="{item.name}" {how}></{kind}>'

    draw(root / "images")
    write(root / "annotations.xml", cvat(shape=shape))


@add("CVAT", ONE)
def cvat_attributes_and_tags(root: Path) -> None:
    """Boxes with attributes inside; labels of the whole picture are no objects."""

    def shape(item: Object) -> str:
        inside = '<attribute name="colour">dog</attribute></box><tag label="indoors"></tag>'
        return cvat_box(item).replace("</box>", inside)

    draw(root / "images")
    write(root / "annotations.xml", cvat(shape=shape))


# Keras: a line a picture, "path left,top,right,bottom,class left,..."


def keras_lines(numbers: tuple[int, ...], names: str = "{}.jpg") -> list[str]:
    lines = []
    for number in numbers:
        boxes = [
            ",".join(map(str, (*item.corners, CLASSES.index(item.name))))
            for item in PICTURES[number].objects
        ]
        lines.append(" ".join([names.format(number), *boxes]))
    return lines


@add("Keras", TWO)
def keras_text_files(root: Path) -> None:
    draw(root / "images")
    for part, numbers in TWO.items():
        write(root / f"{part}.txt", *keras_lines(numbers, "images/{}.jpg"))
    write(root / "classes.txt", *CLASSES)


@add("Keras", TWO, or_told=True)
def keras_of_another_machine(root: Path) -> None:
    draw(root / "VOCdevkit/JPEGImages")
    for part, numbers in TWO.items():
        lines = keras_lines(numbers, "/home/someone/yolo3/VOCdevkit/JPEGImages/{}.jpg")
        write(root / f"2007_{part}.txt", *lines)
    write(root / "model_data/voc_classes.txt", *CLASSES)


@add("Keras", ONE)
def keras_one_file_of_windows_paths(root: Path) -> None:
    draw(root / "images")
    write(root / "annotations.txt", *keras_lines(ALL, "D:\\pets\\images\\{}.jpg"))
    write(root / "classes.txt", *CLASSES)


# labelme


@add("labelme", TWO)
def labelme_folder_a_part(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / part, numbers)
        labelme(root / part, numbers)


@add("labelme", ONE)
def labelme_json_in_a_folder_of_its_own(root: Path) -> None:
    draw(root / "images")
    labelme(root / "labels", image_path="..\\images\\{}.jpg")


@add("labelme", ONE)
def labelme_image_path_of_another_machine(root: Path) -> None:
    draw(root)
    labelme(root, image_path="/home/someone/pictures/{}.jpg")


@add("labelme", ONE)
def labelme_polygons_and_circles(root: Path) -> None:
    def shape(item: Object) -> dict:
        if item.w == item.h:
            middle = [item.x + item.w / 2, item.y + item.h / 2]
            return {"points": [middle, [middle[0], item.y]], "shape_type": "circle"}
        return {"points": [list(point) for point in item.outline], "shape_type": "polygon"}

    draw(root)
    labelme(root, shape=shape)


@add("labelme", ONE)
def labelme_rectangles_of_four_points(root: Path) -> None:
    def shape(item: Object) -> dict:
        return labelme_rectangle(item) | {"points": [list(point) for point in item.outline]}

    draw(root)
    labelme(root, shape=shape)


@add("labelme", ONE, told=("1.json", "point"))
def labelme_points_are_no_boxes(root: Path) -> None:
    draw(root)
    labelme(root)
    content = json.loads((root / "1.json").read_text())
    content["shapes"].append({"label": "cat", "points": [[9, 9]], "shape_type": "point"})
    write_json(root / "1.json", content)


@add("labelme", WITH_TEST)
def labelme_parts_below_pictures_and_labels(root: Path) -> None:
    for part, numbers in WITH_TEST.items():
        draw(root / "images" / part, numbers)
        labelme(root / "labels" / part, numbers, image_path=f"../../images/{part}/{{}}.jpg")
