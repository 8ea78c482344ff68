"""YOLO and Darknet: a text file of boxes for each picture, and a file that names the classes."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from ...untrusted.files import OutsideName, parse_yaml, read_bytes
from .files import (
    SPLITS,
    AmbiguousName,
    Files,
    parts_of,
    split_name,
    split_of_path,
)
from .keras import is_keras
from .source import (
    Labelled,
    Object,
    Part,
    Source,
    around,
    find_picture,
    read_lines,
    read_names,
    read_text,
    require_distinct_names,
)

_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
_LABEL_FOLDERS = ("labels", "label", "labeltxt", "annotations", "annotation", "annots", "txt")
_NAMES_FILES = ("classes.txt", "_darknet.labels", "obj.names", "names.txt", "labels.txt")


def load_yaml(path: str) -> dict | None:
    """None if there is something else than a mapping in it. All values are text, as written."""
    content = parse_yaml(read_text(path), path)
    return content if isinstance(content, dict) else None


def read_yaml(path: str, labels: Files, pictures: Files) -> Source:
    """A description in YAML: ``names``, and where ``train``, ``val`` and ``test`` lie."""
    content = load_yaml(path) or {}
    names = _names(path, content, labels)
    folder = Path(path).parent
    start = content.get("path") or "."
    if not isinstance(start, str) or "\0" in start:
        raise ValueError(f"{path}: 'path' must be a folder, got {start!r:.200}")
    base = Path(os.path.normpath(folder / os.path.expanduser(start)))
    source = Source("YOLO", {}, names)
    if content.get("nc") not in (None, str(len(names))):
        told = f"nc is {content['nc']!r:.40}, but there are {len(names)} names: these count"
        source.notes.append(told)
    found: dict[str, list[str]] = {}
    for name in SPLITS:
        places = content.get(name) or (content.get("valid") if name == "val" else None)
        if not places:
            continue
        part = source.parts[name] = Part()
        found[name] = []
        for place in [places] if isinstance(places, str) else places:
            if not isinstance(place, str):
                raise ValueError(f"{path}: {name!r} must be folders or lists, got {places!r:.200}")
            listed = _pictures_at(place, path, [base, folder], pictures, part.problems, name)
            if listed is None:
                source.notes.append(f"{name}: {place} is not there, nor is anything that ends so")
            else:
                found[name] += listed
        if not found[name]:
            source.notes.append(f"no {name!r}: no picture is where {Path(path).name} says")
            del source.parts[name], found[name]
    if not source.parts:
        told = "; ".join(source.notes) or "it names neither 'train' nor 'val'"
        raise ValueError(f"{path}: {told}. Name the folder of the pictures with --images")
    has_keypoints = "kpt_shape" in content
    for name, part in source.parts.items():
        _read_labels(part, name, found[name], names, labels, pictures, has_keypoints, source)
    return _with_labels(source)


def read_darknet(path: str, labels: Files, pictures: Files) -> Source:
    """Darknet's ``obj.data``: ``train`` and ``valid`` are lists of pictures, ``names`` a file."""
    content = dict(
        (key.strip(), value.strip())
        for key, _, value in (line.partition("=") for line in read_lines(path))
    )
    folder = Path(path).parent
    names_file = _existing(content.get("names") or "obj.names", path, [folder], labels)
    if names_file is None:
        raise ValueError(f"{path}: names = {content.get('names')} is not below {labels.root}")
    names = read_lines(names_file)
    require_distinct_names(names, names_file)
    labels.used.add(labels.relative(names_file))
    source = Source("YOLO", {}, names)
    for key in ("train", "valid", "val", "test"):
        if key not in content:
            continue
        part = Part()
        name = split_name(key) or "train"
        listed = _pictures_at(content[key], path, [folder], pictures, part.problems, name)
        if listed is None:
            source.notes.append(f"{key}: {content[key]} is not there, nor is a file that ends so")
        elif listed:
            source.parts[name] = part
            _read_labels(part, name, listed, names, labels, pictures, False, source)
    if not source.parts:
        raise ValueError(f"{path}: neither 'train' nor 'valid' is there: {content!r:.200}")
    return _with_labels(source)


