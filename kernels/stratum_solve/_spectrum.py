"""Eigenvalues of a batch of Grams, without an error on those that overflowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

_RANK = 1e-12  # eigenvalues below this share of the largest are rounding


class Spectrum(NamedTuple):
    """``matrix = vectors @ diag(values) @ vectors.T``.

    Attributes:
        values: Ascending, [..., K].
        vectors: In columns, [..., K, K].
        kept: Which eigenvalues are above rounding, bool [..., K].
    """

    values: Tensor
    vectors: Tensor
    kept: Tensor

    def power(self, exponent: float) -> Tensor:
        """Return the matrix to a power, [..., K, K]; its null space stays null."""
        values = self.values.masked_fill(~self.kept, 1.0).pow(exponent)
        values = values.masked_fill(~self.kept, 0.0)
        return (self.vectors * values.unsqueeze(-2)) @ self.vectors.mT


def spectrum(matrix: Tensor) -> Spectrum:
    """Decompose symmetric matrices, [..., K, K].

    One that is not finite is decomposed as the unit matrix: its weights are made NaN afterwards.
    ``torch.linalg.eigh`` is exact and costs 20 us on the CPU; on CUDA it waits for the device once.
    """
    finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, unit))
    largest = values[..., -1:].clamp_min(torch.finfo(matrix.dtype).tiny)
    return Spectrum(values, vectors, values > _RANK * largest)
