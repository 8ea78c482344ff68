"""Learning rates by part and layer, and parts that are not trained."""

import pytest
import torch
from torch import nn

from stage_interactor import get_config
from stage_interactor.config import ConfigError, instantiate
from stage_interactor.d2.solver import get_default_optimizer_params
from stage_interactor.engine.parameters import freeze, parameter_groups
from stage_interactor.engine.process import build_optimizer

SMALL = ["model.backbone.name=test_resnet", "model.backbone.pretrained=false"]
SMALL += ["model.backbone.frozen_stages=0", "model.decoder.num_points=[8,8,8]"]
SMALL += ["model.decoder.embed_dim=16", "model.decoder.feedforward_dim=16"]
SMALL += ["model.decoder.out_points=8", "model.neck.norm_groups=4", "model.decoder.num_heads=4"]


@pytest.fixture
def model():
    return instantiate(get_config("stage_interactor_r50_100q_12ep.py", SMALL).model)


def rates(model, **options):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, **options)
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_without_factors_the_groups_are_those_of_detectron2(model):
    options = dict(weight_decay_norm=0.0, overrides={"bias": {"weight_decay": 0.5}})
    ours = parameter_groups(model, 1e-3, lr_factors=dict(backbone=1.0, decoder=1.0), **options)
    theirs = get_default_optimizer_params(model, 1e-3, **options)
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs):
        assert [id(p) for p in one.pop("params")] == [id(p) for p in other.pop("params")]
        assert one == other


def test_each_part_has_its_factor_and_the_longest_name_counts(model):
    found = rates(
        model, lr_factors={"backbone": 0.1, "decoder": 2.0, "decoder.stages.0": 3.0, "neck": 0.0}
    )
    assert len(found) == len(list(model.parameters()))
    for name, rate in found.items():
        expected = {"backbone": 0.1, "decoder": 2.0, "neck": 0.0, "queries": 1.0}[
            name.split(".")[0]
        ]
        assert rate == (3.0 if name.startswith("decoder.stages.0.") else expected), name


def test_a_factor_of_ones_own_is_one_more(model):
    found = rates(
        model, lr_factors={"backbone": 0.5}, lr_factor_func=lambda name: 3.0 if "bn" in name else 1
    )
    assert found["backbone.network.bn1.weight"] == 1.5
    assert found["backbone.network.conv1.0.weight"] == 0.5


def test_rates_decay_from_each_block_of_the_backbone_to_the_one_before_it(model):
    found = rates(model, lr_factors={"backbone": 0.5}, layer_decay=0.5)
    by_block = {
        name: rate / 0.5
        for name, rate in found.items()
        if name.startswith("backbone.") and name.endswith("bn1.weight")
    }
    blocks = ["bn1", *(f"layer{i}.0.bn1" for i in range(1, 5))]
    assert by_block == {
        f"backbone.network.{block}.weight": 0.5 ** (5 - depth) for depth, block in enumerate(blocks)
    }
    assert {rate for name, rate in found.items() if not name.startswith("backbone")} == {1.0}
    assert rates(model, layer_decay=0.0)["backbone.network.conv1.0.weight"] == 0.0  # as it says


@pytest.mark.parametrize(
    ("names", "depths", "blocks"),
    [
        (  # detectron2's ViT in its feature pyramid
            ["net.pos_embed", "net.blocks.0.norm1.weight", "net.blocks.0.mlp.fc1.weight",
             "net.blocks.11.norm1.weight", "simfp_2.0.weight"],
            [0, 1, 1, 2, 3],
            2,
        ),
        (  # timm's ConvNeXt
            ["network.stem_0.weight", "network.stages_0.blocks.0.gamma",
             "network.stages_1.downsample.0.weight", "network.stages_1.blocks.0.gamma",
             "network.stages_1.blocks.1.gamma", "norms.0.weight"],
            [0, 1, 2, 2, 3, 4],
            3,
        ),
        (  # timm's EfficientNet
            ["network.conv_stem.weight", "network.blocks.0.0.bn1.weight",
             "network.blocks.1.0.bn1.weight", "network.blocks.1.1.bn1.weight"],
            [0, 1, 2, 3],
            3,
        ),
        (  # detectron2's ResNet
            ["stem.conv1.weight", "res2.0.conv1.weight", "res2.1.conv1.weight",
             "res3.0.shortcut.weight"],
            [0, 1, 2, 3],
            3,
        ),
    ],
)  # fmt: skip
def test_blocks_are_known_by_the_names_of_other_libraries(names, depths, blocks):
    model = nn.Module()
    for name in names:
        *path, last = f"backbone.{name}".split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.register_parameter(last, nn.Parameter(torch.zeros(1)))
    found = rates(model, layer_decay=0.5)
    for name, depth in zip(names, depths):
        assert found[f"backbone.{name}"] == 0.5 ** (blocks + 1 - depth), name


@pytest.mark.parametrize(("factor", "told"), [(0, True), (0.1, False)])
def test_a_part_with_a_rate_of_0_is_told(factor, told, model, caplog):
    cfg = get_config(
        "stage_interactor_r50_100q_12ep.py", [*SMALL, f"optimizer.params.lr_factors.neck={factor}"]
    )
    build_optimizer(cfg, model)
    assert ("have a learning rate of 0 (optimizer.params): train.freeze" in caplog.text) == told


def test_parts_that_are_not_there_are_told_with_what_is_meant(model):
    with pytest.raises(ConfigError, match="lr_factors: .*no part 'backbon'; is backbone meant"):
        parameter_groups(model, 1.0, lr_factors={"backbon": 0.1})
    with pytest.raises(ConfigError, match=r"train.freeze: .*'xyz'; it has \['backbone', 'decoder'"):
        freeze(model, ["xyz"])
    with pytest.raises(ConfigError, match="'decoder.stage'; is decoder.stages meant"):
        freeze(model, ["decoder.stage"])
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="layer_decay: the blocks of the backbone are not known"):
        parameter_groups(model, 1.0, layer_decay=0.5)


def test_a_model_without_a_part_whose_factor_is_that_of_all_is_as_good(model):
    model.neck = nn.Identity()
    assert (
        rates(model, lr_factors=dict(backbone=1.0, neck=1.0)).keys()
        == dict(model.named_parameters()).keys()
    )
    with pytest.raises(ConfigError, match="no part 'neck'"):
        rates(model, lr_factors=dict(neck=0.5))


def test_frozen_parts_are_not_trained_and_stay_as_evaluated(model):
    model.backbone.freeze_norm = False
    freeze(model, ["backbone.network.layer1", "neck", "decoder.stages.0.attention.qkv.weight"])
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "decoder.stages.0.attention.qkv.bias" in trained
    assert not [name for name in trained if name.startswith(("neck", "backbone.network.layer1."))]
    norms = {n: m.training for n, m in model.backbone.network.named_modules() if "bn" in n}
    assert not norms["layer1.0.bn1"] and norms["layer2.0.bn1"] and norms["bn1"]
    groups = parameter_groups(model, 1.0)
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_model_of_which_nothing_is_trained_is_an_error(model):
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze(model, ["backbone", "neck", "queries", "decoder"])
