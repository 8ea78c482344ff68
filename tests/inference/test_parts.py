"""What a checkpoint's config may call: all that the configs use, each with its own arguments."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object

from stage_interactor.config import (
    flatten,
    instantiate,
    list_configs,
    load_config,
    without_pretrained_weights,
)
from stage_interactor.d2 import RUNTIME
from stage_interactor.engine import CheckpointError
from stage_interactor.inference.blueprint import Blueprint
from stage_interactor.inference.parts import PARTS, take_model
from stage_interactor.inference.weights import read_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
NEEDS = {"detectron2": "detectron2", "detrex": "detrex"}  # folder: package


def written(cfg, path):
    """A config as a checkpoint gives it back."""
    categories = [{"id": i, "name": str(i)} for i in range(cfg.model.num_classes)]
    extra = Blueprint.of_run(cfg, categories).as_extra()
    torch.save({"model": {"a": torch.ones(1)}, **extra}, path)
    return Blueprint.from_checkpoint(read_checkpoint(str(path)), str(path))


@pytest.mark.parametrize("name", list_configs())
def test_a_checkpoint_of_every_config_can_be_built_from_itself(name, tmp_path):
    package = NEEDS.get(Path(name).parts[0])
    if package:
        pytest.importorskip(package)
        if RUNTIME != "detectron2":
            pytest.skip("runs on detectron2")
    cfg = load_config(name)
    if not isinstance(cfg.model.get("num_classes", None), int):
        cfg.model.num_classes = 7
    without_pretrained_weights(cfg)
    blueprint = written(cfg, tmp_path / "c.pth")
    blueprint.build_augmentation()
    if name.startswith("own_parts/"):
        with pytest.raises(CheckpointError, match="calls grid_sampler.GridSampler, which is"):
            blueprint.sketch()
        return
    # Nothing is lost of what the config says, but where a part is and that weights are fetched.
    kept = [flat(take_model(blueprint.config)), flat(blueprint.config["model"])]
    assert kept[0] == kept[1] and len(kept[0]) > 30
    if kept[0] in _seen:
        return  # the same model in another run
    _seen.append(kept[0])
    built = blueprint.sketch()
    assert len(built.state_dict()) > 50
    if package:  # whose configs hold more than plain values; some read numbers while being built
        expected = instantiate(cfg.model)
        shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (built, expected)]
        assert repr(built) == repr(expected) and shapes[0] == shapes[1]


_seen: list[dict] = []


def flat(model):
    return {
        key: value
        for key, value in flatten(model, ".").items()
        if not key.endswith(("_target_", "recipe.arguments", ".pretrained"))
    }


@pytest.mark.parametrize("name", list(PARTS))
def test_a_part_has_the_arguments_that_it_may_get(name):
    package = name.split(".")[0]
    pytest.importorskip(package)
    if package in NEEDS and RUNTIME != "detectron2":
        pytest.skip("runs on detectron2")
    target = get_object(name)
    parameters = inspect.signature(target).parameters.values()
    allowed = set(PARTS[name][0])
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        assert allowed <= {parameter.name for parameter in parameters}
    if name.startswith("stage_interactor.modeling."):  # of ours all, but what calls or holds more
        own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert own - allowed == set()


def test_names_are_compared_and_not_imported():
    code = """
import sys
from stage_interactor.inference import parts
before = set(sys.modules)
for target in (
    "this.that", "antigravity", "torch.nn.utils.fusion.system", "detectron2.modeling.X",
    "detectron2.modeling.backbone.ResNet", "stage_interactor.modeling.detector.os.system",
):
    try:
        parts.take_model({"model": {"_target_": target}})
    except ValueError as error:
        print(error)
assert set(sys.modules) == before, set(sys.modules) - before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("which is not known as a part") == 5


def test_scores_of_many_classes_need_more_memory_than_a_file_may_ask_for(tmp_path):
    cfg = load_config("quickstart.py", ["model.queries.num_queries=4096"])
    cfg.model.num_classes = 5
    assert written(cfg, tmp_path / "c.pth").build_model(sketched(cfg, tmp_path))
    cfg.model.num_classes = 100_000
    with pytest.raises(CheckpointError, match="the scores would take .* GiB"):
        written(cfg, tmp_path / "c.pth").build_model(sketched(cfg, tmp_path))


def sketched(cfg, folder):
    """The weights' names and shapes."""
    return written(cfg, folder / "c.pth").sketch().state_dict()


@pytest.mark.parametrize("sides", [[800, 400], [400, 600, 800]])
def test_a_range_of_sides_goes_from_the_smallest_to_the_largest(sides, tmp_path):
    cfg = load_config("quickstart.py")
    cfg.model.num_classes = 5
    resize = {"_target_": "stage_interactor.d2.transforms.ResizeShortestEdge"}
    cfg.dataloader.test.mapper.augmentation = [resize | {"short_edge_length": sides}]
    with pytest.raises(CheckpointError, match="the smallest and the largest side"):
        written(cfg, tmp_path / "c.pth").build_augmentation()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", 10**6),
        ("embed_dim", 10**9),
        ("out_channels", 0),
        ("num_reg_tokens", 10**6),
        ("img_size", 10**6),
        ("dynamic_img_size", "os.system"),
        ("init_values", float("inf")),
        ("feature_cls", "getter"),
        ("out_indices", [0]),
        ("checkpoint_path", "/etc/passwd"),
        ("name", "hf_hub:evil/model"),
        ("channels_last", "never"),
    ],
)
def test_a_plain_backbone_gets_sizes_and_numbers_within_bounds_alone(key, value, tmp_path):
    cfg = load_config("stage_interactor_dinov3_vit_s_100q_12ep.py")
    cfg.model.neck.in_channels = [256] * 4
    cfg.model.backbone.update(pretrained=False, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config: .*model.backbone.{key}\b"):
        written(cfg, tmp_path / "c.pth").sketch()
