"""A trained detector to be used: pictures in, detections with names out."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from ..d2 import transforms as T
from ..d2.detections import UnusableDetectionsError, split_output
from ..d2.structures import Boxes, Instances
from ..data import prepare_picture, read_picture
from ..data.images import Picture
from ..modeling.batches import padded_size
from ..untrusted.pictures import PictureTooLargeError, require_pixels_for_model
from ..untrusted.tensors import EXPORTED
from .blueprint import Blueprint, load_model
from .conversion import FOLDER, load_released
from .exported import ExportedDetector
from .hub import FILE, download, file_in_folder, local_file
from .prepare import choose_device, prepare_for_inference
from .selection import Selection, Threshold
from .tiles import NMS, Part, Tiling, tiling_of

if TYPE_CHECKING:
    from .results import Results
    from .sources import Frame

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # arrays are neither equal nor not
class Detections:
    """The objects found in one picture, best first."""

    boxes: np.ndarray  # (N, 4) float32, xyxy in pixels of the picture
    scores: np.ndarray  # (N,) float32, 0 to 1
    classes: np.ndarray  # (N,) int64, class indices from 0
    names: tuple[str, ...]  # of the N objects' classes
    image_size: tuple[int, int]  # height and width in pixels
    # (N,) int64, from 1, -1 for an object that has none yet; None where nothing is tracked
    tracks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Any) -> "Detections":
        """Some of them, by anything that numpy takes as an index of an array."""
        kept = np.atleast_1d(np.arange(len(self))[which])
        names = tuple(self.names[index] for index in kept)
        arrays = (self.boxes[kept], self.scores[kept], self.classes[kept])
        tracks = None if self.tracks is None else self.tracks[kept]
        return Detections(*arrays, names, self.image_size, tracks)

    def to_supervision(self) -> Any:
        """As ``supervision.Detections``, with the names under ``data["class_name"]``.

        Tracks are its ``tracker_id``.
        """
        from ..pages.boxes import sv

        return sv.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.classes.copy(),
            tracker_id=None if self.tracks is None else self.tracks.copy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_instances(self) -> Instances:
        """As detectron2's Instances: ``pred_boxes``, ``scores``, ``pred_classes``.

        Tracks are its ``ID``, as detectron2's trackers have them.
        """
        instances = Instances(
            self.image_size,
            pred_boxes=Boxes(torch.from_numpy(self.boxes.copy())),
            scores=torch.from_numpy(self.scores.copy()),
            pred_classes=torch.from_numpy(self.classes.copy()),
        )
        if self.tracks is not None:
            instances.ID = self.tracks.tolist()
        return instances


class Detector:
    """Finds objects in pictures of any size.

        detector = Detector.from_checkpoint("output/quickstart/model_final.pth")
        found = detector("picture.jpg")
        print(found.boxes, found.scores, found.names)

    Args:
        model: list of ``{"image", "height", "width"}`` to list of ``{"instances"}``, as the
            detector takes and gives them.
        categories: COCO's, ``{"id": ..., "name": ...}``, by class index.
        augmentation: what resizes a picture for the model.
        image_format: "RGB" or "BGR", what the model takes.
        thresholds: least scores of the classes where none is given, by class index: those that the
            evaluation of the weights has chosen. None, where there are none, is 0.3 for all.
    """

    def __init__(
        self,
        model: Callable[[list[dict]], list[dict]],
        categories: Sequence[Mapping[str, Any]],
        augmentation: T.AugmentationList,
        image_format: str = "RGB",
        thresholds: Sequence[float] | None = None,
    ):
        self.model = model
        self.categories = [dict(category) for category in categories]
        self.augmentation = augmentation
        self.image_format = image_format
        self._thresholds = None if thresholds is None else list(thresholds)

    @property
    def class_names(self) -> list[str]:
        return [str(category["name"]) for category in self.categories]  # some are numbers in JSON

    @property
    def thresholds(self) -> dict[str, float] | None:
        """The checkpoint's own, by the names of the classes; None if it has none."""
        return None if self._thresholds is None else dict(zip(self.class_names, self._thresholds))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        config_file: str | None = None,
        overrides: Sequence[str] = (),
        averaged: bool | None = None,
        device: str | None = None,
        dtype: str = "float32",
        compile: bool = False,
        trusted: bool = False,
    ) -> "Detector":
        """Of a checkpoint of this project, which carries its config and its classes.

        Args:
            path: a ``.pth`` or ``.safetensors`` file, or an exported one, ``.onnx``, ``.pt2`` or
                ``.xml`` (OpenVINO); ``hf://user/name[@revision][/file]`` is one on the Hugging Face
                hub.
            config_file: for a checkpoint without a config of its own: the one that it was trained
                with. Its test data name the classes.
            overrides: ``key=value``, change that config, or else the model and the input
                (``dataloader.test.mapper``) of the checkpoint's own.
            averaged: None takes the averages of the weights over the training where the file has
                them, True insists on them, False takes the trained weights.
            device: such as ``"cuda:1"``; a GPU if there is one, by default.
            dtype, compile: see :func:`stage_interactor.inference.prepare_for_inference`; an
                exported file stays as it is.
            trusted: whether ``.pt2`` and ``.xml`` files may be read, which can run anything. All
                other files are read as data, whoever wrote them.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it cannot be read, carries no config, does not fit it, asks for more
                than a detector is made of, holds no averages where ``averaged`` is True, or is a
                ``.pt2`` or ``.xml`` file that is not trusted.
            ConfigError: ``config_file`` or an override is wrong.
            ValueError: another ``dtype``, or a ``device`` that is not there.
            ImportError: an ``.onnx`` file without onnx and onnxruntime, or an ``.xml`` file
                without openvino.
        """
        path = local_file(os.fspath(path))
        detect: Callable[[list[dict]], list[dict]]
        if path.endswith(EXPORTED):
            if dtype != "float32" or compile or config_file or overrides or averaged is not None:
                raise ValueError(
                    f"{path} is exported: it keeps its precision, config and weights, so dtype, "
                    "compile, config_file, overrides and averaged (--dtype, --config-file, "
                    "--trained-weights) have no meaning for it"
                )
            detect, blueprint = ExportedDetector.load(path, device, trusted=trusted)
        else:
            chosen = choose_device(device)
            model, blueprint = load_model(path, config_file, overrides, averaged)
            detect = prepare_for_inference(model.to(chosen), dtype=dtype, compile=compile)
        return cls.of_blueprint(detect, blueprint)

    @classmethod
    def of_blueprint(
        cls, model: Callable[[list[dict]], list[dict]], blueprint: Blueprint
    ) -> "Detector":
        """Of a model, or what takes its place, and of what its file says of it."""
        return cls(
            model,
            blueprint.categories,
            blueprint.build_augmentation(),
            blueprint.image_format,
            blueprint.thresholds,
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | os.PathLike,
        *,
        revision: str | None = None,
        filename: str = FILE,
        token: str | None = None,
        **options: Any,
    ) -> "Detector":
        """Of a detector on the Hugging Face hub, as ``stage-interactor push`` puts it there.

            detector = Detector.from_pretrained("user/name")

        Args:
            repo_id: ``"user/name"``, or a folder that holds such a file.
            revision: a branch, a tag or a commit; the main branch by default.
            filename: of the repository: a ``.safetensors`` or an ``.onnx`` file. Others are not
                taken from there.
            token: of the user; the one that ``hf auth login`` keeps, by default.
            options: of :meth:`from_checkpoint`: ``device``, ``dtype``, ``compile`` and more.

        Raises:
            HubError, a CheckpointError: it cannot be had, or is not what the hub says it is.
            As of :meth:`from_checkpoint`, which reads it.
        """
        repo_id = os.fspath(repo_id)
        if os.path.isdir(repo_id):
            if revision is not None:
                raise ValueError(f"revision={revision!r}: {repo_id} is a folder, which has none")
            return cls.from_checkpoint(file_in_folder(repo_id, filename), **options)
        return cls.from_checkpoint(download(repo_id, revision, filename, token=token), **options)

    @classmethod
    def from_released(
        cls,
        name: str,
        path: str | os.PathLike | None = None,
        *,
        folder: str | os.PathLike = FOLDER,
        device: str | None = None,
        dtype: str = "float32",
        compile: bool = False,
    ) -> "Detector":
        """Of a checkpoint that the authors have released, of COCO's 80 classes.

            detector = Detector.from_released("stage_interactor_r50_100q_12ep")

        The file is downloaded by whoever uses it, and converted in memory, to the last key. Its
        SHA-256 is logged; the authors name none that it could be compared with.

        Args:
            name: of its config, in ``configs/released/``.
            path: of the file; by default the one in ``folder`` that is called as the authors'
                config is, such as ``checkpoints/stageinteractor_r50_1x_coco.pth``.
            device, dtype, compile: see :meth:`from_checkpoint`.

        Raises:
            FileNotFoundError: there is no such file; which one is needed is told.
            CheckpointError: it is another one.
            ValueError: another ``name`` or ``dtype``, or a ``device`` that is not there.
        """
        chosen = choose_device(device)
        model, blueprint = load_released(name, path, folder)
        detect = prepare_for_inference(model.to(chosen), dtype=dtype, compile=compile)
        return cls.of_blueprint(detect, blueprint)

    @overload
    def __call__(
        self, pictures: Picture, threshold: Threshold = None, **options: Any
    ) -> Detections: ...

    @overload
    def __call__(
        self,
        pictures: list[Picture] | tuple[Picture, ...],
        threshold: Threshold = None,
        **options: Any,
    ) -> list[Detections]: ...

    def __call__(
        self,
        pictures: Picture | list[Picture] | tuple[Picture, ...],
        threshold: Threshold = None,
        **options: Any,
    ) -> Detections | list[Detections]:
        """Finds objects.

            detector("picture.jpg", 0.5)
            detector("picture.jpg", {"cell": 0.5}, nms=0.7, max_detections=20)
            detector("map.tif", tiles=800, batch_size=4)

        Args:
            pictures: one, or a list, of which those of one size, resized and padded, are given to
                the model as one batch: paths, PIL images, or uint8 arrays (H, W, 3), RGB. What is
                found in a picture does not depend on the others.
            threshold: detections with a lower score are left out: one for all classes, or for some
                by their names, and under None for all others. What nothing is said of has
                :attr:`thresholds`, or 0.3.
            options: ``classes``, ``multi_label``, ``nms``, ``agnostic``, ``max_detections``, see
                :meth:`select`; ``tiles``, ``overlap``, ``batch_size``, see :meth:`detect`.

        Returns:
            Detections of the picture, or of each picture of the list.

        Raises:
            ImageReadError: a file cannot be read as a picture.
            ValueError: an array is of another form, or an option out of its range.
            UnusableDetectionsError: detections of a picture are NaN or infinite.
        """
        if not isinstance(pictures, (list, tuple)):
            return self([pictures], threshold, **options)[0]
        found = []
        for number, (picture, detections) in enumerate(
            zip(pictures, self.detect(pictures, threshold, **options)), start=1
        ):
            if isinstance(detections, UnusableDetectionsError):
                is_path = isinstance(picture, (str, os.PathLike))
                name = picture if is_path else f"picture {number} of {len(pictures)}"
                raise UnusableDetectionsError(f"{name}: {detections}")
            found.append(detections)
        return found

    def detect(
        self,
        pictures: Sequence[Picture],
        threshold: Threshold = None,
        *,
        tiles: int | None = None,
        overlap: float | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> list[Detections | UnusableDetectionsError]:
        """The detections of each picture, or what is wrong with them; see :meth:`__call__`.

        Args:
            tiles: a side in pixels: larger pictures are looked at in tiles of it, each resized as a
                picture of its size is, and once as a whole for what is larger than a tile. Boxes of
                a class, of whatever tiles, that overlap by an IoU of more than 0.5, or of ``nms``,
                are one.
            overlap: of neighbouring tiles, as a share of their side; 0.2 by default. Objects that
                are a little smaller than it are seen whole by a tile.
            batch_size: tiles that the model gets at once.
        """
        select = self.select(threshold, **options)
        if tiling := tiling_of(tiles, overlap, batch_size):
            return [self.detect_tiled(read_picture(item), tiling, select) for item in pictures]
        return self.detect_prepared([self.prepare(picture) for picture in pictures], select)

    def select(
        self,
        threshold: Threshold = None,
        *,
        classes: Sequence[str] | str | None = None,
        multi_label: bool = False,
        nms: float | None = None,
        agnostic: bool = False,
        max_detections: int | None = None,
    ) -> Selection:
        """Which detections are given.

        Args:
            threshold: least score, see :meth:`__call__`.
            classes: names of the classes to keep, also where they are numbers, such as "7".
            multi_label: a query that wins several classes gives a box for each of them, not for the
                best alone.
            nms: an IoU: of boxes of a class that overlap by more than it the best is kept.
            agnostic: NMS whatever the class.
            max_detections: the best so many of a picture.

        Raises:
            ValueError: a value is out of its range, or a class unknown.
        """
        return Selection.of(
            self.class_names,
            self._thresholds,
            threshold,
            classes=classes,
            multi_label=multi_label,
            nms=nms,
            agnostic=agnostic,
            max_detections=max_detections,
        )

    def prepare(self, picture: Picture) -> dict[str, Any]:
        """A picture, resized, as the model takes it.

        Raises:
            ImageReadError: it cannot be read.
            PictureTooLargeError: it is too large for the memory that the model would need.
        """
        prepared = prepare_picture(read_picture(picture), self.augmentation, self.image_format)
        divisibility = getattr(self.model, "size_divisibility", 1)
        height, width = padded_size(prepared["image"], divisibility)
        require_pixels_for_model(width, height)
        return prepared

    def detect_prepared(
        self, inputs: Sequence[dict[str, Any]], select: Selection
    ) -> list[Detections | UnusableDetectionsError]:
        """:meth:`detect` of pictures that :meth:`prepare` has made ready."""
        found: list[Detections | UnusableDetectionsError] = []
        for output in self.model(list(inputs)) if inputs else []:
            output, count = split_output(output)
            if count:
                told = (
                    f"{count} detections are NaN, infinite or of negative size: the model "
                    "overflows; use it in float32 (dtype, --dtype), or another checkpoint"
                )
                found.append(UnusableDetectionsError(told))
                continue
            instances = output["instances"]
            boxes = instances.pred_boxes.tensor.float().cpu().numpy()
            scores = instances.scores.float().cpu().numpy()
            classes = instances.pred_classes.cpu().numpy()
            found.append(self._named(boxes, scores, classes, select, instances.image_size))
        return found

    def detect_tiled(
        self, picture: np.ndarray, tiling: Tiling, select: Selection
    ) -> Detections | UnusableDetectionsError:
        """:meth:`detect` of a picture, uint8 (H, W, 3) RGB, in tiles if it is larger than one."""
        height, width = picture.shape[:2]
        if tiling.fits(height, width):
            return self.detect_prepared([self.prepare(picture)], select)[0]
        # What can only be told of all of them together is not asked of each.
        of_part = replace(select, nms=None, classes=None, max_detections=None)
        parts = []
        for batch in tiling.batches(height, width):
            try:
                inputs = [
                    self.prepare(picture[top:bottom, left:right])
                    for left, top, right, bottom in batch
                ]
            except PictureTooLargeError as error:
                if batch != [(0, 0, width, height)]:
                    raise
                logger.warning(f"Only tiles are looked at: for the whole picture, {error}")
                continue
            for place, found in zip(batch, self.detect_prepared(inputs, of_part)):
                if isinstance(found, UnusableDetectionsError):
                    return UnusableDetectionsError(f"in the tile {place}, {found}")
                parts.append(Part(place, found.boxes, found.scores, found.classes))
        boxes, scores, classes = tiling.merged(parts, height, width)
        of_all = replace(select, multi_label=True, nms=select.nms or NMS)
        return self._named(boxes, scores, classes, of_all, (height, width))

    def _named(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        classes: np.ndarray,
        select: Selection,
        image_size: tuple[int, int],
    ) -> Detections:
        kept = select(boxes, scores, classes)
        names = self.class_names
        named = tuple(names[index] for index in classes[kept])
        return Detections(boxes[kept], scores[kept], classes[kept], named, image_size)

    def predict_files(
        self, places: Iterable[str | os.PathLike] | str | os.PathLike, **options: Any
    ) -> "Results":
        """Finds objects in images and videos, folders and globs of them.

            results = detector.predict_files("photos", output_dir="output/found")
            for path, name, frame, detections in results:
                print(path, detections.names)

        Args:
            places, options: see :func:`stage_interactor.inference.predict.predict_files`.
        """
        from .predict import predict_files  # which brings what reads and writes videos

        return predict_files(self, places, **options)

    def stream(
        self, source: str | int | os.PathLike, **options: Any
    ) -> "Iterator[tuple[Frame, Detections]]":
        """Finds objects in a camera, a stream of the network or a video, frame by frame.

            for frame, found in detector.stream("rtsp://camera/stream", track=True):
                print(frame.time, found.names, found.tracks)

        Args:
            source, options: see
                :func:`stage_interactor.inference.live.predict_stream`.
        """
        from .live import predict_stream

        return predict_stream(self, source, **options)
