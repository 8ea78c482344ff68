#!/usr/bin/env python
"""Times the parts of the detector: the reference against the fast path, side by side in one run.

python tools/benchmark.py                                 # every part in float32 and bfloat16
python tools/benchmark.py --parts decoder train_step --queries 100 --image-size 800 1344
python tools/benchmark.py --device cuda --batch-size 2 --compile --output benchmark.json
python tools/benchmark.py --bare      # the paper's R50 model without a config, timm or omegaconf

All variants of a part take turns, so that what disturbs the machine disturbs all of them; the ratio
is the median of the ratios of the turns. The floor of a part is the longer of two times: its FLOPs
at the fastest matrix product measured here in that precision, and the bytes that it has to read and
write at least once at the fastest copy measured here.
"""

import argparse
import copy
import ctypes
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import bare  # noqa: F401
import numpy as np
import torch
from checks.coco_detections import coco_like
from checks.labels_and_losses import labels_and_losses
from checks.small import without_zeros
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from stage_interactor.d2.structures import Boxes, BoxMode, Instances
from stage_interactor.errors import call
from stage_interactor.inference import DTYPES, prepare_for_inference
from stage_interactor.inference.prepare import choose_device
from stage_interactor.modeling import (
    ChannelMapper,
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    InitialQueries,
    StageInteractor,
    StageOutput,
    build_decoder,
)
from stage_interactor.modeling.matcher import Targets
from stage_interactor.ops import (
    current_ops,
    mix_channels,
    mix_points,
    mix_statically,
    sample_pyramid,
    use_ops,
)
from stage_interactor.ops.memory import kept_memory
from stage_interactor.ops.sampling import Pyramid


@dataclass
class Case:
    """One part of the detector in one setting.

    ``run`` is called with nothing and does the work once. Its variants differ in what surrounds it.
    """

    name: str
    run: dict[str, Callable[[], object]]  # by precision
    images: int
    least_bytes: float  # in float32
    flops: float = 0.0
    compiled: dict[str, Callable[[], object]] = field(default_factory=dict)
    has_operations: bool = True  # whether fast and reference differ at all


@dataclass
class Result:
    """One variant of a case, times in milliseconds."""

    case: str
    variant: str
    median: float
    spread: float  # half the distance between the quartiles
    ratio: float  # reference time / this time
    images_per_second: float
    floor: float
    share_of_floor: float
    peak_mib: float | None  # above what was allocated before


class Machine:
    """Measures: fastest product and copy, time with synchronisation, peak memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.products = {name: self._product(dtype) for name, dtype in DTYPES.items()}
        self.copy = self._copy()

    def seconds(self, work: Callable[[], object]) -> float:
        self._synchronise()
        start = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _best(self, work: Callable[[], object], repeats: int = 7) -> float:
        work()
        return min(self.seconds(work) for _ in range(repeats))

    def _product(self, dtype: torch.dtype) -> float:
        """FLOP/s of the best square product; a multiply-add is two."""
        size = 8192 if self.device.type == "cuda" else 2048
        if self.device.type == "cpu" and dtype == torch.float16:
            return float("nan")  # not a precision for CPUs
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        with torch.inference_mode():
            return 2 * size**3 / self._best(lambda: left @ right)

    def _copy(self) -> float:
        """Bytes a second, read and written."""
        size = (2**30 if self.device.type == "cuda" else 2**28) // 4
        source = torch.randn(size, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def peak_mib(self, work: Callable[[], object]) -> float | None:
        """MiB that the work holds at most, above what there was before; None if unknown.

        Gradients of an earlier call must be gone before: see :meth:`Parts.forget_gradients`.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        try:  # Linux: the high-water mark of the process can be reset
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except (OSError, AttributeError):
            return None
        before = _process_memory("VmRSS")
        work()
        return (_process_memory("VmHWM") - before) / 2**10

    def describe(self) -> dict:
        name = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif sys.platform == "linux":
            with open("/proc/cpuinfo") as file:
                names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
            name = f"{names[0]}, {torch.get_num_threads()} threads" if names else name
        teraflops = {key: round(value / 1e12, 3) for key, value in self.products.items()}
        return {
            "device": name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "product_tflops": {key: value for key, value in teraflops.items() if value == value},
            "copy_gb_per_s": round(self.copy / 1e9, 1),
        }


