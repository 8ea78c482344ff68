"""The kernels, compiled for GPUs that need not be here: nothing spills, all fits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def run(tmp_path):
    """Runs Python where kernels are compiled, not interpreted, and nothing is compiled yet."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=TOOLS, env=environment, capture_output=True, text=True
        )

    return run


def test_no_kernel_of_the_papers_detectors_spills(run):
    """On sm_80 and sm_90; ``python tools/kernels.py`` compiles all variants for all GPUs."""
    done = run("kernels.py", "--arch", "80", "90", "--dtype", "bfloat16", "float32", "--main-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 100 variants" in done.stderr


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("dict(STEP=64, num_warps=4)", "spills"),
        ("dict(STEP=8, num_warps=4)", ""),
    ],
)
def test_a_spill_is_seen(run, change, fault):
    """All rows at once, as no launch has it, take more registers than there are."""
    done = run(
        "-c",
        f"""if True:
        import kernels
        kernel = kernels.mixing_triton._mix_points_backward_kernel
        kernels.mixing_triton.split = lambda *args: {change}
        variant = kernels.Variant(kernel, "float32", points=64, rows=128)
        print(kernels.faults(variant, 80, kernels.compiled(variant, 80)))
    """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(fault) and bool(done.stdout.strip()) == bool(fault)
