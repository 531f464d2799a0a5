"""Fails where a kernel waits for a value of a GPU, without a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Fails when a value of a tensor is read on the host, of whatever device it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        reads = (aten._local_scalar_dense, aten.nonzero, aten.equal)
        assert func.overloadpacket not in reads, func
        return func(*args, **(kwargs or {}))
