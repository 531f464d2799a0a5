"""Which boundaries a model has, how each is served, and what is proven of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pinet_fast.kernels import _registry

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class CoverageEntry:
    """One place where a parameter meets rows of the batch.

    Attributes:
        parameter: Name of the parameter; several are joined by ``+`` where it is computed of them.
        op: The torch function.
        rule: ``"boundary"`` (an op of its own) or ``"slice"`` (the function runs once a stratum).
        rows: What the rows are: ``users``, ``events`` or ``declared``.
        dim: The dimension that holds them.
        use: Counts the uses of the same parameter by the same op, from 1.
        proven: The step at which the leak check proved it; None = not yet.
        backend: What computes its stratum gradients: a backend of the op in ``pinet_fast.kernels``
            that serves it (several, joined by ``+``, where they took turns in this process; ``-``
            before the first backward), or ``"torch"`` where torch's own functions do.
    """

    parameter: str
    op: str
    rule: Literal["boundary", "slice"]
    rows: str
    dim: int
    use: int
    proven: int | None
    backend: str

    def __str__(self) -> str:
        proof = "unproven" if self.proven is None else f"proven at step {self.proven}"
        rule = "" if self.rule == "boundary" else ", slice rule"
        where = f"{self.rows} in dim {self.dim}, use {self.use}"
        return f"{self.parameter}: {self.op}{rule}, {self.backend}, {where}: {proof}"


_KERNELS = {
    **dict.fromkeys(
        ("linear", "matmul", "addmm", "bilinear", "einsum", "gru", "lstm", "rnn_tanh", "rnn_relu"),
        "stratified_linear_backward",
    ),
    **dict.fromkeys(("embedding", "embedding_bag"), "stratified_embedding_reduce"),
    "layer_norm": "stratified_norm_backward",
    **dict.fromkeys(
        ("group_norm", "rms_norm", "prelu", "add", "sub", "subtract", "mul", "multiply", "div"),
        "stratum_sums",
    ),
}


def backend_of(op: str, *, is_sliced: bool) -> str:
    """Return what computes the stratum gradients of a boundary, as entries say it."""
    kernel = None if is_sliced else _KERNELS.get(op)
    if kernel is None:
        return "torch"
    used = [b.name for b in _registry.backends(kernel) if _registry.num_calls(kernel, b.name)]
    return "+".join(used) or "-"


class Coverage(tuple[CoverageEntry, ...]):
    """All boundaries seen so far; prints one line each, slice-rule and unproven ones marked."""

    __slots__ = ()

    def __new__(cls, entries: Iterable[CoverageEntry] = ()) -> Self:
        """Make a coverage of entries."""
        return super().__new__(cls, tuple(entries))

    @property
    def unproven(self) -> Coverage:
        """Return the entries that the leak check has not proven."""
        return Coverage(entry for entry in self if entry.proven is None)

    @property
    def sliced(self) -> Coverage:
        """Return the entries under the slice rule, which cost one launch a stratum."""
        return Coverage(entry for entry in self if entry.rule == "slice")

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__
