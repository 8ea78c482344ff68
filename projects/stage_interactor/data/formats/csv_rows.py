"""CSV: a row for each box, with a head that names the columns, or RetinaNet's without one."""

import csv
from collections.abc import Mapping, Sequence

from ...untrusted.files import require_memory
from .files import IMAGE_SUFFIXES, Files, split_of_path, splits_of_files
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
    "cx": ("cx", "xcenter", "centerx", "xc"), "cy": ("cy", "ycenter", "centery", "yc"),
    "x": ("x", "bboxx", "xtopleft"), "y": ("y", "bboxy", "ytopleft"),
    "w": ("w", "bboxw", "bboxwidth", "boxwidth"), "h": ("h", "bboxh", "bboxheight", "boxheight"),
    "box": ("bbox", "box", "boundingbox"),
    "width": ("width", "imagewidth", "imgwidth"), "height": ("height", "imageheight", "imgheight"),
}  # fmt: skip
_FORMS = ("x0", "y0", "x1", "y1"), ("box",), ("cx", "cy", "w", "h"), ("x", "y", "w", "h")
_RETINANET = ("picture", "x0", "y0", "x1", "y1", "label")


def columns_of(path: str) -> tuple[dict[str, int], list[tuple[int, list[str]]]] | None:
    """Positions of the columns, and rows with their lines; None if it is no table of boxes."""
    text = read_text(path)
    require_memory(path, text)
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error:  # masks may be in it
        return None
    if not rows:
        return None
    head = ["".join(c for c in cell.lower() if c.isalnum()) for cell in rows[0][1]]
    found = {
        key: head.index(name)
        for key, names in _COLUMNS.items()
        if (name := next((name for name in names if name in head), None))
    }
    if {"x", "cx"} & found.keys() and not {"w", "h"} <= found.keys():  # of the box then
        found = {k: v for k, v in found.items() if k not in ("width", "height")} | {
            new: found[old] for new, old in (("w", "width"), ("h", "height")) if old in found
        }
    if "picture" not in found and (named := _columns_of_pictures(rows[1:51])):
        found["picture"] = named[0]
    if "picture" in found and any(all(key in found for key in keys) for keys in _FORMS):
        return found, rows[1:]
    fits = [len(row) == 6 and (_are_numbers(row[1:5]) or not any(row[1:])) for _, row in rows[:50]]
    if fits[0] and sum(fits) > len(fits) / 2:
        return {key: position for position, key in enumerate(_RETINANET)}, rows
    return None


def _columns_of_pictures(rows: Sequence[tuple[int, list[str]]]) -> list[int]:
    """The one column, whatever its head, that has the names of pictures in all rows."""
    found = [
        column
        for column in range(min((len(row) for _, row in rows), default=0))
        if all(row[column].strip().lower().endswith(IMAGE_SUFFIXES) for _, row in rows)
    ]
    return found if len(found) == 1 else []


def read_csv(csv_files: Sequence[str], labels: Files, pictures: Files) -> Source:
    """Of tables, each a part or of several; which, its name, its folder or its pictures' say."""
    source = Source("CSV", {})
    parts = splits_of_files(csv_files)
    for path, own in parts.items():
        where = labels.absolute(path)
        table = columns_of(where)
        assert table is not None  # they were found by it
        columns, rows = table
        labels.used.add(path)
        problems: list[str] = []
        by_picture: dict[str, list[tuple[int, list[str]]]] = {}
        for number, row in rows:
            name = row[columns["picture"]].strip() if len(row) > columns["picture"] else ""
            if not name:
                problems.append(f"{where}, line {number}: no picture is named")
                continue
            by_picture.setdefault(name, []).append((number, row))
        are_corners, are_shares = _form(columns, rows, path, source)
        if "label" not in columns:
            source.notes.append(f"{path} has no column of classes: all are 'object'")
        items: dict[str, tuple[list[Object], tuple[int, int] | None]] = {}  # by picture
        places: dict[str, Part] = {}
        pictures.expect(by_picture, path)
        for name, group in by_picture.items():
            told = f", line {group[0][0]}"
            found = find_picture(pictures, name, path, problems, own, told)
            if found is None:
                continue
            part = source.parts.setdefault(own or split_of_path(found) or "train", Part())
            objects, size = items.setdefault(found, ([], None))
            for number, row in group:
                cells = _cells(columns, row)
                try:
                    size = _size(cells) or size
                    if (values := _values(cells)) is None:
                        continue
                    if not (label := cells.get("label", "object")):
                        raise ValueError("it has no class")
                    box = corners(values) if are_corners else tuple(values)
                    told = f"line {number}"
                    objects.append(Object(label, box, told, relative=are_shares))  # type: ignore
                except (OverflowError, ValueError) as error:
                    told = ",".join(row)[:80]
                    part.problems.append(f"{where}, line {number}: no box: {told!r} ({error})")
            places.setdefault(found, part)
            items[found] = objects, size
        for found, part in places.items():
            objects, size = items[found]
            part.labelled.append(Labelled(pictures.absolute(found), objects, where, size))
        last = source.parts.setdefault(own or next(iter(source.parts), "train"), Part())
        last.problems += problems
    _add_unlabelled(source, parts, pictures)
    return source


