"""The stand-in and detectron2 side by side: the same in, the same out, to the last bit."""

import importlib
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    MultiStepParamScheduler,
)
from omegaconf import OmegaConf
from torch import nn

from stage_interactor.data import read_image

pytest.importorskip("detectron2", reason="detectron2 is not installed: nothing to compare with")


def modules(**theirs):
    """Namespaces (embedded, detectron2) of the modules given as embedded name = detectron2 name."""
    ours = {
        name: importlib.import_module(f"stage_interactor.d2.embedded.{name}") for name in theirs
    }
    theirs = {name: importlib.import_module(path) for name, path in theirs.items()}
    return types.SimpleNamespace(**ours), types.SimpleNamespace(**theirs)


RUNTIMES = modules(
    config="detectron2.config",
    structures="detectron2.structures",
    data="detectron2.data",
    coco="detectron2.data.datasets.coco",
    transforms="detectron2.data.transforms",
    samplers="detectron2.data.samplers",
    engine="detectron2.engine",
    evaluation="detectron2.evaluation",
    evaluator="detectron2.evaluation.evaluator",
    checkpoint="detectron2.checkpoint",
    solver="detectron2.solver",
    events="detectron2.utils.events",
    logger="detectron2.utils.logger",
)


def both(function):
    """What the function returns for (embedded, detectron2), both from the same random state."""
    results = []
    for runtime in RUNTIMES:
        np.random.seed(11)
        torch.manual_seed(11)
        results.append(function(runtime))
    return results


def assert_equal(ours, theirs):
    """Nested equality that knows tensors, arrays and NaN, without any tolerance."""
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs):
            assert_equal(mine, other)
    elif isinstance(ours, (np.ndarray, torch.Tensor)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert (ours == theirs).all()
    elif isinstance(ours, float) and math.isnan(ours):
        assert math.isnan(theirs)
    else:
        assert ours == theirs


# ---------------------------------------------------------------------------------- config

CONFIGS = {
    "common/base.py": """
from torch import nn
from omegaconf import OmegaConf
from {config} import LazyCall as L

backbone = L(nn.Sequential)(_args_=None)
layer = L(nn.Linear)(in_features=4, out_features="${{.in_features}}", bias=False)
optimizer = L("torch.optim.AdamW")(lr=1e-4, betas=(0.9, 0.999))
tree = dict(norm=L(nn.BatchNorm2d)(num_features=3), layers=[L(nn.ReLU)(), dict(a=None, b=[1, 2])])
_private = dict(a=1)
number = 3
""",
    "runs/run.py": """
from ..common.base import layer, tree, number
from {config} import LazyConfig

optimizer = LazyConfig.load_rel("../common/base.py", "optimizer")
layer.in_features = number
tree["layers"] = list(tree["layers"]) + [dict(late=True)]
""",
}
OVERRIDES = [
    "optimizer.lr=2e-5",
    "optimizer.betas=[0.8,0.9]",
    "+tree.extra={a: 1, b: [x, y]}",
    "tree.new.deep='text, with=signs'",
    "layer.in_features=5",
    "tree.norm.eps=null",
    "tree.flag=true",
]


def write_configs(folder, config_module):
    for name, text in CONFIGS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(config=config_module))
    return str(folder / "runs" / "run.py")


def container(cfg):
    return OmegaConf.to_container(cfg, resolve=True)


def test_the_same_config_file_gives_the_same_config(tmp_path):
    loaded = []
    names = ("stage_interactor.d2.embedded.config", "detectron2.config")
    for number, (runtime, name) in enumerate(zip(RUNTIMES, names)):
        path = write_configs(tmp_path / str(number), name)
        cfg = runtime.config.LazyConfig.load(path)
        loaded.append((container(cfg), container(runtime.config.LazyConfig.apply_overrides(
            cfg, OVERRIDES))))  # fmt: skip
    assert_equal(*loaded)
    assert set(loaded[0][0]) == {"layer", "tree", "optimizer"}


