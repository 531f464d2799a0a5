"""FunctionRule: any function from a Gram to weights, as a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pinet_fast.aggregation.rules.base import GramRule
from pinet_fast.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable


class FunctionRule(GramRule):
    """Call ``function(gram [K, K]) -> weights [K]`` with the K strata that are present.

    The answer's shape and finiteness are checked, which on CUDA waits for the device once a call.
    The function never sees a Gram that overflowed: such a step has NaN weights.

    Args:
        function: Takes and returns tensors; results are converted to the Gram's dtype and device.
        per_parameter: Call it for every parameter's Gram apart.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], per_parameter: bool = False) -> None:
        self.function = function
        self.per_parameter = per_parameter

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @torch.no_grad()
    def weights(self, gram: Tensor) -> Tensor:
        """Return the function's weights.

        Raises:
            AggregationError: They have another shape or are not finite.
        """
        if gram.dim() == 3:
            return torch.stack([self.weights(one) for one in gram])
        if not bool(gram.isfinite().all()):
            return gram.new_full(gram.shape[:1], torch.nan)
        weights = self.function(gram)
        if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise AggregationError(
                f"rule {self._name}: expected a tensor of {gram.shape[0]} weights, one for each "
                f"stratum of the Gram {list(gram.shape)}; got {got}"
            )
        if not bool(weights.isfinite().all()):
            raise AggregationError(
                f"rule {self._name}: expected finite weights, got {weights.tolist()} for the Gram "
                f"{gram.tolist()}"
            )
        return weights.to(gram)

    def __repr__(self) -> str:
        return f"FunctionRule({self._name})"
