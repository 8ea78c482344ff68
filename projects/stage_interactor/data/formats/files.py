"""What lies below a folder, found by the names that annotations use, wherever it is.

Annotation files name pictures by paths of the machine that they were written on. What such a path
and the files below a folder have in common is the end of it.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from ...untrusted.files import is_within

# Of pictures: the formats of untrusted.pictures.
IMAGE_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".sgi", ".tga", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
# Folders of pictures that are made of others, and have their names: no annotation means these.
_MADE_OF_OTHERS = re.compile(
    r"(.*_)?(masks?|trimaps?|seg|segs|segmentations?|segmentation(class|object)(raw|visualization)?|"
    r"visuali[sz]ations?|vis|viz|overlays?|depths?|heatmaps?|annotated|drawn|detections?|"
    r"predictions?|preds?|runs|thumbs?|thumbnails?)"
)
SPLITS = ("train", "val", "test")
_MOST_WAYS = 100  # by links into one folder
_OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/fd")
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


class AmbiguousName(ValueError):
    """A name that fits several files equally well, which are ``found``."""

    def __init__(self, message: str, found: Iterable[str] = ()):
        super().__init__(message)
        self.found = list(found)


def _key(text: str) -> str:
    """What names are compared by: no case, and letters as one (macOS takes é apart)."""
    return unicodedata.normalize("NFC", text).lower()


def split_name(text: str) -> str | None:
    """The split that a file or folder name speaks of: ``instances_val2017`` is "val"."""
    words = text.lower().replace("-", "_").replace(".", "_").replace(" ", "_").split("_")
    for word in words:
        word = word.rstrip("0123456789")
        word = _ALIASES.get(word, word)
        if word in SPLITS:
            return word
    return None


def split_of_path(path: str) -> str | None:
    """The split that the nearest folder of a path speaks of."""
    parts = path.split("/")[:-1]
    return next((name for part in reversed(parts) if (name := split_name(part))), None)


def split_of_file(path: str) -> str | None:
    """The split that an annotation file is of: by its name, or by its folders."""
    return split_name(path.rpartition("/")[2].rpartition(".")[0]) or split_of_path(path)


def splits_of_files(paths: Iterable[str]) -> dict[str, str | None]:
    """By annotation file its split; None for all if none of them says one.

    Beside files that say theirs, one that does not is that to train on. Where there is such a one
    already, it is of all parts together, and is left out.
    """
    found = {path: split_of_file(path) for path in paths}
    if not any(found.values()):
        return found
    if "train" not in found.values():
        found = {path: split or "train" for path, split in found.items()}
    return {path: split for path, split in found.items() if split}


def parts_of(name: str) -> list[str]:
    """Of a path as Windows or Unix write it, without drive, ``.`` and ``..``."""
    parts = name.strip().replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".", "..") and not part.endswith(":")]


class Files:
    """The files below a folder, those in linked folders too; hidden ones are passed over.

    Paths are relative to ``root``, with ``/`` between their parts.
    """

    def __init__(self, root: str | os.PathLike, only: Iterable[str] | None = None):
        """``only``: these, instead of all that are there."""
        self.root = os.fspath(root)
        self.within: list[str] | None = [self.root]  # where names may lead; None: anywhere
        self.paths = sorted(_walk(self.root) if only is None else only)
        self.restricted = False  # a person said that it is these
        self.used: set[str] = set()
        self._least: dict[str, int] = {}  # by file, how many folders a name must have in common
        self.exchanged: list[tuple[str, str]] = []  # pictures found with another suffix
        self.doubtful: set[str] = set()  # those that a name may mean

    def reset(self) -> None:
        """Forgets what was used."""
        self.used.clear()
        self.exchanged.clear()
        self.doubtful.clear()

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def absolute(self, path: str) -> str:
        return os.path.join(self.root, path)

    def may_read(self, path: str | os.PathLike) -> bool:
        """Whether what a file names may be opened."""
        return self.within is None or any(is_within(path, folder) for folder in self.within)

    def outside(self, name: str, near: str) -> str | None:
        """The path of a file elsewhere that a name in the file ``near`` is of; None without one."""
        written = name.replace("\\", "/")
        if "\0" in name or not (os.path.isabs(written) or ".." in written.split("/")):
            return None
        for folder in dict.fromkeys((os.path.dirname(self.absolute(near)), self.root)):
            path = os.path.normpath(os.path.join(folder, written))
            if not is_within(path, self.root) and os.path.lexists(path):
                return os.path.abspath(path)
        return None

    def relative(self, path: str | os.PathLike) -> str:
        """Of any path below ``root``."""
        return Path(os.path.relpath(path, self.root)).as_posix()

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Those that end so, in any case."""
        return [path for path in self.paths if path.lower().endswith(suffixes)]

    @cached_property
    def pictures(self) -> list[str]:
        return self.with_suffix(*IMAGE_SUFFIXES)

    @cached_property
    def _above(self) -> list[str]:
        """The folders that the top lies in, and itself: paths in files may begin with them."""
        return [*map(_key, os.path.abspath(self.root).split(os.sep)[-4:])]

    def common_end(self, name: str, path: str) -> int:
        """How many parts at the end of a path in a file and of one below the top are the same."""
        return common_end([*map(_key, parts_of(name))], self._above + _key(path).split("/"))

    @cached_property
    def folders(self) -> set[str]:
        """All folders with something in them, the top as ""."""
        found = {""}
        for path in self.paths:
            while path := path.rpartition("/")[0]:
                if path in found:
                    break
                found.add(path)
        return found

    def below(self, folder: str) -> list[str]:
        """The pictures in a folder, and in the folders below it."""
        start = f"{folder}/" if folder else ""
        return [path for path in self.pictures if path.startswith(start)]

    def originals_below(self, folder: str) -> list[str]:
        """The same without masks and other pictures that are made of these."""
        start = len(folder) + 1 if folder else 0
        return [
            path
            for path in self.below(folder)
            if not any(map(_MADE_OF_OTHERS.fullmatch, _key(path[start:]).split("/")[:-1]))
        ]

    def folder(self, name: str) -> str | None:
        """The folder whose path has the longest end in common with ``name``.

        What is not common, of either, has no folder of a part of the data, such as train/.

        Raises:
            AmbiguousName: there are several.
        """
        parts = [*map(_key, parts_of(name))]
        found = []
        for path in self.folders:
            folders = _key(path).split("/") if path else []
            common = common_end(parts, [*self._above, *folders])
            beyond = parts[: len(parts) - common] + folders[: max(len(folders) - common, 0)]
            if not any(map(split_name, beyond)):
                found.append((common, path))
        longest = max((common for common, _ in found), default=0)
        best = sorted(path for common, path in found if common == longest)
        if not longest:
            return None
        if len(best) > 1:
            raise AmbiguousName(f"{name!r} could be any of the folders {', '.join(best)}")
        return best[0]

    def expect(self, names: Iterable[str], near: str) -> None:
        """Looks over all names that a file has, before :meth:`picture` is asked for them.

        Where some are told apart by their folders alone, or most have a folder in common with their
        pictures, none is taken that has not: a picture that is missing is not another one.
        """
        unique = {tuple(map(_key, parts_of(name))) for name in names}
        least, longest = 0, max(map(len, unique), default=1)
        while least + 1 < longest and len({parts[-least - 1 :] for parts in unique}) < len(unique):
            least += 1
        if least == 0:
            ends = [
                max(
                    common_end(parts[:-1], self._above + _key(path).split("/")[:-1])
                    for path in self._by_name[parts[-1]]
                )
                for parts in unique
                if len(parts) > 1 and parts[-1] in self._by_name
            ]
            least = int(2 * sum(end > 0 for end in ends) > len(ends))
        self._least[near] = least

    def picture(self, name: str, near: str = "", split: str | None = None) -> str | None:
        """The picture that an annotation calls ``name``; None if there is none.

        Several of that name are told apart by the ends of their paths, then by what their folders
        have in common with ``near``, the annotation's file. A picture in the folder of another
        part of the data than the name's own folders say, or ``split``, or ``near``, is never meant,
        nor one in a folder of masks or the like, unless the name has that folder.

        Raises:
            AmbiguousName: several are left.
        """
        parts = parts_of(name)
        if not parts:
            return None
        last = _key(parts[-1])
        folders = [*map(_key, parts[:-1])]
        split = split_of_path("/".join(parts)) or split or split_of_path(near)

        least = min(self._least.get(near, 0), len(folders))

        def may_be_meant(path: str) -> bool:
            theirs = _key(path).split("/")[:-1]
            if common_end(folders, self._above + theirs) < least:
                return False
            beyond = theirs[: len(theirs) - common_end(folders, theirs)]
            of_split = next((found for x in reversed(beyond) if (found := split_name(x))), None)
            apart = beyond[_common_start(theirs, _key(near).split("/")[:-1]) :]
            return (split is None or of_split in (None, split)) and not any(
                map(_MADE_OF_OTHERS.fullmatch, apart)
            )

        # Without a suffix, or with that of the file before it was converted.
        for paths in (
            self._by_name.get(last, ()),
            self._by_stem.get(last, ()),
            self._by_stem.get(os.path.splitext(last)[0], ()),
        ):
            if found := [path for path in paths if may_be_meant(path)]:
                break
        else:
            return None
        above = self._above
        best = _best(found, lambda path: common_end(folders, above + _key(path).split("/")[:-1]))
        if len(best) > 1:
            best = [path for path in best if path.split("/")[-1] == parts[-1]] or best
        if len(best) > 1:
            best = _best(best, lambda path: _closeness(path, near))
        if len(best) > 1 and split:
            best = [path for path in best if split_of_path(path) == split] or best
        if len(best) > 1:  # links, by which a file has two paths
            best = list({os.path.realpath(self.absolute(path)): path for path in best}.values())
        if len(best) > 1:
            shown = ", ".join(best[:4]) + (", ..." if len(best) > 4 else "")
            raise AmbiguousName(f"{name!r} could be any of {shown}", best)
        suffix = os.path.splitext(last)[1]
        if suffix in IMAGE_SUFFIXES and not best[0].lower().endswith(suffix):
            self.exchanged.append((name, best[0]))
        return best[0]

    def has_picture(self, stem: str) -> bool:
        """Whether there is a picture of this name, whatever its suffix."""
        return _key(stem) in self._by_stem

    @cached_property
    def _known(self) -> set[str]:
        return set(self.paths)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(self.pictures, lambda path: _key(path.rpartition("/")[2]))

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped(
            self.pictures, lambda path: os.path.splitext(_key(path.rpartition("/")[2]))[0]
        )


