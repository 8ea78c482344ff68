"""Data sets that somebody made to do harm, or that were damaged, drawn at random.

They are the layouts of ``tests/data`` with one of their files changed, and data sets whose names
lead elsewhere, one for each format.
"""

import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "data"))
from layout_variants import VARIANTS  # noqa: E402
from layouts import OFTEN_MET  # noqa: E402

LAYOUTS = {
    name: layout
    for name, layout in (OFTEN_MET.found | VARIANTS.found).items()
    if not layout.or_told and not layout.at
}
TEXTS = {".csv", ".data", ".json", ".labels", ".names", ".txt", ".xml", ".yaml"}
NUMBER = re.compile(rb"\d+(?:\.\d+)?")
WORDS = (
    b"nan", b"-1", b"1e400", b"9" * 400, b"9" * 10**6, b"null", b"[1, 2]", b"", b"x", b"0",
    b"[" * 3000, b"..", b"/dev/zero", b"../../../../etc/passwd", b"file:///etc/passwd", b"~root",
    b"%2e%2e/%2e%2e/etc/passwd", b"C:\\x.jpg", b"..\\..\\etc\\passwd", b"a\0b",
)  # fmt: skip
LAUGHS = b'<!DOCTYPE l [<!ENTITY a "ha">%s]>' % b"".join(
    b'<!ENTITY %c "%s">' % (c, b"&%c;" % (c - 1) * 10) for c in b"bcdefghij"
)
LETTERS = "abcdefghijkl"
YAML_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip(LETTERS, LETTERS[1:])
)


def damage(content: bytes, rng: random.Random) -> bytes:
    """One change to a text: of a number, a letter, a part, or all of it."""
    kind = rng.randrange(8)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return (
            content[:at]
            + rng.choice((b"\0", b"\xff", b'"', b"}", b"\n", b"<", b"&j;"))
            + content[at:]
        )
    if kind == 2:
        numbers = list(NUMBER.finditer(content))
        if numbers:
            found = rng.choice(numbers)
            return content[: found.start()] + rng.choice(WORDS) + content[found.end() :]
    if kind == 3:
        names = list(re.finditer(rb"[\w./-]+\.(?:jpe?g|png|bmp)", content))
        if names:
            found = rng.choice(names)
            return content[: found.start()] + rng.choice(WORDS) + content[found.end() :]
    if kind == 4:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 20)):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 5:
        return LAUGHS + content.replace(b"<name>", b"<name>&j;", 1)
    if kind == 6:
        return YAML_LAUGHS.encode() + content
    return content + content


def mutated(root: Path, rng: random.Random) -> str:
    """Writes one; its name, to find it again."""
    name = rng.choice(sorted(LAYOUTS))
    root.mkdir()
    LAYOUTS[name].build(root)
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    texts = [path for path in files if path.suffix in TEXTS]
    if texts and rng.random() < 0.8:
        path = rng.choice(texts)
        path.write_bytes(damage(path.read_bytes(), rng))
        return f"{name}, {path.relative_to(root)}"
    path = rng.choice(files)
    kind = rng.choice(("pipe", "folder", "loop", "device", "kernel", "empty", "flips"))
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "device", "kernel"):
        places = {"loop": path, "device": "/dev/zero", "kernel": "/proc/self/status"}
        path.symlink_to(places[kind])
    else:
        path.write_bytes(b"" if kind == "empty" else damage(content, rng))
    return f"{name}, {path.relative_to(root)} is a {kind}"


# Data sets of two pictures to train on, of which the second has a name that leads elsewhere.


def _coco(root: Path, name: str) -> None:
    names = ["a.png", name]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [2, 2, 20, 20]} for n in (1, 2)]
    images = [{"id": n, "file_name": f, "width": 40, "height": 30} for n, f in enumerate(names, 1)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "train.json").write_text(json.dumps(content))


def _voc(root: Path, name: str) -> None:
    box = "<xmin>2</xmin><ymin>2</ymin><xmax>20</xmax><ymax>20</ymax>"
    for stem, file in (("a", "a.png"), ("b", name)):
        (root / f"{stem}.xml").write_text(
            f"<annotation><filename>{file}</filename><object><name>cat</name><bndbox>{box}</bndbox>"
            "</object></annotation>"
        )


def _csv(root: Path, name: str) -> None:
    rows = [f"{file},2,2,20,20,cat" for file in ("a.png", name)]
    (root / "train.csv").write_text("\n".join(["filename,xmin,ymin,xmax,ymax,class", *rows]))


def _via(root: Path, name: str) -> None:
    shape = {"name": "rect", "x": 2, "y": 2, "width": 20, "height": 20}
    region = {"shape_attributes": shape, "region_attributes": {"class": "cat"}}
    entries = {f: {"filename": f, "size": 1, "regions": [region]} for f in ("a.png", name)}
    (root / "via_region_data.json").write_text(json.dumps(entries))


def _labelme(root: Path, name: str) -> None:
    shape = {"label": "cat", "shape_type": "rectangle", "points": [[2, 2], [20, 20]]}
    for stem, file in (("a", "a.png"), ("b", name)):
        (root / f"{stem}.json").write_text(json.dumps({"shapes": [shape], "imagePath": file}))


def _cvat(root: Path, name: str) -> None:
    box = '<box label="cat" xtl="2" ytl="2" xbr="20" ybr="20"/>'
    images = "".join(f'<image name="{file}">{box}</image>' for file in ("a.png", name))
    (root / "annotations.xml").write_text(f"<annotations>{images}</annotations>")


def _keras(root: Path, name: str) -> None:
    (root / "train.txt").write_text("".join(f"{f} 2,2,20,20,0\n" for f in ("a.png", name)))
    (root / "classes.txt").write_text("cat\n")


def _yolo_list(root: Path, name: str) -> None:
    (root / "train.txt").write_text(f"a.png\n{name}\n")
    (root / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: train.txt\nnames: [cat]\n")


def _darknet(root: Path, name: str) -> None:
    (root / "train.txt").write_text(f"a.png\n{name}\n")
    (root / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "obj.names").write_text("cat\n")
    (root / "obj.data").write_text("classes = 1\ntrain = train.txt\nnames = obj.names\n")


FORMATS: dict[str, Callable[[Path, str], None]] = {
    "coco": _coco, "voc": _voc, "csv": _csv, "via": _via, "labelme": _labelme, "cvat": _cvat,
    "keras": _keras, "yolo_list": _yolo_list, "darknet": _darknet,
}  # fmt: skip


def leading_out(folder: Path, kind: str, written: Callable[[Path], str]) -> tuple[Path, Path, str]:
    """Writes a data set with a name that leads to a picture beside it: ``written`` of its path.

    Returns:
        The data set, the picture, and its name.
    """
    root, secret = folder / "data", folder / "elsewhere" / "secret.png"
    for path in (root / "a.png", secret):
        path.parent.mkdir()
        Image.new("RGB", (40, 30), (200, 30, 60)).save(path)
    secret.with_suffix(".txt").write_text("0 0.5 0.5 0.5 0.5\n")
    name = written(secret)
    FORMATS[kind](root, name)
    return root, secret, name
