"""Synthetic run folders, as a finished training run leaves them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CUTOFFS = (5, 10, 20)


@dataclass
class RunSpec:
    """What a synthetic run looks like."""

    name: str = "agreement"
    rule: str = "agreement"
    loss: str = "ce"
    seed: int = 0
    num_strata: int = 2
    users: int = 400
    heads: bool = True
    log_steps: int = 60
    epochs: int = 6
    data: str = "beauty.parquet"
    fingerprint: str = "ab" * 32
    simulated: bool = False
    time_ties: float | None = 0.437
    names: tuple[str, ...] | None = None
    empty_strata: tuple[int, ...] = ()
    quality: float = 0.0
    """Share of users whose target is moved up to rank 1."""
    extra_config: dict[str, Any] = field(default_factory=dict)


def interval(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "low": None, "high": None}
    mean, error = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return {"mean": mean, "low": mean - error, "high": mean + error}


def group(ranks: np.ndarray) -> dict[str, Any]:
    out: dict[str, Any] = {"users": len(ranks)}
    for k in CUTOFFS:
        hit = ranks <= k
        out[f"ndcg@{k}"] = interval(hit / np.log2(ranks + 1))
        out[f"hr@{k}"] = interval(hit.astype(float))
        out[f"mrr@{k}"] = interval(hit / ranks)
    return out


def evaluation(ranks: np.ndarray, strata: np.ndarray, num_strata: int) -> dict[str, Any]:
    return {
        "overall": group(ranks),
        "strata": [group(ranks[strata == s]) for s in range(num_strata)],
    }


def population(spec: RunSpec) -> dict[str, np.ndarray]:
    """Return users with a long tail of activeness; the same for all runs of one log."""
    rng = np.random.default_rng(11)
    activeness = np.floor(2 + rng.pareto(1.2, spec.users) * 4).astype(np.int64)
    borders = np.quantile(activeness, 1 - 0.5 ** np.arange(1, spec.num_strata))
    strata = np.searchsorted(borders, activeness, side="left")
    for s in spec.empty_strata:
        strata[strata == s] = (s + 1) % spec.num_strata
    hardness = rng.gamma(1.5, 60, spec.users) / np.log2(activeness + 2)
    backbone = 1 + np.floor(hardness).astype(np.int64)
    moved = rng.random(spec.users) < spec.quality
    backbone[moved] = 1
    ranks = {"users": np.arange(spec.users) * 3 + 7, "strata": strata, "activeness": activeness}
    ranks["backbone"] = backbone
    if spec.heads:
        better = rng.random(spec.users) < np.where(strata == 0, 0.25, 0.05)
        ranks["heads"] = np.where(better, np.maximum(backbone // 2, 1), backbone)
    return ranks


def stratum_facts(spec: RunSpec, ranks: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    default = ("tail", "head") if spec.num_strata == 2 else None
    facts = []
    for s in range(spec.num_strata):
        own = ranks["activeness"][ranks["strata"] == s]
        low, high = (int(own.min()), int(own.max())) if len(own) else (None, None)
        names = spec.names or default
        facts.append(
            {
                "id": s,
                "name": names[s] if names else f"{low}-{high} events",
                "users": len(own),
                "events": int(own.sum()),
                "min_activeness": low,
                "max_activeness": high,
            }
        )
    return facts


def log_records(spec: RunSpec) -> list[dict[str, Any]]:
    """Return log records; like a real log, each stage counts its steps from 1."""
    rng = np.random.default_rng(spec.seed)
    count, needs_gram = spec.num_strata, spec.rule not in ("joint", "backdoor")
    records: list[dict[str, Any]] = []
    for stage in ("backbone", "heads") if spec.heads else ("backbone",):
        gram = needs_gram and stage == "backbone"
        epochs = spec.epochs if stage == "backbone" else 3
        edges = np.linspace(0, spec.log_steps, epochs + 1).astype(int)
        for epoch, (low, high) in enumerate(pairwise(edges), start=1):
            for index in range(low, high):
                progress = index / max(spec.log_steps, 1) + (stage == "heads")
                base = 5.5 + 2.5 * np.exp(-2.5 * progress)
                losses = base + np.linspace(0, 0.5, count) + rng.normal(0, 0.1, count)
                angle = 0.25 * np.exp(-2 * progress) - 0.03
                cosines = np.full((count, count), angle) + rng.normal(0, 0.02, (count, count))
                np.fill_diagonal(cosines, 1)
                weights = rng.dirichlet(np.full(count, 40.0)) if gram else np.ones(count) / count
                speed = 14000 * (1 - 0.6 * np.exp(-8 * progress))
                records.append(
                    {
                        "event": "step",
                        "stage": stage,
                        "epoch": epoch,
                        "step": 20 * index + 1,
                        "loss": float(losses.mean()),
                        "stratum_losses": losses.tolist(),
                        "weights": weights.tolist(),
                        "norms": (0.3 + 0.1 * np.arange(count) - 0.1 * progress).tolist()
                        if gram
                        else None,
                        "cosines": cosines.tolist() if gram else None,
                        "counts": [4000, *[1000] * (count - 1)],
                        "events_per_second": speed,
                    }
                )
            final = epoch / epochs + (stage == "heads")
            score = 0.03 * (1 - np.exp(-2.5 * final))
            scores = [{"ndcg@10": score * (1 + 0.4 * s), "hr@10": score * 2} for s in range(count)]
            for s in spec.empty_strata:
                scores[s] = {"ndcg@10": None, "hr@10": None}  # type: ignore[dict-item]
            records.append(
                {
                    "event": "epoch",
                    "stage": stage,
                    "epoch": epoch,
                    "step": 20 * int(high),
                    "train_loss": 6.5,
                    "seconds": 3.0 * epoch,
                    "valid": {"overall": {"ndcg@10": score, "hr@10": 2 * score}, "strata": scores},
                }
            )
    return records


def metrics(spec: RunSpec, ranks: dict[str, np.ndarray]) -> dict[str, Any]:
    stages = ("backbone", "heads") if spec.heads else ("backbone",)
    evaluations = {
        stage: evaluation(ranks[stage], ranks["strata"], spec.num_strata)
        if stage in stages
        else None
        for stage in ("backbone", "heads")
    }
    head_facts = {
        "epochs": 3,
        "best_epochs": [2] * spec.num_strata,
        "seconds": 9.0,
        "events_per_second": 30000.0,
    }
    return {
        "schema": 1,
        "name": spec.name,
        "finished_at": "2026-03-01T12:00:00+00:00",
        "config": {
            "data": f"logs/{spec.data}",
            "model": "sasrec",
            "loss": spec.loss,
            "rule": spec.rule,
            "prior": "uniform",
            "strata": "head:0.2",
            "heads": spec.heads,
            "seed": spec.seed,
            "epochs": spec.epochs,
            "batch_size": 128,
            "lr": 0.001,
            **spec.extra_config,
        },
        "data": {
            "name": spec.data,
            "fingerprint": spec.fingerprint,
            "simulated": spec.simulated,
            "users": spec.users,
            "items": 1682,
            "events": 100000,
            "time_ties": spec.time_ties,
        },
        "strata": stratum_facts(spec, ranks),
        "stages": {
            "backbone": {
                "epochs": spec.epochs,
                "best_epoch": spec.epochs - 1,
                "seconds": 18.0,
                "events_per_second": 14141.2,
            },
            "heads": head_facts if spec.heads else None,
        },
        "final": stages[-1],
        "test": evaluations,
        "valid": evaluations,
        "coverage": []
        if spec.rule in ("joint", "backdoor")
        else ["items.weight: embedding, events in dim 0, use 1: proven at step 0"] * 12,
        "versions": {"pinet_fast": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    }


def write_run(root: Path, spec: RunSpec) -> Path:
    """Write the run folder ``root/spec.name``."""
    folder = root / spec.name
    folder.mkdir(parents=True)
    ranks = population(spec)
    content = metrics(spec, ranks)
    (folder / "config.json").write_text(json.dumps(content["config"]))
    (folder / "metrics.json").write_text(json.dumps(content, indent=2))
    lines = [json.dumps(record) + "\n" for record in log_records(spec)]
    (folder / "log.jsonl").write_text("".join(lines))
    np.savez_compressed(folder / "test_ranks.npz", **ranks)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder from the fields of RunSpec."""

    def make(**fields: Any) -> Path:
        return write_run(tmp_path, RunSpec(**fields))

    return make
