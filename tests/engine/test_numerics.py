"""What a run sets of PyTorch ends with the run."""

import os

import pytest
import torch

from stage_interactor.engine.numerics import numerics


def settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_before_when_a_run_has_ended(fails, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    try:
        with numerics({"deterministic": True}):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            torch.set_float32_matmul_precision("medium")  # as detectron2's default_setup does
            torch.backends.cudnn.benchmark = True
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert settings() == before


def test_what_the_user_has_set_stays():
    with numerics({}):
        assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with numerics({}):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
