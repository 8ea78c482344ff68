"""One small data set, written in the layouts that people and tools keep theirs in.

Every picture has a size of its own, so that a test knows which one it was given whatever its name.
The first layouts are those that are often met; ``layout_variants.py`` has more of the same kinds.
"""

import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

CLASSES = ("cat", "dog")


class Object(NamedTuple):
    name: str
    x: int
    y: int
    w: int
    h: int

    @property
    def corners(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.w, self.y + self.h

    @property
    def outline(self) -> list[tuple[int, int]]:
        left, top, right, bottom = self.corners
        return [(left, top), (right, top), (right, bottom), (left, bottom)]


class Picture(NamedTuple):
    size: tuple[int, int]  # width, height
    objects: tuple[Object, ...]


# By number; the file names are the numbers. Number 2 has no object, 0 begins with a square.
PICTURES = (
    Picture((64, 48), (Object("cat", 9, 5, 22, 22), Object("dog", 35, 12, 23, 30))),
    Picture((60, 44), (Object("dog", 5, 3, 17, 27),)),
    Picture((56, 52), ()),
    Picture((48, 64), (Object("cat", 11, 14, 29, 31),)),
    Picture(
        (72, 40),
        (Object("cat", 3, 17, 21, 22), Object("cat", 33, 6, 28, 18), Object("dog", 44, 26, 24, 12)),
    ),
    Picture((68, 50), (Object("dog", 13, 7, 37, 29),)),
)
ALL = tuple(range(len(PICTURES)))
Parts = Mapping[str, tuple[int, ...]]
ONE: Parts = {"train": ALL}
TWO: Parts = {"train": (0, 1, 2, 3), "val": (4,)}
THREE: Parts = {**TWO, "test": (5,)}
WITH_TEST: Parts = {"train": (0, 1, 2, 3, 4), "test": (5,)}


@dataclass(frozen=True)
class Layout:
    """What is to be read of what ``build`` writes into a folder.

    Attributes:
        kind: of the data set.
        parts: numbers of the pictures of each.
        told: what a note or a problem must speak of; without it nothing may be wrong.
        at: below the folder, what is named to the reader.
        one_class: the layout has no classes: whatever the reader calls its one is right.
        or_told: need not be understood, as long as a refusal or a problem says so.
    """

    build: Callable[[Path], None]
    kind: str
    parts: Parts
    told: tuple[str, ...] = ()
    at: str = ""
    one_class: bool = False
    or_told: bool = False


@dataclass
class Layouts:
    """Layouts by name, in the order in which they are written down."""

    found: dict[str, Layout] = field(default_factory=dict)

    def add(self, kind: str, parts: Parts, **more) -> Callable:
        def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
            self.found[build.__name__] = Layout(build, kind, parts, **more)
            return build

        return register


OFTEN_MET = Layouts()


# What the builders share.


@functools.cache
def picture_bytes(number: int, suffix: str) -> bytes:
    colour = (40 * number, 250 - 30 * number, 90)
    file = io.BytesIO()
    kind = {".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF"}.get(suffix.lower())
    Image.new("RGB", PICTURES[number].size, colour).save(file, kind or "JPEG")
    return file.getvalue()


def draw(folder: Path, numbers: Sequence[int] = ALL, names: str = "{}.jpg") -> None:
    for number in numbers:
        path = folder / names.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(number, path.suffix))


def write(path: Path, *lines: object, encoding: str = "utf-8", end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode(encoding))


def write_json(path: Path, content: object, encoding: str = "utf-8") -> None:
    write(path, json.dumps(content), encoding=encoding, end="")


def each(pattern: str, numbers: Sequence[int]) -> list[str]:
    return [pattern.format(number) for number in numbers]


def box_line(item: Object, size: tuple[int, int]) -> str:
    """YOLO's centre, width and height."""
    (width, height), (_, x, y, w, h) = size, item
    values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return " ".join([str(CLASSES.index(item.name)), *(f"{value:.6f}" for value in values)])


def outline_line(item: Object, size: tuple[int, int]) -> str:
    """YOLO's corners of a segment, or of a box that is turned."""
    values = (value / size[axis] for point in item.outline for axis, value in enumerate(point))
    return " ".join([str(CLASSES.index(item.name)), *(f"{value:.6f}" for value in values)])


