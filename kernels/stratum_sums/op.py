"""The op ``pinet::stratum_sums``: schema, fake kernel, choice of a backend, public function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.errors import InputError

from .. import _registry, _tl
from .._library import NAMESPACE, is_plain, without_graph
from . import _cpp, reference

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_TRITON_STRATA = 64


def stratum_sums(
    rows: Tensor, ids: Tensor, num_strata: int, *, backend: str | None = None
) -> Tensor:
    """Sum the rows of every stratum: the stratum gradients of a bias.

    ``out[s, c] = sum of rows[n, c] over the n with ids[n] = s``.

    Args:
        rows: [N, D]; float32, float64, bfloat16 or float16; any strides, expanded tensors included.
        ids: Stratum of every row, int64 [N] in ``0..num_strata-1``, in any order, on the same
            device.
        num_strata: S >= 1.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Returns:
        New tensor [S, D] of the dtype of ``rows``, float32 for bfloat16 and float16; detached: the
        op is not differentiable.

    Raises:
        InputError: Shapes, dtypes or devices are not as above.
        RuntimeError: An id is out of range (C++ only: elsewhere nobody looks, and its row counts
            nowhere).
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        Short runs of rows in float32 at least, all above in float64, one rounding at the end. An
        empty stratum gives exact zeros. A NaN or an infinity reaches the column of its stratum and
        nothing else. Bitwise deterministic for any number of threads.

    Cost:
        ``cost(num_rows, width, num_strata, itemsize)``: each row is read once.
    """
    _check(rows, ids, num_strata)
    run = _kernel if is_plain(rows) else torch.ops.pinet.stratum_sums.default
    sums: Tensor = run(rows, ids, num_strata, backend or "")
    return sums


def cost(num_rows: int, width: int, num_strata: int, itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that the op cannot avoid.

    Args:
        num_rows: N.
        width: D.
        num_strata: S.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations and bytes read and written.
    """
    return num_rows * width, (num_rows + num_strata) * width * itemsize + num_rows * 8


def _check(rows: Tensor, ids: Tensor, num_strata: int) -> None:
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise InputError(
            f"stratum_sums: rows: expected [N, D], float32, float64, bfloat16 or float16, got "
            f"{list(rows.shape)} {rows.dtype}; flatten all but the last dimension, or convert"
        )
    if ids.dtype is not torch.int64 or ids.shape != rows.shape[:1] or ids.device != rows.device:
        raise InputError(
            f"stratum_sums: ids: expected int64 [{rows.shape[0]}] on {rows.device}, one stratum a "
            f"row, got {ids.dtype} {list(ids.shape)} on {ids.device}; repeat or convert them"
        )
    if num_strata < 1:
        raise InputError(
            f"stratum_sums: num_strata: expected at least 1, got {num_strata}; count empty strata"
        )


def _triton_supports(rows: Tensor, ids: Tensor, num_strata: int) -> str | None:
    if reason := _tl.device_refusal(rows.device):
        return reason
    if num_strata > _MAX_TRITON_STRATA:
        return f"{num_strata} strata are more than {_MAX_TRITON_STRATA}"
    return None


def _run_triton(rows: Tensor, ids: Tensor, out: Tensor) -> None:
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run(rows, ids, out)  # type: ignore[no-untyped-call]


_TRITON = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton,
)
_registry.register(
    "stratum_sums",
    [_cpp.BACKEND, _TRITON, reference.BACKEND],
    lambda rows, ids, num_strata: (rows, ids, num_strata),
)

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratum_sums(Tensor rows, Tensor ids, SymInt num_strata, str backend) -> Tensor"
)


def _kernel(rows: Tensor, ids: Tensor, num_strata: int, backend: str) -> Tensor:
    # The choice is made here, not in the public function: see stratum_gram.
    chosen = _registry.select("stratum_sums", (rows, ids, num_strata), backend or None)
    out = _fake(rows, ids, num_strata, backend)
    without_graph(chosen.impl, rows, ids, out)
    _registry.record_call("stratum_sums", chosen.name)
    return out


def _fake(rows: Tensor, ids: Tensor, num_strata: int, backend: str) -> Tensor:
    dtype = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    return rows.new_empty((num_strata, rows.shape[1]), dtype=dtype)


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("stratum_sums", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("stratum_sums", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing: the result is detached.
NAMESPACE.impl("stratum_sums", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
