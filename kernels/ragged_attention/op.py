"""The op ``pinet::ragged_attention``: schema, fakes, autograd, choice of a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pinet_fast.errors import InputError

from .. import _registry
from .._library import NAMESPACE, is_plain, without_graph
from . import _cpp, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ragged_attention(
    qkv: Tensor,
    offsets: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    max_len: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return causal softmax attention of every event over its user's events so far.

    ``out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(D)) v[j]`` over the events j <= i of the same
    user, head by head. Users lie one after the other, without padding; no user's events are read
    for another. Differentiable once, with respect to ``qkv``.

    Args:
        qkv: Queries, keys and values, [T, 3, H, D]; float32, float64, bfloat16 or float16; any
            strides.
        offsets: User u owns rows ``offsets[u]`` to ``offsets[u + 1]``; int64 [B + 1], ascending
            from 0 to T, on the device of ``qkv``. Users may have no events.
        dropout: Probability that an attention weight is dropped, 0 <= dropout < 1; the others are
            scaled by 1 / (1 - dropout). Rounded to a multiple of 2^-32.
        seed: Decides which weights are dropped, int64 [1] on the device of ``qkv``: the same seed
            and offsets give the same mask on every backend. None draws one from torch's generator.
        max_len: No user has more events. None reads the offsets, which synchronises a device and
            breaks a compiled graph.
        backend: ``"reference"`` or ``"cpp"``; None lets the library choose.

    Returns:
        [T, H, D] of the dtype of ``qkv``, contiguous.

    Raises:
        InputError: Shapes, dtypes, devices or ``dropout`` are not as above.
        BackendUnavailableError: The backend asked for cannot serve these inputs.
        RuntimeError: Offsets are not as above (tensors of the CPU), or the gradient of a gradient
            is asked for.

    Numerics:
        Sums and exponentials are in the dtype of ``qkv``, float32 for bfloat16 and float16. The
        same bits for the same inputs and seed, whatever the number of threads. A NaN stays with
        its user.

    Cost:
        ``cost(lengths, heads, width, itemsize)``, a forward.
    """
    _check(qkv, offsets, dropout, seed)
    if max_len is None:
        max_len = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    if dropout > 0 and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=qkv.device)
    arguments = qkv, offsets, max_len, dropout, seed if dropout > 0 else None, backend or ""
    if is_plain(qkv):
        plain: Tensor = _apply(*arguments)  # type: ignore[no-untyped-call]
        return plain
    out: Tensor = torch.ops.pinet.ragged_attention.default(*arguments)[0]
    return out


def cost(lengths: Sequence[int], heads: int, width: int, itemsize: int) -> tuple[int, int]:
    """Return the arithmetic and the traffic that a forward cannot avoid.

    Args:
        lengths: Events of every user.
        heads: H.
        width: D.
        itemsize: Bytes per element.

    Returns:
        Floating-point operations of the two products over the L (L + 1) / 2 scores of every user
        and head, and bytes read and written. A backward computes five such products, reads
        ``qkv``, the output and its gradient and writes the gradient of ``qkv``.
    """
    scores = heads * sum(n * (n + 1) // 2 for n in lengths)
    events = sum(lengths)
    return 4 * scores * width, itemsize * events * heads * (4 * width + 1) + 8 * (len(lengths) + 1)


def _check(qkv: Tensor, offsets: Tensor, dropout: float, seed: Tensor | None) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] == 0 or qkv.dtype not in _DTYPES:
        raise InputError(
            "ragged_attention: qkv: expected [T, 3, H, D], float32, float64, bfloat16 or float16, "
            f"got {list(qkv.shape)} {qkv.dtype}; stack queries, keys and values in dimension 1"
        )
    if offsets.dim() != 1 or offsets.dtype is not torch.int64 or offsets.numel() == 0:
        raise InputError(
            f"ragged_attention: offsets: expected int64 [B + 1], got {offsets.dtype} "
            f"{list(offsets.shape)}; accumulate the lengths of the users, 0 first"
        )
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"ragged_attention: dropout: expected 0 <= dropout < 1, got {dropout}")
    if seed is not None and (seed.dtype is not torch.int64 or seed.shape != (1,)):
        raise InputError(
            f"ragged_attention: seed: expected int64 [1], got {seed.dtype} {list(seed.shape)}; "
            "pass None to have one drawn"
        )
    for name, other in (("offsets", offsets), ("seed", seed)):
        if other is not None and other.device != qkv.device:
            raise InputError(
                f"ragged_attention: {name}: expected on {qkv.device}, as qkv, got {other.device}; "
                "move it"
            )