def test_each_runtime_reads_what_the_other_saved(tmp_path):
    ours, theirs = (runtime.config for runtime in RUNTIMES)
    path = write_configs(tmp_path, "stage_interactor.d2.embedded.config")
    cfg = ours.LazyConfig.load(path)
    for writer, reader, name in ((ours, theirs, "a.yaml"), (theirs, ours, "b.yaml")):
        writer.LazyConfig.save(cfg, str(tmp_path / name))
        again = reader.LazyConfig.load(str(tmp_path / name))
        assert again.layer._target_ == "torch.nn.Linear"
        layer, norm = reader.instantiate(again.layer), reader.instantiate(again.tree.norm)
        assert layer.weight.shape == (3, 3) and isinstance(norm, nn.BatchNorm2d)
    assert (tmp_path / "a.yaml").read_text() == (tmp_path / "b.yaml").read_text()


def test_targets_are_saved_under_the_same_short_names():
    registry = importlib.import_module("detectron2.utils.registry")
    targets = [nn.Conv2d, torch.optim.AdamW, nn.functional.relu, dict, json.JSONDecoder.decode,
               CosineParamScheduler, OmegaConf.create]  # fmt: skip
    for target in targets:
        name = RUNTIMES[0].config._dotted_name(target)
        assert name == registry._convert_target_to_string(target)


def test_the_same_description_builds_the_same(tmp_path):
    def build(runtime):
        L = runtime.config.LazyCall
        linear = L(nn.Linear)(in_features=2, out_features=3)
        call = L(types.SimpleNamespace)(a=linear, b=[L(nn.ReLU)(), "x"], c=None, d=dict(e=1))
        built = vars(runtime.config.instantiate(call))
        return [str(built), {k: type(v).__name__ for k, v in built.items()}, built["a"].weight]

    assert_equal(*both(build))


# ---------------------------------------------------------------------------------- structures


def test_box_conversions_round_alike():
    rng = np.random.default_rng(0)
    for box in (rng.uniform(0, 900, (5, 4)), rng.uniform(0, 900, (5, 4)).astype(np.float32),
                torch.rand(3, 4), [0.1, 0.2, 0.3, 0.7], (10, 20, 31, 47)):  # fmt: skip
        for modes in (("XYWH_ABS", "XYXY_ABS"), ("XYXY_ABS", "XYWH_ABS")):
            results = [
                r.structures.BoxMode.convert(box, *(r.structures.BoxMode[m] for m in modes))
                for r in RUNTIMES
            ]
            assert type(results[0]) is type(results[1])
            assert_equal(*results)
    ours, theirs = (runtime.structures.BoxMode for runtime in RUNTIMES)
    assert all(theirs[mode.name].value == mode.value for mode in ours)


def test_boxes_and_image_batches_compute_alike():
    def compute(runtime):
        boxes = runtime.structures.Boxes(torch.randn(6, 4) * 40 + 20)
        boxes.clip((30, 50))
        kept = boxes.nonempty(3.0)
        boxes.scale(1.3, 0.7)
        boxes = boxes.clone()
        area = boxes.area()
        images = [torch.rand(3, 20, 31), torch.rand(3, 25, 16)]
        batch = runtime.structures.ImageList.from_tensors(images, 16)
        single = runtime.structures.ImageList.from_tensors(images[:1])
        return [kept, boxes.tensor, area, boxes[2].tensor, batch.tensor, batch.image_sizes,
                single.tensor]  # fmt: skip

    assert_equal(*both(compute))


# ---------------------------------------------------------------------------------- data


def register(name, files):
    """Put the same data set into the catalogues of both runtimes, for one test."""
    for runtime in RUNTIMES:
        runtime.coco.register_coco_instances(name, {}, *files)
    yield name
    for runtime in RUNTIMES:
        runtime.data.DatasetCatalog.remove(name)
        runtime.data.MetadataCatalog.remove(name)


@pytest.fixture
def datasets(coco_files, request):
    yield from register(f"parity_{request.node.name}", coco_files)


@pytest.fixture
def large_datasets(large_coco_files, request):
    yield from register(f"parity_large_{request.node.name}", large_coco_files)


def test_the_same_file_gives_the_same_annotations(datasets):
    for empty in (True, False):
        assert_equal(*both(lambda r, e=empty: r.data.get_detection_dataset_dicts(datasets, e)))
    assert_equal(*both(lambda r: vars(r.data.MetadataCatalog.get(datasets))))


def test_coco_2017_is_registered_alike():
    for split in ("train", "val", "test-dev", "val_100"):
        name = f"coco_2017_{split}"
        ours, theirs = both(lambda r, n=name: dict(vars(r.data.MetadataCatalog.get(n))))
        theirs.pop("thing_colors")
        assert ours == theirs