def yolo(
    folder: Path,
    numbers: Sequence[int] = ALL,
    names: str = "{}.txt",
    line: Callable[[Object, tuple[int, int]], str] = box_line,
    **how: str,
) -> None:
    """A label file of each picture; an empty one of number 2."""
    for number in numbers:
        size, objects = PICTURES[number]
        write(folder / names.format(number), *(line(item, size) for item in objects), **how)


def voc_object(item: Object, first: int = 1) -> str:
    """Corners from ``first``; those from 1 are inclusive, as Pascal VOC's."""
    left, top, right, bottom = item.corners
    return (
        f"<object><name>{item.name}</name><difficult>0</difficult>"
        f"<bndbox><xmin>{left + first}</xmin><ymin>{top + first}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
    )


def voc(
    folder: Path,
    numbers: Sequence[int] = ALL,
    file_name: str = "{}.jpg",
    names: str = "{}.xml",
    edit: Callable[[str], str] = str,
    of_object: Callable[[Object], str] = voc_object,
    **how: str,
) -> None:
    for number in numbers:
        (width, height), objects = PICTURES[number]
        text = (
            f"<annotation><folder>images</folder><filename>{file_name.format(number)}</filename>"
            f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            f"{''.join(map(of_object, objects))}</annotation>"
        )
        write(folder / names.format(number), edit(text), **how)


def coco(
    numbers: Sequence[int] = ALL, names: str = "{}.jpg", first_class: int = 1, **more: object
) -> dict:
    """The content of a JSON file; ``more`` is added to every annotation."""
    images, annotations = [], []
    for number in numbers:
        (width, height), objects = PICTURES[number]
        name = names.format(number)
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for item in objects:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number + 1, "bbox": list(item[1:]),
                 "category_id": CLASSES.index(item.name) + first_class, "area": item.w * item.h,
                 "iscrowd": 0, **more}
            )  # fmt: skip
    categories = [{"id": i + first_class, "name": name} for i, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def rows(
    numbers: Sequence[int], row: Callable[[int, Picture, Object], str], without: str = ""
) -> list[str]:
    """A row an object; of a picture of none ``without``, where that is given."""
    found = []
    for number in numbers:
        picture = PICTURES[number]
        found += [row(number, picture, item) for item in picture.objects]
        if not picture.objects and without:
            found.append(without.format(number))
    return found


def plain_row(number: int, picture: Picture, item: Object) -> str:
    return ",".join(map(str, (f"{number}.jpg", *item.corners, item.name)))


TENSORFLOW_HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax"


def tensorflow_row(number: int, picture: Picture, item: Object) -> str:
    return ",".join(map(str, (f"{number}.jpg", *picture.size, item.name, *item.corners)))


def via_rectangle(item: Object) -> dict:
    return {"name": "rect", "x": item.x, "y": item.y, "width": item.w, "height": item.h}


def via_polygon(item: Object) -> dict:
    xs, ys = zip(*item.outline)
    return {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)}


def via(
    numbers: Sequence[int],
    shape: Callable[[Object], dict] = via_rectangle,
    attributes: Callable[[str], dict] = lambda name: {"name": name},
    names: str = "{}.jpg",
) -> dict:
    """The pictures of VIA's JSON, by name and size of the file."""
    found = {}
    for number in numbers:
        name = names.format(number)
        regions = [
            {"shape_attributes": shape(item), "region_attributes": attributes(item.name)}
            for item in PICTURES[number].objects
        ]
        entry = {"filename": name, "size": 600 + number, "file_attributes": {}, "regions": regions}
        found[f"{name}{600 + number}"] = entry
    return found


def cvat_box(item: Object) -> str:
    left, top, right, bottom = item.corners
    corners = f'xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"'
    return f'<box label="{item.name}" occluded="0" {corners} z_order="0"></box>'


def cvat(
    numbers: Sequence[int] = ALL,
    shape: Callable[[Object], str] = cvat_box,
    names: str = "{}.jpg",
    attributes: Callable[[int], str] = lambda number: "",
    task: str = "pets",
) -> str:
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    images = ""
    for number in numbers:
        (width, height), objects = PICTURES[number]
        images += (
            f'<image id="{number}" name="{names.format(number)}" width="{width}" '
            f'height="{height}"{attributes(number)}>{"".join(map(shape, objects))}</image>'
        )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task>'
        f"<name>{task}</name><labels>{labels}</labels></task></meta>{images}</annotations>"
    )


def labelme_rectangle(item: Object) -> dict:
    """The dogs' from their last corner to their first."""
    left, top, right, bottom = item.corners
    points = [[left, top], [right, bottom]]
    return {"points": points[::-1] if item.name == "dog" else points, "shape_type": "rectangle"}


