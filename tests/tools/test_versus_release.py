"""The authors' code is named where it is missing; ours is set up as theirs is called."""

import sys
from argparse import Namespace

import pytest
import torch
import versus_release as tool
from torch import nn


def test_what_a_folder_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "mmdet").mkdir()
    monkeypatch.setattr(sys, "argv", ["versus_release.py", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="has no folder configs; see --help"):
        tool.main()


@pytest.mark.parametrize("train", [False, True])
def test_both_sides_of_this_project_run_and_are_compared(monkeypatch, train):
    """Their parts are stood in for by ones that do as little as they can."""
    theirs = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])
    monkeypatch.setattr(tool, "release_parts", lambda *_: theirs)
    monkeypatch.setattr(tool.Sides, "_infer_theirs", lambda self: self.maps[0].sum())
    monkeypatch.setattr(tool.Sides, "_train_theirs", lambda self: self.maps[0].sum().backward())
    args = Namespace(image_size=(64, 96), train=train)
    sides = tool.Sides("", torch.device("cpu"), 5, 2, args)
    machine = Namespace(seconds=lambda work: work() or 2.0, peak_mib=lambda work: work() or 3.0)
    rows = tool.compared(sides, machine, ["float32", "bfloat16"], 2)
    names = [f"{n}, {p}" for n in ("authors", "reference", "fast") for p in ("float32", "bfloat16")]
    assert [row["side"] for row in rows] == names
    assert {row["ratio"] for row in rows} == {"1.00"} == {row["of theirs"] for row in rows}
    gradients = [parameter.grad is not None for parameter in sides.decoder.parameters()]
    assert any(gradients) == train
