"""EMA and Warmup: state follows taken steps only."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from pinet_fast import rules
from pinet_fast.errors import CheckpointError, ConfigError
from pinet_fast.rules import EMA, MGDA, Agreement, Backdoor, Joint, Warmup

ALL = [True, True, True]


def gram_of(seed: int, strata: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(strata, 9, generator=generator, dtype=torch.float64)
    return gradients @ gradients.T


def test_ema_is_the_recursion() -> None:
    rule, average = EMA("mgda", beta=0.7), None
    for step in range(6):
        fresh = MGDA().weights(gram_of(step))
        average = fresh if average is None else 0.7 * average + 0.3 * fresh
        torch.testing.assert_close(rule.stratum_weights(gram_of(step), ALL), average)
        rule.commit()


def test_skipped_steps_leave_nothing_behind() -> None:
    rule, other = EMA("mgda"), EMA("mgda")
    for step in range(8):
        for one in (rule, other):
            if one is rule or step % 2 == 0:
                one.stratum_weights(gram_of(step), ALL)
            if step % 2 == 0:
                one.commit()
            else:
                one.discard()
    torch.testing.assert_close(rule.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_an_overflow_that_is_committed_changes_nothing() -> None:
    rule = EMA("mgda")
    rule.stratum_weights(gram_of(0), ALL)
    rule.commit()
    before = rule.state_dict()["average"]
    rule.stratum_weights(gram_of(0) * torch.nan, ALL)
    rule.commit()
    torch.testing.assert_close(rule.state_dict()["average"], before)


def test_accumulated_backwards_count_as_one_step() -> None:
    rule = EMA("mgda", beta=0.5)
    rule.stratum_weights(gram_of(0), ALL)
    rule.commit()
    start = rule.state_dict()["average"]
    first = rule.stratum_weights(gram_of(1), ALL)
    torch.testing.assert_close(first * 3, 0.5 * start + 1.5 * MGDA().weights(gram_of(1)))
    second = rule.stratum_weights(gram_of(2), ALL)
    rule.commit()
    torch.testing.assert_close(rule.state_dict()["average"], 1.5 * (first + second))


def test_ema_with_absent_strata() -> None:
    rule = EMA("mgda")
    assert rule.stratum_weights(gram_of(0), [True, False, False]).tolist() == [1, 0, 0]
    rule.commit()
    weights = rule.stratum_weights(gram_of(1), [True, True, False])
    assert float(weights.sum()) == pytest.approx(1)
    assert weights[2] == 0
    rule.commit()
    kept = rule.state_dict()["average"]
    assert kept[2].isnan()
    rule.stratum_weights(gram_of(2), [False, True, True])
    rule.commit()
    after = rule.state_dict()["average"]
    assert after[0] == kept[0]
    assert after.isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_ema_resumes_and_copies(copied: object) -> None:
    rule = EMA("mgda")
    rule.stratum_weights(gram_of(0), ALL)
    rule.commit()
    resumed = EMA("mgda")
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    expected = rule.stratum_weights(gram_of(1), ALL)
    torch.testing.assert_close(resumed.stratum_weights(gram_of(1), ALL), expected, rtol=0, atol=0)
    again = copied(rule)  # type: ignore[operator]
    torch.testing.assert_close(again.stratum_weights(gram_of(1), ALL), expected, rtol=0, atol=0)


def test_warmup_changes_after_its_steps() -> None:
    rule = Warmup("mgda", steps=2)
    for _ in range(2):
        assert isinstance(rule.active, Joint)
        rule.discard()  # a skipped step does not count
        assert isinstance(rule.active, Joint)
        rule.commit()
    assert isinstance(rule.active, MGDA)
    assert isinstance(Warmup("mgda", steps=0).active, MGDA)


def test_warmups_nest_and_resume() -> None:
    def make() -> Warmup:
        return Warmup(EMA("mgda"), steps=1, before=Warmup("backdoor", steps=5))

    rule = make()
    rule.commit()
    assert isinstance(rule.active, EMA)
    rule.active.stratum_weights(gram_of(0), ALL)
    rule.commit()
    resumed = make()
    resumed.load_state_dict(rule.state_dict())
    active = resumed.active
    assert isinstance(active, EMA)
    assert isinstance(rule.active, EMA)
    torch.testing.assert_close(
        active.stratum_weights(gram_of(1), ALL), rule.active.stratum_weights(gram_of(1), ALL)
    )


def test_stateless_rules_have_empty_state_and_refuse_another_one() -> None:
    for name in rules.names():
        rule = rules.by_name(name)
        rule.commit()
        rule.discard()
        rule.load_state_dict(rule.state_dict())
        assert rule.active is rule
    with pytest.raises(CheckpointError, match=r"MGDA.*got \['average', 'rule'\]"):
        MGDA().load_state_dict(EMA("mgda").state_dict())
    with pytest.raises(CheckpointError, match="EMA"):
        EMA("mgda").load_state_dict({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA("mgda", beta=1), "0 <= beta < 1, got 1"),
        (lambda: EMA(Agreement()), "pass per_parameter=False"),
        (lambda: EMA(Backdoor()), "expected a Gram rule"),
        (lambda: EMA(Warmup("mgda", 3)), "expected a Gram rule"),
        (lambda: Warmup("mgda", steps=-1), "got -1"),
        (lambda: Warmup("mgda", steps=2.5), "got 2.5"),
        (lambda: Warmup("mgad", steps=2), "got 'mgad'"),
    ],
)
def test_bad_wrappers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
