"""Who is who in one forward: roots, what is derived from them, and what carries rows.

Roots are the optimizer's parameters, their views, and tensors computed from roots alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pinet_fast.aggregation.leaves import Root, VirtualLeaves
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pinet_fast.aggregation.rows import BatchRows

_ADDITIONS = frozenset(
    {torch.add, torch.sub, Tensor.add, Tensor.sub, Tensor.__add__, Tensor.__radd__, Tensor.__sub__,
     Tensor.__rsub__, Tensor.__iadd__, Tensor.__isub__, Tensor.add_, Tensor.sub_}
)  # fmt: skip
"""Where a term without rows may join a loss whose rows are reduced already."""


class Roots:
    """Tells roots from the other tensors of a forward, by identity.

    Args:
        parameters: The optimizer's parameters that require gradients.
        names: Their names, for messages.
        rows: The batch's row layouts.
        leaves: Where stratum gradients will arrive.
        takes_scalars: Whether ``loss.backward()`` on a reduced loss is expected.
        own: The parameters' roots, as :func:`roots_of` made them.

    Attributes:
        is_shared: Work belongs to no user now: ``shared()`` is entered.
        by_id: Roots by the identity of their tensors, for a look without a call.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        *,
        rows: BatchRows,
        leaves: VirtualLeaves,
        takes_scalars: bool,
        own: dict[int, Root],
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.names = names
        self.rows = rows
        self.leaves = leaves
        self.takes_scalars = takes_scalars
        self.is_shared = False
        self.by_id = own.copy()
        for root in own.values():
            root._detached = None  # of the last forward

    def root_of(self, value: Any) -> Root | None:
        """Return the root that ``value`` is, or None: a parameter, a view of one, or derived."""
        root = self.by_id.get(id(value))
        if root is not None:
            return root
        if not isinstance(value, Tensor) or value._base is None:
            return None
        base = self.by_id.get(id(value._base))
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
        for tensor in tensors_among(args, kwargs):
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
        for tensor in tensors_among((out,), {}):
            if tensor.requires_grad and id(tensor) not in self.by_id:
                adopted = self._adopt(tensor, sources)
                adopted.has_rows = has_rows or any(root.has_rows for root in roots)
                adopted.foreign = (*foreign, *(t for root in roots for t in root.foreign))
        return out

    def _adopt(self, tensor: Tensor, sources: tuple[int, ...]) -> Root:
        base = None if tensor._base is None else self.by_id.get(id(tensor._base))
        transposed_from = base if base is not None and _is_transpose(tensor, base.tensor) else None
        root = Root(tensor, sources, transposed_from=transposed_from, position=len(self.by_id))
        self.by_id[id(tensor)] = root
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

    def _may_hold_rows(self, tensor: Tensor) -> bool:
        root = self.root_of(tensor)
        if root is None:
            if isinstance(tensor, nn.Parameter):
                return False  # a frozen one: its sizes say nothing
            return any(self.rows.is_row_size(size) for size in tensor.shape) or (
                tensor.requires_grad and self.rows.trace(tensor) is not None
            )
        return bool(self.rows.declared) and any(
            self.names[source] in self.rows.declared for source in root.sources
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


def roots_of(parameters: Sequence[Tensor]) -> dict[int, Root]:
    """Return the roots of parameters by identity.

    The values keep the tensors alive, so no key is ever reused.
    """
    return {id(p): Root(p, (i,), is_parameter=True) for i, p in enumerate(parameters)}


def tensors_among(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
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
