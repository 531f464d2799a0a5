"""PCGrad: what conflicts between stratum gradients is projected away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class PCGrad(GramRule):
    """Project every stratum gradient off the others it conflicts with, one after the other; mean.

    The paper takes the others in random order and sums; here the result is divided by K, so that
    equal gradients give their mean. The order matters for three strata and more.

    Args:
        order: ``"conflict"`` (default): the most conflicting stratum first, by cosine; nothing is
            random and the strata's ids do not matter; our choice. ``"random"``: the paper's, a new
            order for every stratum at every step.
        seed: Seed of the random orders.

    Raises:
        ConfigError: An unknown order.

    Source:
        Yu et al., Gradient surgery for multi-task learning (arXiv 2001.06782), Algorithm 1.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})

    def __init__(self, order: Literal["conflict", "random"] = "conflict", seed: int = 0) -> None:
        if order not in ("conflict", "random"):
            raise ConfigError(f'PCGrad: expected order "conflict" or "random", got {order!r}')
        self.order = order
        self.seed = seed
        self._num_steps = 0
        if order == "random":
            self.claims = type(self).claims - {"equivariant"}

    def weights(self, gram: Tensor) -> Tensor:
        """Return the summed coefficients of the projected gradients, over K."""
        num_strata = gram.shape[-1]
        square = gram.diagonal(dim1=-2, dim2=-1)
        tiny = torch.finfo(gram.dtype).tiny
        inverse = torch.where(square > 0, 1 / square.clamp_min(tiny), 0.0)
        order = self._order(gram, inverse.sqrt())
        inverse = inverse.unsqueeze(-2).expand_as(gram)
        # Row i holds the projected gradient of stratum i, as coefficients of the given ones.
        rows = torch.eye(num_strata, dtype=gram.dtype, device=gram.device).expand_as(gram)
        for turn in range(num_strata - 1):
            other = order[..., turn : turn + 1]
            conflict = (rows @ gram).gather(-1, other)
            excess = conflict * inverse.gather(-1, other)
            rows = rows.scatter_add(-1, other, -torch.where(conflict < 0, excess, conflict * 0))
        return rows.mean(-2) + square * 0  # a NaN stays one

    def _order(self, gram: Tensor, inverse_norm: Tensor) -> Tensor:
        """Return int64 [..., K, K]: for every stratum the others in turn, itself last."""
        num_strata = gram.shape[-1]
        if self.order == "conflict":
            key = gram * inverse_norm.unsqueeze(-1) * inverse_norm.unsqueeze(-2)
        else:
            generator = torch.Generator().manual_seed((self.seed << 32) + self._num_steps)
            key = torch.rand(num_strata, num_strata, generator=generator).to(gram.device)
        itself = torch.eye(num_strata, dtype=torch.bool, device=gram.device)
        order = key.masked_fill(itself, torch.inf).argsort(dim=-1, stable=True)
        return order.expand(gram.shape)

    def commit(self) -> None:
        """Draw other orders from now on."""
        self._num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were taken, which with the seed fixes the random orders."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the orders where ``state`` was saved."""
        self._expect(state, {"num_steps"})
        self._num_steps = int(state["num_steps"])

    def __repr__(self) -> str:
        if self.order == "conflict":
            return "PCGrad()"
        return f'PCGrad(order="random", seed={self.seed})'
