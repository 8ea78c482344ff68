"""Values that cannot be meant are told before a run begins, in a line that names key and value."""

import copy
import json
import math
import sys
import types

import pytest
from omegaconf import OmegaConf

from stage_interactor.config import ConfigError, list_configs, load_config, require_runnable
from stage_interactor.engine.settings import RULES, check_settings, unread_keys
from stage_interactor.engine.training import train
from stage_interactor.errors import explain

TINY = "tests/tiny_config.py"
RUBBISH = (
    -1, 0, 1, 1.5, 1e30, math.nan, math.inf, "x", "", "nan", "a/../../b", "\0", [], {}, [-1], None,
    True, 10**9,
)  # fmt: skip


def checked(config, processes=1):
    check_settings(config, processes)
    require_runnable(config)


@pytest.mark.parametrize("name", [n for n in list_configs() if "/de" not in f"/{n}"] + [TINY])
def test_nothing_is_wrong_with_the_configs_of_this_package(name):
    config = load_config(name)
    checked(config)
    assert unread_keys(config) == []


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.max_iter", 0, "a whole number of 1 or more, got 0"),
        ("train.max_iter", "ten", "got 'ten'"),
        ("train.max_iter", 1e4, "got 10000.0"),
        ("train.eval_period", -1, r"0 or more \(0: never\), got -1"),
        ("train.checkpointer.period", -5, "got -5"),
        ("train.checkpointer.max_to_keep", 0, "1 or more, or null, got 0"),
        ("train.log_period", -1, "got -1"),
        ("train.accumulation_steps", 0, "got 0"),
        ("train.ddp.gradient_as_bucket_view", "yes", "true or false, got 'yes'"),
        ("train.ddp.static_graph", 2, "true or false, got 2"),
        ("train.ddp.bucket_cap_mb", 0, "between 0 and 1000000.0, or null, got 0"),
        ("train.model_ema.decay", 1.5, "a number from 0 to 1, got 1.5"),
        ("train.clip_grad.params.max_norm", 0, "more than 0, got 0"),
        ("train.device", "gpu", "a device of this machine, .* got 'gpu'"),
        ("train.amp.dtype", "float8", r"one of \['bfloat16', 'float16'\], got 'float8'"),
        ("train.amp", None, "a section with keys, got null"),
        ("train.resume", 1, "true, false, auto or null, got 1"),
        ("train.resume", "yes", "got 'yes'"),
        ("train.grace_seconds", 1e9, "a number between 0 and 1000000.0, got 1000000000.0"),
        ("train.max_pixels", 0, "1 or more, or null, got 0"),
        ("dataloader.train.mapper.augmentation", ["flip"], r"each a call, or null, got \['flip'\]"),
        ("dataloader.test.mapper.augmentation", [{"prob": 1}], "each a call, or null, got "),
        ("train.output_dir", "s3://x/y", "a folder of this machine, got 's3://x/y'"),
        ("dataloader.test.mapper", {"a": 1}, "a section with a _target_, got {'a': 1}"),
        ("dataloader.test.mapper", {}, "a section with a _target_, got {}"),
        ("model.criterion.num_classes", 2**70, "at most 100000, got 1180591620717411303424"),
        ("train.seed", -1, "got -1"),
        ("train.seed", 2**32, "at most 4294901760, got 4294967296"),
        ("optimizer.eps", 0, "more than 0, got 0"),
        ("optimizer.lr", math.nan, "a finite number, at least 0, got nan"),
        ("optimizer.lr", math.inf, "got inf"),
        ("optimizer.lr", -1e-3, "got -0.001"),
        ("model.criterion.loss_class_weight", 2**70, "got 1180591620717411303424"),
        ("optimizer.weight_decay", math.nan, "got nan"),
        ("optimizer.betas", [0.9], r"got \[0.9\]"),
        ("optimizer.params.layer_decay", 0, "more than 0 and at most 1, or null, got 0"),
        ("optimizer.params.layer_decay", 1.5, "at most 1, or null, got 1.5"),
        ("lr_multiplier.warmup_iters", -1, "got -1"),
        ("dataloader.train.total_batch_size", 0, "got 0"),
        ("dataloader.train.num_workers", -2, "got -2"),
        ("dataloader.train.mapper.image_format", "GBR", "got 'GBR'"),
        ("dataloader.test.mapper.augmentation", [-1], r"each a call, or null, got \[-1\]"),
        ("model.queries.num_queries", 0, "got 0"),
        ("model.queries.embed_dim", 8, "model.decoder.embed_dim, 16, got 8"),
    ],
)
def test_a_value_that_cannot_be_meant_is_told_with_its_key(key, value, told):
    config = load_config(TINY)
    OmegaConf.update(config, key, value, merge=False)
    with pytest.raises(ConfigError, match=f"{key} must be .*{told}"):
        checked(config)


