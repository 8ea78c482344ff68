"""Lazy configs, on whichever runtime is there."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from stage_interactor.d2.config import LazyCall, LazyConfig, instantiate
from stage_interactor.d2.solver import get_default_optimizer_params

COMMON = """
from omegaconf import OmegaConf
from torch import nn
from stage_interactor.d2.config import LazyCall as L

_hidden = dict(a=1)
size = 8
model = L(nn.Sequential)()
layer = L(nn.Linear)(in_features=4, out_features="${.in_features}", bias=False)
train = dict(lr=1e-4, steps=[10, 20], output_dir="out", nested=dict(deep=dict(value=1)))
names = OmegaConf.create(["a", "b"])
plain = [1, 2]
"""
RUN = """
from ..common.base import layer, train
from stage_interactor.d2.config import LazyConfig

train.lr = 0.5
layer.in_features = 6
other = LazyConfig.load_rel("../common/base.py", "train")
"""


@pytest.fixture
def config_folder(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "common" / "base.py").write_text(COMMON)
    (tmp_path / "runs" / "run.py").write_text(RUN)
    return tmp_path


def load(folder, name="runs/run.py", keys=None):
    return LazyConfig.load(str(folder / name), keys)


def test_a_lazy_call_is_edited_like_attributes_before_it_is_built():
    call = LazyCall(nn.Linear)(in_features=3, out_features=5)
    call.out_features = 7
    assert call._target_ is nn.Linear
    assert instantiate(call).weight.shape == (7, 3)


def test_targets_may_be_dotted_names_also_inside_lists():
    layers = [LazyCall("torch.nn.Linear")(in_features=2, out_features=2), "text"]
    built = instantiate(OmegaConf.create({"x": layers}, flags={"allow_objects": True}).x)
    assert isinstance(built, ListConfig)
    assert isinstance(built[0], nn.Linear) and built[1] == "text"


def test_calls_inside_calls_are_built_first():
    optimizer = LazyCall(torch.optim.SGD)(
        params=LazyCall(get_default_optimizer_params)(
            model=LazyCall(nn.Linear)(in_features=2, out_features=1)
        ),
        lr=0.25,
    )
    (group,) = instantiate(optimizer).param_groups
    assert group["lr"] == 0.25 and group["params"][0].shape == (1, 2)


def test_a_mapping_without_a_target_is_passed_on_untouched():
    options = dict(lr=0.5, layers=[1, 2], inner=LazyCall(nn.ReLU)())
    call = LazyCall(SimpleNamespace)(options=options, sizes=[dict(width=3)])
    built = instantiate(call)
    assert built.options == call.options and isinstance(built.options, DictConfig)
    assert built.options.inner._target_ is nn.ReLU  # and nothing inside it is called
    assert built.sizes == [{"width": 3}]


def test_a_target_that_is_no_callable_is_refused():
    with pytest.raises(TypeError):
        LazyCall(3)


def test_wrong_arguments_name_the_target_in_the_log(logged):
    with pytest.raises(TypeError):
        instantiate(LazyCall(nn.Linear)(in_features=1, colour="red"))
    assert "Linear" in "".join(logged)


def test_an_unknown_target_names_what_cannot_be_imported():
    with pytest.raises(Exception, match="no_such_layer"):
        instantiate({"_target_": "torch.nn.no_such_layer"})


def test_loading_keeps_configs_and_leaves_out_the_rest(config_folder):
    cfg = load(config_folder, "common/base.py")
    assert sorted(cfg.keys()) == ["layer", "model", "names", "train"]
    assert isinstance(cfg.train, DictConfig) and isinstance(cfg.names, ListConfig)
    assert load(config_folder, "common/base.py", "size") == 8
    layer, train = load(config_folder, "common/base.py", ("layer", "train"))
    assert layer.out_features == 4 and train.steps == [10, 20]


def test_relative_imports_go_by_file_and_are_not_shared(config_folder):
    cfg = load(config_folder)
    assert cfg.train.lr == 0.5 and cfg.layer.out_features == 6
    assert cfg.other.lr == 1e-4
    assert load(config_folder, "common/base.py").train.lr == 1e-4


def test_relative_paths_work_from_the_working_directory(config_folder, monkeypatch):
    monkeypatch.chdir(config_folder / "runs")
    assert LazyConfig.load("../runs/run.py").layer.in_features == 6


def test_a_missing_import_names_the_file_and_the_importer(config_folder):
    (config_folder / "runs" / "bad.py").write_text("from ..common.gone import x")
    with pytest.raises(ImportError, match="gone.py"):
        load(config_folder, "runs/bad.py")


def test_a_folder_cannot_be_imported(config_folder):
    (config_folder / "runs" / "bad.py").write_text("from .. import common")
    with pytest.raises(ImportError, match="(?i)relative import"):
        load(config_folder, "runs/bad.py")


def test_a_syntax_error_names_the_file(config_folder):
    (config_folder / "runs" / "bad.py").write_text("x = = 1")
    with pytest.raises(SyntaxError, match="bad.py"):
        load(config_folder, "runs/bad.py")


def test_other_file_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="run.json"):
        LazyConfig.load(str(tmp_path / "run.json"))


def test_a_saved_config_builds_the_same_after_loading(config_folder, tmp_path):
    cfg = load(config_folder)
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, path)
    again = LazyConfig.load(path)
    assert again.layer._target_ == "torch.nn.Linear"
    assert "${.in_features}" in (tmp_path / "config.yaml").read_text()
    assert instantiate(again.layer).weight.shape == (6, 6)
    assert again.train == cfg.train
    assert cfg.layer._target_ is nn.Linear  # saving leaves the config alone


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.lr=0.01", {"lr": 0.01}),
        ("train.lr=1e-6", {"lr": 1e-6}),
        ("train.steps=[1,2,3]", {"steps": [1, 2, 3]}),
        ("+train.extra=true", {"extra": True}),
        ("train.new.key=null", {"new": {"key": None}}),
        ("train.output_dir='a=b, c'", {"output_dir": "a=b, c"}),
        ("train.nested={deep: {other: 2}}", {"nested": {"deep": {"value": 1, "other": 2}}}),
    ],
)
def test_overrides_use_the_grammar_of_hydra(config_folder, override, expected):
    cfg = load(config_folder, "common/base.py")
    before = OmegaConf.to_container(cfg.train)
    assert LazyConfig.apply_overrides(cfg, [override]) is cfg
    assert OmegaConf.to_container(cfg.train) == before | expected


def test_an_override_through_a_number_is_refused(config_folder):
    with pytest.raises(KeyError, match="train.lr"):
        LazyConfig.apply_overrides(load(config_folder), ["train.lr.value=1"])


def test_a_deletion_is_refused(config_folder):
    with pytest.raises(NotImplementedError):
        LazyConfig.apply_overrides(load(config_folder), ["~train.lr"])