_registry.register(
    "ragged_attention", [_cpp.FORWARD, reference.FORWARD], lambda qkv, offsets: (qkv,)
)
_registry.register("ragged_attention_backward", [_cpp.BACKWARD, reference.BACKWARD])

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "ragged_attention(Tensor qkv, Tensor offsets, SymInt max_len, float dropout, Tensor? seed,"
    " str backend) -> (Tensor, Tensor)"
)
NAMESPACE.define(  # type: ignore[no-untyped-call]
    "ragged_attention_backward(Tensor grad, Tensor qkv, Tensor offsets, SymInt max_len,"
    " float dropout, Tensor? seed, Tensor out, Tensor lse, str backend) -> Tensor"
)


def _kernel(
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # The choice is made here, not in the public function: see stratum_gram.
    chosen = _registry.select("ragged_attention", (qkv,), backend or None)
    out, lse = _fake(qkv, offsets, max_len, dropout, seed, backend)
    without_graph(chosen.impl, qkv, offsets, max_len, dropout, seed, out, lse)
    _registry.record_call("ragged_attention", chosen.name)
    return out, lse


def _fake(
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    num_events, _, heads, width = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return (
        qkv.new_empty((num_events, heads, width)),
        qkv.new_empty((num_events, heads), dtype=wide),
    )


def _backward_kernel(
    grad: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    backend: str,
) -> Tensor:
    chosen = _registry.select("ragged_attention_backward", (qkv,), backend or None)
    grad_qkv = qkv.new_empty(qkv.shape)
    without_graph(chosen.impl, grad, qkv, offsets, max_len, dropout, seed, out, lse, grad_qkv)
    _registry.record_call("ragged_attention_backward", chosen.name)
    return grad_qkv


def _backward_fake(
    grad: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    backend: str,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, offsets, max_len, dropout, seed, backend = inputs
    ctx.save_for_backward(qkv, offsets, seed, *output)
    ctx.max_len, ctx.dropout, ctx.backend = max_len, dropout, backend
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, offsets, seed, out, lse = ctx.saved_tensors
    grad_qkv = torch.ops.pinet.ragged_attention_backward.default(
        grad, qkv, offsets, ctx.max_len, ctx.dropout, seed, out, lse, ctx.backend
    )
    return (grad_qkv, None, None, None, None, None)


class _Attention(torch.autograd.Function):
    """The op with a backward of its own, without the dispatcher's: 100 us of Python a call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = _kernel(*arguments)
        qkv, offsets, ctx.max_len, ctx.dropout, seed, ctx.backend = arguments
        ctx.save_for_backward(qkv, offsets, seed, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, offsets, seed, out, lse = ctx.saved_tensors
        # The registered op refuses gradients of gradients, and is what batched backwards need.
        is_direct = is_plain(grad) and not torch.is_grad_enabled()
        run = _backward_kernel if is_direct else torch.ops.pinet.ragged_attention_backward.default
        grad_qkv = run(grad, qkv, offsets, ctx.max_len, ctx.dropout, seed, out, lse, ctx.backend)
        return grad_qkv, None, None, None, None, None


_apply = super(torch.autograd.Function, _Attention).apply  # without its check for transforms


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "ragged_attention: the gradient of a gradient is not implemented; use softmax attention "
        "user by user where it is needed"
    )


for _op, _impl, _meta in (
    ("ragged_attention", _kernel, _fake),
    ("ragged_attention_backward", _backward_kernel, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        NAMESPACE.impl(_op, _impl, _key)  # type: ignore[no-untyped-call]
    NAMESPACE.impl(_op, _meta, "Meta")  # type: ignore[no-untyped-call]
torch.library.register_autograd(
    "pinet::ragged_attention", _backward, setup_context=_save, lib=NAMESPACE
)
torch.library.register_autograd("pinet::ragged_attention_backward", _refuse, lib=NAMESPACE)
