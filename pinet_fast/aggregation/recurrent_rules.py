"""Boundary rules of recurrent layers: ``torch.gru``, ``lstm``, ``rnn_tanh`` and ``rnn_relu``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pinet_fast.aggregation.boundary import apply
from pinet_fast.aggregation.recurrent import Cell, StratifiedRecurrent
from pinet_fast.aggregation.roots import func_name
from pinet_fast.aggregation.rule_arguments import bind
from pinet_fast.aggregation.slice_rule import slice_rule
from pinet_fast.errors import BoundaryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.interception import BoundaryRule, Interception
    from pinet_fast.aggregation.layout import RowLayout


def _arguments(
    input: Any, hx: Any, params: Any, has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> dict[str, Any]:  # fmt: skip
    return locals()


def _recurrent(mode: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    sizes = args[1] if len(args) > 1 else None
    if isinstance(sizes, Tensor) and not sizes.is_floating_point():
        raise BoundaryError(
            f"{func_name(func)}: a PackedSequence mixes the users of a time step, so its rows "
            "cannot be cut by stratum; pass the padded batch (or a ragged model) and mask the "
            "losses by opt.backward(losses, weights=mask)"
        )
    call = bind(_arguments, args, kwargs)
    params = call["params"]
    rows, states = call["input"], call["hx"]
    states = states if isinstance(states, list | tuple) else (states,)
    per_layer = 4 if call["has_biases"] else 2
    num_runs = call["num_layers"] * (2 if call["bidirectional"] else 1)
    roots = [mode.root_of(p) for p in params]
    batch_dim = 0 if call["batch_first"] else 1
    layout = None
    is_plain = (
        rows.dim() == 3
        and len(params) == per_layer * num_runs  # projections have more
        and not any(mode.root_of(t) is not None for t in (rows, *states))
        and rows.device.type == "cpu"  # elsewhere one fused kernel a stratum is the faster way
        and not torch.is_autocast_enabled("cpu")
        and all(root or not p.requires_grad for p, root in zip(params, roots, strict=True))
    )
    if is_plain:
        shape = tuple(size if dim == batch_dim else -1 for dim, size in enumerate(rows.shape))
        layout = mode.find(shape, rows, roots, func_name(func))
    if layout is None:
        return slice_rule(mode, func, args, kwargs)
    if call["batch_first"]:
        rows = rows.transpose(0, 1)
    layers = _Layers(mode, func_name(func), call, states, layout._replace(dim=1))  # type: ignore[arg-type]
    out, last = layers.run(rows)
    return (out.transpose(0, 1) if call["batch_first"] else out), *last


class _Layers:
    """The layers and directions of one call, run one by one as torch does."""

    def __init__(
        self,
        mode: Interception,
        cell: Cell,
        call: dict[str, Any],
        states: Sequence[Tensor],
        layout: RowLayout,
    ) -> None:
        self.mode = mode
        self.cell = cell
        self.call = call
        self.states = states
        self.layout = layout
        self.last: list[list[Tensor]] = [[] for _ in states]

    def run(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs [L, B, directions * H] and the last states, stacked."""
        directions = 2 if self.call["bidirectional"] else 1
        for layer in range(self.call["num_layers"]):
            if layer and self.call["dropout"]:
                rows = F.dropout(rows, self.call["dropout"], self.call["train"])
            runs = range(layer * directions, (layer + 1) * directions)
            outs, memories = self._computed(rows, runs)
            parts = [
                self._direction(rows, index, out, memory, is_reversed=index > runs[0])
                for index, out, memory in zip(runs, outs, memories, strict=True)
            ]
            rows = parts[0] if directions == 1 else torch.cat(parts, dim=-1)
        return rows, [torch.stack(states) for states in self.last]

    def _params(self, index: int) -> Sequence[Tensor]:
        count = 4 if self.call["has_biases"] else 2
        params: Sequence[Tensor] = self.call["params"][index * count : (index + 1) * count]
        return params

    @torch.no_grad()
    def _computed(
        self, rows: Tensor, runs: range
    ) -> tuple[tuple[Tensor, ...], Sequence[Tensor | None]]:
        """Return the outputs of a layer's directions, [L, B, H] each, and their last memories."""
        states = [state[runs[0] : runs[-1] + 1] for state in self.states]
        has_biases, is_both = self.call["has_biases"], len(runs) == 2
        # Weights come as they are: torch's products depend on whether one requires a gradient.
        out, _, *memories = getattr(torch, self.cell)(
            rows, states if self.cell == "lstm" else states[0],
            [p for index in runs for p in self._params(index)],
            has_biases, 1, 0.0, self.call["train"], is_both, False,
        )  # fmt: skip
        return out.chunk(len(runs), dim=-1), memories[0] if memories else [None] * len(runs)

    def _direction(
        self, rows: Tensor, index: int, out: Tensor, last: Tensor | None, *, is_reversed: bool
    ) -> Tensor:
        if is_reversed:
            rows, out = rows.flip(0), out.flip(0)
        params = self._params(index)
        roots = [self.mode.root_of(p) for p in params]
        leaves = [self.mode.dense_leaf(root, self.cell, self.layout) for root in roots]
        groups = self.mode.rows.groups_of(self.layout, (rows.shape[0], rows.shape[1]))
        memory = self.states[1][index] if self.cell == "lstm" else None
        result = apply(
            StratifiedRecurrent, self.cell, out, last, rows, self.states[0][index],
            memory, groups, self.layout, tuple(params), *leaves,
        )  # fmt: skip
        out = result[0] if self.cell == "lstm" else result
        self.last[0].append(out[-1])
        if self.cell == "lstm":
            self.last[1].append(result[1])
        return out.flip(0) if is_reversed else out


def recurrent_rules() -> dict[Any, BoundaryRule]:
    """Return the boundary rules of recurrent layers by torch function."""
    return dict.fromkeys((torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu), _recurrent)