@pytest.mark.parametrize("key", ["module", "init_sync", "process_group", "device_ids"])
def test_what_a_run_gives_its_processes_itself_is_no_key(key):
    with pytest.raises(ConfigError, match=f"train.ddp has no key {key}"):
        checked(load_config(TINY, [f"+train.ddp.{key}=false"]))


def test_a_static_graph_and_parts_of_a_batch_do_not_go_together():
    static = ["train.ddp.static_graph=true", "train.accumulation_steps=2"]
    checked(load_config(TINY, static))
    checked(load_config(TINY, static[:1]), processes=2)
    told = "static_graph must be false with train.accumulation_steps=2, got True"
    with pytest.raises(ConfigError, match=told):
        checked(load_config(TINY, static), processes=2)


def test_a_section_is_no_value():
    base = load_config(TINY)
    known = [key for key in RULES if "*" not in key and OmegaConf.select(base, key) is not None]
    assert len(known) > 40
    for key in known:
        config = copy.deepcopy(base)
        OmegaConf.update(config, key, {"a": {"b": 1}}, merge=False)
        with pytest.raises(ConfigError, match=f"{key} must be .*, got {{'a': {{'b': 1}}}}"):
            checked(config)


@pytest.mark.parametrize("target", [{}, {"a": 1}, [], 5, None])
def test_what_a_section_is_made_by_has_a_name(target):
    for key in ("model", "model.backbone", "dataloader.test", "optimizer"):
        config = load_config(TINY)
        OmegaConf.update(config, f"{key}._target_", target, merge=False)
        with pytest.raises(ConfigError, match=f"{key}._target_ must name what is called"):
            checked(config)


@pytest.mark.parametrize(
    "key",
    [
        "train.clip_grad.params",
        "train.checkpointer",
        "train.best_checkpointer",
        "train.pictures",
        "train.ddp",
        "train.amp",
        "train.inference",
        "train.clip_grad",
        "train.model_ema",
        "train.wandb",
        "train.mlflow",
        "train.mlflow.params",
    ],
)
def test_a_key_that_a_section_does_not_know_is_told(key):
    with pytest.raises(ConfigError, match=f"{key} has no key nonsense"):
        checked(load_config(TINY, [f"+{key}.nonsense=1"]))


def test_a_key_that_nothing_reads_is_told():
    added = ["+train.max_iters=5", "+dataloader.tests=1", "+lr=0.1", "+train.often=5"]
    added += ["train.eval_period=${train.often}", "+mine.side=5", "+train.cudnn_benchmark=false"]
    assert unread_keys(load_config(TINY, added)) == [
        "dataloader.tests of the config is read by nothing: is dataloader.test meant?",
        "lr of the config is read by nothing",
        "train.max_iters of the config is read by nothing: is train.max_iter meant?",
    ]


def test_a_service_that_is_away_ends_no_training(tmp_path, monkeypatch, capfd):
    class Run:
        def log(self, *arguments, **keywords):
            raise ConnectionError("no route to host")

    fake = types.SimpleNamespace(init=lambda config, dir, project: Run(), Image=str)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    small = ["train.max_iter=2", "train.wandb.enabled=true", f"shapes.root={tmp_path}/shapes"]
    with pytest.raises(ConfigError, match=r"train.wandb cannot be started .*argument 'nonsense'"):
        train(TINY, [*small, "+train.wandb.params.nonsense=1"], output_dir=tmp_path / "run")
    train(TINY, small, output_dir=tmp_path / "run")
    told = capfd.readouterr().out
    assert told.count("wandb gets no more of this run (ConnectionError: no route to host)") == 1


def test_a_seed_may_be_as_large_as_numpy_s():
    checked(load_config(TINY, ["train.seed=4000000000"]))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.neck.in_channels=[1,2,3,4]", r"set model.neck.in_channels=\[8, 8, 8, 8\]"),
        ("train.init_checkpoint=s3://x/y.pth", "train.init_checkpoint=s3://x/y.pth cannot be had"),
    ],
)
def test_what_only_the_start_finds_is_told(override, told, tmp_path):
    images = f"shapes.root={tmp_path}/shapes"
    with pytest.raises(Exception, match=told) as caught:
        train(TINY, [images, "train.amp.enabled=false", override], output_dir=tmp_path / "run")
    assert explain(caught.value)


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        ("{_target_: stage_interactor.d2.transforms.RandomFlip, prob: nan}", "0.prob must be a nu"),
        ("{_target_: stage_interactor.d2.transforms.ResizeShortestEdge, short_edge_length: [-1]}",
         r"0.short_edge_length must be whole numbers of 0 or more, got \[-1\]"),
        ("{_target_: stage_interactor.d2.transforms.ResizeShortestEdge, short_edge_length: 8, "
         "max_size: 0}", "0.max_size must be 1 or more, got 0"),
        ("{_target_: stage_interactor.d2.transforms.ResizeShortestEdge, short_edge_length: [9,8]}",
         r"short_edge_length must be \[min, max\], got \[9, 8\]"),
        ("{_target_: stage_interactor.d2.transforms.RandomCrop, crop_type: relative, "
         "crop_size: [2,2]}", "0.crop_size must be shares of the sides, up to 1"),
        ("{_target_: stage_interactor.d2.transforms.RandomCrop, crop_type: absolute, "
         "crop_size: [0.5,2]}", "0.crop_size must be pixels, 1 or more"),
        ("{prob: 0.5}", "augmentation must be a list of 0 or more, each a call"),
    ],
)  # fmt: skip
def test_a_transform_that_cannot_be_meant_is_told(transform, told):
    config = load_config(TINY, [f"dataloader.train.mapper.augmentation=[{transform}]"])
    with pytest.raises(ConfigError, match=told):
        checked(config)


