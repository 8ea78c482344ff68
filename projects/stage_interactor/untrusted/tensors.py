"""Files of tensors of others: read as data, without running anything in them."""

import copy
import io
import json
import os
import pickle
import pickletools
import re
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from ..errors import UserError

EXPORTED = (".onnx", ".pt2", ".xml")  # suffixes of files that are no checkpoints
MOST_TEXT = 16 * 2**20  # bytes, of all that is no tensor; PyTorch reads a megabyte in a second

_shorten = reprlib.Repr()
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother = 2, 60, 60


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


def shown(value: Any) -> str:
    """A value of any size in a few words."""
    if isinstance(value, (type(None), bool, int, float, str, list, tuple, dict)):
        if isinstance(value, int) and abs(value) >= 10**30:
            return "a whole number of more than 30 digits"
        return _shorten.repr(value)
    return f"of the type {type(value).__name__}"


def load_tensors(path: str, *, mmap: bool = False) -> Any:
    """What a file of tensors and plain values holds, on the CPU, and nothing in it is run.

    With ``mmap`` tensors stay in the file, and are read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is incomplete or damaged, or holds more than tensors and plain values,
            values that are not finite, or tensors that claim more than the file holds.
    """
    if path.endswith(EXPORTED):
        raise CheckpointError(
            f"{path} is an exported detector, which predict and Detector take; here the checkpoint "
            "is needed that it was exported from"
        )
    require_file(path)
    mapped = False
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as tensors:
                loaded: Any = {key: tensors.get_tensor(key) for key in tensors.keys()}
                extra = parse_json((tensors.metadata() or {}).get("extra", "{}"), path)
            if not isinstance(extra, dict):
                raise CheckpointError(f"{path}: its metadata hold {shown(extra)}, no keys")
            loaded = {**extra, "model": loaded}
        else:
            with open(path, "rb") as file:
                mapped = file.read(4) == b"PK\3\4"  # as PyTorch tells its formats apart
                file.seek(0)
                if mapped:
                    _require_whole(path)
                    # As PyTorch finds it, to which small and large letters of names are the same.
                    records = torch._C.PyTorchFileReader(path)
                    _require_listed(io.BytesIO(records.get_record("data.pkl")))
                else:  # the older format, of five pickles and values behind them
                    for _ in range(5):
                        _require_listed(file)
            # What is read otherwise may lie behind the end of what a file has for it.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            _forget_attributes(loaded)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be loaded safely (weights_only): it is "
            f"incomplete, or holds more than tensors and plain values ({_first_line(error)})"
        ) from error
    _require_honest(loaded, path)
    require_finite(loaded, path)
    return copy.deepcopy(loaded) if mapped and not mmap else loaded


# What the pickles of a checkpoint may call. PyTorch would let them call more: what fills the memory
# by a number, copies what is there, or gives a tensor attributes in place of its methods.
_CALLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage|"
    r"torch\.storage (Typed|Untyped)Storage|torch (b?float|u?int)\d+|torch bool"
)


def _require_listed(file: IO[bytes]) -> None:
    """Raises an UnpicklingError if the next pickle of a file calls what is not listed."""
    start, last = file.tell(), ""
    memo: dict[Any, str] = {}  # names that are kept for later, by where
    for code, argument, position in pickletools.genops(file):
        if (position or 0) - start > MOST_TEXT:
            raise pickle.UnpicklingError("it takes too much to say what its tensors are")
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        if last == "collections OrderedDict" and code.name != "EMPTY_TUPLE":
            raise pickle.UnpicklingError("it makes an OrderedDict of something else")
        last = ""
        if code.name in ("BINGET", "LONG_BINGET"):
            last = memo.get(argument, "")
        elif code.name == "GLOBAL":
            last = str(argument)
            if not _CALLED.fullmatch(last):
                raise pickle.UnpicklingError(f"it names {last.replace(' ', '.')}")


def _forget_attributes(content: Any) -> None:
    """Of the dicts in a file: one that is called as a method is would stand in its place."""
    stack, seen = [content], set()  # a file may nest a list in itself, or again and again
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            getattr(value, "__dict__", {}).clear()
            stack += dict.values(value) if isinstance(value, dict) else value


def _values_of(data: bytes | str, kind: Any) -> np.ndarray:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind)


class _Arrays(pickle._Unpickler):  # type: ignore[name-defined]  # C's would fill the memory
    """Reads pickles of arrays and plain values; whatever else one names is an error.

    Nothing that is called here takes the size of an array from anything but its values.
    """

    _ALLOWED: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): "an array",  # which is named, and not called
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, _="latin1": text.encode("latin1"),
        ("collections", "OrderedDict"): lambda: {},
        **{
            (f"numpy.{core}.{module}", name): function
            for core in ("core", "_core")
            for module, name, function in (
                ("multiarray", "_reconstruct", lambda *_: np.empty(0)),
                ("multiarray", "scalar", lambda kind, data: _values_of(data, kind)[0]),
                ("numeric", "_frombuffer", lambda data, kind, shape, order: (
                    _values_of(data, kind).reshape(shape, order=order))),
            )
        },
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return self._ALLOWED[module, name]


