"""Folders of runs as a stranger could make them, and what happens to who looks at one.

``python hostile_runs.py SEED CASES FOLDER`` writes a page about each of many, in this one process,
and prints what was found wrong as a JSON list.
"""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SECONDS, MEMORY = 60, 4 * 2**30  # that a page may take
MARK = "zqx"  # in what must not reach a page as it is
CLASSES = [
    "cat",
    f"<script>{MARK}()</script>",
    f"\"'><img src=x onerror={MARK}()>",
    "$x^2$ {{ 7 }}",
]


class Touch:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def make_run(folder: Path, marker: Path) -> None:
    """A small run that ``report`` shows all of; what must not be run would touch ``marker``."""
    pictures = folder / "data"
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    found = []
    for key in range(1, 5):
        name = f"{key}<b>.png"
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(pictures / name)
        truth["images"].append({"id": key, "file_name": name, "width": 60, "height": 40})
        for label in range(1, 4):
            box = [float(label * 10), 5.0, 8.0, 9.0 + key]
            item = {"image_id": key, "category_id": label, "bbox": box}
            truth["annotations"].append(
                {**item, "id": len(truth["annotations"]) + 1, "area": box[2] * box[3], "iscrowd": 0}
            )
            found += [{**item, "score": 0.9}, {**item, "bbox": [1.0, 1.0, 5.0, 5.0], "score": 0.4}]
    (folder / "data.json").write_text(json.dumps(truth))
    (folder / "coco_instances_results.json").write_text(json.dumps(found))
    rows = [
        {"iteration": i, "total_loss": 3 - i / 10, "loss_class": 1.0, "lr": 1e-4, "time": 0.2}
        | ({"bbox/AP": 1.5 * i, "bbox/AP50": 2.0 * i, "bbox/AP75": None} if i % 5 == 4 else {})
        for i in range(20)
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"bbox": {"AP": 12.5, "APs": None}}))
    data = {
        "_target_": "stage_interactor.data.load_coco_dataset",
        "name": "${data.name}_val",
        "json_file": "${data.json}",
        "image_root": "${data.root}",
        "is_train": False,
    }
    config = {
        "data": {"name": "x", "json": str(folder / "data.json"), "root": str(pictures)},
        "dataloader": {
            "train": {"total_batch_size": 4},
            "test": {"dataset": data},
            "evaluator": {"dataset_name": "${..test.dataset.name}", "max_dets_per_image": 100},
        },
        "model": {"backbone": {"name": "resnet"}, "queries": {"num_queries": 8}},
        "optimizer": {"lr": 1e-4},
        "train": {"max_iter": 20},
    }
    (folder / "config_resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "instances_predictions.pth").write_bytes(pickle.dumps(Touch(str(marker))))
    shutil.copy(pictures / "1<b>.png", folder / "detections.jpg")


def values(marker: Path) -> list[Any]:
    """In place of a value: other types, ends of ranges, and what a careless reader would run."""
    call = {"_target_": "os.system", "command": f"touch '{marker}'"}
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return [
        None, True, 0, -1, 1, 2**31, 2**64, -(10**400), 1e308, -1e308, 1e-320, float("nan"),
        float("inf"), "", "x", "0", "\0", "\ud800", "../../x", "/etc/passwd", "a" * 5000, "\u202e",
        f"<script>{MARK}()</script>", f"\"'><img src=x onerror={MARK}()>", "]]>", "&#60;b&#62;",
        [], {}, [[]], [None], {"": 0}, [1, 2, 3, 4], [float("nan")] * 4, [1e308] * 4, ["x"] * 4,
        "${oc.env:HOME}", "${oc.create:{a:1}}", "${train}", "${..}", "${.}", "${", "${a.b.c}",
        "${data.name}" * 300, "${data.json}", "${optimizer.lr}",
        call, [call], {"_target_": "builtins.eval", "expression": code, "_args_": [code]},
        {"_target_": "stage_interactor.config.saved_object", "recipe": {
            "function": "os.system", "arguments": [f"touch '{marker}'"], "keywords": {}}},
        {"_target_": "stranger_module.load", "path": str(marker)},
    ]  # fmt: skip


TEXTS = (  # in place of a YAML file
    "a: &a [x, x]\n"
    + "".join(f"{k}: &{k} [*{p}, *{p}]\n" for p, k in zip("abcdefghijklm", "bcdefghijklmn")),
    "a: &a {x: 1}\n" + "".join(
        f"m{k}: &m{k} {{<<: [{p}, {p}], k{k}: 1}}\n"
        for k, p in ((k, f"*m{k - 1}" if k else "*a") for k in range(40))),
    "a: &a [*a]\n", "a: &a {b: *a}\ndataloader: *a\n", "[" * 5000, "{a: " * 5000, "- " * 5000,
    "a: !!python/object/apply:os.system ['touch MARKER']\n", "!!python/name:os.system\n",
    "a: !!int ''\n", "a: !!float x\n", "a: !!bool x\n", "a: !!timestamp x\n", "a: 2020-99-99\n",
    "a: !!binary x\n", "? [a]\n: b\n", "? {a: b}\n: c\n", "a: 1\n---\nb: 2\n", "%YAML 9.9\n---\n",
    "a: " + "9" * 5000, "a: 1_000:99:99\n", "\t", "*a", "null", "5", "- 1", "a: b: c", "\x00", "",
)  # fmt: skip
LINES = (  # in a file of JSON lines
    "[1]", "{}", '"x"', "null", "\x00\x01", "{", '{"iteration": 5}', '{"iteration": "x", "lr": 1}',
    '{"iteration": 1e9, "lr": 1}', '{"iteration": -1, "total_loss": 1}', "[" * 100_000,
    '{"iteration": 3, "total_loss": 1' + "0" * 5000 + "}", '{"iteration": 3, "time": 1e300}',
    '{"iteration": 9007199254740991, "total_loss": 1, "time": 1000000}', "x" * 2_000_000,
    '{"iteration": 3, "total_loss": Infinity, "grad_norm": -Infinity, "lr": NaN}',
    '{"iteration": true, "lr": true}', '{"iteration": [1]}', '{"iteration": 2, "lr": {"a": 1}}',
    '{"iteration": 6, "total_loss": -1e30, "lr": 1e30, "bbox/AP": -5, "bbox/AP50": 1e29}',
)  # fmt: skip
FILES = (
    "config_resolved.yaml", "metrics.json", "coco_instances_results.json", "data.json",
    "results.json", "instances_predictions.pth", "detections.jpg", "data/1<b>.png",
)  # fmt: skip


def mutate(folder: Path, rng: random.Random, marker: Path) -> str:
    """Changes something in the folder of a run at random; says what."""
    path = folder / rng.choices(FILES, [6, 4, 4, 4, 1, 1, 1, 1])[0]
    structured = path.suffix in (".json", ".yaml")
    how = rng.choice(["bytes", "place", *(["value"] * 4 + ["text"]) * structured])
    if path.is_symlink() or not path.is_file():
        return f"{path.name} left as it is"
    if how == "place":
        return f"{path.name} {_replace(path, rng)}"
    if how == "bytes":
        return f"{path.name} {_change_bytes(path, rng)}"
    if how == "text" and path.suffix == ".yaml":
        text = rng.choice(TEXTS).replace("MARKER", str(marker))
        path.write_text(text)
        return f"{path.name} is {text[:60]!r}"
    try:
        if path.name == "metrics.json":
            lines = path.read_text().splitlines()
            line = rng.choice(LINES)
            lines.insert(rng.randrange(len(lines) + 1), line)
            path.write_text("\n".join(lines))
            return f"{path.name} with {line[:60]!r}"
        content = yaml.safe_load(path.read_text())
    except Exception:  # an earlier change has made it no such file
        return f"{path.name} left as it is"
    told = _change_value(content, rng, values(marker))
    dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
    path.write_text(str(dump(content)), errors="surrogatepass")
    return f"{path.name}: {told}"


def _replace(path: Path, rng: random.Random) -> str:
    kind = rng.choice(["pipe", "folder", "missing", "empty", "link", "device", "large", "circle"])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**36)
    elif kind == "circle":
        path.symlink_to(path)
    return f"is {kind}"


