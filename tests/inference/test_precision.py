"""Which precision is the faster one: measured, kept in a file, and the same for a whole run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from stage_interactor.config import ConfigError, load_config
from stage_interactor.engine.process import settle_precision
from stage_interactor.engine.resume import Previous
from stage_interactor.inference import precision
from stage_interactor.inference.blueprint import KEY
from stage_interactor.inference.precision import half_is_faster

CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def measured(home, monkeypatch):
    """Rates that a machine might have, and how often they were measured."""
    rates, calls = [100.0, 50.0], []
    monkeypatch.setattr(precision, "_measure", lambda dtype: calls.append(dtype) or list(rates))
    return rates, calls


@pytest.mark.parametrize(
    ("rates", "half"),
    [([100, 50], False), ([100, 119], False), ([100, 121], True), ([100, 0], False)],
)
def test_half_precision_needs_more_than_a_margin(measured, rates, half):
    measured[0][:] = map(float, rates)
    found, told = half_is_faster(torch.bfloat16, CPU)
    assert found is half
    assert told.startswith("bfloat16" if half else "float32")
    assert f"{rates[1]} GFLOP/s a thread in bfloat16, {rates[0]} in float32" in told


def test_what_is_measured_is_what_a_product_takes(home):
    float32, bfloat16 = precision._measure(torch.bfloat16)
    assert 1 < float32 < 1e5 and 0.1 < bfloat16 < 1e5


def test_no_random_number_is_drawn_and_the_threads_stay(home):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    half_is_faster(torch.bfloat16, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_machine_is_measured_once(measured, monkeypatch):
    first = half_is_faster(torch.bfloat16, CPU)
    assert half_is_faster(torch.bfloat16, CPU)[0] is first[0] and len(measured[1]) == 1
    half_is_faster(torch.float16, CPU)
    assert len(measured[1]) == 2
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # other instructions, another machine
    half_is_faster(torch.bfloat16, CPU)
    assert len(measured[1]) == 3
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    half_is_faster(torch.bfloat16, CPU)
    assert len(measured[1]) == 3


HOSTILE = (
    b"", b"\0\xff", b"[]", b"{", b"[" * 60_000, b'{"a": 1}', b"NaN", b"1" * 5000, "ключ".encode(),
)  # fmt: skip


@pytest.mark.parametrize("content", [*HOSTILE, *(
    [1.0], [1.0, 2.0, 3.0], "ab", [True, False], [0.0, 1.0], [-1.0, 2.0], [None, 1.0],
    [float("nan"), 1.0], [1.0, float("inf")], [[1.0], 2.0], {"0": 1.0}, [1, 2],
)])  # fmt: skip
def test_a_damaged_file_is_measured_anew(measured, content):
    half_is_faster(torch.bfloat16, CPU)
    (path,) = (os.path.join(folder, name) for folder, _, names in os.walk(
        os.environ["XDG_CACHE_HOME"]) for name in names)  # fmt: skip
    if not isinstance(content, bytes):
        with open(path) as file:
            content = json.dumps(dict.fromkeys(json.load(file), content)).encode()
    with open(path, "wb") as file:
        file.write(content)
    assert half_is_faster(torch.bfloat16, CPU)[0] is False
    assert len(measured[1]) == 2
    half_is_faster(torch.bfloat16, CPU)  # and the file is whole again
    assert len(measured[1]) == 2


@pytest.mark.parametrize(
    "obstacle", ["file", "pipe", "link", "dangling", "folder", "relative", "no home", "foreign"]
)
def test_without_a_place_for_the_file_it_is_measured_each_time(
    measured, tmp_path, monkeypatch, obstacle
):
    cache = tmp_path / "cache"
    folder = cache / "stage_interactor"
    precious = tmp_path / "precious"
    precious.write_text("precious")
    if obstacle == "file":
        cache.write_text("")
    elif obstacle == "pipe":
        folder.mkdir(parents=True)
        os.mkfifo(folder / "rates.json")
    elif obstacle == "link":
        folder.mkdir(parents=True)
        (folder / "rates.json").symlink_to(precious)
    elif obstacle == "dangling":
        cache.symlink_to(tmp_path / "nowhere")
    elif obstacle == "folder":
        (folder / "rates.json").mkdir(parents=True)
    elif obstacle == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        monkeypatch.setenv("HOME", "/proc/nowhere")
    elif obstacle == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    elif obstacle == "foreign":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert half_is_faster(torch.bfloat16, CPU)[0] is False
    assert half_is_faster(torch.bfloat16, CPU)[0] is False
    assert len(measured[1]) == (1 if obstacle == "link" else 2)  # a link is replaced
    assert precious.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == before


def test_a_gpu_decides_by_its_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a T4")
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported",
        lambda including_emulation=True: asked.append(including_emulation) or including_emulation,
    )  # fmt: skip
    cuda = torch.device("cuda")
    assert half_is_faster(torch.bfloat16, cuda) == (False, "float32: a T4 has no bfloat16")
    assert asked == [False]
    assert half_is_faster(torch.float16, cuda) == (True, "float16, which a T4 has")
    assert half_is_faster(torch.bfloat16, torch.device("mps"))[0] is False


AUTO = ["train.amp.enabled=auto", "train.inference.dtype=auto", "train.device=cpu"]


@pytest.mark.parametrize(("rates", "half"), [((1.0, 2.0), True), ((2.0, 1.0), False)])
def test_auto_becomes_what_it_means_here(measured, rates, half):
    measured[0][:] = rates
    config = load_config("quickstart.py", AUTO)
    told = settle_precision(config, None)
    assert config.train.amp.enabled is half
    assert config.train.inference.dtype == ("bfloat16" if half else "float32")
    assert [line.split("=auto: ")[0] for line in told] == [
        "train.amp.enabled", "train.inference.dtype"
    ]  # fmt: skip


def test_a_run_that_goes_on_keeps_what_it_began_with(measured):
    began = {"train": {"amp": {"enabled": True}, "inference": {"dtype": "float16"}}}
    previous = Previous("model.pth", {KEY: {"config": began}, "iteration": 1})
    config = load_config("quickstart.py", AUTO)
    told = settle_precision(config, previous)
    assert config.train.amp.enabled is True and config.train.inference.dtype == "float16"
    assert not measured[1] and told[0] == "train.amp.enabled=auto: true, as the run began"
    config = load_config("quickstart.py", [*AUTO, "train.amp.enabled=false"])
    settle_precision(config, previous)
    assert config.train.amp.enabled is False  # which was said


@pytest.mark.parametrize("value", ["fast", 3, 1, None, [], {"a": 1}, "auto"])
def test_what_a_checkpoint_says_of_it_may_be_anything(measured, value):
    began = {"train": {"amp": {"enabled": value}, "inference": value}}
    previous = Previous("model.pth", {KEY: {"config": began}, "iteration": 1})
    config = load_config("quickstart.py", AUTO)
    settle_precision(config, previous)
    assert config.train.amp.enabled is False and config.train.inference.dtype == "float32"


def test_explicit_values_stay_and_nothing_is_measured(measured):
    for enabled in ("true", "false"):
        config = load_config("quickstart.py", [f"train.amp.enabled={enabled}"])
        assert settle_precision(config, None) == [] and not measured[1]
        assert config.train.amp.enabled is (enabled == "true")
    assert config.train.inference.dtype == "float32"


@pytest.mark.parametrize("name", ["nano", "small", "base", "large"])
def test_presets_measure(name):
    assert load_config(f"custom/{name}.py").train.amp.enabled == "auto"


def test_a_flag_stays_a_flag_whether_or_not_it_was_auto():
    for base in ("quickstart.py", "stage_interactor_r50_100q_12ep.py"):
        for text, value in (("true", True), ("false", False), ("auto", "auto")):
            config = load_config(base, ["train.amp.enabled=auto", f"train.amp.enabled={text}"])
            assert config.train.amp.enabled == value and type(config.train.amp.enabled) is type(
                value
            )
    with pytest.raises(ConfigError, match="expected true or false"):
        load_config("stage_interactor_r50_100q_12ep.py", ["train.amp.enabled=maybe"])
    assert OmegaConf.select(load_config("quickstart.py", ["train.output_dir=true"]),
                            "train.output_dir") == "true"  # fmt: skip


def test_a_read_only_home_is_no_obstacle_for_a_process(tmp_path):
    code = (
        "import torch; from stage_interactor.inference.precision import half_is_faster; "
        "print(half_is_faster(torch.bfloat16, torch.device('cpu')))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "projects", "HOME": "/proc"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and "measured now" in done.stdout
