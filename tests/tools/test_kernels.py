"""What tools/kernels.py computes; that it compiles, and sees a spill: tests/ops."""

import pytest

pytest.importorskip("triton")

import kernels  # noqa: E402


def test_bytes_operations_and_time_of_a_launch():
    variant = kernels.Variant(kernels.mixing_triton._mix_channels_kernel, "bfloat16", 64, 64)
    moved, operations = variant.costs(batch=8, queries=100)
    pairs = 8 * 100 * 4
    assert moved == pairs * 2 * (64 * 64 + 64 * 64 + 64 + 64 * 64)
    assert operations == pairs * 2 * 64**3
    a100 = kernels.DEVICES[80]
    assert variant.shortest(a100, 8, 100) == pytest.approx(moved / 2.04e12 * 1e3)
    assert kernels.Variant(variant.kernel, "float32", 64, 64).shortest(
        kernels.DEVICES[75], 8, 100
    ) == pytest.approx(moved * 2 / 0.32e12 * 1e3)


@pytest.mark.parametrize(
    ("usage", "blocks"),
    [
        ((255, 0, 8192, 4), 2),  # registers: 65536 / (256 * 128)
        ((32, 0, 40 * 1024, 4), 4),  # shared memory: 164 KiB / 41
        ((32, 0, 0, 4), 16),  # warps: 64 / 4
        ((255, 0, 0, 16), 0),  # too many registers for one block
    ],
)
def test_what_a_multiprocessor_holds(usage, blocks):
    assert kernels.Usage(*usage).occupancy(kernels.ARCHITECTURES[80]) == blocks