def read_plain(
    names_files: list[str], labels: Files, pictures: Files, home: str, apart: Iterable[str] = ()
) -> Source:
    """Label files beside the pictures or in ``labels/``, and a file with a class in each line.

    ``apart`` are folders below ``home`` that hold data sets of their own.
    """
    texts = [path for path in names_files if not path.endswith((".yaml", ".yml"))]
    if texts:
        names = read_names(texts, labels)
    else:
        whole = labels.absolute(names_files[0])
        names = _names(whole, load_yaml(whole) or {}, labels)
        labels.used.add(names_files[0])
    source = Source("YOLO", {}, names, [f"classes from {(texts or names_files)[0]}"])
    problems: dict[str, list[str]] = {}
    parts = _parts_by_lists(labels, pictures, home, problems)
    parts = parts or _parts_by_folders(labels, pictures, home, apart)
    for name, paths in parts.items():
        part = source.parts[name] = Part(problems=problems.get(name, []))
        _read_labels(part, name, paths, names, labels, pictures, False, source)
    if not source.parts:
        raise ValueError(
            f"{labels.absolute(names_files[0])} names classes of YOLO, but no picture below "
            f"{pictures.root} has a label file of its name beside it or in labels/: name their "
            "folder with --annotations"
        )
    return source


def _with_labels(source: Source) -> Source:
    """Raises a ValueError if no picture at all has a label file."""
    problems = [text for part in source.parts.values() for text in part.problems]
    if source.no_labels.keys() == source.parts.keys():
        raise ValueError("; ".join([*source.no_labels.values(), *problems][:4]))
    for name, told in source.no_labels.items():
        source.parts[name].problems.append(told)
    return source


def is_names_file(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name in _NAMES_FILES or name.endswith(".names")


def _names(path: str, content: Mapping, labels: Files) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        keys = list(names)
        if sorted(keys) != sorted(map(str, range(len(keys)))):
            raise ValueError(f"{path}: the keys of 'names' must be 0, 1, ..., got {keys!r:.200}")
        names = [names[key] for key in sorted(keys, key=int)]
    if isinstance(names, str):
        file = _existing(names, path, [Path(path).parent], labels, search=False)
        names = read_lines(file) if file and os.path.isfile(file) else names
    if names is None:
        beside = [Path(path).parent / name for name in _NAMES_FILES]
        names = next((read_lines(file) for file in beside if file.is_file()), None)
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name.strip() for name in names)
    ):
        raise ValueError(f"{path}: 'names' must be the list of the classes, got {names!r:.200}")
    names = [name.strip() for name in names]
    require_distinct_names(names, path)
    return names


def _existing(
    place: str, where: str, bases: Iterable[Path], files: Files, search: bool = True
) -> str | None:
    """The file or folder that is meant: as it is written, or by the end of its path.

    Raises:
        OutsideName: it is there, but where names in the file ``where`` may not lead.
    """
    if "\0" in place:
        return None
    outside = False
    for written in dict.fromkeys((place, place.replace("\\", "/"))):
        # Some exports write ../train/images and mean the file's own folder.
        for candidate in (written, written.removeprefix("../")):
            for base in bases:
                try:
                    path = base / Path(candidate).expanduser()
                    # Without "..", which behind a link would lead elsewhere than it says.
                    found = os.path.normpath(path)
                    if path.exists() and files.may_read(found):
                        return found
                    outside |= path.exists()
                except (OSError, RuntimeError):  # a name that is too long; a user that is not
                    continue
    if search:
        last = parts_of(place)[-1:]
        ends = {
            path: files.common_end(place, path)
            for path in files.paths
            if [path.rpartition("/")[2].lower()] == [part.lower() for part in last]
        }
        longest = max(ends.values(), default=0)
        best = [path for path, n in ends.items() if n == longest]
        if len(best) > 1 and len({read_bytes(files.absolute(path)) for path in best}) > 1:
            raise AmbiguousName(f"{place!r} could be any of {', '.join(best)}")
        if best:
            return files.absolute(best[0])
        if (folder := files.folder(place)) is not None:
            return files.absolute(folder)
    if outside:
        raise OutsideName(where, "place", place, files.root)
    return None


def _pictures_at(
    place: str, path: str, bases: list[Path], pictures: Files, problems: list[str], split: str
) -> list[str] | None:
    """Absolute paths of the pictures of a part, in a folder or a list; None if there is neither."""
    try:
        # Named by a person, the pictures' folder comes before what a file says.
        found = _existing(place, path, [] if pictures.restricted else bases, pictures)
    except AmbiguousName as error:
        raise ValueError(f"{path}: {error}; name the folder with --images") from error
    if found is None:
        return None
    if os.path.isdir(found):
        inside = pictures.relative(found)
        if inside.startswith(".."):
            other = Files(found)
            return [other.absolute(name) for name in other.pictures]
        paths = pictures.below("" if inside == "." else inside)
        return [pictures.absolute(name) for name in paths]
    near = pictures.relative(found)
    pictures.used.add(near)
    return _listed(found, near, bases, pictures, problems, split)


