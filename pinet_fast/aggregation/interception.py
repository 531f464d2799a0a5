"""Interception: sees every torch function that takes a parameter and stratifies the boundaries.

A boundary is a call in which a parameter, or a tensor computed from parameters alone, first meets
rows of the batch. There the call is rewritten to an op of ``boundary.py``. Nothing is installed on
the model; outside the ``with`` nothing remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pinet_fast import profiling
from pinet_fast.aggregation.composites import OPENED, opened
from pinet_fast.aggregation.gradient_calls import (
    GRADIENT_CALLS,
    is_recording_hooks,
    reentrant_error,
    run_in_replay,
)
from pinet_fast.aggregation.leak_check import LeakCheck, Site, Use
from pinet_fast.aggregation.leaves import Root, Term, VirtualLeaves
from pinet_fast.aggregation.provenance import trace
from pinet_fast.aggregation.sharing import set_shared
from pinet_fast.aggregation.slice_rule import SliceProof, slice_rule
from pinet_fast.errors import BoundaryError, PinetError, RowLayoutError

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.rows import BatchRows

BoundaryRule = Callable[["Interception", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_ADDITIONS = frozenset(
    {torch.add, torch.sub, Tensor.add, Tensor.sub, Tensor.__add__, Tensor.__radd__, Tensor.__sub__,
     Tensor.__rsub__, Tensor.__iadd__, Tensor.__isub__, Tensor.add_, Tensor.sub_}
)  # fmt: skip
"""Where a term without rows may join a loss whose rows are reduced already."""

_ROWS_FIRST = frozenset({F.linear, F.layer_norm, F.embedding})
"""Functions whose first argument alone can hold rows: their rules ask for its layout at once."""

_TWO_SIDED = frozenset(
    {torch.add, torch.sub, torch.mul, Tensor.add, Tensor.sub, Tensor.mul, Tensor.__add__,
     Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__}
)  # fmt: skip
"""Functions whose rule asks for the layout of the side that is no parameter."""


class Interception(TorchFunctionMode):
    """The torch-function mode of one stratified forward.

    Args:
        parameters: The optimizer's parameters that require gradients.
        names: Their names, for messages.
        rows: The batch's row layouts.
        leaves: Where stratum gradients will arrive.
        check: The leak check, asked which uses need proof.
        rules: Boundary rules by torch function.
        slice_proofs: What earlier steps established for functions under the slice rule.
        takes_scalars: Whether ``loss.backward()`` on a reduced loss is expected.

    Attributes:
        uses: Uses that this step's leak check will prove.
        saw_hooks: A boundary was computed while saved tensors went to hooks (checkpointing).
        is_replaying: The engine recomputes a part of the forward.
        is_shared: Work belongs to no user now: ``shared()`` is entered.
    """

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
        takes_scalars: bool = False,
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.names = names
        self.rows = rows
        self.leaves = leaves
        self.uses: list[Use] = []
        self.slice_proofs = slice_proofs
        self.takes_scalars = takes_scalars
        self.saw_hooks = False
        self.is_replaying = False
        self.is_shared = False
        self._check = check
        self._rules = rules
        self._occurrences: dict[tuple[Any, ...], int] = {}
        self._known: dict[int, tuple[Tensor, RowLayout]] = {}
        # Keys are identities; the values keep the tensors alive, so no key is ever reused.
        self._roots: dict[int, Root] = {
            id(p): Root(p, (i,), is_parameter=True) for i, p in enumerate(parameters)
        }

    def prepare(self, positions: Sequence[int]) -> None:
        """Make the leaves of parameters that the last forward used densely."""
        self.leaves.prepare(self._roots[id(self.parameters[i])] for i in positions)

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
        if not self.is_shared and not self._meets_root(args, kwargs):
            if func in GRADIENT_CALLS:
                return run_in_replay(self, func, args, kwargs or {})
            return func(*args, **(kwargs or {}))
        if func in GRADIENT_CALLS:
            return run_in_replay(self, func, args, kwargs or {})
        if self.is_shared:
            return self.derive(func, args, kwargs or {})
        if profiling.is_on:
            with profiling.boundary(func):
                return self._boundary_or_derived(func, args, kwargs or {})
        return self._boundary_or_derived(func, args, kwargs or {})

    def _meets_root(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Return whether a root is among the arguments; every call of the forward pays for this."""
        roots = self._roots
        for value in args:
            if id(value) in roots:
                return True
            if isinstance(value, Tensor):
                if value._base is not None and self.root_of(value) is not None:
                    return True
            elif isinstance(value, list | tuple):
                for inner in value:
                    if isinstance(inner, Tensor) and self.root_of(inner) is not None:
                        return True
        return bool(kwargs) and self._meets_root(tuple(kwargs.values()), None)  # type: ignore[union-attr]

    def _boundary_or_derived(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (func in _ROWS_FIRST and args and id(args[0]) not in self._roots) or func in _TWO_SIDED:
            try:
                self._refuse_transforms()
                return self._rules[func](self, func, args, kwargs)
            except PinetError as error:
                described = self.describe(list(_tensors(args, kwargs)))
                error.add_note(f"in {func_name(func)} with {described}")
                raise
        tensors = list(_tensors(args, kwargs))
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

    # Roots --------------------------------------------------------------------------------------

    def root_of(self, value: Any) -> Root | None:
        """Return the root that ``value`` is, or None: a parameter, a view of one, or derived."""
        root = self._roots.get(id(value))
        if root is not None:
            return root
        if not isinstance(value, Tensor) or value._base is None:
            return None
        base = self._roots.get(id(value._base))
        if base is None or not value.requires_grad:
            return None
        return self._adopt(value, base.sources)  # a view made before this forward

    def derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call that no row of the batch takes part in; its outputs are roots too.

        Raises:
            BoundaryError: What the parameter meets is computed from rows and has none left.
        """
        roots: list[Root] = []
        foreign: list[Tensor] = []
        has_rows = False
        for tensor in _tensors(args, kwargs):
            root = self.root_of(tensor)
            if root is not None:
                roots.append(root)
            elif tensor.requires_grad:
                if not self.carries_rows(tensor):
                    foreign.append(tensor)
                elif self.is_shared:
                    has_rows = True
                else:
                    return self._joined_term(func, args, kwargs)
        if self.is_shared and func is F.embedding and roots:
            is_sparse = args[6] if len(args) > 6 else kwargs.get("sparse", False)
            self.leaves.note_lookup(roots[0], is_sparse)
            # Pushed back S times, but never as [V, d].
            args, kwargs = args[:6], {**kwargs, "sparse": True}
        out = func(*args, **kwargs)
        sources = tuple(sorted({i for root in roots for i in root.sources}))
        for tensor in _tensors((out,), {}):
            if tensor.requires_grad and id(tensor) not in self._roots:
                adopted = self._adopt(tensor, sources)
                adopted.has_rows = has_rows or any(root.has_rows for root in roots)
                adopted.foreign = (*foreign, *(t for root in roots for t in root.foreign))
        return out

    def _adopt(self, tensor: Tensor, sources: tuple[int, ...]) -> Root:
        base = None if tensor._base is None else self._roots.get(id(tensor._base))
        transposed_from = base if base is not None and _is_transpose(tensor, base.tensor) else None
        root = Root(tensor, sources, transposed_from=transposed_from, position=len(self._roots))
        self._roots[id(tensor)] = root
        return root

    def _joined_term(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Add parameters to something whose rows are reduced already: a penalty in the loss."""
        if func not in _ADDITIONS or not self.takes_scalars:
            raise BoundaryError(
                f"{func_name(func)}: a parameter meets a tensor that is computed from rows of the "
                "batch and has none left, so its gradient cannot be told apart by stratum; keep "
                "one value a user or an event up to the loss, or mark work that belongs to no "
                'user by `with opt.shared():`, or use GradientAggregator(..., mode="exact")'
            )
        return func(*(self._term_leaf(a) for a in args), **kwargs)

    def _term_leaf(self, value: Any) -> Any:
        root = self.root_of(value) if isinstance(value, Tensor) else None
        return value if root is None else self.leaves.term(root).leaf

    def carries_rows(self, tensor: Tensor) -> bool:
        """Return whether the graph of ``tensor`` leads to a boundary of this forward."""
        leaves = {id(leaf) for leaf in self.leaves.tensors()}
        seen: set[Any] = set()
        nodes = [tensor.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in leaves:
                return True
            nodes.extend(parent for parent, _ in node.next_functions)
        return False

    # Leaves -------------------------------------------------------------------------------------

    def dense_leaf(
        self, root: Root | None, op: str, layout: RowLayout, *, is_sliced: bool = False
    ) -> Tensor | None:
        """Return the virtual tensor that receives the dense stratum gradients of ``root``."""
        if root is None:
            return None
        self.saw_hooks = self.saw_hooks or is_recording_hooks()
        leaf = self.leaves.dense(root)
        site = self._site(root, op, layout, is_sliced)
        if not self.is_replaying and self._check.wants(site, self.leaves.num_strata):
            leaf = leaf.view_as(leaf)  # a node of this use's own, for its own proof
            self.uses.append(Use(site, leaf))
        return leaf

    def lookup_leaf(
        self, root: Root, op: str, layout: RowLayout, is_sparse: bool = False
    ) -> Tensor:
        """Return a virtual leaf that receives the sparse stratum gradients of one lookup."""
        self.saw_hooks = self.saw_hooks or is_recording_hooks()
        leaf = self.leaves.lookup(root)
        self.leaves.note_lookup(root, is_sparse)
        site = self._site(root, op, layout)
        if not self.is_replaying and self._check.wants(site, self.leaves.num_strata):
            self.uses.append(Use(site, leaf))
        return leaf

    def term_leaf(self, root: Root, op: str, layout: RowLayout) -> Term:
        """Return a leaf [S] for a derived number that is added to rows."""
        self.saw_hooks = self.saw_hooks or is_recording_hooks()
        term = self.leaves.added_term(root)
        site = self._site(root, op, layout)
        if not self.is_replaying and self._check.wants(site, self.leaves.num_strata):
            self.uses.append(Use(site, term.leaf))
        return term

    def _site(self, root: Root, op: str, layout: RowLayout, is_sliced: bool = False) -> Site:
        key = (root.sources, op, layout.kind, layout.dim)
        occurrence = self._occurrences[key] = self._occurrences.get(key, -1) + 1
        return Site(root.sources, op, layout.kind, layout.dim, occurrence, is_sliced)

    # Rows ---------------------------------------------------------------------------------------

    def find(
        self,
        shape: tuple[int, ...],
        tensor: Tensor | None,
        roots: Sequence[Root | None],
        op: str,
    ) -> RowLayout | None:
        """Return the row layout of a call's operand: as declared for a parameter, or found.

        Where neither sizes nor the graph tell (L == B), what an earlier batch proved of the same
        parameter and op holds still.

        Args:
            shape: Sizes of the dimensions that can hold rows; -1 for dimensions that cannot.
            tensor: The operand; None where it has no graph worth asking.
            roots: The parameters it meets.
            op: The op, as the leak check names it.

        Raises:
            RowLayoutError: The layout is undecided, or another than declared.
        """
        if self.rows.declared:
            for root in roots:
                for source in () if root is None else root.sources:
                    layout = self.rows.find_declared(self.names[source], shape)
                    if layout is not None:
                        return layout
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        try:
            return self.rows.find(shape, tensor)
        except RowLayoutError:
            for sources in {root.sources for root in roots if root is not None}:
                role = self._check.proven_role(sources, op)
                layout = None if role is None else self.rows.with_role(*role, shape)
                if layout is not None:
                    return layout
            raise

    def _may_hold_rows(self, tensor: Tensor) -> bool:
        root = self.root_of(tensor)
        if root is None:
            if isinstance(tensor, nn.Parameter):
                return False  # a frozen one: its sizes say nothing
            return any(self.rows.is_row_size(size) for size in tensor.shape) or (
                tensor.requires_grad and trace(tensor) is not None
            )
        return bool(self.rows.declared) and any(
            self.names[source] in self.rows.declared for source in root.sources
        )

    # Recomputation ------------------------------------------------------------------------------

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

    def _refuse_transforms(self) -> None:
        if torch._C._functorch.maybe_current_level() is not None:
            raise BoundaryError(
                "stratify: inside torch.func transforms (vmap, grad, jvp) the rows of the batch "
                "are hidden; call the model on the whole batch, without vmap, inside "
                "`with opt.stratify(...)`"
            )

    def describe(self, values: Sequence[Any]) -> str:
        """Return the shapes of tensors, with the names of parameters, for messages."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        return ", ".join(
            f"{'+'.join(self.names[i] for i in root.sources)} {list(t.shape)}"
            if (root := self.root_of(t)) is not None
            else f"a tensor {list(t.shape)}"
            for t in tensors
        )


def _refuse_reentrant(grad: Tensor) -> None:
    raise reentrant_error()


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, looking one level into lists and tuples."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for inner in value:
                if isinstance(inner, Tensor):
                    yield inner


def _is_transpose(tensor: Tensor, base: Tensor) -> bool:
    return (
        tensor.dim() == 2
        and base.dim() == 2
        and tensor.data_ptr() == base.data_ptr()
        and tensor.shape == (base.shape[1], base.shape[0])
        and tensor.stride() == (base.stride(1), base.stride(0))
    )


def func_name(func: Callable[..., Any]) -> str:
    """Return the name of a torch function as users know it."""
    return str(getattr(func, "__name__", func))
