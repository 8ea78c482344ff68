"""The folder of a job in parts: what is to be done, and what has been, a file a part."""

import hashlib
import io
import json
import os
import posixpath
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from fsspec.core import url_to_fs

from ...errors import UserError
from ...locking import folder_lock
from ...untrusted.files import read_bytes
from ...writing import write_atomically
from .addresses import answering, is_remote

FORMATS = ("jsonl", "parquet")
MANIFEST, LIST, PARTS, LOCK = "job.json", "pictures.jsonl", "parts", "job.lock"
_VERSION = 1
_MOST_MANIFEST = 2**24  # bytes
# Whose files are there whole or not at all, as soon as they have been written.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}
# How the fields of the manifest are told; what is not here is told by its name.
_FLAGS = {"places": "the pictures", "averaged": "--trained-weights"}


class OtherJobError(UserError):
    """A folder that holds something else than this job."""


class Store:
    """A folder of this machine, or one that fsspec writes to; files in it are whole or not there.

    It can be sent to other processes.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = os.fspath(folder)
        self.is_remote = is_remote(folder)
        self.folder = folder.rstrip("/") if self.is_remote else os.path.abspath(folder)

    def path(self, name: str) -> str:
        """Of a file, its name with slashes."""
        return posixpath.join(self.folder, name)

    def names(self, folder: str = "") -> set[str]:
        """Of all that lies in a folder of it; none where that is not there."""
        path = self.path(folder) if folder else self.folder
        with suppress(FileNotFoundError):
            if not self.is_remote:
                return set(os.listdir(path))
            with answering(path):
                files, place = url_to_fs(path)
                files.invalidate_cache()
                found = files.ls(place, detail=False)
            return {posixpath.basename(name.rstrip("/")) for name in found} - {""}
        return set()

    def read(self, name: str, most: int | None = None) -> bytes:
        """What is in a file.

        Raises:
            OSError, UserError, ValueError: it cannot be read, or has more than ``most`` bytes.
        """
        if not self.is_remote:
            return read_bytes(self.path(name), most)
        with answering(self.path(name)):
            files, path = url_to_fs(self.path(name))
            with files.open(path, "rb") as file:
                content = file.read() if most is None else file.read(most + 1)
        if most is not None and len(content) > most:
            raise ValueError(f"{self.path(name)} has more than {most:,} bytes")
        return content

    def write(self, name: str, content: bytes) -> None:
        if not self.is_remote:
            path = self.path(name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_atomically(path, lambda file: file.write(content))
            return
        with answering(self.path(name), missing=True):
            files, path = url_to_fs(self.path(name))
            protocols = {files.protocol} if isinstance(files.protocol, str) else {*files.protocol}
            if protocols & _OBJECT_STORES:
                files.pipe_file(path, content)
                return
            files.makedirs(posixpath.dirname(path), exist_ok=True)
            temporary = f"{path}.{secrets.token_hex(6)}.tmp"
            files.pipe_file(temporary, content)
            files.mv(temporary, path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One job at a time; addresses have no locks, and two jobs there write the same twice."""
        if self.is_remote:
            yield
            return
        with folder_lock(self.folder, 0, LOCK, "--output-dir"):
            yield

    def remove_leftovers(self) -> None:
        """Parts that a kill has left half written."""
        if not self.is_remote:
            for name in self.names(PARTS):
                if re.fullmatch(r"part-\d+\.\w+\.[0-9a-f]{12}\.tmp", name):
                    os.remove(self.path(f"{PARTS}/{name}"))


