"""Whether half precision is the faster one here: measured, since no flag of a CPU tells.

There are CPUs that name instructions for bfloat16 and need twice the time of float32 with them.
What was measured is kept in a file of the user's, one for all machines that share it.
"""

import hashlib
import json
import math
import os
import platform
import re
import time
from contextlib import suppress

import torch
import torch.nn.functional as F

from ..untrusted.files import read_head
from ..writing import write_text

MARGIN = 1.2  # times float32's rate: below that, what is gained goes into conversions
_SECONDS, _LEAST_TURNS = 0.05, 5  # for measuring
_SHAPE, _WIDTH = (8, 64, 32, 32), 64  # of the features, and of what a convolution makes of them
_MOST_KEPT = 2**16  # bytes
# Of /proc/cpuinfo, what tells one model of a CPU from another; some are called "AMD EPYC" alone.
_MODEL = re.compile(
    r"^((?:vendor_id|cpu family|model|model name|stepping|flags|Features"
    r"|CPU (?:implementer|architecture|variant|part|revision))\s*:.*)$",
    re.MULTILINE,
)


def half_is_faster(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether ``dtype`` is to be computed in rather than float32, and a sentence with the reason.

    On a CPU the rates of a convolution in each decide, with the libraries of this process; on CUDA
    whether the GPU has the instructions. Elsewhere it is float32.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        device: to compute on.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        there = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
        gpu = torch.cuda.get_device_name(device)
        return there, f"{name}, which {gpu} has" if there else f"float32: {gpu} has no {name}"
    if device.type != "cpu":
        return False, f"float32: {device.type} is not measured"
    place, key = _place(), f"{_machine()} {name}"
    known = _read(place)
    rates, source = known.get(key), f"kept in {place}"
    if rates is None:
        rates, source = _measure(dtype), "measured now"
        _write(place, {key: rates} | known)
    half = rates[1] > MARGIN * rates[0]
    return half, (
        f"{name if half else 'float32'}: {rates[1]:.0f} GFLOP/s a thread in {name}, "
        f"{rates[0]:.0f} in float32 ({source}; {name} from {MARGIN:g} times the rate on)"
    )


def _measure(dtype: torch.dtype) -> list[float]:
    """GFLOP/s of a thread in a convolution in float32 and in ``dtype``, the best of several in
    turns; 0 where there is none."""

    def filled(kind: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=kind).contiguous(memory_format=torch.channels_last)

    work = {
        kind: (filled(kind, *_SHAPE), filled(kind, _WIDTH, _SHAPE[1], 3, 3))
        for kind in (torch.float32, dtype)
    }

    def seconds(kind: torch.dtype) -> float:
        start = time.perf_counter()
        try:
            F.conv2d(*work[kind], padding=1)
        except RuntimeError:  # not in this precision
            return math.inf
        return time.perf_counter() - start

    best, turns = dict.fromkeys(work, math.inf), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another where others compute as well
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            for kind in work:
                seconds(kind)  # in which libraries get ready
            end = time.perf_counter() + _SECONDS
            while turns < _LEAST_TURNS or time.perf_counter() < end:
                best = {kind: min(least, seconds(kind)) for kind, least in best.items()}
                turns += 1
    finally:
        torch.set_num_threads(threads)
    flops = 2 * math.prod(_SHAPE) * _WIDTH * 9
    return [flops / least / 1e9 for least in best.values()]


def _machine() -> str:
    """What the rates depend on."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, UnicodeError):  # not Linux
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read(2**16).split("\n\n")[0]
        model = "\n".join(_MODEL.findall(first)) or model
    told = (
        model, torch.__version__, torch.backends.cpu.get_cpu_capability(),
        torch.backends.mkldnn.is_available(), torch.get_float32_matmul_precision(),
        *(os.environ.get(f"{name}_MAX_CPU_ISA") for name in ("ONEDNN", "DNNL")),
    )  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _place() -> str:
    """The file, in the user's folder for what can be made again; empty if there is no such."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.join(os.path.expanduser("~"), ".cache")
    # Without a home a "~" is left, which would be a folder here.
    return os.path.join(folder, "stage_interactor", "rates.json") if os.path.isabs(folder) else ""


def _read(place: str) -> dict[str, list[float]]:
    """Pairs of rates by machine; what is none is passed over."""
    try:
        content = json.loads(read_head(place, _MOST_KEPT))
    except (ValueError, RecursionError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {key: rates for key, rates in pairs if _are_rates(rates)}


def _are_rates(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(rate) is float and 0 <= rate < math.inf for rate in value)
        and value[0] > 0
    )


def _write(place: str, rates: dict[str, list[float]]) -> None:
    if not place:
        return
    newest = dict(list(rates.items())[:100])
    with suppress(OSError):  # nothing is lost
        os.makedirs(os.path.dirname(place), exist_ok=True)
        write_text(place, json.dumps(newest))