AUGMENTATIONS = {
    "flip": lambda T: [T.RandomFlip(0.5)],
    "vertical flip": lambda T: [T.RandomFlip(0.7, horizontal=False, vertical=True)],
    "resize in a range": lambda T: [T.ResizeShortestEdge((20, 60), 77)],
    "resize by choice": lambda T: [T.ResizeShortestEdge((24, 32, 52), 64, "choice")],
    "resize to one length": lambda T: [T.ResizeShortestEdge(33)],
    "resize by the nearest": lambda T: [T.ResizeShortestEdge(33, interp=0)],
    "resize bicubically": lambda T: [T.ResizeShortestEdge(33, interp=3)],
    "crop absolute": lambda T: [T.RandomCrop("absolute", (30, 500))],
    "crop absolute range": lambda T: [T.RandomCrop("absolute_range", (20, 60))],
    "crop relative": lambda T: [T.RandomCrop("relative", (0.5, 0.9))],
    "crop relative range": lambda T: [T.RandomCrop("relative_range", (0.3, 0.6))],
    "all of DETR": lambda T: [
        T.RandomFlip(),
        T.ResizeShortestEdge((40, 50, 60), sample_style="choice"),
        T.RandomCrop("absolute_range", (24, 50)),
        T.ResizeShortestEdge((30, 36), 80, "choice"),
    ],
}
IMAGES = {
    "colour": lambda rng: rng.integers(0, 256, (48, 71, 3), dtype=np.uint8),
    "float": lambda rng: rng.random((33, 57, 3), dtype=np.float32),
    "reversed": lambda rng: rng.integers(0, 256, (48, 71, 3), dtype=np.uint8)[:, :, ::-1],
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_same_seed_gives_the_same_image_and_boxes(name, kind):
    rng = np.random.default_rng(5)
    image = IMAGES[kind](rng)
    boxes = rng.uniform(0, 40, (6, 4)).astype(np.float32)

    def augment(runtime):
        results = []
        for _ in range(6):
            aug_input = runtime.transforms.AugInput(image.copy(order="K"))
            augmentations = AUGMENTATIONS[name](runtime.transforms)
            applied = runtime.transforms.AugmentationList(augmentations)(aug_input)
            results += [aug_input.image, applied.apply_box(boxes.copy())]
        return results + [np.random.rand()]  # and as many numbers were drawn

    assert_equal(*both(augment))


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_seed_gives_the_same_batches(datasets, box_mapper, num_workers, grouping):
    def load(runtime):
        loader = runtime.data.build_detection_train_loader(
            runtime.data.get_detection_dataset_dicts(datasets),
            mapper=box_mapper(runtime.data.detection_utils, runtime.transforms),
            total_batch_size=3,
            aspect_ratio_grouping=grouping,
            num_workers=num_workers,
        )
        return list(itertools.islice(loader, 9))

    ours, theirs = both(load)
    assert_equal(ours, theirs)
    assert len({record["image_id"] for batch in ours for record in batch}) > 5


def test_the_same_test_batches_and_fallbacks(datasets):
    def load(runtime):
        records = runtime.data.get_detection_dataset_dicts(datasets, filter_empty=False)
        test = runtime.data.build_detection_test_loader(records, mapper=None, batch_size=5)
        train = runtime.data.build_detection_train_loader(
            records, mapper=lambda r: r if r["image_id"] % 4 else None, total_batch_size=2,
            aspect_ratio_grouping=False, sampler=runtime.samplers.TrainingSampler(12, seed=3),
        )  # fmt: skip
        return [list(test), [[r["image_id"] for r in b] for b in itertools.islice(train, 12)]]

    assert_equal(*both(load))


def test_the_same_shares_of_a_data_set_on_every_process(monkeypatch):
    ours, theirs = (importlib.import_module(m) for m in (
        "stage_interactor.d2.embedded.comm", "detectron2.utils.comm"))  # fmt: skip
    for rank in range(3):
        for module in (ours, theirs):
            monkeypatch.setattr(module, "get_world_size", lambda: 3)
            monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
        shares = both(lambda r: [
            [*r.samplers.InferenceSampler(11)],
            [*itertools.islice(iter(r.samplers.TrainingSampler(7, seed=1)), 9)],
        ])  # fmt: skip
        assert_equal(*shares)


@pytest.mark.parametrize("format", ["RGB", "BGR"])
def test_images_are_read_alike(coco_files, format):
    path = f"{coco_files[1]}/0003.png"
    ours, theirs = both(lambda r: r.data.detection_utils.read_image(path, format))
    assert_equal(ours, theirs)
    assert_equal(read_image(path, format), theirs)


# ---------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("seed, limit", [(0, None), (1, None), (2, 100), (3, 7), (4, 300)])
def test_average_precision_is_equal_to_the_last_digit(
    large_datasets, large_coco_files, detections, tmp_path, seed, limit
):
    def evaluate(runtime):
        runtime.data.DatasetCatalog.get(large_datasets)
        folder = tmp_path / runtime.evaluation.__name__
        evaluator = runtime.evaluation.COCOEvaluator(
            large_datasets,
            ("bbox",),
            True,
            str(folder),
            use_fast_impl=False,
            max_dets_per_image=limit,
        )
        evaluator.reset()
        evaluator.process(*detections(large_coco_files[0], runtime.structures, seed))
        results = dict(evaluator.evaluate())
        written = (folder / "coco_instances_results.json").read_text()
        saved = torch.load(folder / "instances_predictions.pth", weights_only=True)
        return [results, written, saved]

    ours, theirs = both(evaluate)
    assert_equal(ours, theirs)
    assert all(0 < value < 100 for value in ours[0]["bbox"].values())


def test_annotations_are_converted_to_the_same_file(datasets, tmp_path):
    def convert(runtime):
        records = runtime.data.DatasetCatalog.get(datasets)
        for record in records:
            for annotation in record["annotations"]:
                annotation.pop("segmentation", None)
        name = "parity_function"
        runtime.data.DatasetCatalog.register(name, lambda: records)
        runtime.data.MetadataCatalog.get(name).thing_classes = ["disc", "square", "ring"]
        path = tmp_path / f"{runtime.coco.__name__}.json"
        runtime.coco.convert_to_coco_json(name, str(path))
        runtime.data.DatasetCatalog.remove(name)
        runtime.data.MetadataCatalog.remove(name)
        content = json.loads(path.read_text())
        return [content["images"], content["annotations"], content["categories"]]

    ours, theirs = both(convert)
    for mine, other in zip(ours, theirs):
        assert mine == other  # in any order of the keys


def test_tables_are_drawn_alike():
    assert_equal(*both(lambda r: r.logger.create_small_table({"AP": 12.34567, "AP50": 3.0})))


# ---------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", ["linear", "constant"])
def test_schedules_are_equal(method, rescale):
    steps = MultiStepParamScheduler([1.0, 0.1, 0.01], milestones=[5, 8], num_updates=10)

    def rates(runtime):
        values = []
        for scheduler in (steps, CosineParamScheduler(1, 0.1), ConstantParamScheduler(1.0)):
            optimizer = torch.optim.SGD(
                [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.3, 0.07)]
            )
            warm = runtime.solver.WarmupParamScheduler(scheduler, 0.01, 0.23, method, rescale)
            multiplier = runtime.solver.LRMultiplier(optimizer, warm, max_iter=10)
            for _ in range(9):
                values.append([group["lr"] for group in optimizer.param_groups])
                optimizer.step()
                multiplier.step()
            values.append(multiplier.state_dict())
        return values

    assert_equal(*both(rates))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base_lr": 0.1, "weight_decay": 0.01, "weight_decay_norm": 0.0},
        {"base_lr": 0.1, "bias_lr_factor": 2.0, "weight_decay_bias": 0.0},
        {"base_lr": 0.1, "lr_factor_func": lambda name: 0.1 if "0.0" in name else 1.0},
        {"base_lr": 0.1, "overrides": {"query": {"lr": 0.5, "weight_decay": 0.0}}},
    ],
    ids=["none", "norms", "biases", "factors", "overrides"],
)
def test_parameter_groups_are_equal(options):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.GroupNorm(1, 3)),
        shared, nn.LayerNorm(3), shared, nn.SyncBatchNorm(3),
    )  # fmt: skip
    model.query = nn.Parameter(torch.ones(2))
    model[1].bias.requires_grad_(False)
    groups = both(lambda r: r.solver.get_default_optimizer_params(model, **options))
    ids = [
        [({k: v for k, v in g.items() if k != "params"}, [id(p) for p in g["params"]]) for g in gs]
        for gs in groups
    ]
    assert_equal(*ids)


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        first, second = self.layer(batch).square().mean(0)
        return {"loss_a": first, "loss_b": second}