def _process_memory(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = DTYPES[precision]
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def _backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Gradients of the inputs from made-up gradients of the outputs."""
    torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])


class ReleaseOrFast(nn.Module):
    """A criterion that computes as the release does where the reference operations are chosen."""

    def __init__(self, criterion: Criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]):
        if current_ops() == "fast":
            return self.criterion(outputs, objects)
        if not isinstance(objects, Targets):
            objects = Targets.from_instances(objects, torch.float32)
        return labels_and_losses(
            [output.logits.float() for output in outputs],
            [output.boxes for output in outputs],
            [boxes[:count] for boxes, count in zip(objects.boxes, objects.counts)],
            [classes[:count] for classes, count in zip(objects.classes, objects.counts)],
            [(int(height), int(width)) for height, width in objects.image_sizes],
        )


class Parts:
    """Builds the cases from a model's own sizes."""

    def __init__(self, model: nn.Module, mapper, device: torch.device, batch: int, args):
        self.mapper = mapper
        self.device, self.batch, self.size = device, batch, tuple(args.image_size)
        self.precisions, self.compile = args.precision, args.compile
        self.objects, self.eval_images = args.objects, args.eval_images
        self.leaves: list[Tensor] = []
        without_zeros(model.decoder)
        self.model = model.to(device)
        self.num_queries = self.model.queries.num_queries
        self.stage = self.model.decoder.stages[-1]
        self.images = torch.rand(batch, 3, *self.size, device=device) * 255
        self.sizes = torch.tensor([self.size] * batch, device=device)
        with torch.inference_mode():
            self.maps = [m.clone() for m in self.model.neck(self.model.backbone(self.images))]
        self.map_bytes = sum(level.nbytes for level in self.maps)

    # Single operations, of the last stage's sizes

    def _operation(self, name: str, function, inputs: dict, least_elements: int, flops: float):
        """Forward, and forward with backward, of a function of tensors."""
        cases = []
        for trains in (False, True):
            run = {}
            for precision in self.precisions:
                dtype = DTYPES[precision]
                tensors = {
                    key: _leaf(value, dtype, trains, key.startswith(("xy", "weights")))
                    for key, value in inputs.items()
                }
                leaves = [leaf for value in tensors.values() for leaf in _leaves(value)]

                def work(tensors=tensors, leaves=leaves, trains=trains):
                    with torch.set_grad_enabled(trains):
                        output = function(**tensors)
                    if trains:
                        _backward(output if isinstance(output, list) else [output], leaves)

                run[precision] = work
            factor = 3 if trains else 1
            cases.append(
                Case(
                    name + (" forward+backward" if trains else " forward"),
                    run,
                    self.batch,
                    4.0 * least_elements * factor,
                    flops * factor,
                )
            )
        return cases

    def sampling(self) -> list[Case]:
        """The points of all stages, which read one pyramid."""
        height, width = self.size
        inputs, least, flops = {}, 0, 0.0
        for index, stage in enumerate(self.model.decoder.stages):
            sampler = stage.sampler
            shape = self.batch, self.num_queries, sampler.num_groups
            points = sampler.point_groups * sampler.points_per_group
            # Boxes of all sizes, as a decoder has them, with points around their centres.
            centre = torch.rand(*shape[:2], 1, 1, 2) * torch.tensor([width, height])
            spread = 2 ** (4 + 5 * torch.rand(*shape[:2], 1, 1, 1))
            xy = centre + spread * torch.randn(*shape, points, 2)
            z = (spread.log2() + torch.randn(*shape, points, 1)).squeeze(-1)
            inputs[f"xy{index}"] = xy.to(self.device)
            inputs[f"weights{index}"] = sampler.level_weights(z.to(self.device))
            group_dim = self.maps[0].shape[1] // sampler.num_groups
            samples = xy[..., 0].numel()
            taps = samples * 4 * len(self.maps)
            least += samples * (group_dim + 2 + len(self.maps))
            flops += 2.0 * taps * group_dim
        least += sum(level.numel() for level in self.maps)
        strides, stages = self.stage.sampler.strides, len(self.model.decoder.stages)

        def sample(**tensors):
            pyramid = Pyramid([tensors[f"level{index}"] for index in range(len(self.maps))])
            points = [(tensors[f"xy{i}"], tensors[f"weights{i}"]) for i in range(stages)]
            return [sample_pyramid(pyramid, *point, strides) for point in points]

        inputs |= {f"level{index}": level for index, level in enumerate(self.maps)}
        return self._operation(f"sampling of all {stages} stages", sample, inputs, least, flops)

    def _filters(self):
        mixing = self.stage.mixing
        shape = self.batch, self.num_queries, mixing.num_groups
        make = lambda *sizes: torch.randn(*shape, *sizes, device=self.device)  # noqa: E731
        return mixing, shape[0] * shape[1] * shape[2], make

    def mixing_channels(self) -> list[Case]:
        mixing, pairs, make = self._filters()
        width, points = mixing.channel_shape[0], mixing.spatial_shape[1]
        inputs = dict(
            points=make(points, width),
            own=make(width, width),
            bias=make(width),
            stored=make(width, width),
            gates=(make(width).sigmoid(), make(width).sigmoid()),
        )
        elements = pairs * (2 * points * width + 2 * width * width + 3 * width)
        flops = pairs * (2.0 * points * width * width + 4 * width * width)
        return self._operation("channel mixing with reuse", mix_channels, inputs, elements, flops)

    def mixing_points(self) -> list[Case]:
        mixing, pairs, make = self._filters()
        width, (rows, points) = mixing.channel_shape[0], mixing.spatial_shape
        inputs = dict(
            points=make(points, width),
            own=make(rows, points),
            bias=make(2 * rows),
            stored=make(rows, points),
            gates=(make(rows).sigmoid(), make(points).sigmoid()),
        )
        elements = pairs * (points * width + 2 * rows * points + 2 * rows * width + 3 * rows)
        flops = pairs * (4.0 * rows * points * width + 4 * rows * points)
        return self._operation("spatial mixing with reuse", mix_points, inputs, elements, flops)

    def mixing_statically(self) -> list[Case]:
        mixing, pairs, make = self._filters()
        width, points = mixing.channel_shape[0], mixing.spatial_shape[1]
        grid = self.stage.sampler.point_groups, self.stage.sampler.points_per_group
        sides = [n * width for n in reversed(grid)]
        layers = [
            (torch.randn(side, side, device=self.device), torch.randn(side, device=self.device))
            for side in sides
        ]
        inputs = dict(
            points=make(points, width),
            residual=make(points, width),
            within=layers[0],
            across=layers[1],
        )
        elements = 3 * pairs * points * width + sum(side * side for side in sides)
        flops = 2.0 * pairs * points * width * sum(sides)
        mix = lambda **tensors: mix_statically(grid=grid, **tensors)  # noqa: E731
        return self._operation("static mixing", mix, inputs, elements, flops)

    # Modules and the whole

    def _module(self, name: str, work: Callable[[], object], least_bytes: float, trains=False):
        def in_precision(precision: str, work=work):
            def run():
                with torch.set_grad_enabled(trains), _autocast(self.device, precision):
                    return work()

            return run

        run = {precision: in_precision(precision) for precision in self.precisions}
        return Case(name, run, self.batch, least_bytes)

    def forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for leaf in self.leaves:
            leaf.grad = None

    def _parameter_bytes(self, module: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    def backbone(self) -> list[Case]:
        module = self.model.backbone
        least = self._parameter_bytes(module) + self.images.nbytes
        return [self._module("backbone", lambda: module(self.images), least)]

    def neck(self) -> list[Case]:
        with torch.inference_mode():
            features = {k: v.clone() for k, v in self.model.backbone(self.images).items()}
        least = sum(v.nbytes for v in features.values()) + self.map_bytes
        return [self._module("neck", lambda: self.model.neck(features), least)]

    def _decode(self, maps: Sequence[Tensor]) -> list[StageOutput]:
        return self.model.decoder(maps, *self.model.queries(self.sizes))

    def decoder(self) -> list[Case]:
        least = self._parameter_bytes(self.model.decoder) + self.map_bytes
        name = f"decoder, {self.num_queries} queries"
        half = {p: [m.to(DTYPES[p]) for m in self.maps] for p in self.precisions}
        prepared = {p: prepare_for_inference(self.model, dtype=DTYPES[p]).model
                    for p in self.precisions}  # fmt: skip
        case = self._module(f"{name}, inference", lambda: None, least)
        for precision in self.precisions:
            case.run[precision] = self._inference(
                precision,
                lambda p=precision: prepared[p].decoder(half[p], *self.model.queries(self.sizes)),
            )

        def train(maps):
            outputs = self._decode(maps)
            losses = [o.logits.float().square().mean() + o.boxes.mean() for o in outputs]
            with torch.autocast(self.device.type, enabled=False):
                sum(losses).backward()

        training = self._module(f"{name}, training", lambda: None, 3 * least, trains=True)
        for precision in self.precisions:
            leaves = [m.clone().to(DTYPES[precision]).requires_grad_() for m in self.maps]
            self.leaves += leaves

            def run(leaves=leaves, precision=precision):
                self.forget_gradients()
                with _autocast(self.device, precision):
                    train(leaves)

            training.run[precision] = run
        return [case, training]

    def _inference(self, precision: str, work: Callable[[], object]):
        def run():
            with torch.inference_mode(), _autocast(self.device, precision):
                return work()

        return run

    def inference(self) -> list[Case]:
        images = [{"image": image, "height": self.size[0], "width": self.size[1]}
                  for image in self.images]  # fmt: skip
        least = self._parameter_bytes(self.model) + self.images.nbytes + self.map_bytes
        case = self._module(f"whole inference, {self.num_queries} queries", lambda: None, least)
        for precision in self.precisions:
            plain = self.model.eval()
            run = self._inference(precision, lambda m=plain: m(images))
            case.run[precision] = run
            options = dict(dtype=DTYPES[precision], channels_last=True)
            prepared = prepare_for_inference(plain, **options)
            case.compiled[f"{precision}, prepared"] = lambda m=prepared: m(images)
            if self.compile:
                compiled = prepare_for_inference(plain, **options, compile=True)
                case.compiled[f"{precision}, compiled"] = lambda m=compiled: m(images)
        return [case]

    def mixed_sizes(self) -> list[Case]:
        """Eight batches of images of four sizes in random order."""
        from stage_interactor.data.grouping import BySize

        if self.batch == 1:
            return []
        height, width = self.size
        upright = [(height, width), (height * 3 // 4, width * 3 // 4)]
        sizes = torch.tensor(upright + [size[::-1] for size in upright])
        chosen = sizes[torch.randint(4, (8 * self.batch,))].tolist()
        images = [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for size in chosen]
        batches = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        model = prepare_for_inference(self.model)

        def padded():
            for batch in batches:
                model._detect(batch)

        def each_size():
            for batch in batches:
                model(batch)

        def put_together():
            for batch in BySize(batches, model.size_divisibility):
                model(batch)

        least = len(batches) * self._parameter_bytes(self.model)
        variants = {"one size at a time": each_size, "sizes put together": put_together}
        compiled = {f"float32, {name}": work for name, work in variants.items()}
        name = f"{len(images)} images of four sizes, padded to the largest of a batch"
        return [Case(name, {"float32": padded}, len(images), least, compiled=compiled)]

    def train_step(self) -> list[Case]:
        data = [{"image": image, "instances": instances}
                for image, instances in zip(self.images, self._instances(self.batch))]  # fmt: skip
        if not isinstance(self.model.criterion, ReleaseOrFast):
            self.model.criterion = ReleaseOrFast(self.model.criterion)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        least = 5 * self._parameter_bytes(self.model) + 3 * self.map_bytes

        def step():
            self.model.train()
            optimizer.zero_grad(set_to_none=True)
            total = sum(self.model(data).values())
            with torch.autocast(self.device.type, enabled=False):
                total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()

        name = f"training step, {self.num_queries} queries"
        return [self._module(name, step, least, trains=True)]

    def data(self) -> list[Case]:
        """Loading photographs: decoding, augmentation, resizing, in one process."""
        return [self._loading(480, 640), self._loading(3000, 4000)]

    def _loading(self, height: int, width: int) -> Case:
        folder = tempfile.TemporaryDirectory()
        path = f"{folder.name}/photograph.jpg"
        coarse = torch.rand(1, 3, 30, 40) * 255
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        noisy = (smooth + 4 * torch.randn_like(smooth)).clamp(0, 255)
        Image.fromarray(noisy[0].permute(1, 2, 0).byte().numpy()).save(path, quality=92)
        boxes = [[20.0 * i, 10.0 * i, 100.0, 80.0] for i in range(self.objects)]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
            for box in boxes
        ]
        record = dict(file_name=path, image_id=0, height=height, width=width)
        record["annotations"] = annotations
        fast = copy.copy(self.mapper)
        fast.fast = True

        def load(mapper):
            def work(folder=folder):  # which lives as long as this
                np.random.seed(0)  # one size of all variants
                return mapper(copy.deepcopy(record))

            return work

        size = load(self.mapper)()["image"].nbytes
        name = f"loading a {width} x {height} JPEG for training, one process"
        compiled = {"float32, decode=fast": load(fast)}
        return Case(name, {"float32": load(self.mapper)}, 1, 2.0 * size, compiled=compiled)

    def evaluation(self) -> list[Case]:
        """COCO's metric of 100 detections an image, the second variant by another package."""
        from pycocotools.coco import COCO

        from stage_interactor.d2.embedded.scoring import evaluated

        truth = COCO()
        truth.dataset, results = coco_like(self.eval_images)
        truth.createIndex()

        def score(fast: bool):
            return lambda: evaluated(truth, copy.deepcopy(results), [1, 10, 100], fast=fast)

        name = f"COCO's metric of {self.eval_images} images"
        fast = {"float32, faster-coco-eval": score(True)}
        least = 48.0 * len(results)
        return [Case(name, {"float32": score(False)}, self.eval_images, least, compiled=fast)]

    def _instances(self, images: int) -> list[Instances]:
        generator = torch.Generator().manual_seed(1)
        height, width = self.size
        result = []
        for _ in range(images):
            corner = torch.rand(self.objects, 2, generator=generator)
            extent = torch.rand(self.objects, 2, generator=generator)
            corner = corner * torch.tensor([width * 0.7, height * 0.7])
            extent = 16 + extent * torch.tensor([width * 0.3 - 16, height * 0.3 - 16])
            instances = Instances(self.size)
            instances.gt_boxes = Boxes(torch.cat((corner, corner + extent), 1))
            classes = (self.objects,)
            instances.gt_classes = torch.randint(0, self.model.num_classes, classes)
            result.append(instances.to(self.device))
        return result

    def losses(self) -> list[Case]:
        """Matching, labels and losses of 16 images, forward and backward."""
        criterion = ReleaseOrFast(self.model.criterion)
        instances = self._instances(16)
        outputs = []
        for _ in self.model.decoder.stages:
            boxes = []
            for image in instances:
                objects = image.gt_boxes.tensor
                chosen = torch.randint(len(objects), (self.num_queries,), device=self.device)
                boxes.append(objects[chosen] + 20 * torch.randn_like(objects[chosen]))
            shape = len(instances), self.num_queries, self.model.num_classes
            logits = (torch.randn(shape, device=self.device) - 4).requires_grad_()
            outputs.append(StageOutput(logits, torch.stack(boxes).requires_grad_(), None, None))
        leaves = [leaf for output in outputs for leaf in (output.logits, output.boxes)]

        def work():
            # Not called as a module: the counter of FLOPs follows those into the backward pass.
            losses = criterion.forward(outputs, instances)
            torch.autograd.grad(sum(losses.values()), leaves)

        values = sum(leaf.nbytes for leaf in leaves)
        name = f"matching + labels + losses, 16 images of {self.objects} objects"
        return [Case(name, {"float32": work}, 16, 2.0 * values)]


def _leaves(value) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def _leaf(value, dtype: torch.dtype, trains: bool, keep: bool):
    if isinstance(value, tuple):
        return tuple(_leaf(part, dtype, trains, keep) for part in value)
    return value.detach().clone().to(value.dtype if keep else dtype).requires_grad_(trains)


def measure(
    case: Case,
    machine: Machine,
    repeats: int,
    only_reference: bool,
    forget: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Variants in turns; the first is the yardstick: the reference in float32."""
    variants: list[tuple[str, str, Callable[[], object]]] = [
        ("reference", "float32", case.run.get("float32") or next(iter(case.run.values())))
    ]
    if not only_reference and case.has_operations:
        variants += [("fast", precision, work) for precision, work in case.run.items()]
        variants += [("fast", name, work) for name, work in case.compiled.items()]
    with use_ops("reference"), FlopCounterMode(display=False) as counter:
        variants[0][2]()
    flops = case.flops or counter.get_total_flops()

    times: list[list[float]] = [[] for _ in variants]
    peaks = []
    for ops, _, work in variants:
        with use_ops(ops):
            work()  # allocations, compilation
            forget()
            peaks.append(machine.peak_mib(work))
    for _ in range(repeats):
        for index, (ops, _, work) in enumerate(variants):
            with use_ops(ops):
                times[index].append(machine.seconds(work))

    results = []
    for (ops, precision, _), seconds, peak in zip(variants, times, peaks):
        name = precision.split(",")[0]
        element = DTYPES[name].itemsize / 4
        floor = max(flops / machine.products[name], case.least_bytes * element / machine.copy)
        median = statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
        ratio = statistics.median(base / value for base, value in zip(times[0], seconds))
        results.append(
            Result(
                case.name,
                f"{ops}, {precision}",
                round(median * 1e3, 3),
                round((quartiles[2] - quartiles[0]) * 500, 3),
                round(ratio, 2),
                round(case.images / median, 2),
                float(f"{floor * 1e3:.3g}"),  # of a small part: far below a microsecond
                float(f"{floor / median:.3g}"),
                None if peak is None else round(peak, 1),
            )
        )
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    rows, last = [], None
    for r in results:
        peak = "" if r.peak_mib is None else f"{r.peak_mib:.0f}"
        name = "" if r.case == last else r.case
        last = r.case
        rows.append(
            [name, r.variant, f"{r.median:.1f} ± {r.spread:.1f}", f"{r.ratio:.2f}",
             f"{r.images_per_second:.2f}", f"{r.floor:.1f}", f"{r.share_of_floor:.0%}", peak]
        )  # fmt: skip
    headers = ["part", "path", "ms", "ratio", "images/s", "floor, ms", "of floor", "peak, MiB"]
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def configured(config_file: str, overrides: Sequence[str], queries: int | None):
    """Model, with another number of queries if one is given, and training mapper of a config."""
    from stage_interactor.config import instantiate, load_config, without_pretrained_weights

    cfg = load_config(config_file, overrides)
    without_pretrained_weights(cfg)
    if queries:
        cfg.model.queries.num_queries = queries
    return instantiate(cfg.model), instantiate(cfg.dataloader.train.mapper)


class TorchvisionResNet50(nn.Module):
    """Maps of strides 4 to 32, BatchNorm and the first stage frozen, as in the paper."""

    def __init__(self):
        super().__init__()
        names = {f"layer{index}": f"stride{2 ** (index + 1)}" for index in range(1, 5)}
        self.network = create_feature_extractor(resnet50(), names)
        for name, parameter in self.network.named_parameters():
            if name.startswith(("conv1", "layer1")):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "TorchvisionResNet50":
        super().train(mode)
        self.network.eval()  # BatchNorm with the statistics that it has
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.network(images)


def bare_model(queries: int | None) -> nn.Module:
    """The paper's R50 model, on torchvision's ResNet."""
    return StageInteractor(
        backbone=TorchvisionResNet50(),
        neck=ChannelMapper(in_channels=(256, 512, 1024, 2048)),
        queries=InitialQueries(num_queries=queries or 300),
        decoder=build_decoder(),
        criterion=Criterion(matcher=HungarianMatcher(), assigner=CrossStageAssigner()),
    )


PARTS = (
    "backbone", "neck", "sampling", "mixing_channels", "mixing_points", "mixing_statically",
    "decoder", "losses", "inference", "mixed_sizes", "train_step", "data",
    "evaluation",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", default="configs/stage_interactor_r50_300q_36ep_crop.py", metavar="FILE"
    )
    parser.add_argument("--bare", action="store_true",
                        help="no config: the paper's model on torchvision's ResNet-50")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1])
    parser.add_argument("--queries", nargs="+", type=int, help="default: the config's")
    parser.add_argument("--image-size", nargs=2, type=int, default=[800, 1344],
                        metavar=("HEIGHT", "WIDTH"))  # fmt: skip
    parser.add_argument("--objects", type=int, default=20, help="in each image")
    parser.add_argument("--eval-images", type=int, default=500, help="in the part evaluation")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--reference", action="store_true", help="measure the reference alone")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", metavar="FILE", help="JSON with all figures")
    parser.add_argument("opts", nargs="*", help="overrides of the config, key=value")
    args = parser.parse_args()
    sizes = *args.batch_size, *args.image_size, *(args.queries or [])
    if min(*sizes, args.repeats, args.objects, args.eval_images) < 1:
        parser.error("numbers of images, pixels, queries, objects and repeats must be at least 1")
    if "float32" not in args.precision:  # the yardstick
        args.precision.insert(0, "float32")
    if "float16" in args.precision and args.device == "cpu":
        parser.error("--precision float16 is for GPUs; CPUs have bfloat16")
    return args


@kept_memory()
def main() -> None:
    args = parse_args()
    device = choose_device(args.device)
    if device.type == "cuda":  # float32 means float32, in the reference too
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = Machine(device)
    description = machine.describe()
    print(json.dumps(description))
    setting = {key: value for key, value in vars(args).items() if key != "output"}
    report: dict = {"machine": description, "setting": setting}
    results: list[Result] = []
    for batch in args.batch_size:
        for queries in args.queries or [None]:
            torch.manual_seed(0)
            if args.bare:
                model, mapper = bare_model(queries), None
            else:
                model, mapper = configured(args.config_file, args.opts, queries)
            parts = Parts(model, mapper, device, batch, args)
            for name in args.parts:
                if name == "data" and args.bare:
                    continue
                for case in getattr(parts, name)():
                    case.name += f", batch {batch}" if batch > 1 else ""
                    forget = parts.forget_gradients
                    results += measure(case, machine, args.repeats, args.reference, forget)
                    last = results[-1]
                    print(f"{last.case} ({last.variant}): {last.ratio:.2f}", file=sys.stderr)
                    report["results"] = [asdict(result) for result in results]
                    if args.output:  # after every case: a long run may be cut off
                        with open(args.output, "w") as file:
                            json.dump(report, file, indent=2)
    print(table(results))


if __name__ == "__main__":
    sys.exit(call("benchmark.py", main, mistake=1))