def _listed(
    list_file: str,
    near: str,
    bases: list[Path],
    pictures: Files,
    problems: list[str],
    split: str,
) -> list[str]:
    """The pictures of a part that a file lists, a path in each line."""
    found: dict[str, None] = {}
    folder = os.path.dirname(list_file)
    lines = read_lines(list_file)
    pictures.expect(lines, near)
    for line in lines:
        if is_keras(line):
            raise ValueError(f"{list_file} holds boxes, where a list of pictures is meant")
        name = line.replace("\\", "/")
        direct = next(
            (
                candidate
                for base in (folder, *map(str, bases))
                if "\0" not in name
                and os.path.isfile(candidate := os.path.normpath(os.path.join(base, name)))
                and pictures.may_read(candidate)
            ),
            None,
        )
        if direct is None:
            below = find_picture(pictures, line, near, problems, split)
            direct = below and os.path.normpath(pictures.absolute(below))
        if direct in found:
            problems.append(f"{list_file}: {line} is listed twice")
        elif direct:
            found[direct] = None
    return list(found)


def _parts_by_lists(
    labels: Files, pictures: Files, home: str, problems: dict[str, list[str]]
) -> dict[str, list[str]]:
    """By ``train.txt`` ... in the top folder, if the pictures that they list are there."""
    parts = {}
    for path in labels.with_suffix(".txt"):
        folder, _, name = path.rpartition("/")
        split = split_name(name[: -len(".txt")])
        if folder == home and split and name.lower() not in _NAMES_FILES:
            listed = _listed(
                labels.absolute(path), path, [], pictures, problems.setdefault(split, []), split
            )
            if listed:
                labels.used.add(path)
                parts[split] = listed
    return parts


def _parts_by_folders(
    labels: Files, pictures: Files, home: str, apart: Iterable[str]
) -> dict[str, list[str]]:
    """By the names of the folders, those in which a picture has a label file."""
    folders: dict[str, list[str]] = {}
    starts = tuple(f"{folder}/" for folder in apart)
    for path in pictures.originals_below(home):
        if path.startswith(starts):
            continue
        folders.setdefault(os.path.dirname(pictures.absolute(path)), []).append(path)
    finder = _LabelFinder(labels, pictures)
    parts: dict[str, list[str]] = {}
    for paths in folders.values():
        whole = [os.path.normpath(pictures.absolute(path)) for path in paths]
        if any(finder.find(path) for path in whole):
            parts.setdefault(split_of_path(paths[0]) or "", []).extend(whole)
    if "" in parts and len(parts) == 1:
        return {"train": parts[""]}
    parts.pop("", None)  # beside parts that say what they are; told as files that are not used
    return {name: parts[name] for name in SPLITS if name in parts}


class _LabelFinder:
    """Finds the label files of pictures; what a folder holds is looked up once."""

    def __init__(self, labels: Files, pictures: Files):
        self._listing = lru_cache(maxsize=None)(self._read_folder)
        self.folders = lru_cache(maxsize=None)(self._label_folders)
        self._named_labels = lru_cache(maxsize=None)(self._find_named_labels)
        self._only: list[str] = []  # where a person said that labels, or pictures, are
        if labels.restricted:
            self._only = [labels.root]
        elif pictures.restricted:
            named = (path.rpartition("/")[2].lower() for path in sorted(labels.folders))
            at = zip(sorted(labels.folders), named)
            self._only = [labels.absolute(path) for path, name in at if name in _LABEL_FOLDERS]
            self._only.append(labels.root)

    def find(self, picture: str) -> list[str]:
        """Paths of its label files, that of ``labels/`` first."""
        folder, name = os.path.split(os.path.abspath(picture))
        stem = os.path.splitext(name)[0]
        found = (
            os.path.join(place, file)
            for place in self.folders(folder)
            for listing in (self._listing(place),)
            if (file := listing.get(stem) or listing.get(stem.lower()))
        )
        return list(dict.fromkeys(found))

    @staticmethod
    def _read_folder(folder: str) -> dict[str, str]:
        names = [name for name in os.listdir(folder) if name.lower().endswith(".txt")]
        stems = {os.path.splitext(name)[0]: name for name in names}
        return {stem.lower(): name for stem, name in stems.items()} | stems

    @staticmethod
    def _find_named_labels(folder: str) -> list[str]:
        """Folders in this one that are called so."""
        try:
            names = {name.lower(): name for name in sorted(os.listdir(folder))}
        except OSError:
            return []
        return [os.path.join(folder, names[known]) for known in _LABEL_FOLDERS if known in names]

    def _label_folders(self, folder: str) -> list[str]:
        """Where labels of a folder's pictures may lie; folders that are there."""
        if self._only:
            name = os.path.basename(folder)
            split = split_of_path(f"{folder}/") or ""
            within = [os.path.join(at, part) for part in (name, split, "") for at in self._only]
            return [path for path in dict.fromkeys(within) if os.path.isdir(path)]
        found = []
        parts = folder.split(os.sep)
        for index in reversed(range(len(parts))):  # labels/train of images/train
            if parts[index].lower() in _IMAGE_FOLDERS:
                above = os.sep.join(parts[:index]) or os.sep
                found += [os.path.join(at, *parts[index + 1 :]) for at in self._named_labels(above)]
        above, name = os.path.split(folder)
        beside = self._named_labels(above)
        found += [os.path.join(at, name) for at in beside]  # labels/train of train
        found += [*self._named_labels(folder), folder, *beside]
        return [path for path in dict.fromkeys(found) if os.path.isdir(path)]


