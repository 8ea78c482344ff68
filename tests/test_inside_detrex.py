"""The package copied into a checkout of detrex, as docs/detrex.md says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_package_works_as_one_of_detrexs_projects(tmp_path):
    project = tmp_path / "detrex" / "projects" / "stage_interactor"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "projects" / "stage_interactor", project, ignore=ignore)
    for name in ("configs", "tools"):
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    shutil.copy(ROOT / "train_net.py", project)
    folder = tmp_path / "detrex"
    environment = os.environ | {"PYTHONPATH": "projects", "OMP_NUM_THREADS": "1"}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run("-c", "import stage_interactor; print(stage_interactor.__file__)")
    assert Path(where.strip()) == project / "__init__.py"
    small = ["shapes.num_train=4", "shapes.num_val=2", "shapes.image_size=64", "train.max_iter=1"]
    home = "projects/stage_interactor"
    flags = (
        "--config-file",
        f"{home}/configs/quickstart.py",
        "dataloader.train.total_batch_size=2",
    )
    output = run(f"{home}/train_net.py", *flags, *small)
    assert "Finished." in output
    assert (folder / "output" / "quickstart" / "model_final.pth").is_file()
