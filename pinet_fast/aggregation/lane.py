"""The lane: the interception's usual calls, compiled.

At small batches a step costs what its Python costs. Once the leak check has proven a model, most of
the interception's decisions are the same in every step, and ``csrc/`` makes them without Python:
it passes on calls that no parameter takes part in, and makes the boundaries of linear layers, layer
norms, lookups, and sums and products with a parameter, whose sites are settled, whose rows are
[N, ...] with the batch's events or users in dimension 0, on a CPU. Their nodes
compute what the functions of ``boundary.py``, ``lookups.py`` and ``broadcast.py`` do, with the same
kernels and the same bits; where another backend than the compiled one serves, they call its op.
Whatever is otherwise is left to
:class:`Interception`, so that nothing is decided in two ways: layouts that the graph would have to
tell through views, autocast, saved-tensor hooks, modes of other libraries (``set_default_device``
is one), subclasses of tensors, ``shared()``, derived parameters, first uses.
"""

from __future__ import annotations

import functools
import operator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pinet_fast import _env, profiling
from pinet_fast.aggregation import compiled, provenance
from pinet_fast.aggregation.gradient_calls import GRADIENT_CALLS, refuse_backward
from pinet_fast.aggregation.interception import Interception
from pinet_fast.aggregation.leak_check import LeakCheck, Site
from pinet_fast.aggregation.sharing import set_shared
from pinet_fast.kernels import _registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_OPS = {"linear": 0, "layer_norm": 1, "embedding": 2, "add": 3, "mul": 4}  # as csrc/lane.h has them
_KERNELS = (
    "stratified_linear_backward", "stratified_norm_backward", "stratified_embedding_add",
    "stratum_sums",
)  # fmt: skip
_SUMS = (Tensor.add, torch.add)  # what operators call too, usual ones first
_PRODUCTS = (Tensor.mul, torch.mul)


@functools.cache
def _library() -> tuple[Any, str | None]:
    """Return the compiled module, told of the interception, or None and why there is none."""
    module, reason = compiled.load()
    if module is not None:
        module.configure(
            Interception.__torch_function__, set_shared, refuse_backward, GRADIENT_CALLS,
            (F.linear, F.layer_norm, F.embedding, torch.layer_norm, torch.embedding),
            _SUMS, _PRODUCTS,
            tuple(provenance.SAME_SHAPE), tuple(provenance.READERS),
        )  # fmt: skip
    return module, reason


def refusal() -> str | None:
    """Return None if this process has the lane, else the reason why not."""
    return _library()[1]


class LayerFunctions(Protocol):
    """Functions of layers.

    Attributes:
        linear: As ``F.linear``, with three arguments.
        layer_norm: As ``torch.layer_norm``, with five arguments.
        embedding: As ``torch.embedding``, with three arguments.
    """

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    layer_norm: Callable[[Tensor, Sequence[int], Tensor, Tensor, float], Tensor]
    embedding: Callable[[Tensor, Tensor, int], Tensor]


@functools.cache
def layer_functions() -> LayerFunctions:
    """Return functions that ask a lane at once, instead of by way of torch's stack of modes.

    Where there is no lane, in this process or at a call, they are the functions of torch.
    """
    module: LayerFunctions | None = _library()[0]
    if module is not None:
        return module
    return cast(
        "LayerFunctions",
        SimpleNamespace(linear=F.linear, layer_norm=torch.layer_norm, embedding=torch.embedding),
    )


@functools.cache
def _interception() -> type[Interception]:
    """Return the class of interceptions in a lane; made where there is one."""

    class LaneInterception(Interception):
        """An interception whose calls pass the lane first."""

        prepares_leaves = False  # the lane keeps its own
        lane: Any
        depth = 0

        def prepare(self, positions: Sequence[int]) -> None:
            self.rows.layout_of = self.lane.layout_of
            self.lane.begin(
                self, self.by_id, self.leaves, self.leaves.dense_leaves, self._occurrences,
                self._known, self.leaves.num_strata, self.rows.whole_layouts(),
                _registry.is_first("cpp", _KERNELS), self.leaves.keeps_touched,
            )  # fmt: skip
            self.__torch_function__ = _library()[0].torch_function(self)  # type: ignore[method-assign]

        def __enter__(self) -> Self:
            self.depth += 1
            super().__enter__()  # type: ignore[no-untyped-call]
            return self

        def __exit__(self, *error: object) -> None:
            self.depth -= 1
            if not self.depth:  # attention and replays enter it again inside
                self.lane.end()
                self.__dict__.pop("__torch_function__", None)
            super().__exit__(*error)  # type: ignore[no-untyped-call]

        def expect_backward(self, is_expected: bool) -> None:
            self.lane.expect(is_expected)
            if is_expected:
                return
            for op, calls in zip(_KERNELS, self.lane.take_calls(), strict=True):
                _registry.record_call(op, "cpp", calls)

        @contextmanager
        def replaying(self) -> Iterator[None]:
            was_paused = self.lane.pause(True)
            try:
                with super().replaying():
                    yield
            finally:
                self.lane.pause(was_paused)

    return LaneInterception


class _Settled(NamedTuple):
    """What a lane was made from."""

    num_sites: int
    parameters: list[Tensor]


class Lanes:
    """Makes a lane for the steps of one aggregator, anew where more is settled."""

    def __init__(self) -> None:
        self._made: _Settled | None = None
        self._lane: Any = None

    def find(
        self, parameters: list[Tensor], check: LeakCheck
    ) -> tuple[type[Interception], Any] | None:
        """Return the interception's class and its lane; None where the interception is plain.

        Args:
            parameters: The optimizer's parameters that require gradients.
            check: What is proven.
        """
        if not check.settled or profiling.is_on or refusal() is not None:
            return None
        if not _env.lane_enabled():
            return None
        made = self._made
        if (
            made is None
            or made.num_sites != len(check.settled)
            or len(made.parameters) != len(parameters)
            or not all(map(operator.is_, made.parameters, parameters))
        ):
            self._made = _Settled(len(check.settled), parameters)
            self._lane = _lane(parameters, check)
        return None if self._lane is None else (_interception(), self._lane)


def _lane(parameters: list[Tensor], check: LeakCheck) -> Any:
    served = {i for i, p in enumerate(parameters) if type(p) in (nn.Parameter, torch.Tensor)}
    found: dict[tuple[Any, ...], set[int]] = {}
    for sources, op, kind, dim, occurrence, is_sliced in map(Site._make, check.settled):
        if op in _OPS and dim == 0 and len(sources) == 1 and not is_sliced:
            found.setdefault((sources, op, kind, dim), set()).add(occurrence)
    sites = [
        (
            key[0][0],
            _OPS[key[1]],
            key[2],
            key,
            next(n for n in range(len(seen) + 1) if n not in seen),
        )
        for key, seen in found.items()
        if key[0][0] in served
    ]
    if not sites:
        return None
    return _library()[0].Lane(parameters, sites)
