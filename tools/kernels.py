#!/usr/bin/env python
"""What the CUDA kernels cost on GPUs that need not be here: compiled for each, and computed.

python tools/kernels.py                              # all variants, all architectures
python tools/kernels.py --arch 80 90 --dtype bfloat16 --markdown

For each variant: registers and spilled bytes a thread, shared memory and warps a block, how many
warps of it a multiprocessor holds; bytes moved and operations of a launch, and the longer of the
times that they take at the peak rates of a GPU of that architecture. Exit 1 if a kernel of the
paper's sizes spills, or does not fit. No GPU is needed.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "projects"), str(ROOT / "tools")]

import bare  # noqa: E402, F401
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from stage_interactor.ops import (  # noqa: E402
    map_norm_triton,
    mixing_triton,
    sampling_triton,
    shift_relu_triton,
)

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
GROUPS, WIDTH, LEVELS = 4, 64, 4
CHANNELS, PIXELS = 256, 100 * 168  # of a map, that of stride 8 of an image of 800 x 1344
# Bytes that a thread may spill: a few of a float32 kernel's hundreds of registers cost nothing.
SPILL = {"bfloat16": 0, "float16": 0, "float32": 128}


class Architecture(NamedTuple):
    """Limits of one multiprocessor, of CUDA's programming guide (table of compute capabilities)."""

    block_shared: int  # KiB of shared memory that a block may ask for
    shared: int  # KiB of shared memory
    warps: int
    blocks: int


ARCHITECTURES = {
    75: Architecture(64, 64, 32, 16),
    80: Architecture(163, 164, 64, 32),
    86: Architecture(99, 100, 48, 16),
    89: Architecture(99, 100, 48, 24),
    90: Architecture(227, 228, 64, 32),
    100: Architecture(227, 228, 64, 32),
    120: Architecture(99, 100, 48, 24),
}
REGISTERS = 65536  # of a multiprocessor, on all of these


class Device(NamedTuple):
    """Peak rates of a GPU, of its maker's data sheet, dense."""

    name: str
    bandwidth: float  # TB/s
    half: float  # TFLOP/s, float16 and bfloat16 on tensor cores with float32 sums
    tf32: float  # TFLOP/s; 0 without
    single: float  # TFLOP/s, float32 off the tensor cores


DEVICES = {
    75: Device("T4", 0.32, 8.1, 0.0, 8.1),  # Triton multiplies off its tensor cores
    80: Device("A100 80GB", 2.04, 312, 156, 19.5),
    89: Device("RTX 4090", 1.01, 165, 82.6, 82.6),
    90: Device("H100 SXM", 3.35, 989, 494, 67),
}


