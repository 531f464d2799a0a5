"""Interception: sees every torch function that takes a parameter and stratifies the boundaries.

A boundary is a call in which a parameter, or a tensor computed from parameters alone, first meets
rows of the batch. There the call is rewritten to an op of ``boundary.py``. Nothing is installed on
the model; outside the ``with`` nothing remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pinet_fast.aggregation.composites import OPENED, opened
from pinet_fast.aggregation.leak_check import LeakCheck, Site, Use
from pinet_fast.aggregation.leaves import Root, VirtualLeaves
from pinet_fast.aggregation.slice_rule import SliceProof, slice_rule
from pinet_fast.errors import PinetError

if TYPE_CHECKING:
    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.rows import BatchRows

BoundaryRule = Callable[["Interception", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


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
    ) -> None:
        super().__init__()
        self.names = names
        self.rows = rows
        self.leaves = leaves
        self.uses: list[Use] = []
        self.slice_proofs = slice_proofs
        self._check = check
        self._rules = rules
        self._occurrences: dict[tuple[Any, ...], int] = {}
        # Keys are identities; the values keep the tensors alive, so no key is ever reused.
        self._roots: dict[int, Root] = {
            id(p): Root(p, (i,), is_parameter=True) for i, p in enumerate(parameters)
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not any(self.root_of(value) is not None for value in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        return self._boundary_or_derived(func, args, kwargs)

    def _boundary_or_derived(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = list(_tensors(args, kwargs))
        others = [t for t in tensors if self.root_of(t) is None]
        if not any(self._may_hold_rows(t) for t in others):
            return self.derive(func, args, kwargs)
        rule = self._rules.get(func)
        if rule is not None:
            try:
                return rule(self, func, args, kwargs)
            except PinetError as error:
                error.add_note(f"in {func_name(func)} with {self._describe(tensors)}")
                raise
        if func in OPENED:
            with self:
                return opened(func)(*args, **kwargs)
        try:
            return slice_rule(self, func, args, kwargs)
        except PinetError as error:
            error.add_note(f"in {func_name(func)} with {self._describe(tensors)}")
            raise

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
        """Run a call that no row of the batch takes part in; its outputs are roots too."""
        out = func(*args, **kwargs)
        sources = sorted(
            {i for t in _tensors(args, kwargs) if (r := self.root_of(t)) for i in r.sources}
        )
        for tensor in _tensors((out,), {}):
            if tensor.requires_grad and id(tensor) not in self._roots:
                self._adopt(tensor, tuple(sources))
        return out

    def _adopt(self, tensor: Tensor, sources: tuple[int, ...]) -> Root:
        base = None if tensor._base is None else self._roots.get(id(tensor._base))
        transposed_from = base if base is not None and _is_transpose(tensor, base.tensor) else None
        root = self._roots[id(tensor)] = Root(tensor, sources, transposed_from=transposed_from)
        return root

    def dense_leaf(self, root: Root | None, op: str, layout: RowLayout) -> Tensor | None:
        """Return the virtual tensor that receives the dense stratum gradients of ``root``."""
        if root is None:
            return None
        leaf = self.leaves.dense(root)
        site = self._site(root, op, layout)
        if self._check.wants(site, self.leaves.num_strata):
            leaf = leaf.view_as(leaf)  # a node of this use's own, for its own proof
            self.uses.append(Use(site, leaf))
        return leaf

    def lookup_leaf(self, root: Root, op: str, layout: RowLayout) -> Tensor:
        """Return a virtual leaf that receives the sparse stratum gradients of one lookup."""
        leaf = self.leaves.lookup(root)
        site = self._site(root, op, layout)
        if self._check.wants(site, self.leaves.num_strata):
            self.uses.append(Use(site, leaf))
        return leaf

    def _site(self, root: Root, op: str, layout: RowLayout) -> Site:
        key = (root.sources, op, layout.kind.split(" ")[0], layout.dim)
        occurrence = self._occurrences[key] = self._occurrences.get(key, -1) + 1
        return Site(*key, occurrence)

    def _may_hold_rows(self, tensor: Tensor) -> bool:
        return any(self.rows.is_row_size(size) for size in tensor.shape)

    def _describe(self, tensors: Sequence[Tensor]) -> str:
        return ", ".join(
            f"{'+'.join(self.names[i] for i in root.sources)} {list(t.shape)}"
            if (root := self.root_of(t)) is not None
            else f"a tensor {list(t.shape)}"
            for t in tensors
        )


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
