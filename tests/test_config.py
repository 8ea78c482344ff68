import dataclasses
import enum
import functools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from stage_interactor.config import (
    ConfigError,
    instantiate,
    load_config,
    require_runnable,
    save_config,
    save_resolved,
)
from stage_interactor.d2.config import LazyConfig
from stage_interactor.modeling import OneToOneAssigner, TwoStageSampler, VanillaSampler

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(CONFIGS.glob("*.py"))
R50 = str(CONFIGS / "stage_interactor_r50_100q_12ep.py")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_config_is_complete_and_builds_its_model(path, tmp_path):
    cfg = load_config(str(path), ["model.backbone.pretrained=false"])
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(cfg)
    if path.stem == "custom_data":
        cfg.model.num_classes = 3
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert len(model.decoder.stages) == len(cfg.model.decoder.num_points)
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.0) == pytest.approx(0.001) and multiplier(0.3) > 0.7
    save_resolved(cfg, str(tmp_path / "resolved.yaml"))
    again = LazyConfig.load(str(tmp_path / "resolved.yaml"))
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in instantiate(again.model).state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}


def test_threads_load_configs_at_the_same_time():
    def load(_):
        return OmegaConf.to_yaml(load_config("stage_interactor_r50_100q_12ep.py"))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(load, range(40)))) == 1
    finally:
        sys.setswitchinterval(before)


def test_the_recipe_is_the_papers():
    one = load_config(R50)
    three = load_config(str(CONFIGS / "stage_interactor_r50_300q_36ep_crop.py"))
    assert (one.optimizer.lr, one.optimizer.weight_decay) == (2.5e-5, 1e-4)
    assert one.train.clip_grad.params.max_norm == 1.0
    assert one.dataloader.train.total_batch_size == 16
    assert (one.model.queries.num_queries, three.model.queries.num_queries) == (100, 300)
    assert three.train.max_iter == 3 * one.train.max_iter
    assert one.dataloader.train.mapper.augmentation_with_crop is None
    assert len(three.dataloader.train.mapper.augmentation_with_crop) == 4
    drops = [instantiate(one.lr_multiplier)(epoch / 12) for epoch in (7.9, 8.1, 10.9, 11.1)]
    assert drops == pytest.approx([1, 0.1, 0.1, 0.01])
    drops = [instantiate(three.lr_multiplier)(epoch / 36) for epoch in (23.9, 24.1, 32.9, 33.1)]
    assert drops == pytest.approx([1, 0.1, 0.1, 0.01])


def test_the_schedules_of_two_and_three_times_the_length():
    def drops(run):
        cfg = load_config(str(CONFIGS / f"{run}.py"))
        epochs = cfg.train.max_iter // 7330
        values = [instantiate(cfg.lr_multiplier)((epoch + 0.5) / epochs) for epoch in range(epochs)]
        return epochs, [e for e in range(1, epochs) if values[e] < 0.5 * values[e - 1]]

    assert drops("stage_interactor_r50_100q_24ep_ms") == (24, [16, 22])
    assert drops("stage_interactor_r50_300q_24ep_crop") == (24, [16, 22])
    assert drops("stage_interactor_r50_100q_36ep_ms") == (36, [27, 33])
    assert drops("adamixer_r101_300q_36ep_crop") == (36, [24, 33])


def test_swin_trains_without_decay_of_norms_and_positions_and_with_longer_warm_up():
    cfg = load_config(
        str(CONFIGS / "stage_interactor_swin_s_300q_36ep_crop.py"),
        ["model.backbone.pretrained=false"],
    )
    assert cfg.lr_multiplier.warmup_iters == 1000
    model = instantiate(cfg.model)
    drop_paths = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert max(drop_paths) == pytest.approx(0.2)
    cfg.optimizer.params.model = model
    decay = {
        id(p): group["weight_decay"]
        for group in instantiate(cfg.optimizer).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        plain = "norm" in name or "relative_position_bias_table" in name
        plain = plain or "_branch.1." in name  # the heads' layer norms
        assert decay[id(parameter)] == (0.0 if plain else 1e-4), name


def test_configs_do_not_change_the_ones_they_import():
    load_config(str(CONFIGS / "stage_interactor_r50_300q_36ep_crop.py"))
    load_config(str(CONFIGS / "adamixer_r50_100q_12ep.py"))
    cfg = load_config(R50)
    assert cfg.model.queries.num_queries == 100
    assert cfg.model.decoder.sampler == "two_stage"


def test_the_baseline_is_adamixer():
    cfg = load_config(
        str(CONFIGS / "adamixer_r50_100q_12ep.py"), ["model.backbone.pretrained=false"]
    )
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert isinstance(model.criterion.assigner, OneToOneAssigner)
    for stage in model.decoder.stages:
        assert isinstance(stage.sampler, VanillaSampler)
        assert len(stage.mixing.channel_reuse) == 0 and stage.mixing.bias_generator is None
    for config, starts_at_zero in ((cfg, False), (load_config(R50), True)):
        (stage, *_) = instantiate(config.model.decoder).stages
        assert (stage.mixing.out.weight == 0).all() == starts_at_zero


def test_overrides_reach_the_model_and_swap_the_backbone():
    options = [
        "model.backbone.name=resnet18",
        "model.backbone.pretrained=false",
        "model.decoder.embed_dim=64",
        "model.decoder.num_points=[16,8]",
        "model.num_classes=5",
        "model.criterion.assigner.scope=[i,L]",
    ]
    model = instantiate(load_config(R50, options).model)
    assert [conv.in_channels for conv in model.neck.convs] == [64, 128, 256, 512]
    assert len(model.decoder.stages) == 2 and model.queries.content.shape[1] == 64
    assert model.decoder.stages[0].head.cls_out.out_features == 5
    assert isinstance(model.decoder.stages[0].sampler, TwoStageSampler)
    assert model.criterion.assigner.stages_in_scope(1, 2) == [1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.decoder.embeddim=64",
            "model.decoder has no key 'embeddim'; did you mean embed_dim",
        ),
        ("modle.num_classes=3", "the config has no key 'modle'; did you mean model"),
        ("train.amp.enable=true", "did you mean enabled"),
        ("train.max_iter=many", r"expected a whole number \(now 87960\)"),
        ("train.amp.enabled=1", "expected true or false"),
        ("optimizer.lr=fast", "expected a number"),
        ("model.decoder.num_points=32", "expected a list"),
        ("train.amp=true", "the key is a section"),
        ("train.max_iter.x=3", "train.max_iter is the value 87960, not a section"),
        ("train.max_iter", "not of the form key=value"),
        ("a.b[1].c=2", "an item of a list is named by a dot: a.b.1.c$"),
        ("dataloader.train.mapper.augmentation.7.prob=1", "a list of 2 items"),
    ],
)
def test_a_wrong_override_is_an_error_that_helps(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(R50, [override])


def test_parameters_that_a_config_leaves_at_their_default_can_be_set():
    cfg = load_config(R50, ["model.decoder.level_shift=0.5", "+train.note=hello", "optimizer.lr=1"])
    assert cfg.model.decoder.level_shift == 0.5
    assert cfg.train.note == "hello" and cfg.optimizer.lr == 1


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match="nowhere.py: there is no such file"):
        load_config("nowhere.py")


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_tiny_patch4_window7_224"])
def test_a_backbone_is_swapped_by_its_name_alone(name):
    cfg = load_config(R50, [f"model.backbone.name={name}", "model.backbone.pretrained=false"])
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert [conv.in_channels for conv in model.neck.convs] == model.backbone.channels


