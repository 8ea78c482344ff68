"""Writes a COCO data set as YOLO and as Pascal VOC, as other programs do."""

import json
import shutil
from pathlib import Path

import yaml


def _parts(json_files):
    for name, path in json_files.items():
        content = json.loads(Path(path).read_text())
        names = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        by_image = {image["id"]: [] for image in content["images"]}
        for item in content["annotations"]:
            by_image[item["image_id"]].append(item)
        yield name, content, names, by_image


def write_yolo(json_files, image_root, out):
    """images/ and labels/ of each part, six decimals, and a data.yaml."""
    for name, content, names, by_image in _parts(json_files):
        for kind in ("images", "labels"):
            (out / kind / name).mkdir(parents=True)
        for image in content["images"]:
            source = Path(image_root[name], image["file_name"])
            shutil.copy(source, out / "images" / name / source.name)
            lines = []
            for item in by_image[image["id"]]:
                x, y, w, h = item["bbox"]
                box = ((x + w / 2) / image["width"], (y + h / 2) / image["height"],
                       w / image["width"], h / image["height"])  # fmt: skip
                index = list(names).index(item["category_id"])
                lines.append(" ".join([str(index), *(f"{value:.6f}" for value in box)]))
            (out / "labels" / name / f"{source.stem}.txt").write_text("\n".join(lines))
    content = {name: f"images/{name}" for name in json_files}
    (out / "data.yaml").write_text(yaml.safe_dump(content | {"names": list(names.values())}))


def write_voc(json_files, image_root, out, with_classes=True):
    """Annotations/, JPEGImages/, ImageSets/Main/, and the order of the classes."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (out / folder).mkdir(parents=True)
    for name, content, names, by_image in _parts(json_files):
        stems = []
        for image in content["images"]:
            source = Path(image_root[name], image["file_name"])
            stem = f"{name}_{source.stem}"
            stems.append(stem)
            shutil.copy(source, out / "JPEGImages" / f"{stem}{source.suffix}")
            objects = ""
            for item in by_image[image["id"]]:
                x, y, w, h = item["bbox"]
                objects += (
                    f"<object><name>{names[item['category_id']]}</name><difficult>0</difficult>"
                    f"<bndbox><xmin>{x + 1:g}</xmin><ymin>{y + 1:g}</ymin>"
                    f"<xmax>{x + w:g}</xmax><ymax>{y + h:g}</ymax></bndbox></object>"
                )
            (out / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}{source.suffix}</filename>{objects}</annotation>"
            )
        (out / "ImageSets/Main" / f"{name}.txt").write_text("\n".join(stems))
    if with_classes:
        (out / "classes.txt").write_text("\n".join(names.values()))
