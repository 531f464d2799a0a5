"""A GRU layer over ragged sequences, without padding.

Sequences are laid out by step and, inside a step, from the longest down, so that the sequences
still alive at a step are the first rows of those of the step before. The recurrence runs without a
graph. Its gradient reaches the weights through two ordinary linear layers over all T events: since
every hidden state is known after the forward, ``h_before W_hh^T + b_hh`` is one of them, and the
way back through time gives the gradients of both layers' outputs. So the weights meet rows of the
batch in ``F.linear`` alone, which is where stratum gradients come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pinet_fast.aggregation.strata_index import repeat_rows


class StepPlan:
    """Where every event goes when sequences run side by side; computed once a batch.

    Attributes:
        order: The events by step, then by user from the longest sequence down, int64 [T].
        inverse: Position of every event in ``order``, int64 [T].
        alive: Sequences that have a step, for each step, on the host.
    """

    def __init__(self, offsets: Tensor) -> None:
        device, offsets = offsets.device, offsets.cpu()
        lengths = offsets[1:] - offsets[:-1]
        by_length = torch.argsort(lengths, descending=True, stable=True)
        place = torch.empty_like(by_length)
        place[by_length] = torch.arange(len(lengths))
        step = torch.arange(int(offsets[-1])) - repeat_rows(offsets[:-1], lengths)
        order = torch.argsort(step * max(len(lengths), 1) + repeat_rows(place, lengths))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        self.order, self.inverse = order.to(device), inverse.to(device)
        self.alive: list[int] = torch.bincount(step).tolist() if len(order) else []


class RaggedGRU(nn.Module):
    """One GRU layer, as ``torch.nn.GRU`` with its parameters' names and gate order r, z, n.

    Args:
        dim_in: Width of the events.
        dim: d, width of the states.
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.of_input = nn.Linear(dim_in, 3 * dim)
        self.of_hidden = nn.Linear(dim, 3 * dim)

    def forward(self, rows: Tensor, plan: StepPlan) -> Tensor:
        """Return the state after every event, from a zero state before the first.

        Args:
            rows: Events, [T, D_in].
            plan: The batch's plan.

        Returns:
            [T, d], in the order of ``rows``.
        """
        by_input = self.of_input(rows)
        with torch.no_grad(), torch._C.DisableTorchFunction():  # seen by nobody, so by no mode
            weight = self.of_hidden.weight.detach().to(by_input.dtype)
            bias = self.of_hidden.bias.detach().to(by_input.dtype)
            states, before = _run(by_input.detach(), weight, bias, plan)
        by_hidden = self.of_hidden(before)
        recurrence: Any = _Recurrence.apply  # untyped
        out: Tensor = recurrence(by_input, by_hidden, states, before, weight, plan)
        return out


def _run(by_input: Tensor, weight: Tensor, bias: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
    """Return the states after and before every event, [T, d] each."""
    dim = weight.shape[1]
    ordered = by_input.index_select(0, plan.order)
    states = by_input.new_empty((len(ordered), dim))
    before = by_input.new_zeros((len(ordered), dim))
    transposed, start = weight.t(), 0
    hidden = before[: plan.alive[0]] if plan.alive else before
    for alive in plan.alive:
        hidden = hidden[:alive]
        rows = slice(start, start + alive)
        before[rows] = hidden
        hidden = _cell(ordered[rows], torch.addmm(bias, hidden, transposed), hidden, dim)
        states[rows] = hidden
        start += alive
    return states.index_select(0, plan.inverse), before.index_select(0, plan.inverse)


def _cell(of_input: Tensor, of_hidden: Tensor, hidden: Tensor, dim: int) -> Tensor:
    gates = torch.sigmoid(of_input[:, : 2 * dim] + of_hidden[:, : 2 * dim])
    reset, update = gates[:, :dim], gates[:, dim:]
    new = torch.tanh(torch.addcmul(of_input[:, 2 * dim :], reset, of_hidden[:, 2 * dim :]))
    return torch.lerp(new, hidden, update)


class _Recurrence(torch.autograd.Function):
    """Hand out states that are known already; send their gradients back through time.

    ``weight`` takes no part in the graph: it has its gradient from the layer that made
    ``by_hidden``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        by_input: Tensor,
        by_hidden: Tensor,
        states: Tensor,
        before: Tensor,
        weight: Tensor,
        plan: StepPlan,
    ) -> Tensor:
        ctx.save_for_backward(by_input, by_hidden, before, weight)
        ctx.plan = plan
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_input, by_hidden, before, weight = ctx.saved_tensors
        plan, dim = ctx.plan, weight.shape[1]
        first, second = (t.index_select(0, plan.order) for t in (by_input, by_hidden))
        hidden, grad = before.index_select(0, plan.order), grad.index_select(0, plan.order)
        gates = torch.sigmoid(first[:, : 2 * dim] + second[:, : 2 * dim])
        reset, update = gates[:, :dim], gates[:, dim:]
        proposed = second[:, 2 * dim :]
        new = torch.tanh(torch.addcmul(first[:, 2 * dim :], reset, proposed))
        # What a step's gradient is multiplied with, for all steps at once.
        to_new = (1 - update) * (1 - new * new)
        to_reset = to_new * proposed * reset * (1 - reset)
        to_update = (hidden - new) * update * (1 - update)
        factors = torch.stack([to_reset, to_update, to_new * reset], 1)
        for_hidden = torch.empty_like(factors)
        total = torch.empty_like(grad)
        end = len(grad)
        carried = grad.new_zeros((0, dim))
        for alive in reversed(plan.alive):
            rows = slice(end - alive, end)
            own = total[rows]
            own.copy_(grad[rows])
            own[: len(carried)] += carried
            torch.mul(factors[rows], own.unsqueeze(1), out=for_hidden[rows])
            carried = torch.addmm(own * update[rows], for_hidden[rows].flatten(1), weight)
            end -= alive
        for_input = torch.stack([for_hidden[:, 0], for_hidden[:, 1], total * to_new], 1)
        back = (g.flatten(1).index_select(0, plan.inverse) for g in (for_input, for_hidden))
        return (*back, None, None, None, None)
