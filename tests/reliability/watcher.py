"""Uses files of detectors, one after the other, and tells what happens to each, as JSON lines.

    python watcher.py FOLDER PICTURE TRUSTED_FOLDERS...

reads names of files from standard input. Whatever is opened outside of the folder and of the
installed packages, whatever is written, connected to or started, is told; so is an error that a
user would see as a stack trace.
"""

import json
import os
import resource
import signal
import sys
import time


def main() -> None:
    folder, picture, *trusted = sys.argv[1:]
    readable = tuple(
        os.path.realpath(place)
        for place in (folder, picture, sys.prefix, sys.base_prefix, *trusted, "/proc", "/sys")
    )
    import contextlib

    with contextlib.suppress(ImportError):  # which look at the machine when they are imported
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

    from stage_interactor import Detector, errors
    from stage_interactor.engine.checkpoint import Checkpointer

    seen: list[str] = []
    watched = ("socket.", "subprocess.", "os.", "shutil.", "urllib.", "ftplib.", "ctypes.dlopen")
    harmless = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")

    def hook(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            path, mode, flags = os.path.realpath(os.fsdecode(args[0])), args[1], args[2] or 0
            writes = any(sign in (mode or "") for sign in "wax+") or flags & (
                os.O_WRONLY | os.O_RDWR
            )
            if path != "/dev/null" and (writes or not path.startswith(readable)):
                seen.append(f"open {path} {mode}")
        elif event.startswith(watched) and not event.startswith(harmless):
            seen.append(f"{event} {str(args)[:100]}")
        elif event == "import" and "canary" in args[0]:
            seen.append(f"import {args[0]}")

    def late(*_: object) -> None:
        raise SystemExit("too late")

    signal.signal(signal.SIGALRM, late)
    for number, line in enumerate(sys.stdin):
        path = line.rstrip("\n")
        signal.alarm(60)
        start, told, names = time.monotonic(), "", None
        try:
            detector = Detector.from_checkpoint(path, device="cpu")
            found = detector(picture, threshold=0.0)
            names = [len(found), float(found.scores.sum())]
            if path.endswith((".pth", ".pkl")):  # also as what a training starts from
                Checkpointer(detector.model, strict=False)._read(path)
        except SystemExit as error:
            told = f"SystemExit {error}"
        except BaseException as error:
            text = errors.explain(error)
            told = text if text is not None else f"BUG {type(error).__name__}: {error}"
            if path.endswith((".pth", ".pkl")):
                try:
                    Checkpointer(None, strict=False)._read(path)
                except BaseException as second:
                    if errors.explain(second) is None:
                        told = f"BUG {type(second).__name__}: {second}"
        signal.alarm(0)
        if number == 0:
            sys.addaudithook(hook)  # the first is a good one, and imports what is imported late
            seen.clear()
        print(
            json.dumps(
                {
                    "path": path,
                    "told": told,
                    "found": names,
                    "seen": seen[:3],
                    "seconds": time.monotonic() - start,
                    "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                }
            ),
            flush=True,
        )
        seen.clear()


if __name__ == "__main__":
    main()
