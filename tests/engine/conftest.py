"""The generated images of the tiny config, written once for a file of tests."""

from pathlib import Path

import pytest

from stage_interactor.config import instantiate, load_config


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    cfg = load_config(str(Path(__file__).parents[1] / "tiny_config.py"), [f"shapes.root={root}"])
    for part in (cfg.dataloader.train, cfg.dataloader.test):
        instantiate(part.dataset)
    return root