def train(runtime, folder, stop=23):
    folder.mkdir(exist_ok=True)
    model = Losses()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = (torch.randn(4, 3) for _ in itertools.count())
    trainer = runtime.engine.SimpleTrainer(model, batches, optimizer)
    steps = MultiStepParamScheduler([1.0, 0.1], milestones=[11], num_updates=stop)
    schedule = runtime.solver.WarmupParamScheduler(steps, 0.01, 0.2)
    checkpointer = runtime.checkpoint.DetectionCheckpointer(model, str(folder), trainer=trainer)

    class EndOfIteration(runtime.engine.HookBase):
        def before_train(self):
            self.multiplier = runtime.solver.LRMultiplier(optimizer, schedule, stop)

        def after_step(self):
            trainer.storage.put_scalars(lr=optimizer.param_groups[0]["lr"], smoothing_hint=False)
            self.multiplier.step()
            if (trainer.iter + 1) % 10 == 0:
                checkpointer.save(f"model_{trainer.iter}", iteration=trainer.iter)

    trainer.register_hooks([runtime.engine.hooks.IterationTimer(), EndOfIteration()])
    trainer.train(0, stop)
    return trainer


TIMES = ("time", "data_time", "rank_data_time")


def test_a_training_gives_the_same_weights_metrics_and_checkpoints(tmp_path):
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    folder = iter(folders)
    trainers = both(lambda r: train(r, next(folder)))
    assert_equal(*[dict(trainer.model.state_dict()) for trainer in trainers])
    assert_equal(*[trainer.state_dict() for trainer in trainers])

    latest = [
        {key: value for key, value in trainer.storage.latest_with_smoothing_hint().items()}
        for trainer in trainers
    ]
    assert latest[0].keys() == latest[1].keys()
    assert_equal(*[{k: v for k, v in found.items() if k not in TIMES} for found in latest])

    names = [sorted(p.name for p in f.iterdir()) for f in folders]
    assert names[0] == names[1] and "model_19.pth" in names[0]
    for name in names[0]:
        if name.endswith(".pth"):
            assert_equal(*[torch.load(f / name, weights_only=True) for f in folders])
    assert (folders[0] / "last_checkpoint").read_text() == (
        folders[1] / "last_checkpoint"
    ).read_text()


