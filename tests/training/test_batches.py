"""Mixes, limits of events, weights and negatives of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.runs import StopAt, assert_same_run

from pinet_fast.aggregation import GradientAggregator
from pinet_fast.data import RaggedLoader, Split, Strata, prepare
from pinet_fast.errors import ConfigError, TrainingInterrupted
from pinet_fast.models import SASRec
from pinet_fast.training import RunConfig, train
from pinet_fast.training.batches import negatives_of, sampler_of
from pinet_fast.training.mixes import mix_of
from pinet_fast.training.stages import Stage

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS: list[dict[str, Any]] = [
    {"mix": "uniform"},
    {"mix": "tail=0.3,head=0.7", "max_events": 300},
    {"max_events": 200, "loss": "bce", "negatives_per": "user", "negatives": 3},
    {
        "mix": "sqrt", "weights": "none", "loss": "bce", "negatives": 5, "negatives_per": "batch",
        "negatives_dist": "popularity", "negatives_alpha": 0.75, "negatives_exclude": "targets",
    },
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=["uniform", "shares", "events", "negatives"])
@pytest.mark.parametrize("step", [3, 13])
def test_resume_is_bit_identical_with_any_batches(
    config: RunConfig, tmp_path: Path, options: dict[str, Any], step: int
) -> None:
    config = replace(config, **options)
    train(config, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(config, tmp_path / "broken", observer=StopAt(step))
    train(None, tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert RunConfig.load(tmp_path / "whole" / "config.json") == config


def loader_of(config: RunConfig) -> RaggedLoader:
    store, split = prepare(config.data), Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges=config.strata)
    return RaggedLoader(
        store, sampler_of(config, strata, 0), split=split, strata=strata, max_len=config.max_len,
        negatives=negatives_of(config),
    )  # fmt: skip


def test_options_reach_the_batches(config: RunConfig) -> None:
    for batch in loader_of(replace(config, max_events=150)):
        assert batch.num_events <= 150
    for batch in loader_of(replace(config, mix="0.25,0.75")):
        assert batch.strata.ids.bincount().tolist() == [16, 48]
    for shape, per in (((0, 4), "event"), ((64, 4), "user"), ((4,), "batch")):
        own = replace(config, loss="bce", negatives=4, negatives_per=per, mix="uniform")
        batch = next(iter(loader_of(own)))
        assert batch.negatives is not None
        assert batch.negatives.shape == ((batch.num_events, 4) if per == "event" else shape)
    assert negatives_of(config) is None


@pytest.mark.parametrize("weights", ["population", "none"])
@pytest.mark.parametrize("mix", ["proportional", "uniform"])
def test_a_joint_step_follows_the_weighted_mean(config: RunConfig, mix: str, weights: str) -> None:
    """The gradient is that of sum(w l) / sum(w), by plain autograd; w undoes the mix."""
    loader = loader_of(replace(config, mix=mix))
    batch = next(iter(loader))
    torch.manual_seed(0)
    model = SASRec(loader.store.num_items, max_len=10, dim=8, dropout=0.0)
    by_stratum = torch.ones(2)
    if weights == "population" and mix == "uniform":
        users = loader.strata.user_counts
        by_stratum = torch.tensor(users / users.sum() / 0.5)
    w = by_stratum[batch.strata.ids].repeat_interleave(batch.lengths).float()
    losses = model(batch)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((losses * w).sum() / w.sum(), parameters)
    stage = Stage(
        "backbone", module=model, trained=model, loader=loader, epochs=1,
        optimizer=GradientAggregator(torch.optim.SGD(parameters, lr=0.0), "joint"),
        is_weighted=weights == "population",
    )  # fmt: skip
    stage.train_step(batch)
    for mine, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs, atol=1e-6, rtol=1e-4)


def test_a_config_of_an_earlier_version_keeps_its_meaning(
    config: RunConfig, tmp_path: Path
) -> None:
    """Options that it lacks have the values that were the only ones then."""
    old = config.to_dict()
    for name in (
        "max_events", "mix", "weights", "negatives", "negatives_per", "negatives_dist",
        "negatives_alpha", "negatives_exclude",
    ):  # fmt: skip
        del old[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old))
    assert RunConfig.load(path) == config


def test_mixes_are_read() -> None:
    assert mix_of("sqrt") == "sqrt"
    assert mix_of("0.2, 0.8") == [0.2, 0.8]
    assert mix_of("tail=0.25,1=0.75") == {"tail": 0.25, 1: 0.75}
    assert mix_of("5-8 events=0.5,9+ events=0.5") == {"5-8 events": 0.5, "9+ events": 0.5}
    for text in ("", "half", "0.5,", "=,", "a=b"):
        with pytest.raises(ConfigError, match="--mix: expected"):
            mix_of(text)


def test_shares_that_do_not_fit_leave_no_folder(config: RunConfig, tmp_path: Path) -> None:
    for mix, match in (("0.5,0.6", "sum 1"), ("0.2,0.3,0.5", "expected 2 shares"),
                       ("tail=0.5,heads=0.5", "no stratum 'heads'")):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            train(replace(config, mix=mix), tmp_path / "run")
    with pytest.raises(ConfigError, match="max_events: a user has"):
        train(replace(config, max_events=3), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
