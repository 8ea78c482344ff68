import pytest

from stage_interactor.commands import main


@pytest.fixture(scope="session")
def exported(small_run, tmp_path_factory):
    """Exports once a format; gives the folder of all of them."""
    folder = tmp_path_factory.mktemp("exported")

    def export(suffix):
        path = folder / f"model.{suffix}"
        if not path.exists():
            kind = {"onnx": "onnx", "pt2": "torch-export"}.get(suffix, suffix)
            checkpoint = str(small_run / "model_final.pth")
            arguments = ["--checkpoint", checkpoint, "--format", kind, "--output", str(path)]
            assert main(["export", *arguments]) == 0
        return path

    return export
