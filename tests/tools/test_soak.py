"""tools/soak.py: rounds of tests with new seeds, beside a process that must not grow."""

import subprocess
import sys
from pathlib import Path

import pytest
import soak

ROOT = Path(__file__).parents[2]


def test_a_round_runs_the_tests_with_its_seed(tmp_path, monkeypatch):
    test = tmp_path / "test_it.py"
    test.write_text(
        "import os\n\ndef test_it():\n    assert os.environ['SEED'] + os.environ['CASES'] == '73'\n"
    )
    monkeypatch.setattr(soak, "TESTS", (str(test),))
    status, told, most = soak.run_round(7, 3, tmp_path / "log.txt")
    assert (status, told[:8]) == (0, "1 passed") and 0 < most < 4
    status, told, _ = soak.run_round(8, 3, tmp_path / "log.txt")
    assert (status, told[:8]) == (1, "1 failed")


def test_what_is_left_out_elsewhere_runs_too(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = soak\n")
    marked = "import pytest\n\n@pytest.mark.soak\ndef test_it():\n    pass\n"
    (tmp_path / "test_it.py").write_text(marked + "\ndef test_other():\n    assert False\n")
    status, told, _ = soak.run_tests("soak", (str(tmp_path),), tmp_path / "log.txt")
    assert (status, told[:8]) == (0, "1 passed")
    assert all((ROOT / name.removeprefix("--ignore=")).exists() for name in soak.ONCE)


def test_the_growth_is_that_of_later_rounds():
    assert soak.slope([900, 100, 102, 104]) == pytest.approx(2)
    assert soak.slope([900, 100, 100, 100]) == pytest.approx(0) == soak.slope([5])


def test_the_process_that_stays_says_what_it_holds(tmp_path):
    command = [sys.executable, str(ROOT / "tools/soak.py"), "--resident", str(tmp_path)]
    done = subprocess.run(command, input="\n\n", capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("held ")]
    assert len(lines) == 2 and all('"MiB"' in line for line in lines), done.stdout + done.stderr