def test_a_list_can_take_the_place_of_a_call():
    config = load_config("configs/quickstart.py", ["model.num_classes=3"])
    assert config.model.num_classes == 3
    override = "model.neck.in_channels=[1,2,3,4]"
    config = load_config("configs/custom_data.py", [override])
    assert list(config.model.neck.in_channels) == [1, 2, 3, 4]


@dataclasses.dataclass
class Width:
    channels: int = 3


class Kind(enum.Enum):
    LOUD = "loud"


OBJECTS = {
    "class": torch.nn.LayerNorm,
    "method": OmegaConf.create,
    "nested": json.JSONDecoder.decode,
    "partial": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    "partial of a tuple": functools.partial(max, (1, 2), key=len),
    "dtype": torch.float32,
    "path": Path("/a b/ü"),
    "enum": Kind.LOUD,
    "device": torch.device("cuda:1"),
    "tuple in a tuple": functools.partial(SimpleNamespace, sizes=((1, 2), [3])),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_survives_wherever_it_stands(kind, tmp_path):
    value = OBJECTS[kind]
    config = OmegaConf.create(
        {"call": {"_target_": SimpleNamespace, "value": value, "plain": {"x": [value]}}},
        flags={"allow_objects": True},
    )
    save_config(config, tmp_path / "saved.yaml")
    loaded = load_config(tmp_path / "saved.yaml").call
    # Also a reader that knows nothing of this project, but for what stands in plain sections.
    elsewhere = instantiate(LazyConfig.load(str(tmp_path / "saved.yaml")).call)
    for found in (loaded.value, loaded.plain.x[0], elsewhere.value):
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            assert (found.func, found.args, found.keywords) == parts
            assert [*map(type, found.keywords.values())] == [*map(type, value.keywords.values())]
        else:
            assert found == value and type(found) is type(value)


def test_numbers_texts_and_dataclasses_survive(tmp_path):
    values = [1e-5, 1e17, float("inf"), "1e-5", "null", "yes", "a: b", True, None, "ü\n", 3, 3.0]
    config = OmegaConf.create({"values": values}, flags={"allow_objects": True})
    config.section = OmegaConf.create(
        {"p1": Width(5), "_target_": SimpleNamespace}, flags={"allow_objects": True}
    )
    save_config(config, tmp_path / "saved.yaml")
    loaded = load_config(tmp_path / "saved.yaml")
    assert [(item, type(item)) for item in loaded["values"]] == [(v, type(v)) for v in values]
    assert OmegaConf.to_object(loaded.section.p1) == Width(5)


def test_what_has_no_name_is_told_when_it_is_saved_and_refused_when_it_is_run(tmp_path, caplog):
    config = OmegaConf.create(
        {"call": {"_target_": SimpleNamespace, "value": lambda: 0}}, flags={"allow_objects": True}
    )
    save_config(config, tmp_path / "saved.yaml")
    assert "cannot hold call.value, <function" in caplog.text
    loaded = load_config(tmp_path / "saved.yaml")
    for use in (require_runnable, lambda config: instantiate(config.call)):
        with pytest.raises(
            ConfigError, match="could not hold call.value.*config file that it came"
        ):
            use(loaded)


def test_overrides_are_a_list():
    with pytest.raises(ConfigError, match=r"overrides must be a list, \['train.max_iter=1'\]"):
        load_config("quickstart.py", "train.max_iter=1")
