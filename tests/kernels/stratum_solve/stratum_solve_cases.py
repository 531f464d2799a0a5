"""Grams, and what two backends' weights may differ by."""

from __future__ import annotations

import torch

KINDS = ("random", "singular", "scaled", "repeated", "integer", "zero", "opposed")


def make_gram(kind, strata, seed, batch=()):
    """Return a Gram [*batch, S, S] float64."""
    generator = torch.Generator().manual_seed(seed)
    size = (*batch, strata, 2 * strata + 3)
    gradients = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "singular":
        gradients = gradients[..., : max(strata // 2, 1)]
    elif kind == "scaled":
        spread = torch.randn((*batch, strata, 1), generator=generator, dtype=torch.float64)
        gradients = gradients * 10 ** (3 * spread)
    elif kind == "repeated":
        gradients = gradients[..., torch.arange(strata) // 2, :]
    elif kind == "integer":
        # Sums of these are exact, so that every order of summation takes the same decisions.
        gradients = torch.randint(-3, 4, size, generator=generator).double()
    elif kind == "zero":
        gradients = gradients * 0
    elif kind == "opposed":
        gradients = gradients[..., :1, :] * (1 - 2 * (torch.arange(strata) % 2))[:, None]
    return gradients @ gradients.mT


def assert_solves_alike(rule, gram, got, expected, c=0.5):
    """Compare weights [..., S] of one Gram, or what they lead to where weights are undecided."""
    assert got.isfinite().all()
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)
    step, wanted = ((w.unsqueeze(-2) @ gram).squeeze(-2) for w in (got, expected))
    if rule in ("agreement", "balanced"):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    elif rule in ("mgda", "pcgrad", "cagrad"):
        # Several weights may be nearly optimal, or project away what is nothing but rounding: their
        # steps' inner products tell them apart.
        error = (step - wanted).abs().amax(-1) / size
        assert (error <= (2e-5 if rule == "cagrad" else 1e-8)).all(), error
    else:
        # A pseudo-inverse: rounding times the condition, which the cut at 1e-12 bounds.
        scale = expected.abs().amax(-1, keepdim=True).clamp_min(1.0)
        values = torch.linalg.eigvalsh(gram / size[..., None, None])
        is_regular = values[..., 0] > 1e-7
        error = ((got - expected).abs() / scale).amax(-1)
        assert (error[is_regular] <= 1e-6).all(), error
