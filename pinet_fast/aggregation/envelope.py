"""What stratum gradients cannot do yet, each refused by name before anything is computed."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pinet_fast.aggregation.compiler_names import eager_stance, frame_callback
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pinet_fast.aggregation.leak_check import LeakCheck


_HAS_RANKS = torch.distributed.is_available()
_OWN_KINDS = {Tensor, torch.nn.Parameter}


def refuse_outside_envelope(
    parameters: Sequence[Tensor], names: Sequence[str], *, check: LeakCheck, intercept: bool
) -> None:
    """Refuse what would train something else than it says.

    Raises:
        AggregationError: Several ranks, sharded or complex parameters, or CUDA graph capture while
            the leak check is armed.
    """
    # Every step asks, so what is never so in most processes is told without a call for it.
    if _HAS_RANKS and torch.distributed.is_initialized():
        _refuse_ranks()
    if not {*map(type, parameters)} <= _OWN_KINDS:
        sharding = sys.modules.get("torch.distributed.tensor")  # nobody has one without this import
        if sharding is not None:
            _refuse_sharded(parameters, names, sharding)
    if any(map(Tensor.is_complex, parameters)):
        _refuse_complex(parameters, names)
    # Nothing is captured before CUDA is initialised; asking for that is cheap.
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    capturing = initialised and torch.cuda.is_current_stream_capturing()
    if capturing and intercept and check.mode != "never":
        raise AggregationError(
            "stratify: a CUDA graph is being captured and the leak check reads results on the "
            "host; warm up until coverage() shows no unproven entry, then capture with "
            'check="never"'
        )


def is_compiler_used() -> bool:
    """Return whether something in this process was given to torch.compile.

    Optimizers import the compiler, so that it is there says nothing. Where this misses a compiled
    model (after ``torch._dynamo.reset()``), it runs eagerly.
    """
    module = sys.modules.get("torch._dynamo.eval_frame")
    if module is None:
        return False
    backends = getattr(module, "cached_backends", {0: module})  # another torch: it may be
    return any(backend is not None for backend in backends.values())


def refuse_compiled_step() -> None:
    """Refuse a ``stratify`` that compiled code enters, before any of its own code is compiled.

    Raises:
        AggregationError: torch.compile runs this call itself.
    """
    if "torch._dynamo" not in sys.modules:
        return
    if torch.compiler.is_compiling():
        raise AggregationError(_TRACED)
    callback = frame_callback()
    if callback is not None and callback() not in (None, False):
        raise AggregationError(_TRACED)


def compiled_modules(*, run_graphs: bool) -> AbstractContextManager[None]:
    """Have compiled models run as graphs that stratify or eagerly: others hide boundaries."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and the import takes seconds
        return nullcontext()
    if run_graphs:
        return retained_buffers()
    return eager_stance()


@contextmanager
def retained_buffers() -> Iterator[None]:
    """Have compiled graphs keep their buffers for more than one backward, as a leak check needs.

    To be entered where they are compiled and where they run backward.
    """
    config = torch._functorch.config
    before = config.donated_buffer
    config.donated_buffer = False  # config.patch() would leave something behind at every step
    try:
        yield
    finally:
        config.donated_buffer = before


_TRACED = (
    "stratify: torch.compile traces the training step itself; compile the model "
    "(model = torch.compile(model)), and keep stratify, backward and step outside"
)


def _refuse_ranks() -> None:
    """Stratum gradients are not reduced across ranks yet, and each rank would go its own way."""
    if (ranks := torch.distributed.get_world_size()) > 1:
        raise AggregationError(
            f"stratify: this process is one of {ranks} ranks, and stratum gradients are not "
            'reduced across ranks yet; train on one, or use rule="joint" or "backdoor", which '
            "need none"
        )


def _refuse_complex(parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    name, p = next(it for it in zip(names, parameters, strict=True) if it[1].is_complex())
    raise AggregationError(
        f"stratify: {name} is {str(p.dtype).removeprefix('torch.')}, and rules compare stratum "
        "gradients of real parameters; keep it as nn.Parameter(torch.view_as_real(p)) and use "
        'torch.view_as_complex(p) in the forward, or use rule="joint" or "backdoor"'
    )


def _refuse_sharded(parameters: Sequence[Tensor], names: Sequence[str], sharding: Any) -> None:
    for p, name in zip(parameters, names, strict=True):
        if isinstance(p, sharding.DTensor):
            raise AggregationError(
                f"stratify: {name} is a DTensor, and stratum gradients are not reduced across "
                'its shards; train with plain parameters, or use rule="joint" or "backdoor"'
            )
