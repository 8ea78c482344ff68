"""Checkpoints that somebody changed, by accident or to do harm: each a name and what writes it.

Of a good checkpoint (what ``torch.load`` gives) and what is done to it. ``written`` holds all that
is listed; ``mutated`` changes a value anywhere, at random.
"""

import copy
import io
import json
import math
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

CANARY = "canary_of_hostile_files"  # a module whose import leaves a trace

# Calls that no detector is made of: programs, code, files, addresses, hooks, other people's code.
CALLS: dict[str, dict[str, Any]] = {
    "os.system": {"command": "touch {trace}"},
    "posix.system": {"command": "touch {trace}"},
    "subprocess.run": {"args": ["touch", "{trace}"]},
    "builtins.exec": {"object": "open('{trace}', 'w')"},
    "builtins.open": {"file": "{trace}", "mode": "w"},
    "pathlib.Path.touch": {"self": "{trace}"},
    "shutil.rmtree": {"path": "{trace}"},
    f"{CANARY}.anything": {},
    "torch.load": {"f": "{pickle}", "weights_only": False},
    "torch.hub.load": {"repo_or_dir": "{folder}", "model": "x", "source": "local"},
    "torch.hub.download_url_to_file": {"url": "http://127.0.0.1:9/x", "dst": "{trace}"},
    "torch.nn.modules.module.os.system": {"command": "touch {trace}"},
    "torch.nn.init.torch.load": {"f": "{pickle}", "weights_only": False},
    "torch.nn.Module.__init__.__globals__": {},
    "torch.nn.Module.__subclasses__": {},
    "torch.nn.modules.module.register_module_forward_pre_hook": {"hook": "x"},
    "torch.nn.Identity": {"_partial_": True},
    "torch.nn.Linear": {"in_features": 10**6, "out_features": 10**6},
    "torch.nn.Embedding": {"num_embeddings": 10**10, "embedding_dim": 100},
    "torch.nn.parallel.DistributedDataParallel": {"module": {"_target_": "torch.nn.Identity"}},
    "torch.utils.cpp_extension.load_inline": {"name": "x", "cpp_sources": "int f;"},
    "hydra.utils.get_object": {"path": "os.system"},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": "touch {trace}"}},
    "functools.partial": {"func": "os.system"},
    "fvcore.common.download.download": {"url": "http://127.0.0.1:9/x", "dir": "{folder}"},
    "stage_interactor.config.load_config": {"config": "{folder}/config.py"},
    "stage_interactor.config.saved_object": {
        "recipe": {"function": "os.system", "arguments": ["touch {trace}"], "keywords": {}}
    },
    "stage_interactor.d2.config.LazyConfig.load": {"filename": "{folder}/config.py"},
    "stage_interactor.commands.main": {"arguments": ["export"]},
    "stage_interactor.modeling.detector.os.system": {"command": "touch {trace}"},
    "stage_interactor.modeling.detector.torch.load": {"f": "{pickle}"},
    "stage_interactor.modeling.backbone.timm.create_model": {"model_name": "hf_hub:a/b"},
    "stage_interactor.modeling.TimmBackbone.__init__.__globals__.os.system": {"command": "x"},
    "timm.create_model": {"model_name": "local-dir:{folder}", "pretrained": True},
    "torchvision.models.resnet50": {"weights": "DEFAULT"},
    "detectron2.checkpoint.DetectionCheckpointer": {"save_dir": "{trace}"},
    "detectron2.modeling.backbone.os.system": {"command": "touch {trace}"},
}
# Of a backbone of timm: files, addresses, classes by name, and sizes that are none.
BACKBONES: dict[str, dict[str, Any]] = {
    "a file of weights": {"checkpoint_path": "{pickle}"},
    "a file": {"checkpoint_path": "/etc/passwd"},
    "an address": {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}, "pretrained": True},
    "a pretrained file": {"pretrained_cfg": {"file": "{pickle}"}, "pretrained": True},
    "an overlay": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}},
    "a cache": {"cache_dir": "{trace}"},
    "a hub": {"name": "hf_hub:evil/model"},
    "another hub": {"name": "hf-hub:evil/model"},
    "a folder": {"name": "local-dir:{folder}"},
    "a path": {"name": "../../x"},
    "a tag": {"name": "resnet10t.hf-hub:evil"},
    "unicode": {"name": "resnet１０t"},
    "a large network": {"name": "vit_giant_patch14_dinov2"},
    "no network": {"name": "resnet10t\0"},
    "a class": {"feature_cls": "os.system"},
    "a layer": {"norm_layer": "os.system"},
    "an activation": {"act_layer": "os.system"},
    "scripting": {"scriptable": True},
    "a wide stem": {"stem_width": 10**6},
    "wide layers": {"channels": [10**5] * 4},
    "many layers": {"layers": [10**6] * 4},
    "strides as a text": {"strides": "4,8"},
    "no strides": {"strides": []},
    "strides of numbers": {"strides": [4.0, 8.0, 16.0]},
}
RUBBISH: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1.5, 1e308, math.nan, math.inf, -math.inf, 7, 10**6, 10**9, 2**63, 10**40,
    "", "x", "5", "None", "???", "${oc.env:HOME}", "${oc.create:{a:1}}", "é\u202e\x1b[31m\n", "\0",
    "../../etc/passwd", "http://127.0.0.1:9/x", "a" * 10**5, [], [0], [1] * 1000, [[[]]], ["x"],
    {}, {"a": 1}, {"_target_": 5}, {"_target_": ["os.system"]}, {"_target_": "torch.nn"},
    {"_target_": "os.getcwd"}, {"_target_": f"{CANARY}.x"}, {1: 2}, {"_args_": [1]}, torch.ones(2),
)  # fmt: skip