def labelme(
    folder: Path,
    numbers: Sequence[int] = ALL,
    shape: Callable[[Object], dict] = labelme_rectangle,
    image_path: str = "{}.jpg",
    **how: str,
) -> None:
    for number in numbers:
        (width, height), objects = PICTURES[number]
        shapes = [{"label": o.name, "group_id": None, "flags": {}, **shape(o)} for o in objects]
        content = {
            "version": "5.2.1", "flags": {}, "shapes": shapes, "imageData": None,
            "imagePath": image_path.format(number), "imageHeight": height, "imageWidth": width,
        }  # fmt: skip
        write_json(folder / f"{number}.json", content, **how)


def yolo_parts(root: Path, parts: Parts, folder: str = "{part}/{kind}", **how) -> None:
    """Pictures and label files of each part, such as ``train/images`` and ``train/labels``."""
    for part, numbers in parts.items():
        draw(root / folder.format(part=part, kind="images"), numbers)
        yolo(root / folder.format(part=part, kind="labels"), numbers, **how)


ROBOFLOW_NAMES = {"train": "train", "val": "valid", "test": "test"}


# The layouts that are often met.


@OFTEN_MET.add("COCO", TWO)
def coco_custom_json_names(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / f"{part}2017", numbers)
        content = coco(numbers, first_class=0)
        write_json(root / f"annotations/custom_{part}.json", content)


@OFTEN_MET.add("COCO", TWO)
def coco_json_beside_images_folder(root: Path) -> None:
    """Exports of COCO and of YOLO in one place."""
    for part, numbers in TWO.items():
        folder = root / ROBOFLOW_NAMES[part]
        draw(folder / "images", numbers)
        yolo(folder / "labels", numbers)
        write_json(folder / "_annotations.coco.json", coco(numbers))


@OFTEN_MET.add("COCO", ONE)
def coco_one_json(root: Path) -> None:
    draw(root / "JPEGImages")
    content = coco(names="JPEGImages/{}.jpg")
    content["categories"].insert(0, {"id": 0, "name": "_background_"})
    write_json(root / "annotations.json", content)


@OFTEN_MET.add("CSV", TWO)
def csv_roboflow_and_retinanet(root: Path) -> None:
    """No header; number 2 has no row."""
    for part, numbers in TWO.items():
        folder = root / ROBOFLOW_NAMES[part]
        draw(folder, numbers)
        write(folder / "_annotations.csv", *rows(numbers, plain_row))


@OFTEN_MET.add("CVAT", ONE)
def cvat_xml(root: Path) -> None:
    draw(root / "images")
    write(root / "annotations.xml", cvat())


@OFTEN_MET.add("YOLO", {"train": (0, 1, 2, 3, 5), "val": (4,)})
def darknet_obj_data(root: Path) -> None:
    draw(root / "obj_train_data")
    yolo(root / "obj_train_data")
    write(root / "obj.names", *CLASSES)
    elsewhere = "/content/darknet/data"
    lines = ("train = data/train.txt", f"valid = {elsewhere}/valid.txt", "names = data/obj.names")
    write(root / "obj.data", "classes = 2", *lines, "backup = backup/")
    write(root / "train.txt", *each("data/obj_train_data/{}.jpg", (0, 1, 2, 3, 5)))
    write(root / "valid.txt", f"{elsewhere}/obj_train_data/4.jpg")


@OFTEN_MET.add("labelme", {"train": (0, 1, 3, 4, 5)}, told=("2.jpg",))
def labelme_json_beside_images(root: Path) -> None:
    """Number 2 has no JSON: that it is left out, or has no object, is said."""
    draw(root)
    labelme(root, (0, 1, 3, 4, 5))


@OFTEN_MET.add("VIA", TWO)
def via_json(root: Path) -> None:
    for part, numbers in TWO.items():
        draw(root / part, numbers)
        entries = via(numbers, lambda o: (via_polygon if o.name == "dog" else via_rectangle)(o))
        content = {"_via_settings": {}, "_via_attributes": {}, "_via_img_metadata": entries}
        write_json(root / part / "via_region_data.json", content)


def list_sets(root: Path, parts: Parts, **how: str) -> None:
    for part, numbers in parts.items():
        write(root / f"ImageSets/Main/{part}.txt", *numbers, **how)