def read_model_zoo(path: str) -> dict[str, Any]:
    """A ``.pkl`` file of detectron2's model zoo: arrays alone, and no code in it is run.

    Raises:
        CheckpointError: it is another pickle, or holds values that are not finite.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            loaded = _Arrays(file, encoding="latin1").load()
    except Exception as error:
        raise CheckpointError(
            f"{path} is no file of detectron2's model zoo, arrays by name: {_first_line(error)}"
        ) from error
    blobs = loaded.get("blobs", loaded) if isinstance(loaded, dict) else None
    if not isinstance(blobs, dict):
        raise CheckpointError(f"{path} holds {shown(loaded)}, no weights")
    if "model" not in loaded or "__author__" not in loaded:  # of Caffe2
        weights = {key: item for key, item in blobs.items() if not str(key).endswith("_momentum")}
        loaded = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    require_finite(loaded, path)
    return loaded


def require_file(path: str) -> None:
    """Raises a FileNotFoundError or a CheckpointError for what cannot be read as a file."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    if not os.path.isfile(path):  # a pipe would be waited for
        inside = os.path.join(path, "model_final.pth")
        hint = f"; {inside} is one" if os.path.isfile(inside) else ""
        raise CheckpointError(f"{path} is no checkpoint: it is a folder, a pipe or a device{hint}")


def parse_json(text: str, path: str) -> Any:
    """JSON in a file; a CheckpointError for what is none, too much, or names a key twice."""
    if len(text) > MOST_TEXT:
        raise CheckpointError(
            f"{path}: its metadata have {len(text):,} letters, more than a detector's description"
        )

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice in it")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata are no JSON: {error}") from error


def _require_whole(path: str) -> None:
    """Raises a CheckpointError for a ZIP file that is damaged, or holds more than its size."""
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            if sum(part.file_size for part in parts) > os.path.getsize(path):
                raise CheckpointError(
                    f"{path} is no checkpoint of PyTorch's: its parts are compressed, or overlap"
                )
            if any(
                p.file_size > MOST_TEXT and p.filename.lower().endswith("data.pkl") for p in parts
            ):
                raise CheckpointError(
                    f"{path} is no checkpoint of ours: it takes more than {MOST_TEXT >> 20} MiB "
                    "to say what its tensors are"
                )
            damaged = file.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{path} is damaged or incomplete: {_first_line(error)}") from error
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {shown(damaged)} in it is wrong. Copy it anew, or "
            "take an earlier checkpoint"
        )


def _first_line(error: BaseException) -> str:
    """What an error of a library says, without its advice to read the file unsafely."""
    text = str(error)
    found = re.search(r"WeightsUnpickler error: *(.+)|(unsupported GLOBAL .+)", text)
    line = found[1] or found[2] if found else (text.splitlines() or [""])[0]
    line = line.partition(". ")[0][:300]
    return "".join(c for c in line if c.isprintable()) or type(error).__name__


_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def _require_honest(loaded: Any, path: str) -> None:
    """Raises a CheckpointError for tensors that are not what they seem, or larger than the file."""
    claimed: dict[str, int] = {}
    for name, tensor in _tensors(loaded):
        dense = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not dense or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} is a tensor of {tensor.dtype} on {tensor.device}, "
                f"{tensor.layout}; a checkpoint holds dense ones of real numbers"
            )
        claimed[name] = tensor.numel() * tensor.element_size()
    # Views of the same values are tied weights or averages, and at most a few.
    size = os.path.getsize(path)
    if sum(claimed.values()) > 4 * size + 2**20:
        name = max(claimed, key=lambda name: claimed[name])
        raise CheckpointError(
            f"{path}: its tensors would take {sum(claimed.values()) / 2**30:.1f} GiB, {name} alone "
            f"{claimed[name] / 2**30:.1f} GiB, in a file of {size / 2**30:.3f} GiB"
        )


def require_finite(loaded: Any, path: str) -> None:
    """Raises a CheckpointError that names the tensors of a loaded file with NaN or infinity."""
    if names := not_finite(loaded):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(
            f"{path}: {len(names)} tensors hold NaN or infinite values: {shown}. The training that "
            "wrote it had diverged: take an earlier checkpoint (--resume takes the one that is "
            "named in last_checkpoint)"
        )


def not_finite(content: Any) -> list[str]:
    """Names of the tensors with NaN or infinity in nested mappings and lists."""
    flags: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(content):
        if tensor.dtype == torch.float64:
            tensor = tensor.float()  # as the model has it, where 1e300 is infinite
        flags.setdefault(tensor.device, {})[name] = tensor.isfinite().all()
    return [
        name
        for found in flags.values()  # one wait for each device
        for name, finite in zip(found, torch.stack([*found.values()]).tolist())
        if not finite
    ]


def _tensors(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors and arrays of nested mappings and lists, by their names with dots."""
    seen: set[int] = set()  # a file may nest a list in itself, or again and again
    stack = [("", content)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(value if value.flags.writeable else value.copy())
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            stack += reversed([(f"{name}.{key}".lstrip("."), item) for key, item in items])