def _walk(root: str) -> Iterator[str]:
    """Paths of files. Links to folders are followed, but not to one that they lie in.

    Raises:
        ValueError: they lead to a folder of the system, or to one folder in very many ways, as
            folders do that are linked to one another.
    """
    whole = os.path.realpath(root)
    ways: Counter[str] = Counter()
    for folder, folders, names in os.walk(root, followlinks=True):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        start = "" if inside == "." else f"{inside}/"
        above = [root, *(os.path.join(root, start[:n]) for n, c in enumerate(start) if c == "/")]

        def leads_back(name: str, above=above, folder=folder) -> bool:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                return False
            target = os.path.realpath(path)
            ways[target] += 1
            if ways[target] > _MOST_WAYS or target.startswith(_OF_THE_SYSTEM):
                told = "in very many ways" if ways[target] > _MOST_WAYS else "of the system"
                raise ValueError(f"{path} leads to {target}, a folder {told}: take the link away")
            return is_within(whole, target) or any(os.path.samefile(path, a) for a in above)

        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith((".", "__MACOSX")) and not leads_back(name)
        ]
        yield from (start + name for name in names if not name.startswith("."))


def _grouped(paths: Iterable[str], key) -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in paths:
        found[key(path)].append(path)
    return found


def _best(paths: list[str], score) -> list[str]:
    if len(paths) == 1:
        return paths
    scores = [score(path) for path in paths]
    most = max(scores)
    return [path for path, value in zip(paths, scores) if value == most]


def common_end(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = zip(reversed(first), reversed(second))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _common_start(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = zip(first, second)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _closeness(path: str, near: str) -> int:
    """How many folders two paths have in common, from the top and from the end."""
    first, second = path.split("/")[:-1], near.split("/")[:-1]
    from_top = _common_start(first, second)
    return from_top + common_end(first[from_top:], second[from_top:])


def describe_unused(unused: dict[str, list[str]]) -> str:
    """``12 .txt (labels/0.txt, ...), 3 .json (...)``."""
    return ", ".join(
        f"{len(paths)} {suffix} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
        for suffix, paths in sorted(unused.items(), key=lambda item: -len(item[1]))
    )
