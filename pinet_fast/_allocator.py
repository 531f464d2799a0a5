"""Keeps glibc from returning a training step's memory to the system after every step."""

from __future__ import annotations

import functools

import torch

_JUST_UNDER_LIMIT = 31 * 2**20


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 62 MiB of freed memory at the top of its heap; once a process.

    By default it returns what is free there as soon as it exceeds twice the largest block that was
    freed so far. A step whose largest tensor has 5 MB then gives back most of its memory at its end
    and pays for it again, thousands of page faults a step, or not, by the accident of what lies on
    top. Freeing one block just under glibc's limit of 32 MiB raises the threshold for good, as any
    model with tensors of that size does by itself. The block is never touched. Other allocators
    take no notice, and neither does glibc where the environment sets one of its thresholds
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``): those stay.
    """
    block = torch.empty(_JUST_UNDER_LIMIT, dtype=torch.uint8, device="cpu")
    del block
