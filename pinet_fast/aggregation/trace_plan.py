"""What a compiled graph must know before it is traced: where rows are, as eager steps found it.

The layout rules read autograd graphs and sizes on the host; a compiler cannot trace that. So the
first steps of a compiled model run eagerly. They write down which functions met parameters and in
which dimension their rows were. Once every boundary is proven and all of them have a traced form,
graphs are compiled with these layouts; a model with any other boundary goes on running eagerly.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.composites import OPENED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.layout import RowLayout

logger = logging.getLogger("pinet_fast.aggregation")


class Role(NamedTuple):
    """Where the rows are at the boundaries of one parameter and op.

    Attributes:
        kind: ``users`` or ``events``.
        dim: The dimension that holds rows.
        flat: What was flattened into it: ``"outer"`` in front of the rows, ``"inner"`` behind
            them, ``""`` nothing.
    """

    kind: str
    dim: int
    flat: str


ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
DIFFERENCES = frozenset({torch.sub, Tensor.sub, Tensor.__sub__})
PRODUCTS = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
MATMULS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
TRACED = (
    frozenset({F.linear, F.layer_norm, F.embedding, Tensor.__getitem__})
    | ADDITIONS | DIFFERENCES | PRODUCTS | MATMULS | OPENED
)  # fmt: skip
"""Functions whose boundaries have a traced form."""

_VIEWS = (
    "t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as",
    "narrow", "select", "flatten", "contiguous", "chunk", "split", "unbind", "__getitem__",
)  # fmt: skip
_ARITHMETIC = (
    "neg", "add", "sub", "mul", "div", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__truediv__", "__neg__", "tanh", "sigmoid", "exp", "softmax", "norm", "pow",
    "__pow__", "sqrt", "sum",
)  # fmt: skip
DERIVING = frozenset(
    f
    for name in (*_VIEWS, *_ARITHMETIC)
    for f in (getattr(torch, name, None), getattr(Tensor, name, None))
    if f is not None
) | {torch._weight_norm, torch.cat, torch.stack, F.normalize}
"""Functions of parameters alone that a trace may call again, once a stratum: none is random."""

TRANSPOSES = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
"""Views that a compiler does not show to torch-function modes; known by their base."""


@functools.cache
def _shown_by_compiler() -> frozenset[Callable[..., Any]]:
    """Return the functions that Dynamo hands to torch-function modes.

    It goes by torch's list of public ones, where the one under weight norm is missing.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    shown = get_overridable_functions()
    shown.add(torch._weight_norm)
    return frozenset(shown)


class TracePlan:
    """What eager steps found, and whether graphs may be compiled from it.

    Attributes:
        roles: Row roles by the parameters' positions and op.
        dense: Positions of parameters that meet rows in full.
        lookups: How often each table was looked up in one forward, and whether for sparse
            gradients, by position.
        obstacle: Why graphs cannot be compiled; None = nothing known.
    """

    def __init__(self) -> None:
        self.roles: dict[tuple[tuple[int, ...], str], Role] = {}
        self.dense: set[int] = set()
        self.lookups: dict[int, tuple[int, bool]] = {}
        self.obstacle: str | None = None
        self._parameters: tuple[int, ...] = ()

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Start an eager step: what is known of other parameters than these is forgotten."""
        known = tuple(map(id, parameters))
        if known != self._parameters:
            self.roles, self.dense, self.lookups, self.obstacle = {}, set(), {}, None
            self._parameters = known

    def is_ready(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether graphs may be compiled for a model with these parameters."""
        return (
            bool(self.roles)
            and self.obstacle is None
            and self._parameters == tuple(map(id, parameters))
        )

    def note_role(
        self, sources: tuple[int, ...], op: str, layout: RowLayout, *, is_sliced: bool
    ) -> None:
        """Note one boundary."""
        flat = "outer" if layout.outer != 1 else "inner" if layout.inner != 1 else ""
        role = Role(layout.kind, layout.dim, flat)
        if is_sliced:
            self.refuse(f"{op} runs once a stratum")
        elif layout.kind not in ("users", "events") or (layout.outer != 1 and layout.inner != 1):
            self.refuse(f"rows of {op} are {layout.kind}")
        elif self.roles.setdefault((sources, op), role) != role:
            self.refuse(f"{op} has one parameter meet rows in several layouts")

    def note_call(self, func: Callable[..., Any], name: str) -> None:
        """Note a function that met rows and parameters."""
        if func not in TRACED or func not in _shown_by_compiler():
            self.refuse(f"{name} has no traced form")

    def note_derived(self, func: Callable[..., Any], name: str, *, of_parameters: bool) -> None:
        """Note a function of parameters alone."""
        if func in TRANSPOSES:
            if not of_parameters:
                self.refuse("a transpose of a tensor computed from parameters is hidden (use .t())")
        elif func not in DERIVING or func not in _shown_by_compiler():
            self.refuse(f"{name} of parameters has no traced form")

    def refuse(self, why: str) -> None:
        """Note why this model cannot be compiled; said once."""
        if self.obstacle is None:
            self.obstacle = why
            logger.info("compiled models run eagerly inside stratify: %s", why)
