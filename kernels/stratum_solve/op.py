"""The op ``pinet::stratum_solve``: schema, fake kernel, choice of a backend, public function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.errors import InputError

from .. import _registry, _tl
from .._library import NAMESPACE, is_plain
from . import _cpp, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

RULES = ("agreement", "balanced", "mgda", "pcgrad", "imtlg", "alignedmtl", "cagrad")
"""The rules of this op; ``csrc/stratum_solve.h`` numbers them in this order."""

_MAX_TRITON_STRATA = 32


def stratum_solve(
    gram: Tensor,
    rule: str,
    *,
    present: Sequence[bool] | None = None,
    c: float = 0.5,
    keys: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute a rule's weights of the strata from the Gram of their gradients.

    Args:
        gram: Inner products of the stratum gradients, float64 [S, S], or [P, S, S] for P Grams that
            are solved one by one; symmetric, any strides.
        rule: One of ``RULES``; the class of the same name in ``pinet_fast.rules`` defines it.
        present: Which strata count, S values known on the host; None = all. The rows and columns
            of the others are not read.
        c: Radius of ``"cagrad"``, in [0, 1); other rules ignore it.
        keys: For ``"pcgrad"``: float64 [S, S], stratum s meets the others by ascending ``keys[s]``
            (equal keys by ascending id); None = by ascending cosine. Other rules ignore it.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``; None lets the library choose.

    Returns:
        New tensor float64 [S] or [P, S] on the device of ``gram``, detached; 0 for absent strata.

    Raises:
        InputError: Shapes, dtypes, devices, the rule's name or the radius are not as above.
        BackendUnavailableError: The backend asked for cannot serve these inputs.

    Numerics:
        Float64 throughout, a fixed number of operations, bitwise deterministic on one backend.
        Finite for every finite Gram, also a singular one. A Gram with a NaN or an infinity among
        its present strata has NaN weights for all of them; other Grams of the batch do not notice.

    Cost:
        ``cost(rule, num_grams, num_strata)``; a matter of latency, not of throughput.
    """
    chosen = [True] * gram.shape[-1] if present is None and gram.dim() else list(present or ())
    _check(gram, rule, chosen, c, keys)
    run = _kernel if is_plain(gram) else torch.ops.pinet.stratum_solve.default
    weights: Tensor = run(gram, rule, chosen, c, keys, backend or "")
    return weights


def cost(rule: str, num_grams: int, num_strata: int) -> tuple[int, int]:
    """Return the arithmetic, to the leading order, and the traffic that the op cannot avoid.

    Args:
        rule: One of ``RULES``.
        num_grams: P.
        num_strata: Strata that are present.

    Returns:
        Floating-point operations and bytes read and written.
    """
    square, cube = num_strata**2, num_strata**3
    solve = 2 * cube // 3
    flop = {
        "agreement": 6 * square,
        "balanced": 4 * num_strata,
        "mgda": 20 * (solve + 8 * square),
        "pcgrad": 2 * cube,
        "imtlg": 8 * 6 * cube,  # eight sweeps of S^2 / 2 rotations of three pairs of rows
        "alignedmtl": 8 * 6 * cube,
        "cagrad": 28 * (solve + 14 * square),
    }[rule]
    return num_grams * flop, num_grams * (square + num_strata) * 8


def _check(gram: Tensor, rule: str, present: list[bool], c: float, keys: Tensor | None) -> None:
    if rule not in RULES:
        raise InputError(
            f"stratum_solve: rule: expected one of {', '.join(RULES)}; got {rule!r}; "
            "solve rules of your own with torch functions on the Gram"
        )
    if gram.dim() not in (2, 3) or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise InputError(
            f"stratum_solve: gram: expected [S, S] or [P, S, S] with S >= 1, got "
            f"{list(gram.shape)}; stratum_gram gives one"
        )
    if gram.dtype is not torch.float64:
        raise InputError(
            f"stratum_solve: gram: expected float64, got {gram.dtype}; convert it with .double()"
        )
    num_strata = gram.shape[-1]
    if len(present) != num_strata or not any(present):
        raise InputError(
            f"stratum_solve: present: expected {num_strata} values, at least one of them true, got "
            f"{present}; leave the call out for an empty batch"
        )
    if not 0 <= c < 1:
        raise InputError(f"stratum_solve: c: expected 0 <= c < 1, got {c}; choose a radius in it")
    if keys is not None and (
        keys.shape != gram.shape[-2:]
        or keys.dtype is not torch.float64
        or keys.device != gram.device
    ):
        raise InputError(
            f"stratum_solve: keys: expected float64 [{num_strata}, {num_strata}] on {gram.device}, "
            f"got {keys.dtype} {list(keys.shape)} on {keys.device}; convert it"
        )


def _triton_supports(gram: Tensor, rule: str) -> str | None:
    if reason := _tl.device_refusal(gram.device):
        return reason
    if gram.shape[-1] > _MAX_TRITON_STRATA:
        return f"{gram.shape[-1]} strata are more than {_MAX_TRITON_STRATA}"
    return None


def _run_triton(
    gram: Tensor, rule: str, kept: Sequence[int], c: float, keys: Tensor | None, out: Tensor
) -> None:
    # Triton is imported by the first call that needs it.
    from . import _triton

    _triton.run(gram, rule, kept, c, keys, out)  # type: ignore[no-untyped-call]


_TRITON = _registry.Backend(
    name="triton",
    priority=20,
    probe=_tl.triton_probe,
    is_supported=_triton_supports,
    impl=_run_triton,
)
_registry.register(
    "stratum_solve", [_cpp.BACKEND, _TRITON, reference.BACKEND], lambda gram, rule: (gram, rule)
)

NAMESPACE.define(  # type: ignore[no-untyped-call]
    "stratum_solve(Tensor gram, str rule, bool[] present, float c, Tensor? keys, str backend)"
    " -> Tensor"
)


def _kernel(
    gram: Tensor, rule: str, present: list[bool], c: float, keys: Tensor | None, backend: str
) -> Tensor:
    # The choice is made here, not in the public function: see stratum_gram.
    chosen = _registry.select("stratum_solve", (gram, rule), backend or None)
    with torch.no_grad():
        out = _empty_weights(gram)
        num_strata = gram.shape[-1]
        if gram.numel():
            kept = [s for s, here in enumerate(present) if here]
            grams = gram.reshape(-1, num_strata, num_strata)
            chosen.impl(grams, rule, kept, c, keys, out.view(-1, num_strata))
    _registry.record_call("stratum_solve", chosen.name)
    return out


def _fake(
    gram: Tensor, rule: str, present: list[bool], c: float, keys: Tensor | None, backend: str
) -> Tensor:
    return _empty_weights(gram)


def _empty_weights(gram: Tensor) -> Tensor:
    return gram.new_empty(gram.shape[:-1])


for _key in ("CPU", "CUDA"):
    NAMESPACE.impl("stratum_solve", _kernel, _key)  # type: ignore[no-untyped-call]
NAMESPACE.impl("stratum_solve", _fake, "Meta")  # type: ignore[no-untyped-call]
# Autograd passes the call on and records nothing: the result is detached.
NAMESPACE.impl("stratum_solve", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
