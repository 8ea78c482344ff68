import os
import subprocess
import sys
from pathlib import Path


def test_a_folder_without_reference_files_fails(tmp_path):
    tests = [str(path) for path in Path(__file__).parent.glob("test_golden_[acd]*.py")]
    assert len(tests) == 3
    environment = os.environ | {"GOLDEN_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode != 0
    assert process.stdout.count("no reference files in") >= 3