def _read_labels(
    part: Part,
    name: str,
    paths: list[str],
    names: list[str],
    labels: Files,
    pictures: Files,
    has_keypoints: bool,
    source: Source,
) -> None:
    finder = _LabelFinder(labels, pictures)
    missing = 0
    for path in sorted(paths):
        found = finder.find(path)
        if len(found) > 1 and read_bytes(found[0]) != read_bytes(found[1]):
            part.problems.append(f"{path}: {found[0]} is read, {found[1]} says something else")
        objects = list(_objects(found[0], names, has_keypoints, part.problems)) if found else []
        missing += not found
        labels.used.update(map(labels.relative, found))
        if found and (owner := source.owners.setdefault(found[0], path)) != path:
            if os.path.dirname(owner) != os.path.dirname(path):
                raise ValueError(
                    f"{found[0]} could be of {owner} and of {path}: name the folder of the "
                    "pictures with --images"
                )
            part.problems.append(f"{path}: its labels, {found[0]}, are those of {owner}")
            continue
        part.labelled.append(Labelled(path, objects, found[0] if found else path))
    if missing == len(paths) and paths:
        looked = ", ".join(finder.folders(os.path.dirname(os.path.abspath(paths[0]))))
        source.no_labels[name] = f"no picture of {name} has a label file; looked for in {looked}"
    elif missing:
        source.notes.append(
            f"{missing} of {len(paths)} pictures of {name} have no label file: they are pictures "
            "without objects; take those away that have some"
        )


def _objects(
    path: str, names: list[str], has_keypoints: bool, problems: list[str]
) -> Iterator[Object]:
    try:
        lines = read_text(path).splitlines()
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) == 10 and words[8] in names:  # DOTA's: corners, class, difficulty
            try:
                points = [float(word) for word in words[:8]]
            except ValueError:
                problems.append(f"{where}: not numbers: {line.strip()[:60]!r}")
                continue
            box = around(zip(points[::2], points[1::2]))
            yield Object(words[8], box, f"line {number}", is_crowd=words[9] != "0")
            continue
        try:
            index, *values = (float(word) for word in words)
        except ValueError:
            if not line.startswith(("imagesource:", "gsd:")):  # heads of DOTA's files
                problems.append(f"{where}: not numbers: {line.strip()[:60]!r}")
            continue
        # Keypoints have a third number each, 2 where they are seen, which outlines have not.
        marks = values[6::3]
        if has_keypoints or (len(values) % 3 == 1 and 2 in marks and {*marks} <= {0, 1, 2}):
            values = values[:4]
        if not all(map(math.isfinite, (index, *values))):
            problems.append(f"{where}: not finite: {line.strip()[:60]!r}")
        elif index != int(index) or not 0 <= index < len(names):
            problems.append(f"{where}: class {index:g}, but there are {len(names)} classes")
        elif len(values) != 4 and (len(values) < 6 or len(values) % 2):
            problems.append(f"{where}: {len(values)} numbers after the class; a box has 4")
        elif max(values) > 1.5:
            problems.append(
                f"{where}: {max(values):g} is no share of a picture's width or height; boxes are "
                "written as x and y of the centre, width and height, from 0 to 1"
            )
        else:
            if len(values) == 4:
                x, y, w, h = values
                box = x - w / 2, y - h / 2, w, h
            else:  # the outline of a segment
                box = around(zip(values[::2], values[1::2]))
            yield Object(names[int(index)], box, f"line {number}", relative=True)
