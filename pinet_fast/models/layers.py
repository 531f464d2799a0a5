"""Layers of torch without the Python in front of their functions.

A torch-function mode, such as the interception of a stratified forward, costs ``F.layer_norm`` and
``F.embedding`` a dozen Python calls, and every function the way through torch's stack of modes. The
functions here are told of the interception at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pinet_fast.aggregation.lane import layer_functions


class Linear(nn.Linear):
    """``nn.Linear``; torch's dynamic quantisation, which goes by exact types, passes it by."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input W^T + b``."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        return layer_functions().linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, normalised over its last dimensions."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        return layer_functions().layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps
        )


class Embedding(nn.Embedding):
    """``nn.Embedding`` with dense gradients, for ids of any shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the ids."""
        if torch.compiler.is_compiling() or self.max_norm is not None or self.sparse:
            return super().forward(input)
        padding = -1 if self.padding_idx is None else self.padding_idx
        return layer_functions().embedding(self.weight, input, padding)