class Hostile(NamedTuple):
    name: str
    write: Callable[[Path], Any]
    suffix: str = ".pth"


class _Reduce:
    """What a pickle calls when it is read."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def filled(value: Any, folder: Path) -> Any:
    """A value with the places in its texts."""
    if isinstance(value, str):
        for name, place in (("trace", "trace"), ("pickle", "evil.bin"), ("folder", ".")):
            value = value.replace(f"{{{name}}}", str(folder / place))
        return value
    if isinstance(value, dict):
        return {key: filled(item, folder) for key, item in value.items()}
    return [filled(item, folder) for item in value] if isinstance(value, list) else value


def prepare(folder: Path) -> None:
    """What hostile files point at: each leaves ``folder / "trace"`` where it is run."""
    write = f"open({str(folder / 'trace')!r}, 'w')\n"
    for name in (f"{CANARY}.py", "config.py", "hubconf.py"):
        (folder / name).write_text(write)
    evil = _Reduce(os.system, f"touch {folder / 'trace'}")
    torch.save(evil, folder / "evil.bin")


def written(good: dict, folder: Path, rng: random.Random) -> Iterator[Hostile]:
    """All that is listed."""
    stream = io.BytesIO()
    torch.save(good, stream)
    yield from _files(good, stream.getvalue(), rng)
    yield from _pickles(good, folder)
    yield from _tensors(good)
    yield from _structures(good)
    for name, arguments in CALLS.items():
        call = filled({"_target_": name, **arguments}, folder)
        yield _changed(good, f"backbone calls {name}", ("config", "model", "backbone"), call)
        place = ("config", "dataloader", "test", "mapper", "augmentation")
        yield _changed(good, f"augmentation calls {name}", place, [call])
        place = ("config", "model", "decoder", "parts")
        yield _changed(good, f"a part calls {name}", place, {"sampler": call})
    backbone = good["blueprint"]["config"]["model"]["backbone"]
    for name, options in BACKBONES.items():
        place = ("config", "model", "backbone")
        yield _changed(good, f"backbone with {name}", place, backbone | filled(options, folder))
    yield from _safetensors(good)


def _changed(good: dict, name: str, place: tuple, value: Any) -> Hostile:
    """A checkpoint with another value in its blueprint."""

    def write(path: Path) -> None:
        content = {**good, "blueprint": copy.deepcopy(good["blueprint"])}
        section = content["blueprint"]
        for key in place[:-1]:
            section = section[key]
        section[place[-1]] = value
        torch.save(content, path)

    return Hostile(name, write)


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The places of all values of nested mappings and lists."""
    if place:
        yield place
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*place, key))


