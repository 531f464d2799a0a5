"""AUC, GAUC and log loss of candidates: a held-out item against frozen negatives.

Protocol: every user has one positive, the held-out event, and n negatives that are always the same.
AUC pools the candidates of all users of a group: the share of (positive, negative) pairs, of
whichever users, in which the positive has the higher score; ties count half. GAUC is the mean over
users of the same share inside the user's own candidates. Log loss is in nats and weighs the
positives and the negatives of a user alike, half each, whatever n is: it is what training with
one negative a positive, or the mean of several, lowers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_RESAMPLES = 200
_NOTHING = {"mean": None, "low": None, "high": None}


@dataclass(frozen=True)
class CandidateScores:
    """Scores of M users' candidates, logits.

    Attributes:
        positive: Of the held-out items, [M].
        negatives: Of their negatives, [M, n].
    """

    positive: npt.NDArray[np.float32]
    negatives: npt.NDArray[np.float32]

    def chosen(self, users: npt.NDArray[np.bool_]) -> CandidateScores:
        """Return those of some users, bool [M]."""
        return CandidateScores(self.positive[users], self.negatives[users])


def user_auc(scores: CandidateScores) -> FloatArray:
    """Return the AUC inside every user's candidates, [M]; ties count half."""
    positive = scores.positive[:, None]
    wins = (scores.negatives < positive).sum(1) + 0.5 * (scores.negatives == positive).sum(1)
    share: FloatArray = wins / scores.negatives.shape[1]
    return share


def user_log_loss(scores: CandidateScores) -> FloatArray:
    """Return the log loss of every user's candidates in nats, both labels weighing half, [M]."""
    positive = np.logaddexp(0.0, -scores.positive.astype(np.float64))
    negative = np.logaddexp(0.0, scores.negatives.astype(np.float64)).mean(1)
    loss: FloatArray = 0.5 * (positive + negative)
    return loss


class PooledAUC:
    """AUC over all candidates of a group, for any weights of its users.

    Scores are sorted once; a resample of users changes weights only.

    Args:
        scores: The group's scores.
    """

    def __init__(self, scores: CandidateScores) -> None:
        users, n = scores.negatives.shape
        values = np.concatenate([scores.positive, scores.negatives.ravel()])
        order = np.argsort(values, kind="stable")
        self._owner = np.concatenate([np.arange(users), np.repeat(np.arange(users), n)])[order]
        self._is_positive = order < users
        ordered = values[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        self._starts = starts

    def of(self, weights: FloatArray) -> float:
        """Return the AUC where user m counts ``weights[m]`` times."""
        each = weights[self._owner]
        positive = np.add.reduceat(np.where(self._is_positive, each, 0.0), self._starts)
        negative = np.add.reduceat(np.where(self._is_positive, 0.0, each), self._starts)
        below = np.cumsum(negative) - negative
        return float((positive * (below + 0.5 * negative)).sum() / positive.sum() / negative.sum())


def summarise_clicks(scores: CandidateScores, seed: int = 0) -> dict[str, Any]:
    """Return ``auc``, ``gauc`` and ``log_loss`` with 95% bootstrap intervals over users.

    Args:
        scores: The group's scores; without users every number is None.
        seed: Seed of the bootstrap.
    """
    users = len(scores.positive)
    if not users:
        return {"users": 0, **{name: dict(_NOTHING) for name in ("auc", "gauc", "log_loss")}}
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(users, np.full(users, 1 / users), size=_RESAMPLES).astype(np.float64)
    pooled = PooledAUC(scores)
    out: dict[str, Any] = {"users": users}
    resampled = np.array([pooled.of(weights) for weights in draws])
    out["auc"] = _interval(pooled.of(np.ones(users)), resampled)
    for name, values in (("gauc", user_auc(scores)), ("log_loss", user_log_loss(scores))):
        out[name] = _interval(float(values.mean()), draws @ values / users)
    return out


def clicks_by_stratum(
    scores: CandidateScores, strata: npt.NDArray[np.int64], num_strata: int
) -> dict[str, Any]:
    """Return :func:`summarise_clicks` over all users and for each stratum."""
    groups = [summarise_clicks(scores.chosen(strata == s)) for s in range(num_strata)]
    return {"overall": summarise_clicks(scores), "strata": groups}


def _interval(value: float, resampled: FloatArray) -> dict[str, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": value, "low": float(low), "high": float(high)}