def test_each_runtime_resumes_what_the_other_left(tmp_path):
    ours, theirs = RUNTIMES
    for writer, reader, name in ((ours, theirs, "a"), (theirs, ours, "b")):
        both(lambda r, w=writer, n=name: train(w, tmp_path / n))
        model = Losses()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = reader.engine.SimpleTrainer(model, [], optimizer)
        checkpointer = reader.checkpoint.DetectionCheckpointer(
            model, str(tmp_path / name), trainer=trainer
        )
        checkpointer.resume_or_load("", resume=True)
        assert trainer.iter == 19
        saved = torch.load(checkpointer.get_checkpoint_file(), weights_only=True)
        assert_equal(dict(model.state_dict()), dict(saved["model"]))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_the_command_line_has_the_same_flags_and_defaults():
    from detectron2.engine import default_argument_parser

    from stage_interactor.commands.train import train_net_parser

    parsers = train_net_parser(), default_argument_parser()
    described = [
        {a.dest: (a.option_strings, a.default, a.type, a.nargs) for a in parser._actions}
        for parser in parsers
    ]
    del described[0]["trace"]  # which is this project's own
    assert described[0] == described[1]


def test_scalars_are_stored_and_smoothed_alike():
    def put(runtime):
        with runtime.events.EventStorage(3) as storage:
            for iteration in range(3, 40):
                storage.iter = iteration
                storage.put_scalar("loss", np.random.rand())
                if iteration % 5 == 0:
                    storage.put_scalars(rare=np.random.rand())
                storage.put_scalar("lr", np.random.rand(), smoothing_hint=False)
            return [storage.latest_with_smoothing_hint(w) for w in (1, 7, 20)] + [
                dict(storage.latest()), storage.count_samples("rare", 11)
            ]  # fmt: skip

    assert_equal(*both(put))