def test_a_batch_is_shared_by_all_processes():
    with pytest.raises(ConfigError, match="total_batch_size must be a multiple of the 3 processes"):
        checked(load_config(TINY), processes=3)


def test_what_a_call_does_not_take_is_told():
    config = load_config(TINY)
    config.model.decoder.num_haeds = 4
    with pytest.raises(ConfigError, match="model.decoder has no parameter 'num_haeds'; did you me"):
        checked(config)
    config = load_config(TINY)
    config.model.decoder.first_reusing_stage = "second"
    with pytest.raises(ConfigError, match="first_reusing_stage must be int | None, got 'second'"):
        checked(config)
    config = load_config(TINY)
    config.model.neck = None
    with pytest.raises(ConfigError, match="model.neck must be"):
        checked(config)


@pytest.mark.parametrize("key", ["train.amp", "train.checkpointer.period", "model", "optimizer"])
def test_what_a_run_looks_up_is_missed(key):
    config = load_config(TINY)
    parent, _, name = key.rpartition(".")
    del (OmegaConf.select(config, parent) if parent else config)[name]
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        checked(config)


def keys(section, where=""):
    for name, value in section.items():
        if name != "_target_":
            yield f"{where}{name}"
            if isinstance(value, dict):
                yield from keys(value, f"{where}{name}.")


@pytest.mark.cases(12)
def test_rubbish_ends_a_run_well_or_in_one_line(rng, cases, tmp_path, monkeypatch, capfd):
    small = ["train.max_iter=2", "shapes.num_val=4", "shapes.num_train=8"]
    small += ["train.pictures.num_images=1", "lr_multiplier.warmup_iters=1"]
    base = load_config(TINY, [f"shapes.root={tmp_path}/shapes", *small])
    known = list(keys(OmegaConf.to_container(base)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # for folders that rubbish names
    for case in range(cases):
        key, value = rng.choice(known), rng.choice(RUBBISH)
        config = copy.deepcopy(base)
        config.train.output_dir = f"{tmp_path}/{case}"
        OmegaConf.update(config, key, value, merge=False)
        try:
            train(config)
        except Exception as error:
            assert explain(error), f"{key}={value!r}: {error!r}"
        told = capfd.readouterr()
        assert "Traceback" not in told.out + told.err, f"{key}={value!r}"


def test_a_period_of_0_is_never(tmp_path):
    never = ["train.eval_period=0", "train.checkpointer.period=0", "train.log_period=0"]
    small = [f"shapes.root={tmp_path}/shapes", f"train.output_dir={tmp_path}/run"]
    train(TINY, [*small, *never, "train.max_iter=3"])
    assert [path.name for path in (tmp_path / "run").glob("model_0*.pth")] == []
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.json")]
    assert lines[-1]["iteration"] == 2 and "bbox/AP" in lines[-1]


def test_every_rule_is_of_a_key_that_some_config_has():
    known = set()
    names = ["quickstart.py", "custom/nano.py", "stage_interactor_swin_s_300q_36ep_crop.py"]
    names += [name for name in list_configs() if name.startswith("extensions/")]
    for name in names:
        known |= set(keys(OmegaConf.to_container(load_config(name), resolve=True)))
    # All that DistributedDataParallel takes may be set, whatever version of PyTorch it is of.
    plain = {key for key in RULES if "*" not in key and not key.startswith("train.ddp.")}
    assert plain - known <= {"train.inference.channels_last", "optimizer.eps",
                             "optimizer.momentum", "dataloader.train.shuffle",
                             "dataloader.evaluator.max_dets_per_image", "train.cudnn_benchmark",
                             "dataloader.evaluator.use_07_metric",
                             "train.float32_precision", "train.clip_grad.params.foreach",
                             "model.criterion.alpha", "model.decoder.exit_stage",
                             "model.decoder.parts.cascade.exit_iou",
                             "train.clip_grad.params.error_if_nonfinite"}  # fmt: skip
