"""Boundary op of recurrent layers: GRU, LSTM and Elman RNN, time-major, one direction.

The forward is torch's own function, run without its graph by the rule, for both directions of a
layer at once: the reversed one alone, on flipped rows, differs in the last bits on some processors.
Backward knows every hidden state, so all gates are recomputed in two matrix products over all
steps; only the gradient's way back through time is a loop. The gates' gradients of all steps then
give the stratum gradients of the weights as those of two linear layers. That takes about as long as
the backward that torch records step by step; one call a stratum would run S loops over time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from pinet_fast.aggregation.first_order import first_order
from pinet_fast.kernels import stratified_linear_backward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.aggregation.layout import RowLayout
    from pinet_fast.aggregation.strata_index import RowGroups

# torch.autograd.Function is untyped: its contexts and apply are Any throughout this file.

Cell = Literal["gru", "lstm", "rnn_tanh", "rnn_relu"]


class _GateGradients(NamedTuple):
    """Gradients of a layer's gates before their activation.

    Attributes:
        of_input: Of ``x W_ih^T + b_ih``, [L, B, gates * H].
        of_hidden: Of ``h W_hh^T + b_hh``, [L, B, gates * H].
        first_hidden: Of the first hidden state, [B, H].
        first_cell: Of the first cell state, [B, H]; None but for LSTM.
    """

    of_input: Tensor
    of_hidden: Tensor
    first_hidden: Tensor
    first_cell: Tensor | None = None


class StratifiedRecurrent(torch.autograd.Function):
    """One recurrent layer over [L, B, D_in] with stratum gradients of its weights and biases.

    ``out`` [L, B, H] and ``last`` [B, H], the last memory of an LSTM, are what the layer computed;
    they take their place in the graph here. ``weights`` and ``leaves`` are W_ih, W_hh and, with
    biases, b_ih and b_hh; leaves of frozen weights are None. The weights are a tuple, so that they
    take no part in the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        out: Tensor,
        last: Tensor | None,
        rows: Tensor,
        hidden: Tensor,
        memory: Tensor | None,
        groups: RowGroups,
        layout: RowLayout,
        weights: tuple[Tensor, ...],
        *leaves: Tensor | None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        ctx.cell, ctx.groups = cell, groups
        ctx.layout = layout  # read by provenance.trace
        ctx.set_materialize_grads(False)
        out = out.view_as(out)  # an input that is returned would be saved as an input
        ctx.save_for_backward(rows, hidden, memory, out, *weights)
        return out if last is None else (out, last.view_as(last))

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_memory: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        rows, hidden, memory, out, *weights = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        before = torch.cat([hidden.unsqueeze(0), out[:-1]])
        gates = _gates(rows, before, weights)
        if ctx.cell == "gru":
            back = _through_gru(grad, before, gates, weights[1])
        elif ctx.cell == "lstm":
            back = _through_lstm(grad, grad_memory, memory, gates, weights[1])
        else:
            back = _through_rnn(grad, out, ctx.cell, weights[1])
        for_input, for_hidden = (g.flatten(0, 1) for g in back[:2])
        groups, needs = ctx.groups, (*ctx.needs_input_grad[9:], False, False)  # or no biases
        by_input = stratified_linear_backward(
            for_input, rows.flatten(0, 1), weights[0], groups.ids, groups.offsets, groups.order,
            need_rows=ctx.needs_input_grad[3], need_weight=needs[0], need_bias=needs[2],
        )  # fmt: skip
        by_hidden = stratified_linear_backward(
            for_hidden, before.flatten(0, 1), None, groups.ids, groups.offsets, groups.order,
            need_rows=False, need_weight=needs[1], need_bias=needs[3],
        )  # fmt: skip
        for_rows = None if by_input[0] is None else by_input[0].view_as(rows)
        grads = (by_input[1], by_hidden[1], by_input[2], by_hidden[2])[: len(weights)]
        states = back.first_hidden, back.first_cell
        return None, None, None, for_rows, *states, None, None, None, *grads


def _gates(rows: Tensor, before: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gates' two parts before their activation, [L, B, gates * H] each."""
    biases: Sequence[Tensor | None] = weights[2:] or (None, None)
    return (
        torch.nn.functional.linear(rows, weights[0], biases[0]),
        torch.nn.functional.linear(before, weights[1], biases[1]),
    )


def _through_gru(
    grad: Tensor, before: Tensor, gates: tuple[Tensor, Tensor], w_hh: Tensor
) -> _GateGradients:
    """``r, z = sigma(.)``, ``n = tanh(i_n + r h_n)``, ``h' = (1 - z) n + z h``."""
    steps, users, width = before.shape
    i_r, i_z, i_n = gates[0].chunk(3, dim=-1)
    h_r, h_z, h_n = gates[1].chunk(3, dim=-1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    of_n = (1 - z) * (1 - n * n)
    factors = torch.stack([of_n * h_n * r * (1 - r), (before - n) * z * (1 - z), of_n * r], dim=2)
    of_hidden = torch.empty_like(factors)
    hidden = torch.empty_like(before)
    carry = torch.zeros_like(before[0])
    for t in range(steps - 1, -1, -1):
        now = torch.add(grad[t], carry, out=hidden[t])
        torch.mul(now.unsqueeze(1), factors[t], out=of_hidden[t])
        carry = torch.addcmul(of_hidden[t].view(users, 3 * width).mm(w_hh), now, z[t])
    of_input = torch.cat([of_hidden[:, :, :2].flatten(2), hidden * of_n], dim=-1)
    return _GateGradients(of_input, of_hidden.flatten(2), carry)


def _through_lstm(
    grad: Tensor,
    grad_memory: Tensor | None,
    memory: Tensor,
    gates: tuple[Tensor, Tensor],
    w_hh: Tensor,
) -> _GateGradients:
    """``i, f, o = sigma(.)``, ``g = tanh(.)``, ``c' = f c + i g``, ``h' = o tanh(c')``."""
    steps, users, _ = grad.shape
    i, f, g, o = (gates[0] + gates[1]).chunk(4, dim=-1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    cells = torch.cat([memory.unsqueeze(0), i * g])
    for t in range(steps):
        cells[t + 1].addcmul_(f[t], cells[t])
    squashed = torch.tanh(cells[1:])
    of_cell = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)
    of_output = squashed * o * (1 - o)
    through = o * (1 - squashed * squashed)
    out = torch.empty((steps, users, 4, grad.shape[2]), dtype=grad.dtype, device=grad.device)
    carry = torch.zeros_like(grad[0])
    cell = torch.zeros_like(grad[0]) if grad_memory is None else grad_memory
    for t in range(steps - 1, -1, -1):
        now = grad[t] + carry
        cell = torch.addcmul(cell, now, through[t])
        torch.mul(cell.unsqueeze(1), of_cell[t], out=out[t, :, :3])
        torch.mul(now, of_output[t], out=out[t, :, 3])
        carry = out[t].flatten(1).mm(w_hh)
        cell = cell * f[t]
    both = out.flatten(2)
    return _GateGradients(both, both, carry, cell)


def _through_rnn(grad: Tensor, out: Tensor, cell: Cell, w_hh: Tensor) -> _GateGradients:
    """``h' = act(i + h)``."""
    slope = 1 - out * out if cell == "rnn_tanh" else (out > 0).to(out.dtype)
    gates = torch.empty_like(out)
    carry = torch.zeros_like(out[0])
    for t in range(out.shape[0] - 1, -1, -1):
        torch.mul(grad[t] + carry, slope[t], out=gates[t])
        carry = gates[t].mm(w_hh)
    return _GateGradients(gates, gates, carry)