def mutated(good: dict, rng: random.Random, below: tuple = ()) -> Hostile:
    """One or a few values of the blueprint replaced, doubled, renamed or taken away."""
    content = {**good, "blueprint": copy.deepcopy(good["blueprint"])}
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = [place for place in places(content["blueprint"]) if place[: len(below)] == below]
        place = rng.choice([place for place in known if len(place) > len(below)] or [("config",)])
        section = content["blueprint"]
        for key in place[:-1]:
            section = section[key]
        key = place[-1]
        kind = rng.choice(("replace", "replace", "replace", "scale", "rename", "drop", "wrap"))
        value = section[key] if isinstance(section, list) or key in section else None
        if kind == "scale" and type(value) in (int, float):
            section[key] = value * rng.choice((-1, 0, 2, 1000, 10**9))
        elif kind == "rename" and isinstance(section, dict):
            section[f"{key}{rng.choice(('', '_', 'é', ' '))}x"] = section.pop(key)
        elif kind == "drop":
            del section[key]
        elif kind == "wrap":
            section[key] = rng.choice(([value], {"a": value}, [value, value], str(value)))
        else:
            section[key] = rng.choice(RUBBISH)
        told.append(f"{kind} {'.'.join(map(str, place))}")
    return Hostile("; ".join(told), lambda path: torch.save(content, path))


