"""The contract of ``ragged_attention`` in plain PyTorch: any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._registry import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_LEVELS = 2**32
_LOW = _LEVELS - 1

_MAX_SCORES = 2**24
"""Scores that are held at once: users are padded, a group at a time, to bound the memory."""


def ragged_attention_reference(
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write the attention of every event over its user's events so far; nothing is synchronised.

    Args:
        qkv: Queries, keys and values, [T, 3, H, D] of any floating dtype and strides.
        offsets: int64 [B + 1], ascending from 0 to T.
        max_len: No user has more events.
        dropout: Probability that an attention weight is dropped.
        seed: int64 [1], decides which; None without dropout.
        out: [T, H, D], fully written.
        lse: [T, H], logarithms of the sums of exponentials; fully written.
    """
    for padded in _groups(qkv, offsets, max_len, dropout, seed):
        q, k, v = padded.taken(qkv).permute(2, 0, 3, 1, 4)  # [b, H, L, D]
        logs, weights = _softmax(q, k, padded.valid)
        padded.put(out, ((weights * padded.factors) @ v).transpose(1, 2))
        padded.put(lse, logs.transpose(1, 2))


def ragged_attention_backward_reference(
    grad: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    max_len: int,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_qkv: Tensor,
) -> None:
    """Write the gradients of queries, keys and values; nothing is synchronised.

    Args:
        grad: Gradient of ``out``, [T, H, D], any strides.
        qkv: As of the forward.
        offsets: As of the forward.
        max_len: As of the forward.
        dropout: As of the forward.
        seed: As of the forward.
        out: As the forward wrote it.
        lse: As the forward wrote it; what it says is computed anew here.
        grad_qkv: [T, 3, H, D], fully written.
    """
    for padded in _groups(qkv, offsets, max_len, dropout, seed):
        q, k, v = padded.taken(qkv).permute(2, 0, 3, 1, 4)
        slope = padded.taken(grad).transpose(1, 2)
        _, weights = _softmax(q, k, padded.valid)
        of_weights = (slope @ v.transpose(2, 3)) * padded.factors
        delta = (weights * of_weights).sum(-1, keepdim=True)
        of_scores = weights * (of_weights - delta) * q.shape[-1] ** -0.5
        of_v = (weights * padded.factors).transpose(2, 3) @ slope
        parts = (of_scores @ k, of_scores.transpose(2, 3) @ q, of_v)
        padded.put(grad_qkv, torch.stack([part.transpose(1, 2) for part in parts], dim=2))


class _Padded:
    """A group of users in a padded layout [b, L]."""

    def __init__(
        self, starts: Tensor, lengths: Tensor, max_len: int, num_events: int, factors: Tensor | int
    ) -> None:
        column = torch.arange(max_len, device=starts.device)
        self.valid = column < lengths.unsqueeze(1)
        self.events = torch.where(self.valid, starts.unsqueeze(1) + column, num_events)
        self.factors = factors

    def taken(self, x: Tensor) -> Tensor:
        """Return the rows of [T, ...] as [b, L, ...], zeros in the padding; float32 at least."""
        rows = x[self.events.clamp_max(x.shape[0] - 1)]
        padding = ~self.valid.view(*self.valid.shape, *[1] * (x.dim() - 1))
        return rows.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(padding, 0)

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write [b, L, ...] to the users' rows of [T, ...]."""
        # Rows of the padding have a place of their own: choosing the others would synchronise.
        sink = out.new_empty((out.shape[0] + 1, *out.shape[1:]))
        sink[:-1] = out
        sink[self.events] = x.to(out.dtype)
        out.copy_(sink[:-1])


def _groups(
    qkv: Tensor, offsets: Tensor, max_len: int, dropout: float, seed: Tensor | None
) -> Iterator[_Padded]:
    num_events, _, heads, _ = qkv.shape
    if num_events == 0:
        return
    users = max(1, _MAX_SCORES // max(1, heads * max_len**2))
    lengths = offsets.diff()
    for first in range(0, lengths.shape[0], users):
        starts, sizes = offsets[first:-1][:users], lengths[first : first + users]
        factors: Tensor | int = 1
        if dropout > 0:
            assert seed is not None
            factors = _factors(seed, dropout, starts, heads, max_len, qkv.dtype)
        yield _Padded(starts, sizes, max_len, num_events, factors)


def _softmax(q: Tensor, k: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-sums [b, H, L] and weights [b, H, L, L]; a user's padding follows its events."""
    length = valid.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    logs = scores.logsumexp(-1)
    return logs, (scores - logs.unsqueeze(-1)).exp()


def _factors(
    seed: Tensor, dropout: float, starts: Tensor, heads: int, max_len: int, dtype: torch.dtype
) -> Tensor:
    """Return zero or the scale for every weight, [b, H, L, L]: a function of seed and position.

    Integers are unsigned and of 64 bits (SplitMix64) or 32 bits (the mixing after it); int64 holds
    both.
    """
    device = starts.device
    position = torch.arange(max_len, device=device)
    query = (starts.unsqueeze(1) + position).unsqueeze(1) * heads
    draw = query + torch.arange(heads, device=device).unsqueeze(1)  # [b, H, L]
    z = seed + _signed(0x9E3779B97F4A7C15) * (draw + 1)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shifted(z, 31)).unsqueeze(-1)
    x = (position * 0x9E3779B9 + (z & _LOW)) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D + _shifted(z, 32)) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    x = x ^ (x >> 16)
    kept = min(max(int((1.0 - dropout) * _LEVELS + 0.5), 1), _LEVELS - 1)
    wide = torch.promote_types(dtype, torch.float32)
    return (x < kept).to(wide) * (_LEVELS / kept)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return ``x >> bits`` of an unsigned number."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


FORWARD = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda qkv: None,
    impl=ragged_attention_reference,
)
BACKWARD = Backend(
    name="reference",
    priority=0,
    probe=lambda: None,
    is_supported=lambda qkv: None,
    impl=ragged_attention_backward_reference,
)
