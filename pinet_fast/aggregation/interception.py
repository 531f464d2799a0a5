"""Interception: sees every torch function that takes a parameter and stratifies the boundaries.

A boundary is a call in which a parameter, or a tensor computed from parameters alone, first meets
rows of the batch. There the call is rewritten to an op of ``boundary.py``. Nothing is installed on
the model; outside the ``with`` nothing remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pinet_fast import profiling
from pinet_fast.aggregation.composites import OPENED, opened
from pinet_fast.aggregation.gradient_calls import GRADIENT_CALLS, reentrant_error, run_in_replay
from pinet_fast.aggregation.leaves import VirtualLeaves
from pinet_fast.aggregation.lookup_rules import functional_embedding
from pinet_fast.aggregation.roots import func_name, tensors_among
from pinet_fast.aggregation.sharing import set_shared
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.aggregation.uses import BoundaryUses
from pinet_fast.errors import BoundaryError, PinetError

if TYPE_CHECKING:
    from pinet_fast.aggregation.leak_check import LeakCheck
    from pinet_fast.aggregation.leaves import Root
    from pinet_fast.aggregation.rows import BatchRows
    from pinet_fast.aggregation.slice_proof import SliceProof

BoundaryRule = Callable[["Interception", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_ROWS_FIRST = frozenset({F.linear, F.layer_norm, torch.layer_norm, F.embedding})
"""Functions whose first argument alone can hold rows: their rules ask for its layout at once."""

_TWO_SIDED = frozenset(
    {torch.add, torch.sub, torch.mul, Tensor.add, Tensor.sub, Tensor.mul, Tensor.__add__,
     Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__}
)  # fmt: skip
"""Functions whose rule asks for the layout of the side that is no parameter."""


class Interception(BoundaryUses, TorchFunctionMode):
    """The torch-function mode of one stratified forward.

    Args:
        parameters: The optimizer's parameters that require gradients.
        names: Their names, for messages.
        rows: The batch's row layouts.
        leaves: Where stratum gradients will arrive.
        check: The leak check, asked which uses need proof.
        rules: Boundary rules by torch function.
        slice_proofs: What earlier steps established for functions under the slice rule.
        own: The parameters' roots, as ``roots_of`` made them; others are added in here.
        takes_scalars: Whether ``loss.backward()`` on a reduced loss is expected.

    Attributes:
        prepares_leaves: It is worth noting which leaves a forward used, for the next one.
    """

    prepares_leaves = True

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        *,
        rows: BatchRows,
        leaves: VirtualLeaves,
        check: LeakCheck,
        rules: dict[Any, BoundaryRule],
        slice_proofs: dict[Any, SliceProof],
        own: dict[int, Root],
        takes_scalars: bool = False,
    ) -> None:
        super().__init__(
            parameters, names, rows=rows, leaves=leaves, check=check,
            takes_scalars=takes_scalars, own=own,
        )  # fmt: skip
        self.slice_proofs = slice_proofs
        self._rules = rules

    def prepare(self, positions: Sequence[int]) -> None:
        """Make the leaves of parameters that the last forward used densely."""
        self.leaves.prepare(self.by_id[id(self.parameters[i])] for i in positions)

    def expect_backward(self, is_expected: bool) -> None:
        """Note that the aggregator's backward of this forward begins or ends."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is set_shared:
            before, self.is_shared = self.is_shared, args[0]
            return before
        if not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        if not self.is_shared:
            # Every call of the forward pays for this, so the usual arguments are looked at here.
            roots = self.by_id
            for value in args:
                if id(value) in roots:
                    break
                if isinstance(value, Tensor):
                    if value._base is not None and self.root_of(value) is not None:
                        break
                elif isinstance(value, list | tuple) and self._meets_root(value):
                    break
            else:
                if not kwargs or not self._meets_root(kwargs.values()):
                    if func in GRADIENT_CALLS:
                        return run_in_replay(self, func, args, kwargs or {})
                    return func(*args, **(kwargs or {}))
        if func in GRADIENT_CALLS:
            return run_in_replay(self, func, args, kwargs or {})
        if func is torch.embedding:  # the same with other names and another order
            func, args, kwargs = F.embedding, *functional_embedding(args, kwargs or {})
        if self.is_shared:
            return self.derive(func, args, kwargs or {})
        if profiling.is_on:
            with profiling.boundary(func):
                return self._boundary_or_derived(func, args, kwargs or {})
        return self._boundary_or_derived(func, args, kwargs or {})

    def _meets_root(self, values: Iterable[Any]) -> bool:
        """Return whether a root is among values, or in a list or tuple among them."""
        for value in values:
            if isinstance(value, Tensor):
                if self.root_of(value) is not None:
                    return True
            elif isinstance(value, list | tuple) and self._meets_root(value):
                return True
        return False

    def _boundary_or_derived(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (func in _ROWS_FIRST and args and id(args[0]) not in self.by_id) or func in _TWO_SIDED:
            try:
                if torch._C._functorch.maybe_current_level() is not None:
                    self._refuse_transforms()
                return self._rules[func](self, func, args, kwargs)
            except PinetError as error:
                described = self.describe(list(tensors_among(args, kwargs)))
                error.add_note(f"in {func_name(func)} with {described}")
                raise
        tensors = list(tensors_among(args, kwargs))
        try:
            self._refuse_transforms()
            # Bags: sizes of ids and offsets say nothing about rows, their rule knows better.
            if func is not F.embedding_bag and not any(self._may_hold_rows(t) for t in tensors):
                return self.derive(func, args, kwargs)
            rule = self._rules.get(func)
            if rule is not None:
                return rule(self, func, args, kwargs)
            if func not in OPENED:
                return slice_rule(self, func, args, kwargs)
        except PinetError as error:
            error.add_note(f"in {func_name(func)} with {self.describe(tensors)}")
            raise
        # Attention states its layout: rows are dimension 1 of queries, keys and values.
        for tensor in args[:3]:
            shape = (
                (-1, tensor.shape[1]) if isinstance(tensor, Tensor) and tensor.dim() == 3 else ()
            )
            layout = self.rows.find_exact(shape)
            if layout is not None:
                self._known[id(tensor)] = (tensor, layout)
        with self:
            return opened(func)(*args, **kwargs)

    def _refuse_transforms(self) -> None:
        if torch._C._functorch.maybe_current_level() is not None:
            raise BoundaryError(
                "stratify: inside torch.func transforms (vmap, grad, jvp) the rows of the batch "
                "are hidden; call the model on the whole batch, without vmap, inside "
                "`with opt.stratify(...)`"
            )

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Compute boundaries inside again: the same ops, with leaves that lead nowhere."""
        leaves, was_replaying = self.leaves, self.is_replaying
        self.leaves = VirtualLeaves(leaves.num_strata, on_gradient=_refuse_reentrant)
        self.is_replaying = True
        try:
            yield
        finally:
            self.leaves, self.is_replaying = leaves, was_replaying


def _refuse_reentrant(grad: Tensor) -> None:
    raise reentrant_error()
