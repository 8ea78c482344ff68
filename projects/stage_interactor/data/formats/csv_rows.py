"""CSV: a row for each box, with a head that names the columns, or RetinaNet's without one."""

import csv
import json
from collections.abc import Mapping, Sequence

from .files import SPLITS, Files, split_name, split_of_path
from .source import Labelled, Object, Part, Source, corners, find_picture, read_text

# What programs call their columns, in lower case without space, - and _.
_COLUMNS = {
    "picture": ("filename", "image", "imageid", "imagename", "imagepath", "path", "file",
                "filepath", "img", "imgname", "imgpath", "imagefile", "imagefilename"),
    "label": ("class", "label", "classname", "labelname", "category", "categoryname", "name",
              "objectclass", "objectname"),
    "x0": ("xmin", "x1", "left", "xmn", "boxxmin"),
    "y0": ("ymin", "y1", "top", "ymn", "boxymin"),
    "x1": ("xmax", "x2", "right", "xmx", "boxxmax"),
    "y1": ("ymax", "y2", "bottom", "ymx", "boxymax"),
    "x": ("x", "bboxx", "xtopleft"), "y": ("y", "bboxy", "ytopleft"),
    "w": ("w", "bboxw", "bboxwidth", "boxwidth"), "h": ("h", "bboxh", "bboxheight", "boxheight"),
    "box": ("bbox", "box", "boundingbox"),
    "width": ("width", "imagewidth", "imgwidth"), "height": ("height", "imageheight", "imgheight"),
}  # fmt: skip
_RETINANET = ("picture", "x0", "y0", "x1", "y1", "label")


def columns_of(path: str) -> tuple[dict[str, int], list[tuple[int, list[str]]]] | None:
    """Positions of the columns, and rows with their lines; None if it is no table of boxes."""
    lines = read_text(path).splitlines()
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter)
    rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    if not rows:
        return None
    head = ["".join(c for c in cell.lower() if c.isalnum()) for cell in rows[0][1]]
    found = {
        key: head.index(name)
        for key, names in _COLUMNS.items()
        if (name := next((name for name in names if name in head), None))
    }
    if "x" in found and not {"w", "h"} <= found.keys():  # of the box then
        found = {k: v for k, v in found.items() if k not in ("width", "height")} | {
            new: found[old] for new, old in (("w", "width"), ("h", "height")) if old in found
        }
    complete = ("box",), ("x0", "y0", "x1", "y1"), ("x", "y", "w", "h")
    if "picture" in found and any(all(key in found for key in keys) for keys in complete):
        return found, rows[1:]
    fits = [len(row) == 6 and (_are_numbers(row[1:5]) or not any(row[1:])) for _, row in rows[:50]]
    if fits[0] and sum(fits) > len(fits) / 2:
        return {key: position for position, key in enumerate(_RETINANET)}, rows
    return None


def read_csv(csv_files: Sequence[str], labels: Files, pictures: Files) -> Source:
    """Of tables, each a part or of several; which, its name, its folder or its pictures' say."""
    source = Source("CSV", {})
    for path in csv_files:
        where = labels.absolute(path)
        table = columns_of(where)
        assert table is not None  # they were found by it
        columns, rows = table
        labels.used.add(path)
        stem = path.rpartition("/")[2].rpartition(".")[0]
        own = split_name(stem) or split_of_path(path)
        by_picture: dict[str, list[tuple[int, list[str]]]] = {}
        for number, row in rows:
            name = row[columns["picture"]].strip() if len(row) > columns["picture"] else ""
            by_picture.setdefault(name, []).append((number, row))
        relative = _are_shares(columns, rows)
        if "label" not in columns:
            source.notes.append(f"{path} has no column of classes: all are 'object'")
        problems: list[str] = []
        for name, group in by_picture.items():
            told = f", line {group[0][0]}"
            found = find_picture(pictures, name, path, problems, own, told) if name else None
            if found is None:
                continue
            part = source.parts.setdefault(own or split_of_path(found) or "train", Part())
            objects, size = [], None
            for number, row in group:
                cells = {k: row[i].strip() if i < len(row) else "" for k, i in columns.items()}
                try:
                    size = _size(cells) or size
                    if item := _object(cells, number, relative):
                        objects.append(item)
                except (TypeError, ValueError) as error:
                    told = ",".join(row)[:80]
                    part.problems.append(f"{where}, line {number}: no box: {told!r} ({error})")
            part.labelled.append(Labelled(pictures.absolute(found), objects, where, size))
        last = source.parts.setdefault(own or next(iter(source.parts), "train"), Part())
        last.problems += problems
    add_unlabelled(source, pictures)
    source.parts = {name: source.parts[name] for name in SPLITS if name in source.parts}
    return source


def add_unlabelled(source: Source, pictures: Files) -> None:
    """Pictures among those that a part names, which it does not name: those without objects."""
    owners: dict[str, set[str]] = {}
    for name, part in source.parts.items():
        for entry in part.labelled:
            folder = pictures.relative(entry.path).rpartition("/")[0]
            owners.setdefault(folder, set()).add(name)
    unnamed = []
    for path in pictures.pictures:
        (owner, *others) = owners.get(path.rpartition("/")[0], ("",))
        if owner and not others and path not in pictures.used:
            pictures.used.add(path)
            whole = pictures.absolute(path)
            source.parts[owner].labelled.append(Labelled(whole, (), whole))
            unnamed.append(path)
    if unnamed:
        more = ", ..." if len(unnamed) > 1 else ""
        source.notes.append(
            f"{len(unnamed)} pictures are not named in the annotations: they have no objects "
            f"({unnamed[0]}{more})"
        )


def _object(cells: Mapping[str, str], number: int, relative: bool) -> Object | None:
    """None for a row that says that there is no object."""
    boxes = [cells[key] for key in ("box", "x0", "y0", "x1", "y1", "x", "y", "w", "h")
             if key in cells]  # fmt: skip
    if not any(boxes) or (cells.get("box", "x") in ("", "[]", "nan") and "x0" not in cells):
        return None
    if "x0" in cells:
        box = corners(cells[key] for key in ("x0", "y0", "x1", "y1"))
    elif "box" in cells:
        x, y, w, h = map(float, json.loads(cells["box"].replace("(", "[").replace(")", "]")))
        box = (x, y, w, h)
    else:
        x, y, w, h = (float(cells[key]) for key in ("x", "y", "w", "h"))
        box = (x, y, w, h)
    label = cells.get("label", "object")
    if not label:
        raise ValueError("it has no class")
    return Object(label, box, f"line {number}", relative=relative)


def _size(cells: Mapping[str, str]) -> tuple[int, int] | None:
    width, height = (float(cells.get(key) or 0) for key in ("width", "height"))
    return (int(width), int(height)) if 0 < width < 2**31 and 0 < height < 2**31 else None


def _are_shares(columns: Mapping[str, int], rows: Sequence[tuple[int, Sequence[str]]]) -> bool:
    """Whether the corners are shares of width and height: none is above 1, some are between."""
    keys = [key for key in ("x0", "y0", "x1", "y1") if key in columns]
    values: list[float] = []
    for _, row in rows:
        cells = [row[columns[key]] for key in keys if columns[key] < len(row)]
        values += map(float, cells) if _are_numbers(cells) else []
    return bool(values) and max(values) <= 1 and any(value != int(value) for value in values)


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return all(abs(float(cell)) < 1e12 for cell in cells)
    except ValueError:
        return False
