"""The interception of models that may be compiled: eager until proven, then traced into graphs.

In a graph parameters take part detached; taps (``traced_ops``) hand their stratum gradients to
virtual leaves that the session made before. A tensor computed from parameters is computed again
from each stratum's slice of the leaves: its forward is dead code, and only the way back remains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code

from pinet_fast.aggregation.interception import Interception
from pinet_fast.aggregation.roots import func_name, tensors_among
from pinet_fast.aggregation.trace import Trace
from pinet_fast.aggregation.traced_rules import traced_call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.leak_check import Site
    from pinet_fast.aggregation.leaves import Root, Term
    from pinet_fast.aggregation.trace_plan import TracePlan

_compiling_frames = torch._C._dynamo.eval_frame.get_eval_frame_callback
_uncompiled = torch._dynamo.disable(  # type: ignore[no-untyped-call]
    Interception.__torch_function__
)


class TraceableInterception(Interception):
    """An interception that a compiler may trace once the plan is ready; until then it writes it.

    Args:
        plan: The plan, kept by the aggregator.
    """

    plan: TracePlan
    trace: Trace | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.compiler.is_compiling():
            return traced_call(self, self.trace, func, args, kwargs or {})
        if _compiling_frames() not in (
            None,
            False,
        ):  # between the graphs of a model that has several
            return _uncompiled(self, func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def begin(self, plan: TracePlan) -> bool:
        """Begin a step; return whether its compiled graphs stratify.

        Where they do not yet, models are to run eagerly, and the plan is completed.
        """
        self.plan = plan
        if not self._check.is_armed and plan.is_ready(self.parameters):
            self.trace = Trace(self)
            return True
        plan.begin(self.parameters)
        self._num_lookups: dict[int, int] = {}
        return False

    # What an eager step sees --------------------------------------------------------------------

    def _boundary_or_derived(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = len(self._occurrences)
        out = super()._boundary_or_derived(func, args, kwargs)
        if self.trace is None and len(self._occurrences) != known:
            if any(map(Tensor.is_complex, tensors_among((*args, out), kwargs))):
                self.plan.refuse(f"{func_name(func)} of complex tensors has no traced form")
            self.plan.note_call(func, func_name(func))
        return out

    def derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = len(self.by_id)
        out = super().derive(func, args, kwargs)
        if self.trace is None and len(self.by_id) != known:
            if self.is_shared:
                self.plan.refuse("shared() marks work inside")
            roots = [self.by_id.get(id(a)) for a in args if isinstance(a, Tensor)]
            of_parameters = all(root is not None and root.is_parameter for root in roots)
            self.plan.note_derived(func, func_name(func), of_parameters=of_parameters)
        return out

    def _unproven(
        self, root: Root, op: str, layout: RowLayout, is_sliced: bool = False
    ) -> Site | None:
        if self.trace is None:
            self.plan.note_role(root.sources, op, layout, is_sliced=is_sliced)
            if self.saw_hooks:
                self.plan.refuse("activation checkpointing")
        return super()._unproven(root, op, layout, is_sliced)

    def dense_leaf(
        self, root: Root | None, op: str, layout: RowLayout, *, is_sliced: bool = False
    ) -> Tensor | None:
        if self.trace is None and root is not None:
            self.plan.dense.update(root.sources)
        return super().dense_leaf(root, op, layout, is_sliced=is_sliced)

    def lookup_leaf(
        self, root: Root, op: str, layout: RowLayout, is_sparse: bool = False
    ) -> Tensor:
        if self.trace is None:
            source = root.sources[0]
            count = self._num_lookups[source] = self._num_lookups.get(source, 0) + 1
            most, was_sparse = self.plan.lookups.get(source, (0, True))
            self.plan.lookups[source] = max(most, count), is_sparse and was_sparse
            if not root.is_parameter or op != "embedding":
                self.plan.refuse(f"{op} of a table that is no plain parameter")
        return super().lookup_leaf(root, op, layout, is_sparse)

    def term_leaf(self, root: Root, op: str, layout: RowLayout) -> Term:
        if self.trace is None:
            self.plan.refuse("a penalty on parameters is added to losses")
        return super().term_leaf(root, op, layout)

    def _term_leaf(self, value: Any) -> Any:
        if self.trace is None:
            self.plan.refuse("a penalty on parameters is added to losses")
        return super()._term_leaf(value)


# The hand-over itself is no code to compile: it is traced as a part of the model, or run.
skip_code(TraceableInterception.__torch_function__.__code__)
