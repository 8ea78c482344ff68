"""Arguments of the tools that make no sense end in a line, before anything is measured."""

import benchmark
import kernels
import pytest
import scale
import step_cost
import versus_release

from stage_interactor.errors import call

SMALL = ["--arch", "80", "--dtype", "bfloat16", "--main-only"]
TWO = ["--axes", "queries", "--values", "5", "6", "--repeats", "1"]


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        (step_cost, ["--config-file", "quickstart.py", "--batch-size", "0"], "at least 1"),
        (step_cost, ["--config-file", "quickstart.py", "--image-size", "64", "-3"], "at least 1"),
        (step_cost, ["--batch-size", "3"], "are of a --config-file"),
        (step_cost, ["--config-file", "nothing.py"], "there is no such file"),
        (kernels, [*SMALL, "--batch", "0"], "at least 1"),
        (kernels, [*SMALL, "--queries", "-1"], "at least 1"),
        (scale, [*TWO, "--device", "nothing"], "can be used on cpu"),
        (scale, [*TWO, "--output", "nowhere/figures.csv"], "its folder is not there"),
        (scale, [*TWO, "--plot", "nowhere/figures.png"], "its folder is not there"),
        (scale, [*TWO, "--plot", "figures.txt"], "a .png or .svg file"),
        (scale, ["--read", "README.md"], "is no file that --output of this tool has written"),
        (versus_release, [".", "--queries", "0"], "at least 1"),
        (versus_release, [".", "--image-size", "64", "-64"], "at least 1"),
        (versus_release, [".", "--device", "nothing"], "can be used on cpu"),
        (versus_release, ["."], "has no folder mmdet"),
        (benchmark, ["--queries", "0"], "at least 1"),
        (benchmark, ["--device", "nothing"], "can be used on cpu"),
    ],
)
def test_what_makes_no_sense_is_told(tool, arguments, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool.__name__, *arguments])
    try:
        status = call(tool.__name__, tool.main, mistake=1)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status in (1, 2) and told in err and "Traceback" not in err, err
