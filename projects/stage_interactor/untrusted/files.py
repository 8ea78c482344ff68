"""Files of others: reading them within bounds, and where names in them may lead."""

import hashlib
import json
import os
import stat
from typing import Any

import yaml

from ..errors import UserError

_MOST_YAML = 2**21  # bytes; the names of 20,000 classes take a third of it
_MOST_VALUES = 2**24  # of a JSON file that is read as a whole, of up to about 100 bytes
_MOST_NODES = 1_000_000  # of YAML, with what its aliases stand for


class OutsideName(UserError, ValueError):
    """A name in a file that leads out of the folder that it is looked for in."""

    def __init__(self, where: object, what: str, name: str, folder: object):
        super().__init__(
            f"{where}: the {what} {name[:200]!r} leads outside of {folder}; copy or link it into "
            "that, or allow it: --allow-outside (allow_outside=True)"
        )


def require_regular_file(path: str | os.PathLike) -> os.stat_result:
    """Raises an OSError for a pipe or a device, which reading could wait for without an end.

    Raises:
        FileNotFoundError: there is no such file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise OSError(f"it is a {kinds.get(stat.S_IFMT(status.st_mode), 'device')} and no file")
    return status


def digest_of(path: str | os.PathLike, digest: Any = None) -> str:
    """SHA-256 of a regular file, or what another digest, of hashlib, makes of it.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    require_regular_file(path)
    digest = hashlib.sha256() if digest is None else digest
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_bytes(path: str | os.PathLike, most: int | None = None) -> bytes:
    """What is in a regular file.

    Args:
        most: bytes; a quarter of the machine's memory by default.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger.
    """
    try:
        size = require_regular_file(path).st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error
    most = memory() // 4 if most is None else most
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes; more than {most:,} are not read")
    if not size:  # files of the kernel, such as below /proc, say so, and may be waited for
        return b""
    with open(path, "rb") as file:
        return file.read(size)


def read_head(path: str | os.PathLike, size: int = 2**16) -> bytes:
    """The first bytes of a regular file; none of what is no such file, or cannot be read."""
    try:
        if not require_regular_file(path).st_size:
            return b""
        with open(path, "rb") as file:
            return file.read(size)
    except (OSError, ValueError):
        return b""


def memory() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**33


def require_memory(path: object, content: str | bytes) -> None:
    """Raises a ValueError if what a JSON, XML or CSV file holds is more than the memory does."""
    marks = [mark if isinstance(content, str) else mark.encode() for mark in "[{<,;\n"]
    counts = [content.count(mark) for mark in marks]  # type: ignore[arg-type]
    # A list, mapping or element takes a hundred bytes and more, a number 32.
    needed = 2 * len(content) + 100 * sum(counts[:3]) + 32 * sum(counts[3:])
    if needed > memory():
        raise ValueError(
            f"{path} holds so much that reading it takes about {needed / 2**30:.0f} GiB, and this "
            f"machine has {memory() / 2**30:.0f}; divide it"
        )


def read_json(path: str | os.PathLike, most: int = 2**28) -> Any:
    """What a JSON file holds; NaN and infinity, which JSON has not, as None.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger than ``most`` bytes, no JSON, or holds too much.
    """
    content = read_bytes(path, most)
    if sum(map(content.count, (b",", b"{", b"["))) > _MOST_VALUES:
        raise ValueError(f"{path} holds more than {_MOST_VALUES:,} values")
    try:
        return json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


# The one in C takes seconds where that in Python takes a minute.
_TEXTS = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def parse_yaml(text: str, path: object, loader: Any = _TEXTS) -> Any:
    """What is in a YAML file; all values are text, as written, unless the loader makes more of it.

    Raises:
        ValueError: it is no YAML, is too large to be a description, or its aliases make it so.
    """
    if len(text) > _MOST_YAML:
        raise ValueError(f"{path} has {len(text):,} characters; more than {_MOST_YAML:,} are no "
                         "description of a data set")  # fmt: skip
    # Not safe_load, to which a class called "no" is False.
    try:
        node = yaml.compose(text, loader)
        if node is not None and _count_nodes(node, {}) > _MOST_NODES:
            raise ValueError(f"{path} is not read: its aliases make millions of values of it")
        return None if node is None else loader("").construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error


def _count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """Of a node and all in it, each as often as it is there; of what holds itself, without end."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = _MOST_NODES + 1  # until all of it is counted
        inside = [part for item in node.value for part in (item if type(item) is tuple else [item])]
        counts[id(node)] = 1 + sum(_count_nodes(part, counts) for part in inside)
    return counts[id(node)]


def is_within(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path lies in a folder, as both are written or as links make them."""
    return any(
        f"{where(path)}{os.sep}".startswith(f"{where(folder).rstrip(os.sep)}{os.sep}")
        for where in (os.path.abspath, os.path.realpath)
    )


def join_within(folder: str, name: str) -> str | None:
    """The path of a name in a folder; None if it leads out of that.

    It has no ``..`` any more: behind a link that would lead elsewhere than it says. Links
    themselves are of whoever made the folder, and may lead anywhere.
    """
    path = os.path.join(folder, name)
    parts = name.replace(os.altsep or os.sep, os.sep).split(os.sep)
    if ".." in parts:
        path = os.path.normpath(path)
    elif not (os.path.isabs(name) or os.path.splitdrive(name)[0]):
        return path
    return path if is_within(path, folder) else None
