"""The generated quick-start data set: pictures of shapes as JPEG files with COCO annotations.

Five classes of rotated and stretched shapes, most of them with the texture and the hue that are
typical of their class, of all sizes, overlapping and cut by the border of the picture. The box of
an object is the tight box around the pixels of it that can be seen, as in COCO; `area`, which
sorts objects into small, medium and large, is the area of that box.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ...d2 import comm
from ...errors import naming
from ..coco import load_coco_dataset
from .scene import CLASS_NAMES, draw_scene

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")

_FORMAT = 2  # raise it when the pictures change, so that older folders are generated anew
_PARAMETERS_FILE = "parameters.json"
_OF_A_SCENE = ("image_size", "min_objects", "max_objects", "min_size", "max_size")
_STALE_SECONDS = 3600.0
_WAIT_SECONDS = 1800.0


def generate_shapes(
    root: str | os.PathLike,
    *,
    num_train: int = 2000,
    num_val: int = 400,
    image_size: int = 128,
    min_objects: int = 1,
    max_objects: int = 6,
    min_size: float | None = None,
    max_size: float | None = None,
    seed: int = 0,
    write: bool = True,
) -> Path:
    """Writes the data set to `root`, unless it is already there with the same parameters.

    Files: `train.json` and `val.json` (COCO format), the pictures in `train/` and `val/`, and
    `parameters.json`. The same parameters give the same bytes. Everything is written to a folder
    beside `root` that is renamed when it is whole, so an interrupted run leaves nothing behind
    that could be taken for a data set. In a distributed job the first process of every machine
    writes and the others wait for it.

    Args:
        root: the folder to write. A data set of other parameters in it is replaced.
        num_train, num_val: number of pictures.
        image_size: height and width of a picture, in pixels.
        min_objects, max_objects: range of the number of objects that are tried in a picture.
        min_size, max_size: range of an object's size (square root of its box area), in pixels;
            by default 12.5 % (at least 8) and 92 % of `image_size`.
        seed: of the random numbers.
        write: whether it may be generated; else it must be there already.

    Returns:
        `root` as a path.

    Raises:
        ValueError: a parameter is out of its range.
        FileExistsError: `root` holds something that this function did not write.
        FileNotFoundError: it is not there, and not to be written.
        TimeoutError: the process that writes did not finish.
    """
    root = Path(root)
    parameters = {
        "format": _FORMAT,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "min_objects": min_objects,
        "max_objects": max_objects,
        "min_size": max(8.0, 0.125 * image_size) if min_size is None else min_size,
        "max_size": 0.92 * image_size if max_size is None else max_size,
        "seed": seed,
    }
    _check_parameters(parameters)
    if _is_whole(root, parameters):
        return root
    if not write:
        raise FileNotFoundError(f"{root} does not hold the shapes that {parameters} stand for")
    if comm.get_local_rank() != 0:
        _wait_for(root, parameters)
        return root
    if root.exists() and any(root.iterdir()) and not (root / _PARAMETERS_FILE).is_file():
        raise FileExistsError(
            f"the folder {root} for the generated shapes holds other files (it has no "
            f"{_PARAMETERS_FILE}); choose another folder, or empty this one"
        )

    root.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(root)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}.incomplete-", dir=root.parent))
    try:
        os.chmod(scratch, 0o755)  # mkdtemp's own mode would hide the data from other users
        with naming(root):
            _write(scratch, parameters)
        _move_into_place(scratch, root, parameters)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root


def load_shapes(
    *, root: str | os.PathLike, split: str, name: str | None = None, **parameters
) -> list[dict]:
    """Generates the data set if needed, registers one split of it and returns its records.

    Args:
        root, parameters: see `generate_shapes`.
        split: "train" or "val".
        name: the name to register it under; by default `shapes_train` or `shapes_val`.

    Returns:
        Dataset dicts, see `load_coco_dataset`.
    """
    if split not in SPLITS:
        raise ValueError(f"split of the generated shapes must be 'train' or 'val', got {split!r}")
    root = generate_shapes(root, **parameters)
    return load_coco_dataset(
        name or f"shapes_{split}",
        str(root / f"{split}.json"),
        str(root / split),
        is_train=split == "train",
    )


def _check_parameters(parameters: dict) -> None:
    for name in ("num_train", "num_val", "min_objects"):
        if parameters[name] < 1:
            raise ValueError(f"generate_shapes: {name} must be at least 1, got {parameters[name]}")
    if parameters["max_objects"] < parameters["min_objects"]:
        raise ValueError(
            f"generate_shapes: max_objects={parameters['max_objects']} is less than "
            f"min_objects={parameters['min_objects']}"
        )
    if parameters["image_size"] < 32:
        raise ValueError(
            f"generate_shapes: image_size must be at least 32, got {parameters['image_size']}"
        )
    if not 6 <= parameters["min_size"] <= parameters["max_size"] <= parameters["image_size"]:
        raise ValueError(
            "generate_shapes: sizes must fulfil 6 <= min_size <= max_size <= image_size, got "
            f"min_size={parameters['min_size']}, max_size={parameters['max_size']}, "
            f"image_size={parameters['image_size']}"
        )


def _is_whole(root: Path, parameters: dict) -> bool:
    try:
        written = json.loads((root / _PARAMETERS_FILE).read_text())
    except (OSError, ValueError):
        return False
    return written == parameters and all((root / f"{split}.json").is_file() for split in SPLITS)


def _wait_for(root: Path, parameters: dict) -> None:
    # Polling instead of a barrier: a process that comes late finds the data and must not wait.
    deadline = time.monotonic() + _WAIT_SECONDS
    while not _is_whole(root, parameters):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"waited {_WAIT_SECONDS:.0f} s for the generated shapes in {root}; did the "
                "process with local rank 0 stop?"
            )
        time.sleep(0.2)


def _remove_stale(root: Path) -> None:
    """Removes what runs that were killed long ago have left beside `root`."""
    for folder in root.parent.glob(f".{root.name}.incomplete-*"):
        try:
            age = time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
        except OSError:  # another process has just renamed or removed it
            continue
        if age > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(scratch: Path, root: Path, parameters: dict) -> None:
    for _ in range(10):
        try:
            os.replace(scratch, root)  # succeeds if root is absent or an empty folder
            return
        except OSError:
            if not root.is_dir():
                raise
        if _is_whole(root, parameters):  # another process was faster
            return
        outdated = Path(tempfile.mkdtemp(prefix=f".{root.name}.incomplete-", dir=root.parent))
        try:
            os.replace(root, outdated)
        except FileNotFoundError:
            pass
        finally:
            shutil.rmtree(outdated, ignore_errors=True)
    raise RuntimeError(f"could not move the generated shapes to {root}: it is written to all along")


def _write(folder: Path, parameters: dict) -> None:
    total = parameters["num_train"] + parameters["num_val"]
    logger.info("generating %d pictures of shapes for the quick start ...", total)
    start, done = time.perf_counter(), 0
    for split_index, split in enumerate(SPLITS):
        (folder / split).mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(parameters[f"num_{split}"]):
            # One generator a picture: a picture does not depend on the number of the others.
            rng = np.random.default_rng([parameters["seed"], split_index, index])
            pixels, objects = draw_scene(rng, **{key: parameters[key] for key in _OF_A_SCENE})
            file_name = f"{index + 1:06d}.jpg"
            Image.fromarray(pixels).save(folder / split / file_name, quality=92)
            height, width = pixels.shape[:2]
            images.append(
                {"id": index + 1, "file_name": file_name, "height": height, "width": width}
            )
            annotations += (
                {
                    "id": number,
                    "image_id": index + 1,
                    "category_id": item["class_index"] + 1,
                    "bbox": item["bbox"],
                    "area": round(item["bbox"][2] * item["bbox"][3], 4),
                    "iscrowd": 0,
                }
                for number, item in enumerate(objects, start=len(annotations) + 1)
            )
            done += 1
            if done % 500 == 0 or done == total:
                seconds = time.perf_counter() - start
                logger.info("generated %d of %d pictures in %.1f s", done, total, seconds)
        content = {
            "info": {"description": f"generated shapes, {split} split", "version": str(_FORMAT)},
            "licenses": [{"id": 1, "name": "generated by program, free of rights", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": index + 1, "name": name, "supercategory": "shape"}
                for index, name in enumerate(CLASS_NAMES)
            ],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))
    (folder / _PARAMETERS_FILE).write_text(json.dumps(parameters, indent=2) + "\n")