@OFTEN_MET.add("Pascal VOC", THREE)
def voc_annotations_lowercase(root: Path) -> None:
    draw(root / "JPEGImages", names="{}.png")
    voc(root / "annotations", file_name="{}.png")
    list_sets(root, {**THREE, "trainval": (0, 1, 2, 3, 4)})


@OFTEN_MET.add("Pascal VOC", ONE)
def voc_annots_images(root: Path) -> None:
    draw(root / "images", names="{}.png")
    voc(root / "annots", file_name="{}.png")


@OFTEN_MET.add("Pascal VOC", WITH_TEST)
def voc_devkit_in_repository_empty_val(root: Path) -> None:
    """No part of no picture."""
    devkit = root / "VOCdevkit/VOC2007"
    draw(devkit / "JPEGImages")
    voc(devkit / "Annotations")
    list_sets(devkit, {**WITH_TEST, "val": ()})
    write(devkit / "ImageSets/Main/cat_train.txt", "0  1", "1 -1", "2 -1", "3  1", "4  1")


@OFTEN_MET.add("Pascal VOC", WITH_TEST)
def voc_labelimg_images_train_test(root: Path) -> None:
    """The XML files of LabelImg, and the CSV files that a tutorial makes of them."""
    for part, numbers in WITH_TEST.items():
        draw(root / "images" / part, numbers, "{}.JPG")
        voc(root / "images" / part, numbers, "{}.JPG")
        text = "\n".join(rows(numbers, tensorflow_row)).replace(".jpg", ".JPG")
        write(root / f"images/{part}_labels.csv", TENSORFLOW_HEADER, text)


@OFTEN_MET.add("Pascal VOC", THREE)
def voc_two_image_folders(root: Path) -> None:
    draw(root / "JPEGImages-trainval", (0, 1, 2, 3, 4))
    draw(root / "JPEGImages-test", (5,))
    voc(root / "Annotations")
    list_sets(root, THREE)


@OFTEN_MET.add("YOLO", THREE)
def yolo_beside_images_darknet_labels(root: Path) -> None:
    for part, numbers in THREE.items():
        folder = root / ROBOFLOW_NAMES[part]
        draw(folder, numbers)
        yolo(folder, numbers)
        write(folder / "_darknet.labels", *CLASSES)


@OFTEN_MET.add("YOLO", ONE)
def yolo_classes_txt_no_yaml(root: Path) -> None:
    draw(root / "images")
    yolo(root / "labels")
    write(root / "labels/classes.txt", *CLASSES)


@OFTEN_MET.add("YOLO", TWO)
def yolo_yaml_absolute_path_of_another_machine(root: Path) -> None:
    yolo_parts(root / "datasets", TWO)
    train = "train: /content/someone/project/datasets/train/images"
    val = r"val: C:\Users\someone\project\datasets\val\images"
    write(root / "data.yaml", train, val, "nc: 2", "names: ['cat', 'dog']")


@OFTEN_MET.add("YOLO", TWO)
def yolo_yaml_in_subfolder(root: Path) -> None:
    """The folder was called my_dataset once."""
    yolo_parts(root / "dataset", {"train": TWO["train"], "valid": TWO["val"]})
    places = "train: ./my_dataset/train/images", "val: ./my_dataset/valid/images"
    write(root / "dataset/data.yaml", *places, "nc: 2", "names: ['cat', 'dog']")


@OFTEN_MET.add("YOLO", TWO)
def yolo_yaml_lists_with_windows_paths(root: Path) -> None:
    elsewhere = r"C:\Users\someone\my project\data"
    draw(root / "data/images", (0, 1, 2, 3, 4))
    yolo(root / "data/labels", (0, 1, 2, 3, 4))
    for part, numbers in TWO.items():
        write(root / f"data/{part}.txt", *each(elsewhere + r"\images\{}.jpg", numbers))
    places = rf"train: {elsewhere}\train.txt", rf"val: {elsewhere}\val.txt"
    write(root / "dataset.yaml", "names:", "- cat", "- dog", "nc: 2", *places)


@OFTEN_MET.add("YOLO", {"train": TWO["train"]}, told=("valid", "test"))
def yolo_yaml_missing_valid(root: Path) -> None:
    """That two of its parts are not there is said."""
    yolo_parts(root, {"train": TWO["train"]})
    places = "train: ../train/images", "val: ../valid/images", "test: ../test/images"
    write(root / "data.yaml", *places, "", "nc: 2", "names: ['cat', 'dog']")