def _files(good: dict, whole: bytes, rng: random.Random) -> Iterator[Hostile]:
    for share in (0, 0.1, 0.5, 0.9, 0.999):
        cut = whole[: int(len(whole) * share)]
        yield Hostile(f"cut at {share}", lambda path, cut=cut: path.write_bytes(cut))
    for number, count in enumerate((1, 1, 1, 10, 100)):
        flipped = bytearray(whole)
        for _ in range(count):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        yield Hostile(
            f"{count} bits flipped, {number}",
            lambda path, flipped=bytes(flipped): path.write_bytes(flipped),
        )
    weight = max(good["model"].values(), key=torch.numel).numpy().tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(weight) + rng.randrange(len(weight))] ^= 1 << rng.randrange(8)
    yield Hostile("a bit of a weight", lambda path: path.write_bytes(damaged))
    for text in (b"hello", b"PK\5\6" + b"\0" * 18, b"PK\3\4", b"<!doctype html>", b"\x80\x02]" * 9):
        yield Hostile(f"is {text[:9]!r}", lambda path, text=text: path.write_bytes(text))
    yield Hostile("is a folder", lambda path: path.mkdir())
    yield Hostile("is a pipe", lambda path: os.mkfifo(path))

    def repack(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
            for item in old.infolist():
                new.writestr(item.filename, change(item.filename, old.read(item)), **options)

    def bomb(path: Path) -> None:
        repack(path, lambda name, data: data)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data/999", b"\0" * 2**26)

    def flip(name: str, data: bytes) -> bytes:  # with its checksum put right
        if name.endswith("data.pkl"):
            changed = bytearray(data)
            for _ in range(3):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        return data

    yield Hostile("is compressed", bomb)
    for number in range(5):
        yield Hostile(f"pickle flipped, {number}", lambda path: repack(path, flip))
    # Storages that are smaller than the pickle says: what lies behind them is nobody's.
    yield Hostile(
        "short storages",
        lambda path: repack(path, lambda name, data: data[:4] if "/data/" in name else data),
    )


def _pickles(good: dict, folder: Path) -> Iterator[Hostile]:
    evil = _Reduce(os.system, f"touch {folder / 'trace'}")
    for protocol in (0, 2, 5):
        data = pickle.dumps(evil, protocol)
        yield Hostile(f"a pickle of protocol {protocol}", lambda p, data=data: p.write_bytes(data))
    for suffix in (".pth", ".pt2", ".onnx", ".safetensors", ".pkl"):
        yield Hostile(f"a pickle as {suffix}", lambda path: torch.save(evil, path), suffix)
    code = f"open({str(folder / 'trace')!r}, 'w')"
    for name, what in {"system": evil, "eval": _Reduce(eval, code), "exec": _Reduce(exec, code),
                       "import": _Reduce(__import__, CANARY), "module": torch.nn.Linear(2, 2),
                       "zeros": _Reduce(bytearray, 10**13),
                       "some zeros": _Reduce(bytearray, 4 * 10**9),
                       "copies": _Reduce(OrderedDict, [(1, 2)])}.items():  # fmt: skip
        content = {**good, "x": what}
        yield Hostile(f"beside the weights {name}", lambda p, c=content: torch.save(c, p))
        yield Hostile(
            f"beside the weights {name}, legacy",
            lambda p, c=content: torch.save(c, p, _use_new_zipfile_serialization=False),
        )
    # A name that is kept at a place far behind all others, and an array as large as a number says.
    memo = b"\x80\x02}r\xff\xff\xff\x7f."
    array = b"\x80\x02}X\1\0\0\0acnumpy\nndarray\n(\x8a\x05\0\0\0\0\x02tRs."
    for name, data in (("far", memo), ("of a huge array", array)):
        yield Hostile(f"a pickle {name}", lambda p, data=data: p.write_bytes(data), ".pkl")
    yield Hostile("a deep pickle", lambda path: path.write_bytes(b"\x80\x02" + b"]" * 200_000))


def _tensors(good: dict) -> Iterator[Hostile]:
    def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
        return {**good, "model": {key: change(item) for key, item in good["model"].items()}}

    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda item: item * math.nan,
        "infinite": lambda item: item + math.inf,
        "infinite halves": lambda item: (item * 1e30).half(),
        "too large for float32": lambda item: item.double() + 1e300,
        "complex": lambda item: item.to(torch.complex64),
        "8 bits": lambda item: item.to(torch.float8_e4m3fn),
        "on meta": lambda item: item.to("meta"),
        "sparse": lambda item: item.to_sparse(),
        "expanded": lambda _: torch.zeros(1).expand(10**12),
        "expanded a little": lambda item: torch.zeros(1).expand(10**6),
        "whole numbers": lambda item: item.int(),
        "with an axis more": lambda item: item[..., None],
        "empty": lambda item: item[:0] if item.ndim else item,
    }
    for name, change in changes.items():
        yield Hostile(f"weights {name}", lambda p, f=change: torch.save(weights(f), p))
    # What is called as a method is, but belongs to a file.
    for name in ("numel", "isfinite", "element_size", "__deepcopy__"):
        state = {key: item.clone() for key, item in good["model"].items()}
        setattr(next(iter(state.values())), name, 5)
        content = {**good, "model": state}
        yield Hostile(f"a tensor's {name}", lambda p, c=content: torch.save(c, p))
    for name in ("get", "keys", "__deepcopy__"):
        blueprint = OrderedDict(good["blueprint"])
        blueprint.__dict__[name] = 5
        content = {**good, "blueprint": blueprint}
        yield Hostile(f"a dict's {name}", lambda p, c=content: torch.save(c, p))