def _change_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1)
    kind = rng.choice(["cut", "flip", "insert", "repeat"])
    if kind == "cut":
        del content[at:]
    elif kind == "flip" and content:
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randint(1, 50))
    else:
        content += content[at:]
    path.write_bytes(content)
    return f"{kind} at {at}"


def _change_value(content: Any, rng: random.Random, others: list[Any]) -> str:
    places = list(_places(content))
    if not places:
        return "nothing to change"
    told = []
    for _ in range(rng.choice([1, 1, 1, 3])):
        holder, key = rng.choice(places)
        if rng.random() < 0.1 and isinstance(holder, dict):
            holder.pop(key, None)
            told.append(f"without {key}")
        else:
            holder[key] = rng.choice(others)
            told.append(f"{key} is {str(holder[key])[:60]!r}")
    return ", ".join(told)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield content, key
            yield from _places(value)


EXECUTING = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen",
)  # fmt: skip
CHANGING = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree",
)  # fmt: skip


class Watch:
    """While it is on, all that is run, and what is written outside of a folder, is an event."""

    def __init__(self, allowed: Path):
        self.allowed, self.on = allowed, False
        self.events: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in EXECUTING:
            self.events.append(f"{event} {arguments}"[:200])
        elif event == "import" and str(arguments[0]).startswith("stranger"):
            self.events.append(f"import {arguments[0]}")
        elif event == "open" and isinstance(arguments[2], int):
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if arguments[2] & writing and self._is_outside(arguments[0]):
                self.events.append(f"open to write {arguments[0]}")
        elif event in CHANGING and any(map(self._is_outside, arguments[:2])):
            self.events.append(f"{event} {arguments}"[:200])

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes)) or os.fsdecode(path) == os.devnull:
            return False
        folder = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        return not Path(folder).is_relative_to(self.allowed)


