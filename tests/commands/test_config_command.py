"""`stage-interactor config`, and configs that are found by name."""

import os

import pytest
from omegaconf import OmegaConf

import stage_interactor
from stage_interactor.commands import main
from stage_interactor.config import (
    ConfigError,
    find_config,
    is_config,
    list_configs,
    load_config,
    override_text,
)


def test_every_run_is_listed_and_found_by_its_name(capsys):
    assert main(["config"]) == 0
    names = capsys.readouterr().out.split()
    assert names == list_configs() == stage_interactor.list_configs()
    assert {"quickstart.py", "custom/nano.py", "ablations/table1_static.py"} <= set(names)
    assert not [name for name in names if name.startswith(("common", "models"))]
    for name in ("quickstart.py", "quickstart", "configs/quickstart.py", "./configs/quickstart.py"):
        assert find_config(name).endswith("configs/quickstart.py")
    config = stage_interactor.get_config("quickstart.py", ["train.max_iter=3"])
    assert config.train.max_iter == 3


def test_a_file_that_is_there_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text("train = dict(max_iter=7)")
    assert load_config("quickstart.py").train.max_iter == 7
    assert load_config("configs/quickstart.py").train.max_iter == 2000


def test_a_name_that_is_not_there_is_told_with_what_is_near():
    with pytest.raises(ConfigError, match="did you mean quickstart.py"):
        load_config("quickstrat.py")


def test_what_is_a_config_and_what_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a, b]\n")
    (tmp_path / "flow.yaml").write_text("{train: images, val: images, names: [x, y]}")
    (tmp_path / "bom.yaml").write_text("\ufeffnames: [a]\ntrain: images\n", encoding="utf-8")
    (tmp_path / "nameless.yaml").write_text("train: images\nnc: 2\n")
    (tmp_path / "broken.yaml").write_text("train: [images\n")
    (tmp_path / "run.yaml").write_text("model: {names: 3}\ntrain: {}\ndataloader: {}\n")
    (tmp_path / "train.json").write_text("{}")
    yamls = ("data.yaml", "flow.yaml", "bom.yaml", "nameless.yaml", "broken.yaml")
    for data in ("cells", "train.json", "not_there", *yamls):
        assert not is_config(data), data
    for config in ("run.yaml", "quickstart", "quickstart.py", "not_there.py"):
        assert is_config(config), config


def test_a_resolved_config_is_printed_and_loads_again(tmp_path, capsys):
    assert main(["config", "custom/nano.py", "data.name=a, (b) [c]", "train.max_iter=5"]) == 0
    path = tmp_path / "resolved.yaml"
    path.write_text(capsys.readouterr().out)
    config = load_config(path)
    assert config.train.output_dir == "./output/a, (b) [c]" and config.train.max_iter == 5
    assert config.dataloader.train.dataset.name == "a, (b) [c]_train"


def test_a_copy_can_be_edited_and_says_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["train.max_iter=5", "train.output_dir=a b", "shapes.seed=3",
                 "dataloader.train.mapper.augmentation.0.prob=0.25"]  # fmt: skip
    assert main(["config", "quickstart.py", *overrides, "--copy", "mine"]) == 0
    told = capsys.readouterr().out
    assert "stage-interactor train --config-file mine/quickstart.py" in told
    assert "mine/common/train.py" in told
    copy, original = load_config("mine/quickstart.py"), load_config("quickstart.py", overrides)
    assert OmegaConf.to_container(copy, resolve=True) == OmegaConf.to_container(
        original, resolve=True
    )
    # The whole tree is its own: nothing of it comes from the package.
    common = tmp_path / "mine/common/train.py"
    common.write_text(common.read_text().replace("log_period=20", "log_period=21"))
    assert load_config("mine/quickstart.py").train.log_period == 21
    assert main(["config", "quickstart.py", "--copy", "mine"]) == 2
    assert "mine/quickstart.py is there already" in capsys.readouterr().err


def test_a_copy_of_a_config_in_a_folder_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "custom/nano.py", "--copy"]) == 0
    assert sorted(os.listdir("configs")) == [
        "common", "custom", "custom_data.py", "models", "stage_interactor_r50_100q_12ep.py",
    ]  # fmt: skip
    assert load_config("configs/custom/nano.py").preset.epochs == 36
    own = "own_parts/stage_interactor_r50_100q_12ep_grid_sampler"
    assert main(["config", own, "--copy", "own"]) == 0
    assert "grid_sampler.py" in os.listdir("own/own_parts")  # the class comes along


def test_a_copy_with_a_section_that_is_new(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "quickstart", "--copy", "a (b)", "+train.new.sub=1"]) == 0
    assert "--config-file 'a (b)/quickstart.py'" in capsys.readouterr().out
    assert load_config("a (b)/quickstart.py").train.new.sub == 1
    # What cannot be written as a line is refused, before anything is written.
    assert main(["config", "quickstart", "--copy", "c", "train.amp={enabled: true}"]) == 2
    assert "give the keys of a section one by one" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("train: {max_iter: 3}")
    assert main(["config", "run.yaml", "--copy", "c", "train.max_iter=4"]) == 2
    assert "is YAML" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_the_package_s_commands_mean_its_own_configs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom").mkdir()
    for name in ("quickstart.py", "custom/nano.py"):
        (tmp_path / name).write_text("raise SystemExit('somebody else')")
    assert main(["quickstart", "train.max_itr=3"]) == 2
    assert "did you mean max_iter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart.py", "custom/nano.py"], "name one config"),
        (["train.max_iter=3"], "name one config"),
        (["nonsense.py"], "there is no such file"),
        (["quickstart.py", "train.max_itr=3"], "did you mean max_iter"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    assert main(["config", *words]) == 2
    assert message in capsys.readouterr().err


TEXTS = ("a b", "a,b", "it's", "(x) [y] {z}", "zélles 日本", "a'b\\", "\\", "'q'", '"q"', "null",
         " lead", "trail ", "a\\'b", "x='y'", "2024", "1e5", "true", "[1,2]", "a=b", "#x", "~",
         "a:b", "{a: b}", "a\\\\'", "--resume", "*?", "@x%y&z")  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_may_be_called_anything(text):
    config = load_config("quickstart.py", [override_text("train.output_dir", text)])
    assert config.train.output_dir == text
    # An argument of a call that has no value yet
    key = "dataloader.train.dataset.json_file"
    config = load_config("stage_interactor_r50_100q_12ep.py", [f"{key}=/a b/{text}/x.json"])
    assert config.dataloader.train.dataset.json_file == f"/a b/{text}/x.json"


def test_a_text_that_would_refer_to_another_key_is_refused():
    with pytest.raises(ConfigError, match="cannot hold"):
        override_text("train.output_dir", "a ${b}")


def test_numbers_lists_and_references_are_still_what_they_are():
    overrides = ["train.max_iter=5", "optimizer.lr=1", "model.decoder.strides=[8,16,32]",
                 "train.output_dir=${train.init_checkpoint}", "train.init_checkpoint='x y'",
                 "model.nms_threshold=0.5", "model.neck.norm_groups=null"]  # fmt: skip
    config = load_config("quickstart.py", overrides)
    assert config.train.max_iter == 5 and config.optimizer.lr == 1
    assert config.model.decoder.strides == [8, 16, 32] and config.model.nms_threshold == 0.5
    assert config.train.output_dir == "x y" and config.model.neck.norm_groups is None


def test_a_config_is_copied_before_it_is_changed():
    config = load_config("quickstart.py")
    assert load_config(config, ["train.max_iter=3"]).train.max_iter == 3
    assert config.train.max_iter == 2000