def _structures(good: dict) -> Iterator[Hostile]:
    for what in ([1, 2], torch.zeros(3), None, "model", 5, {}, {"model"}):
        yield Hostile(f"holds {str(what)[:9]}", lambda p, what=what: torch.save(what, p))
    state = good["model"]
    loop: list = []
    loop.append(loop)
    laugh: list = [torch.zeros(1)]
    deep: dict = {}
    for _ in range(60):
        laugh = [laugh, laugh]
    for _ in range(200):
        deep = {"a": deep}
    config = good["blueprint"]["config"]

    def blueprint(**changes: Any) -> dict:
        return {"blueprint": good["blueprint"] | changes}

    changes: dict[str, dict] = {
        "model a list": {"model": [1]},
        "model of numbers": {"model": dict.fromkeys(state, 1)},
        "model a tensor": {"model": torch.zeros(2)},
        "model by numbers": {"model": dict(enumerate(state.values()))},
        "model in itself": {"model": {**state, "x": good}},
        "a key more": {"model": {**state, "evil": torch.zeros(1)}},
        "a key less": {"model": OrderedDict(list(state.items())[1:])},
        "averages a text": {"ema": "x"},
        "averages of one": {"ema": {"x": torch.zeros(1)}},
        "a list in itself": {"x": loop},
        "a list of lists of lists": {"x": laugh},
        "a long text": {"x": "x" * 20_000_000},
        "a blueprint of lists": blueprint(config={**config, "x": laugh}),
        "a deep blueprint": blueprint(config={**config, "x": deep}),
        "another field": blueprint(other=1),
        **{f"blueprint {str(v)[:9]}": {"blueprint": v} for v in (None, [1], "x", {}, 3)},
    }  # fmt: skip
    for name, change in changes.items():
        yield Hostile(name, lambda path, change=change: torch.save({**good, **change}, path))
    yield _changed(good, "sides of any size", ("config", "model", "size_divisibility"), 0)
    yield _changed(good, "four channels", ("config", "model", "pixel_mean"), [0.0] * 4)
    names = [str(i) for i in range(len(good["blueprint"]["categories"]))]
    categories: dict[str, list] = {
        "fewer": [{"id": 1, "name": "a"}],
        "without names": [{"id": i} for i, _ in enumerate(names)],
        "with one id": [{"id": 1, "name": name} for name in names],
        "by lists": [{"id": [i], "name": [name]} for i, name in enumerate(names)],
        "by flags": [{"id": True, "name": name} for name in names],
        "with NaN": [{"id": i, "name": math.nan} for i, _ in enumerate(names)],
        "with long names": [{"id": i, "name": "x" * 10**6} for i, _ in enumerate(names)],
    }
    for name, value in categories.items():
        yield _changed(good, f"categories {name}", ("categories",), value)


def _safetensors(good: dict) -> Iterator[Hostile]:
    from safetensors.torch import save

    extra = json.dumps({"blueprint": good["blueprint"]})
    data = save(
        {key: item.contiguous() for key, item in good["model"].items()},
        {"format": "pt", "extra": extra},
    )
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])

    def build(**changes: Any) -> bytes:
        text = json.dumps(header | changes).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    first = next(name for name in header if name != "__metadata__")
    # fmt: off
    texts = {"no JSON": "{", "a list": "[1]", "deep": "[" * 100_000, "a text": '"x"',
             "weights": '{"model": {"a": 1}}', "NaN": '{"blueprint": NaN}',
             "twice": '{"a": 1, "a": 2}', "of lists": f"[{'[0],' * 5_000_000}0]",
             "a number": '{"blueprint": ' + "9" * 5000 + "}"}
    # fmt: on
    files = {f"extra {name}": build(__metadata__={"extra": text}) for name, text in texts.items()}
    files["a huge shape"] = build(**{first: header[first] | {"shape": [2**40]}})
    files["an offset outside"] = build(**{first: header[first] | {"data_offsets": [0, 2**50]}})
    files["a huge header"] = struct.pack("<Q", 2**60) + data[8:]
    files["no metadata"] = build(__metadata__={})
    files["half"] = data[: len(data) // 2]
    for name, content in files.items():
        yield Hostile(
            f"safetensors {name}", lambda p, content=content: p.write_bytes(content), ".safetensors"
        )
