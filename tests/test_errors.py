"""Mistakes are told in one line, bugs with their trace: stage_interactor.errors."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn, ones

from stage_interactor.config import ConfigError
from stage_interactor.errors import TRACE, call, explain


def wrong_config():
    raise ConfigError("train.x is\n wrong")


def no_compiler():
    raise RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable or set "
        "triton.knobs.build.impl."
    )


MISTAKES = {
    "letters": (lambda: open("a\x1b[2J"), "a\\x1b[2J: No such file"),
    "config": (wrong_config, "train.x is wrong"),
    "no file": (lambda: open("nowhere/at all"), "nowhere/at all: No such file or directory"),
    "two files": (lambda: os.rename("from here", "to there"), "from here and to there: No such"),
    "no space": (lambda: Path("/dev/full").write_text("x"), "No space left on device; make room"),
    "JSON": (lambda: json.loads("{"), "Expecting property name"),
    "memory": (lambda: bytearray(1 << 62), "not enough memory"),
    "depth": (lambda: json.loads("[" * 100000), "nested too deeply"),
    "catalog": (lambda: {}["Dataset 'x' is not registered!"], "Dataset 'x' is not registered!"),
    "compiler": (no_compiler, "(Failed to find C compiler): install gcc and g++, or do without"),
    "one pixel": (lambda: nn.BatchNorm2d(2)(ones(1, 2, 1, 1)), "take larger pictures, more"),
    "long": (lambda: open("x" * 10**6), "name too long"),
    "module": (lambda: __import__("no_such_module"), "No module named 'no_such_module'"),
}
BUGS = (lambda: None + 1, lambda: [][0], lambda: {}["key"], lambda: 1 / 0, lambda: None.x)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, capfd):
    function, text = MISTAKES[name]
    assert call("program", function) == 2
    told = capfd.readouterr().err
    assert text in told and told.startswith("program: ") and told.count("\n") == 1, told
    assert len(told) < 2100


@pytest.mark.parametrize("number", range(len(BUGS)))
def test_a_bug_keeps_its_trace_and_asks_to_be_reported(number, capfd):
    assert call("program", BUGS[number]) == 1
    told = capfd.readouterr().err
    assert "Traceback" in told and "report it" in told.splitlines()[-1]


def test_a_folder_that_is_gone_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert call("program", os.getcwd) == 2
    assert "the folder that this was started in is gone" in capfd.readouterr().err


PROGRAM = """
import os, sys
from stage_interactor.errors import call
def work():
    with open("file", "w"):
        os.write(1, b"x")
        os.write(2, b"x")
        open(sys.stdin.read() or "nowhere")
sys.exit(call("program", work))
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&- 2>&-", "2>&-", "<&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full_change_nothing(closed, tmp_path):
    program = PROGRAM.replace('os.write(2, b"x")', "") if "full" in closed else PROGRAM
    command = f"{sys.executable} -c {shlex.quote(program)} {closed}"
    ended = subprocess.run(command, shell=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert ended.returncode == 2 and (tmp_path / "file").read_bytes() == b""


def test_the_trace_of_a_mistake_is_shown_on_demand(monkeypatch, capfd):
    monkeypatch.setenv(TRACE, "1")
    assert call("program", MISTAKES["config"][0]) == 2
    told = capfd.readouterr().err
    assert "Traceback" in told and told.splitlines()[-1] == "program: train.x is wrong"


def test_a_user_who_stops_a_program_gets_its_status(capfd):
    def stop():
        raise KeyboardInterrupt

    assert call("program", stop) == 130 and capfd.readouterr().err == "program: stopped\n"
    assert explain(ConfigError("a")) == "a"


def test_of_a_line_without_end_the_ends_are_told():
    told = explain(ConfigError("first" + "\x1b" * 10**6 + "last"))
    assert told.startswith("first\\x1b") and told.endswith("last") and len(told) < 10_000
