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


@pytest.mark.parametrize(
    ("gpus", "dtypes", "variants"),
    [
        ("80", "float32", 25),  # float32 takes the most registers
        pytest.param("80 90", "bfloat16 float32", 100, marks=pytest.mark.soak),
    ],
)
def test_no_kernel_of_the_papers_detectors_spills(gpus, dtypes, variants, run):
    """``python tools/kernels.py`` compiles all variants for all GPUs."""
    options = ("--arch", *gpus.split(), "--dtype", *dtypes.split(), "--main-only")
    done = run("kernels.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 of {variants} variants" in done.stderr


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