class Variant(NamedTuple):
    """A kernel with the constants that it is compiled for."""

    kernel: Any
    dtype: str
    points: int = 0
    rows: int = 0  # of the filters
    reuses: bool = False
    bias: bool = True
    precision: str = "tf32x3"
    needs_value: bool = True
    sizes_on_device: bool = False
    adds: bool = False  # takes a second map

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__.strip("_").removesuffix("_kernel")
        return f"sample_{name}" if self.samples else name

    @property
    def samples(self) -> bool:
        return not self.mixes and "xy" in self.kernel.arg_names

    @property
    def mixes(self) -> bool:
        return self.points > 0

    @property
    def of_maps(self) -> bool:
        return not self.mixes and not self.samples

    def __str__(self) -> str:
        if self.of_maps:
            return "two maps" if self.adds else ""
        if not self.mixes:
            options = [] if self.needs_value else ["no gradient of the value"]
            return ", ".join(options + ["sizes on the device"] * self.sizes_on_device)
        options = [f"P {self.points}"]
        options += [f"R {self.rows}"] if "R" in self.kernel.arg_names else []
        options += ["reuse"] if self.reuses else []
        options += [] if self.bias else ["no bias"]
        options += [] if self.precision == "tf32x3" else [self.precision]
        return ", ".join(options)

    def constants(self) -> dict[str, Any]:
        if self.mixes:
            return dict(P=self.points, W=WIDTH, R=self.rows, HAS_BIAS=self.bias,
                        REUSES=self.reuses, PRECISION=self.precision)  # fmt: skip
        if self.of_maps:
            left_out = ("bias",) if self.adds else ("residual", "grad", "totals")
            given = self.kernel is shift_relu_triton._shift_relu_backward_kernel
            return {} if given else {k: None for k in left_out if k in self.kernel.arg_names}
        return dict(LEVELS=LEVELS, BLOCK_DIM=WIDTH, NEEDS_VALUE=self.needs_value) | (
            {} if self.sizes_on_device else {"map_sizes": None}
        )

    def launch(self, arch: int) -> dict[str, Any]:
        """What the project's launch passes besides, on a device of this architecture."""
        if self.mixes:
            capability = divmod(arch, 10)
            rows = self.rows if "R" in self.kernel.arg_names else WIDTH
            dtype = getattr(torch, self.dtype)
            return mixing_triton.split(self.kernel, dtype, capability, self.points, rows)
        if self.samples:
            return sampling_triton.SPLIT
        if "PARTS" in self.kernel.arg_names:
            return dict(PARTS=map_norm_triton._PARTS, WIDTH=CHANNELS // 32)
        norms = self.name.startswith("norm")
        return (map_norm_triton if norms else shift_relu_triton).tile(CHANNELS)

    def type_of(self, argument: str) -> str:
        dtype = DTYPES[self.dtype]
        if self.mixes:
            return "i32" if argument.endswith("_stride") else f"*{dtype}"
        if self.of_maps and argument in ("maps", "residual", "grad", "grad_maps", "out"):
            return f"*{dtype}"
        if self.of_maps:
            numbers = {"eps": "fp32", "width": "i32"}
            return numbers.get(argument, "i32" if argument.startswith("num_") else "*fp32")
        if argument == "map_sizes":
            return "*i32"
        if argument in ("value", "out", "grad"):
            return f"*{dtype}"
        if argument in ("xy", "level_weights", "grad_value", "grad_xy", "grad_level_weights"):
            return "*fp32"
        return "fp32" if argument in sampling_triton.STRIDES else "i32"

    def costs(self, batch: int, queries: int) -> tuple[float, float]:
        """Bytes that a launch has to move, and operations of its products.

        Each input is read and each output written once. Samples (of 64 points, as in the first
        stage) read four pixels a level; of those, caches spare what samples share.
        """
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        pairs = batch * queries * GROUPS
        backward = "backward" in self.name
        if self.of_maps:
            if "PARTS" in self.kernel.arg_names:
                return batch * map_norm_triton._PARTS * 2 * CHANNELS * 4, 0
            maps = 1 + (self.adds or backward) + ("sums" not in self.name)
            return batch * PIXELS * CHANNELS * size * maps, 3 * batch * PIXELS * CHANNELS
        if not self.mixes:
            samples = pairs * 64  # the first stage's points
            taps = samples * LEVELS * 4 * WIDTH
            moved = samples * (WIDTH * size + 4 * (2 + LEVELS)) + taps * size
            if backward:  # adding to float32 sums reads and writes them
                moved += samples * 4 * (2 + LEVELS) + (taps * 8 if self.needs_value else 0)
            return moved, 2 * taps * (2 if backward else 1)
        by_points = "R" in self.kernel.arg_names
        shape = (self.rows, self.points) if by_points else (WIDTH, WIDTH)
        halves = 2 if self.reuses and by_points else 1
        out = (halves * self.rows if by_points else self.points) * WIDTH
        inputs = self.points * WIDTH + shape[0] * shape[1]
        inputs += (out // WIDTH if by_points else WIDTH) if self.bias else 0
        inputs += shape[0] * shape[1] + sum(shape) if self.reuses else 0
        product = 2 * halves * shape[0] * shape[1] * (WIDTH if by_points else self.points)
        moved = (2 * inputs if backward else inputs) + out
        return pairs * moved * size, pairs * product * (3 if backward else 1)

    def shortest(self, device: Device, batch: int, queries: int) -> float:
        """Milliseconds of a launch at the peak rates of a GPU."""
        moved, operations = self.costs(batch, queries)
        if not self.mixes:
            peak = device.single
        elif self.dtype != "float32":
            peak = device.half
        else:
            peak = device.tf32 / (3 if self.precision == "tf32x3" else 1) or device.single
        return max(moved / device.bandwidth, operations / peak) / 1e9


def variants(dtypes: Iterable[str] = DTYPES, main_only: bool = False) -> Iterator[Variant]:
    """All variants of the paper's sizes, or those that its detectors launch."""
    mixing = (
        mixing_triton._mix_channels_kernel,
        mixing_triton._mix_channels_backward_kernel,
        mixing_triton._mix_points_kernel,
        mixing_triton._mix_points_backward_kernel,
    )
    used = [(64, 128, False, True), (32, 128, False, True), (32, 64, True, True)]
    every = list(itertools.product((64, 32), (128, 64), (False, True), (True, False)))
    for dtype in dtypes:
        precisions = ("tf32x3", "tf32") if dtype == "float32" and not main_only else ("tf32x3",)
        for kernel, precision in itertools.product(mixing, precisions):
            known = set()
            for points, rows, reuses, bias in used if main_only else every:
                if "R" not in kernel.arg_names:
                    rows = WIDTH
                if (points, rows, reuses, bias) not in known:
                    known.add((points, rows, reuses, bias))
                    yield Variant(kernel, dtype, points, rows, reuses, bias, precision)
        for on_device in (False, True):
            yield Variant(sampling_triton._forward_kernel, dtype, sizes_on_device=on_device)
            yield Variant(sampling_triton._backward_kernel, dtype, sizes_on_device=on_device)
        if not main_only:
            yield Variant(sampling_triton._backward_kernel, dtype, needs_value=False)
        yield Variant(shift_relu_triton._shift_relu_backward_kernel, dtype)
        for kernel in (
            shift_relu_triton._shift_relu_kernel,
            map_norm_triton._norm_sums_kernel,
            map_norm_triton._norm_factors_kernel,
            map_norm_triton._norm_apply_kernel,
        ):
            for adds in (False, True):
                yield Variant(kernel, dtype, adds=adds)


class Usage(NamedTuple):
    registers: int  # a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block
    warps: int  # a block

    def occupancy(self, limits: Architecture) -> int:
        """Blocks that a multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = self.shared + 1024  # what the system takes of each block
        return min(
            REGISTERS // registers, limits.warps // self.warps, limits.blocks,
            limits.shared * 1024 // shared,
        )  # fmt: skip


def compiled(variant: Variant, arch: int) -> Usage:
    """Compiles a variant for an architecture; what it takes."""
    kernel = variant.kernel
    names = kernel.arg_names
    launch = dict(variant.launch(arch))
    options = {
        name: launch.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in launch
    }
    constants = {k: v for k, v in (variant.constants() | launch).items() if k in names}
    # The launcher's own rule: pointers and integers that 16 divides are marked.
    marked = [
        index for index, name in enumerate(names)
        if name not in constants and (
            variant.type_of(name)[0] == "*"
            or name.endswith("_stride") or name in ("num_points", "group_dim", "num_channels")
        )
    ]  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else variant.type_of(n) for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in marked},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(made.asm["cubin"])
    return Usage(registers, stack, made.metadata.shared, made.metadata.num_warps)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    line = next(line for line in told.splitlines() if "REG:" in line)
    parts = dict(part.split(":") for part in line.split() if ":" in part)
    return int(parts["REG"]), int(parts["STACK"])


def faults(variant: Variant, arch: int, usage: Usage) -> str:
    """What is wrong with a compiled variant, or nothing."""
    found = []
    if usage.stack > SPILL[variant.dtype]:
        found.append(f"spills {usage.stack} bytes")
    if variant.mixes and usage.shared > mixing_triton.shared_bytes(
        getattr(torch, variant.dtype), divmod(arch, 10), variant.points, WIDTH, variant.rows
    ):
        found.append("takes more shared memory than mixing_triton.supports reckons with")
    if usage.shared > ARCHITECTURES[arch].block_shared * 1024:
        found.append("does not fit into shared memory")
    elif not usage.occupancy(ARCHITECTURES[arch]):
        found.append("does not fit into a multiprocessor")
    return ", ".join(found)


def described(variant: Variant, arch: int, usage: Usage, batch: int, queries: int) -> str:
    """A line of all that a compiled variant costs."""
    limits = ARCHITECTURES[arch]
    moved, operations = variant.costs(batch, queries)
    line = (
        f"sm_{arch} {variant.dtype} {variant.name} {variant}: {usage.registers} registers, "
        f"{usage.stack} bytes spilled, {usage.shared / 1024:.0f} KiB shared, {usage.warps} warps, "
        f"{usage.occupancy(limits)} blocks a multiprocessor, {moved / 1e6:.0f} MB, "
        f"{operations / 1e9:.1f} GFLOP"
    )
    if arch in DEVICES:
        time = variant.shortest(DEVICES[arch], batch, queries)
        line += f", {DEVICES[arch].name} {time:.3f} ms"
    fault = faults(variant, arch, usage)
    return line + f"  <-- {fault}" * bool(fault)


def table(costs: dict[tuple[Variant, int], Usage], batch: int, queries: int) -> str:
    """Markdown, a line a variant; of a GPU registers, spilled bytes, warps held, milliseconds."""
    archs = [arch for arch in DEVICES if any(arch == made for _, made in costs)]
    heads = ["precision", "kernel", "MB", "GFLOP", *(DEVICES[arch].name for arch in archs)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for variant in dict.fromkeys(variant for variant, _ in costs):
        moved, operations = variant.costs(batch, queries)
        cells = [variant.dtype, f"{variant.name} {variant}".strip(), f"{moved / 1e6:.0f}",
                 f"{operations / 1e9:.1f}"]  # fmt: skip
        for arch in archs:
            usage = costs.get((variant, arch))
            time = variant.shortest(DEVICES[arch], batch, queries)
            cells.append("" if usage is None else (
                f"{usage.registers} / {usage.stack} / "
                f"{usage.occupancy(ARCHITECTURES[arch]) * usage.warps} / {time:.3f}"
            ))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES,
                        default=list(ARCHITECTURES), help="compute capabilities")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=8, help="images of a launch")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--main-only", action="store_true",
                        help="only the variants that the paper's detectors launch")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="a table, of GPUs with known rates")
    args = parser.parse_args(argv)
    if min(args.batch, args.queries) < 1:
        parser.error("--batch and --queries must be at least 1")
    wrong, costs = 0, {}
    for arch, variant in itertools.product(args.arch, variants(args.dtype, args.main_only)):
        if arch < 80 and variant.dtype == "bfloat16":
            continue  # no products of it: mixing_triton.supports says no
        try:
            usage = costs[variant, arch] = compiled(variant, arch)
        except Exception as error:  # of any kind: the compiler's words are the answer
            wrong += 1
            print(f"sm_{arch} {variant.dtype} {variant.name} {variant}: {str(error)[:200]}")
            continue
        wrong += bool(faults(variant, arch, usage))
        if not args.markdown:
            print(described(variant, arch, usage, args.batch, args.queries), flush=True)
    if args.markdown:
        print(table(costs, args.batch, args.queries))
    print(f"{wrong} of {len(costs)} variants spill or do not fit", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
