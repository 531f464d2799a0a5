"""PCGrad: what conflicts between stratum gradients is projected away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.aggregation.rules.solved import SolvedRule
from pinet_fast.errors import ConfigError
from pinet_fast.kernels import stratum_solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class PCGrad(SolvedRule):
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
    solver = "pcgrad"

    def __init__(self, order: Literal["conflict", "random"] = "conflict", seed: int = 0) -> None:
        if order not in ("conflict", "random"):
            raise ConfigError(f'PCGrad: expected order "conflict" or "random", got {order!r}')
        self.order = order
        self.seed = seed
        self._num_steps = 0
        if order == "random":
            self.claims = type(self).claims - {"equivariant"}

    def stratum_weights(self, gram: Tensor, present: Sequence[bool]) -> Tensor:
        """Return the weights of all S strata; random orders are drawn for the present ones."""
        if self.order == "random":
            return GramRule.stratum_weights(self, gram, present)
        return super().stratum_weights(gram, present)

    def _solve(self, gram: Tensor, present: Sequence[bool] | None) -> Tensor:
        keys = None
        if self.order == "random":
            generator = torch.Generator().manual_seed((self.seed << 32) + self._num_steps)
            num_strata = gram.shape[-1]
            keys = torch.rand(num_strata, num_strata, generator=generator).double().to(gram.device)
        weights: Tensor = stratum_solve(gram.double(), self.solver, present=present, keys=keys)
        return weights

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
