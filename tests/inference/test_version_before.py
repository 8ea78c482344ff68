"""A checkpoint and an ONNX file that version 0.1.0 wrote before modules moved load and predict.

The detector is tiny, trained for 800 iterations; of the checkpoint what is needed to go on with the
optimiser is left out, of the ONNX file the notes of the exporter.
"""

import csv
from pathlib import Path

import pytest

from stage_interactor.commands import main

FILES = Path(__file__).parents[1] / "files"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["pth", "onnx"])
def test_it_predicts_what_it_predicted(suffix, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="needs stage-interactor[export]")
    checkpoint = str(FILES / f"version_0_1_0.{suffix}")
    options = [
        "--threshold",
        "0",
        "--multi-label",
        "--device",
        "cpu",
        "--output-dir",
        str(tmp_path),
    ]
    assert main(["predict", "--checkpoint", checkpoint, str(FILES / "picture.png"), *options]) == 0
    found, expected = read(tmp_path / "predictions.csv"), read(FILES / "version_0_1_0.csv")
    assert [row["class"] for row in found] == [row["class"] for row in expected]
    for ours, theirs in zip(found, expected):
        # To rounding: other processors add in another order.
        assert float(ours["score"]) == pytest.approx(float(theirs["score"]), abs=2e-4)
        for side in ("left", "top", "right", "bottom"):
            assert float(ours[side]) == pytest.approx(float(theirs[side]), abs=0.02)


def test_it_can_be_trained_on_and_exported(tmp_path):
    checkpoint = str(FILES / "version_0_1_0.pth")
    output = str(tmp_path / "again.safetensors")
    assert main(
        ["export", "--checkpoint", checkpoint, "--format", "safetensors", "--output", output]
    ) == 0  # fmt: skip
    assert "5 classes" in (tmp_path / "again.md").read_text()
