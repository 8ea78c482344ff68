"""Memory that is freed stays with the process while it trains, and only then."""

import os
import subprocess
import sys

import pytest

from stage_interactor.ops.memory import kept_memory

# Prints whether the system had to bring pages when large blocks were used again and again.
FAULTS = """
import ctypes, resource, sys
from stage_interactor.ops.memory import kept_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = int(sys.argv[1]) * 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [libc.malloc(size) for _ in range(3)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

with kept_memory() as kept:
    first, again, inside = faults(), faults(), resident()
print(kept, again < first / 5, inside - resident() > 3 * size // resource.getpagesize() // 2)
"""
pytestmark = pytest.mark.skipif(
    not getattr(os, "confstr_names", {}).get("CS_GNU_LIBC_VERSION"), reason="not glibc"
)


def run(megabytes: int = 30, **environment: str) -> list[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    plain |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment
    command = [sys.executable, "-c", FAULTS, str(megabytes)]
    return subprocess.run(command, env=plain, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize("megabytes", [1, 30, 32, 40, 300])
def test_freed_memory_is_used_again_and_returned_at_the_end(megabytes):
    assert run(megabytes) == ["True", "True", "True"]


def test_another_allocator_stays(tmp_path):
    source, library = tmp_path / "empty.c", tmp_path / "libjemalloc.so.2"
    source.write_text("int nothing;\n")
    try:
        subprocess.run(["cc", "-shared", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no compiler")
    assert run(LD_PRELOAD=str(library))[0] == "False"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STAGE_INTERACTOR_KEEP_MEMORY", "0"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ],
)
def test_what_somebody_chose_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with kept_memory() as kept:
        assert not kept


def test_where_glibc_does_not_allocate_nothing_happens(monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: None)  # musl
    with kept_memory() as kept:
        assert not kept
    monkeypatch.delattr(os, "confstr")  # Windows
    with kept_memory() as kept:
        assert not kept


def test_a_word_that_is_neither_is_told(monkeypatch):
    monkeypatch.setenv("STAGE_INTERACTOR_KEEP_MEMORY", "yes")
    with pytest.raises(ValueError, match="STAGE_INTERACTOR_KEEP_MEMORY must be 0"):
        with kept_memory():
            pass