class Manifest(NamedTuple):
    """What a job is; the list of its pictures lies beside it.

    Attributes:
        settings: what the rows depend on, by name; a job of other ones is another job.
        pictures: their number.
        digest: of the list.
        part_size: pictures of a part.
        output_format: of :data:`FORMATS`.
    """

    settings: dict[str, Any]
    pictures: int
    digest: str
    part_size: int
    output_format: str

    @property
    def num_parts(self) -> int:
        return -(-self.pictures // self.part_size)

    def name(self, part: int) -> str:
        return f"{PARTS}/part-{part:05d}.{self.output_format}"

    def slice(self, part: int) -> slice:
        """Which of the pictures it has."""
        return slice(part * self.part_size, min((part + 1) * self.part_size, self.pictures))

    @classmethod
    def begin(
        cls,
        store: Store,
        settings: dict[str, Any],
        pictures: Sequence[str],
        part_size: int,
        output_format: str,
    ) -> tuple["Manifest", list[str]]:
        """Of the job that the folder holds, or else of a new one; and its list of pictures.

        Raises:
            OtherJobError: the folder holds another job, or something else.
        """
        settings = json.loads(json.dumps(settings))
        names = store.names()
        if MANIFEST not in names:
            if others := sorted(names - {LIST, LOCK}):
                raise OtherJobError(
                    f"{store.folder} holds something else, such as {others[0]}: name another "
                    "--output-dir"
                )
            content = "".join(f"{json.dumps(name)}\n" for name in pictures).encode()
            digest = hashlib.sha256(content).hexdigest()
            manifest = cls(settings, len(pictures), digest, part_size, output_format)
            store.write(LIST, content)
            whole = json.dumps({"version": _VERSION, **manifest._asdict()}, indent=1)
            store.write(MANIFEST, whole.encode())
            return manifest, list(pictures)
        manifest = cls._read(store)
        wanted = {**settings, "part_size": part_size, "output_format": output_format}
        held = {
            **manifest.settings,
            "part_size": manifest.part_size,
            "output_format": manifest.output_format,
        }
        other = [key for key in {**wanted, **held} if wanted.get(key) != held.get(key)]
        if other:
            told = ", ".join(
                _FLAGS.get(key, f"--{key.replace('_', '-')}")
                + (f" (was {held.get(key)!r})" if len(repr(held.get(key))) < 50 else "")
                for key in other
            )
            raise OtherJobError(
                f"{store.folder} holds a job of other values: {told}; go on with those that it was "
                "begun with, or name another --output-dir"
            )
        return manifest, manifest._read_list(store)

    @classmethod
    def _read(cls, store: Store) -> "Manifest":
        path = store.path(MANIFEST)
        try:
            content = json.loads(store.read(MANIFEST, _MOST_MANIFEST))
        except (ValueError, RecursionError) as error:
            raise OtherJobError(f"{path} is no manifest of a job ({error})") from error
        types = {"version": int, **cls.__annotations__}
        if (
            not isinstance(content, dict)
            or content.keys() != types.keys()
            or content["version"] != _VERSION
            or type(content["settings"]) is not dict
            or any(type(content[key]) is not str for key in ("digest", "output_format"))
            or any(type(content[key]) is not int for key in ("pictures", "part_size"))
            or min(content["pictures"], content["part_size"]) < 1
            or content["output_format"] not in FORMATS
        ):
            raise OtherJobError(
                f"{path} is no manifest of a job of this version: name another --output-dir"
            )
        del content["version"]
        return cls(**content)

    def _read_list(self, store: Store) -> list[str]:
        path = store.path(LIST)
        try:
            content = store.read(LIST)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise OtherJobError(
                f"{path} is not the list that the job was begun with: name another --output-dir"
            )
        try:
            pictures = [json.loads(line) for line in content.splitlines()]
        except (ValueError, RecursionError) as error:
            raise OtherJobError(f"{path} is no list of pictures ({error})") from error
        if len(pictures) != self.pictures or not all(type(name) is str for name in pictures):
            raise OtherJobError(f"{path} is no list of {self.pictures} pictures")
        return pictures


def encode_rows(rows: Sequence[Mapping[str, Any]], output_format: str) -> bytes:
    """What is in the file of a part: JSON lines, or Parquet."""
    if output_format == "jsonl":
        return "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows).encode()
    pa, parquet = import_parquet()
    schema = pa.schema(
        {
            "file": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "boxes": pa.list_(pa.list_(pa.float64())),
            "scores": pa.list_(pa.float64()),
            "classes": pa.list_(pa.int32()),
            "names": pa.list_(pa.string()),
            "error": pa.string(),
        }
    )
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([*rows], schema), buffer)
    return buffer.getvalue()


def decode_rows(content: bytes, output_format: str, columns: Sequence[str]) -> list[dict]:
    """These columns of a part.

    Raises:
        ValueError: it is no such file.
    """
    if output_format == "jsonl":
        try:
            rows = [json.loads(line) for line in content.splitlines()]
            return [{name: row[name] for name in columns} for row in rows]
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"it has no {error}") from error
    pa, parquet = import_parquet()
    try:
        return parquet.read_table(io.BytesIO(content), columns=[*columns]).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(str(error)) from error


def import_parquet() -> tuple[Any, Any]:
    """
    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'stage-interactor[ray]', or --output-format jsonl"
        ) from error
    return pa, parquet
