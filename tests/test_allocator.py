"""What a training step frees stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes

from pinet_fast._allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Info = type("Info", (ctypes.Structure,),
            {"_fields_": [(name, ctypes.c_size_t) for name in FIELDS.split()]})
libc.mallinfo2.restype = Info

def given_back():
    # 40 MB in blocks that come from the heap, freed from its top downwards.
    blocks = [libc.malloc(100_000) for _ in range(400)]
    full = libc.mallinfo2().arena
    for block in reversed(blocks):
        libc.free(block)
    return full - libc.mallinfo2().arena

before = given_back()
keep_freed_memory()
print(before, given_back())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators have thresholds of their own"
)
def test_freed_memory_stays_with_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    before, after = map(int, done.stdout.split())
    assert before > 30e6  # what the function is for
    assert after == 0


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators have thresholds of their own"
)
@pytest.mark.parametrize(
    "asked",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_thresholds_of_the_environment_stay(asked: dict[str, str]) -> None:
    """Whoever sets one, to see what a step needs for example, finds it obeyed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **asked}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    assert before > 30e6
    assert after > 30e6
