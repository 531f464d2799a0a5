"""What a run folder holds, as typed values (schema 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinet_fast.report._json import Node

METRICS = tuple(f"{name}@{k}" for name in ("ndcg", "hr", "mrr") for k in (5, 10, 20))
"""Metrics of every evaluation."""

STAGES = ("backbone", "heads")
"""Stages of a run, in order."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; all None where there are no users."""

    mean: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Return whether zero lies outside the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @classmethod
    def read(cls, node: Node) -> Interval:
        """Read it from metrics.json."""
        return cls(*(node[key].number_or_none() for key in ("mean", "low", "high")))


@dataclass(frozen=True)
class Group:
    """The metrics of a group of users."""

    users: int
    metrics: dict[str, Interval]

    @classmethod
    def read(cls, node: Node) -> Group:
        """Read it from metrics.json."""
        metrics = {name: Interval.read(node[name]) for name in METRICS}
        return cls(node["users"].integer(), metrics)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one stage's model on one part of the log."""

    overall: Group
    strata: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return all users first, then the strata."""
        return (self.overall, *self.strata)

    @classmethod
    def read(cls, node: Node, num_strata: int) -> Evaluation:
        """Read it from metrics.json."""
        strata = tuple(Group.read(group) for group in node["strata"])
        if len(strata) != num_strata:
            node["strata"].wrong(f"{num_strata} strata")
        return cls(Group.read(node["overall"]), strata)


@dataclass(frozen=True)
class Clicks:
    """How well candidates are told apart: AUC over all of them, and GAUC, the mean over users."""

    auc: Interval
    gauc: Interval
    strata_gauc: tuple[Interval, ...]

    @classmethod
    def read(cls, node: Node) -> Clicks:
        """Read it from metrics.json."""
        overall = node["overall"]
        return cls(
            Interval.read(overall["auc"]),
            Interval.read(overall["gauc"]),
            tuple(Interval.read(group["gauc"]) for group in node["strata"]),
        )

    @classmethod
    def read_all(cls, top: Node, stages: Sequence[str]) -> dict[str, Clicks]:
        """Read those of a run: by stage, and of ``popularity``; empty under full ranking."""
        test = top.get("clicks")
        if test.is_null or not test["test"].mapping():
            return {}
        found = {stage: cls.read(test["test"][stage]) for stage in stages}
        popular = top["baselines"]["popularity"]["clicks"]
        return found if popular.is_null else found | {"popularity": cls.read(popular)}


@dataclass(frozen=True)
class DataFacts:
    """What is known of the log.

    Attributes:
        time_ties: Share of users whose last two events tie in time; None without timestamps.
    """

    name: str
    fingerprint: str
    simulated: bool
    users: int
    items: int
    events: int
    time_ties: float | None

    @classmethod
    def read(cls, node: Node) -> DataFacts:
        """Read it from metrics.json."""
        return cls(
            name=node["name"].text(),
            fingerprint=node["fingerprint"].text(),
            simulated=node["simulated"].flag(),
            users=node["users"].integer(),
            items=node["items"].integer(),
            events=node["events"].integer(),
            time_ties=node["time_ties"].number_or_none(),
        )


@dataclass(frozen=True)
class StratumFacts:
    """A stratum: its users and their training events."""

    id: int
    name: str
    users: int
    events: int
    min_activeness: int | None
    max_activeness: int | None

    @property
    def edges(self) -> tuple[str, int, int | None, int | None]:
        """Return what two runs must share for their strata to be the same."""
        return (self.name, self.users, self.min_activeness, self.max_activeness)

    @classmethod
    def read(cls, node: Node) -> StratumFacts:
        """Read it from metrics.json."""
        least, most = node["min_activeness"], node["max_activeness"]
        return cls(
            id=node["id"].integer(),
            name=node["name"].text(),
            users=node["users"].integer(),
            events=node["events"].integer(),
            min_activeness=None if least.is_null else least.integer(),
            max_activeness=None if most.is_null else most.integer(),
        )


@dataclass(frozen=True)
class StageFacts:
    """How a stage went.

    Attributes:
        best_epochs: The kept epoch: one for the backbone, one a stratum for the plugin heads, where
            0 stands for the untrained head, which changes nothing.
    """

    epochs: int
    best_epochs: tuple[int, ...]
    seconds: float
    events_per_second: float | None

    @classmethod
    def read(cls, node: Node, stage: str, num_strata: int) -> StageFacts:
        """Read it from metrics.json."""
        if stage == "backbone":
            best: tuple[int, ...] = (node["best_epoch"].integer(),)
        else:
            best = tuple(epoch.integer() for epoch in node["best_epochs"])
            if len(best) != num_strata:
                node["best_epochs"].wrong(f"{num_strata} epochs, one a stratum")
        return cls(
            epochs=node["epochs"].integer(),
            best_epochs=best,
            seconds=node["seconds"].number(),
            events_per_second=node["events_per_second"].number_or_none(),
        )


@dataclass(frozen=True)
class StepRecord:
    """A logged step; NaN stands for what a stratum did not have in that batch.

    Attributes:
        step: From 1, counted on from the backbone stage into the heads stage.
        weights: Rule weight of every stratum, or None.
        norms: Gradient norm of every stratum, or None for rules that need none.
        cosines: Cosines between stratum gradients, S rows, or None.
    """

    stage: str
    epoch: int
    step: int
    loss: float
    stratum_losses: tuple[float, ...] | None
    weights: tuple[float, ...] | None
    norms: tuple[float, ...] | None
    cosines: tuple[tuple[float, ...], ...] | None
    events_per_second: float

    @classmethod
    def read(cls, node: Node, num_strata: int, offset: int) -> StepRecord:
        """Read it from a line of log.jsonl; ``offset`` is added to the step."""
        cosines = node.get("cosines")
        rows = None
        if not cosines.is_null:
            rows = tuple(_per_stratum(row, num_strata) or () for row in cosines)
            if len(rows) != num_strata:
                cosines.wrong(f"{num_strata} rows, one a stratum")
        return cls(
            stage=node["stage"].text(),
            epoch=node["epoch"].integer(),
            step=node["step"].integer() + offset,
            loss=node["loss"].number_or_nan(),
            stratum_losses=_per_stratum(node.get("stratum_losses"), num_strata),
            weights=_per_stratum(node.get("weights"), num_strata),
            norms=_per_stratum(node.get("norms"), num_strata),
            cosines=rows,
            events_per_second=node.get("events_per_second").number_or_nan(),
        )


@dataclass(frozen=True)
class EpochRecord:
    """The end of an epoch.

    Attributes:
        step: As in StepRecord.
        valid: Validation NDCG@10 of all users and then of every stratum, NaN for one without
            users; None if this epoch was not evaluated.
    """

    stage: str
    epoch: int
    step: int
    train_loss: float
    valid: tuple[float, ...] | None

    @classmethod
    def read(cls, node: Node, num_strata: int, offset: int) -> EpochRecord:
        """Read it from a line of log.jsonl; ``offset`` is added to the step."""
        valid = node.get("valid")
        scores = None
        if not valid.is_null:
            groups = (valid["overall"], *valid["strata"])
            scores = tuple(group["ndcg@10"].number_or_nan() for group in groups)
            if len(scores) != num_strata + 1:
                valid["strata"].wrong(f"{num_strata} strata")
        return cls(
            stage=node["stage"].text(),
            epoch=node["epoch"].integer(),
            step=node["step"].integer() + offset,
            train_loss=node["train_loss"].number_or_nan(),
            valid=scores,
        )


@dataclass(frozen=True)
class Ranks:
    """Rank of every user's held-out test event among the catalogue, from 1.

    Attributes:
        users: Original user ids, int64 [M].
        strata: Stratum of every user, int64 [M].
        activeness: Training events of every user, int64 [M].
        by_stage: Ranks under each stage's model, int64 [M]; no ``heads`` without plugin heads.
    """

    users: IntArray
    strata: IntArray
    activeness: IntArray
    by_stage: dict[str, IntArray]

    def masks(self, num_strata: int) -> tuple[npt.NDArray[np.bool_], ...]:
        """Return which users belong to each group: all users first, then the strata."""
        everyone = np.ones(len(self.users), dtype=np.bool_)
        return (everyone, *(self.strata == s for s in range(num_strata)))


def _per_stratum(node: Node, num_strata: int) -> tuple[float, ...] | None:
    if node.is_null:
        return None
    values = node.numbers()
    if len(values) != num_strata:
        node.wrong(f"{num_strata} numbers, one a stratum")
    return values