def try_all(seed: int, cases: int, folder: Path) -> list[str]:
    """Looks at many mutated runs; what was found wrong."""
    from stage_interactor.commands import main
    from stage_interactor.engine.training import Run

    folder = folder.resolve()
    marker, watch = folder / "executed", Watch(folder)
    wrong: list[str] = []

    def ended(*_: object) -> None:
        raise TimeoutError("it takes too long")

    signal.signal(signal.SIGALRM, ended)
    make_run(folder / "whole", marker)
    assert main(["report", str(folder / "whole")]) == 0
    page = (folder / "whole/report.html").read_text()
    assert "Best images" in page and MARK in page and f"<script>{MARK}" not in page, "no page"
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        run = folder / f"run{case}"
        make_run(run, marker)
        told = "; ".join(mutate(run, rng, marker) for _ in range(rng.choice([1, 1, 2, 4])))
        output, error = io.StringIO(), io.StringIO()
        signal.alarm(SECONDS)
        watch.on = True
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
                status = main(["report", str(run), "--output", str(run / "page.html")])
                with contextlib.suppress(OSError, ValueError):
                    assert isinstance(Run.in_folder(run).metrics, dict)
        except BaseException as unexpected:
            status = -1
            error.write("".join(traceback.format_exception(unexpected)))
        watch.on = False
        signal.alarm(0)
        lines = error.getvalue().strip().splitlines()
        if status not in (0, 2) or any("Traceback" in line or "a bug" in line for line in lines):
            wrong.append(f"case {case}, {told}: {status}, {' | '.join(lines[-6:])}")
        elif status == 2 and not (lines and lines[-1].startswith("stage-interactor: ")):
            wrong.append(f"case {case}, {told}: no line says why, {lines}")
        elif status == 0:
            page = (run / "page.html").read_text()
            if f"<script>{MARK}" in page or f"<img src=x onerror={MARK}" in page:
                wrong.append(f"case {case}, {told}: unescaped in the page")
            if status == 0 and "src=x" in page.replace("&#34;", '"').replace("src=x onerror", ""):
                wrong.append(f"case {case}, {told}: asks for another file")
        if list(run.glob("*.tmp")):
            wrong.append(f"case {case}, {told}: half a file is left")
        if watch.events or marker.exists():
            wrong.append(f"case {case}, {told}: {watch.events} {marker.exists() * 'executed'}")
            watch.events.clear()
            marker.unlink(missing_ok=True)
        shutil.rmtree(run)
    if (most := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) > MEMORY:
        wrong.append(f"{most / 2**30:.1f} GiB of memory")
    return wrong


if __name__ == "__main__":
    print(json.dumps(try_all(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])), indent=1))