def _add_unlabelled(source: Source, files: Mapping[str, str | None], pictures: Files) -> None:
    """Pictures without objects: those that are not named, of a folder that is all of one part.

    That is the folder which holds the annotations, or is called as their part is. Others may be of
    no part.

    Args:
        source: is added to.
        files: of annotations, with their parts.
        pictures: that are there.
    """
    owners: dict[str, set[str]] = {}
    for name, part in source.parts.items():
        for entry in part.labelled:
            folder = pictures.relative(entry.path).rpartition("/")[0]
            owners.setdefault(folder, set()).add(name)
    holding = {path.rpartition("/")[0] for path in files}
    called = {part for part in files.values() if part}
    unnamed = []
    for path in pictures.pictures:
        folder = path.rpartition("/")[0]
        (owner, *others) = owners.get(folder, ("",))
        is_whole = folder in holding or split_of_path(path) in called
        if owner and not others and is_whole and path not in pictures.used | pictures.doubtful:
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


def _values(cells: Mapping[str, str]) -> list[float] | None:
    """The four numbers of a row; None if it says that there is no object.

    Raises:
        ValueError: they are not four numbers.
    """
    written = next([cells[k] for k in keys] for keys in _FORMS if all(k in cells for k in keys))
    if not any(written) or written in (["[]"], ["nan"]):
        return None
    if len(written) == 1:
        written = written[0].strip("[](){}").replace(";", ",").replace(",", " ").split()
    x, y, z, t = map(float, written)
    return [x - z / 2, y - t / 2, z, t] if "cx" in cells else [x, y, z, t]


def _form(
    columns: Mapping[str, int], rows: Sequence[tuple[int, Sequence[str]]], path: str, source: Source
) -> tuple[bool, bool]:
    """Whether the numbers of a table are corners, and whether they are shares of the picture's
    width and height; the one of its box column is told in a note."""
    found = []
    for _, row in rows:
        try:
            if values := _values(_cells(columns, row)):
                found.append(values)
        except ValueError:
            continue
    flat = [value for values in found for value in values]
    shares = bool(flat) and max(flat) <= 1.5 and any(value != int(value) for value in flat)
    if "x0" in columns:
        return True, shares
    # Of x, y, width and height some are not larger than x and y.
    are_corners = (
        "box" in columns and len(found) >= 5 and all(z > x and t > y for x, y, z, t in found)
    )
    told = "x, y (of the left upper corner), w, h"
    if are_corners or "cx" in columns:
        told = "xmin, ymin, xmax, ymax" if are_corners else "x, y (of the centre), w, h"
    source.notes.append(f"boxes of {path} are read as {told}{', in shares' if shares else ''}")
    return are_corners, shares


def _cells(columns: Mapping[str, int], row: Sequence[str]) -> dict[str, str]:
    return {key: row[i].strip() if i < len(row) else "" for key, i in columns.items()}


def _size(cells: Mapping[str, str]) -> tuple[int, int] | None:
    width, height = (float(cells.get(key) or 0) for key in ("width", "height"))
    return (int(width), int(height)) if 0 < width < 2**31 and 0 < height < 2**31 else None


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return all(abs(float(cell)) < 1e12 for cell in cells)
    except ValueError:
        return False
