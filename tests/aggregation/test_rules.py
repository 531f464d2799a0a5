"""What every rule promises, and what each one says in particular."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pinet_fast.aggregation import rules
from pinet_fast.aggregation.rules import Agreement, Backdoor, BatchStrata, Joint
from pinet_fast.errors import ConfigError, StrataError

GRAM_RULES = [Agreement(per_parameter=False)]
CONSTANT_RULES = [Joint(), Backdoor(), Backdoor("users"), Backdoor("events"), Backdoor([1, 2, 3])]


def gram_of(gradients: Tensor) -> Tensor:
    return gradients.double() @ gradients.double().T


def agreement_as_stated(gradients: Tensor) -> Tensor:
    """The formula of DESIGN section 3 on the gradients themselves, one stratum at a time."""
    mean = gradients.mean(0)

    def cosine(a: Tensor, b: Tensor) -> float:
        scale = float(a.norm() * b.norm())
        return float(a @ b) / scale if scale > 0 else 0.0

    kept = [k for k, g in enumerate(gradients) if cosine(mean, g) > 0]
    weights = torch.zeros(len(gradients), dtype=gradients.dtype)
    scores = [sum(cosine(gradients[i], gradients[j]) for j in kept) for i in kept]
    total = sum(math.exp(score) for score in scores)
    for k, score in zip(kept, scores, strict=True):
        weights[k] = math.exp(score) / total
    return weights


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), strata=st.integers(1, 8), width=st.integers(1, 6))
def test_agreement_is_the_stated_formula(seed: int, strata: int, width: int) -> None:
    torch.manual_seed(seed)
    gradients = torch.randn(strata, width, dtype=torch.float64) + 0.3
    expected = agreement_as_stated(gradients)
    if expected.sum() == 0:  # nobody agrees with the mean: all weigh alike
        expected = torch.full_like(expected, 1 / strata)
    got = Agreement(per_parameter=False).weights(gram_of(gradients))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_agreement_by_parameter_is_the_rule_for_each() -> None:
    torch.manual_seed(0)
    grams = torch.stack([gram_of(torch.randn(4, 3)) for _ in range(5)])
    got = Agreement().weights(grams)
    one = Agreement(per_parameter=False)
    torch.testing.assert_close(got, torch.stack([one.weights(g) for g in grams]))


def test_agreement_drops_the_stratum_against_the_mean() -> None:
    gradients = torch.tensor([[1.0, 0.0], [1.0, 0.2], [-0.5, 0.0]])
    weights = Agreement(per_parameter=False).weights(gram_of(gradients))
    assert weights[2] == 0
    assert (weights[:2] > 0).all()


def test_agreement_of_cancelling_or_zero_gradients_is_the_mean() -> None:
    rule = Agreement(per_parameter=False)
    for gradients in (torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 3)):
        torch.testing.assert_close(
            rule.weights(gram_of(gradients)), torch.full((2,), 0.5, dtype=torch.float64)
        )


@pytest.mark.parametrize("rule", GRAM_RULES, ids=repr)
class TestGramRules:
    def test_equal_gradients_give_the_mean(self, rule: rules.GramRule) -> None:
        weights = rule.weights(gram_of(torch.ones(4, 3)))
        torch.testing.assert_close(weights, torch.full((4,), 0.25, dtype=torch.float64))

    def test_permutation_equivariance(self, rule: rules.GramRule) -> None:
        torch.manual_seed(3)
        gradients = torch.randn(5, 4)
        order = torch.randperm(5)
        torch.testing.assert_close(
            rule.weights(gram_of(gradients[order])), rule.weights(gram_of(gradients))[order]
        )

    def test_weights_do_not_depend_on_the_loss_scale(self, rule: rules.GramRule) -> None:
        torch.manual_seed(4)
        gram = gram_of(torch.randn(5, 4))
        torch.testing.assert_close(rule.weights(gram * 65536.0**2), rule.weights(gram))

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 999), strata=st.integers(1, 8), rank=st.integers(0, 3))
    def test_convex_and_finite_on_singular_grams(
        self, rule: rules.GramRule, seed: int, strata: int, rank: int
    ) -> None:
        torch.manual_seed(seed)
        weights = rule.weights(gram_of(torch.randn(strata, rank)))
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("rule", CONSTANT_RULES, ids=repr)
def test_constant_rules_drop_absent_strata_and_sum_to_one(rule: rules.ConstantRule) -> None:
    batch = BatchStrata((3, 0, 5), user_counts=(10, 20, 30), event_counts=(10, 40, 900))
    weights = rule.weights(batch)
    assert weights[1] == 0
    assert sum(weights) == pytest.approx(1)


def test_priors() -> None:
    batch = BatchStrata((3, 1, 4), user_counts=(10, 20, 70), event_counts=(50, 50, 900))
    assert Joint().weights(batch) == pytest.approx((3 / 8, 1 / 8, 4 / 8))
    assert Backdoor().weights(batch) == pytest.approx((1 / 3,) * 3)
    assert Backdoor("users").weights(batch) == pytest.approx((0.1, 0.2, 0.7))
    assert Backdoor("events").weights(batch) == pytest.approx((0.05, 0.05, 0.9))
    assert Backdoor(torch.tensor([1.0, 1.0, 2.0])).weights(batch) == pytest.approx(
        (0.25, 0.25, 0.5)
    )


def test_population_priors_need_population_counts() -> None:
    with pytest.raises(StrataError, match=r"StrataIndex that carries them.*counts="):
        Backdoor("users").weights(BatchStrata((1, 1)))


@pytest.mark.parametrize("prior", ["tail", [], [-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0]])
def test_bad_priors_are_refused(prior: object) -> None:
    with pytest.raises(ConfigError, match="prior"):
        Backdoor(prior)  # type: ignore[arg-type]


def test_prior_of_another_size_or_without_weight_is_refused() -> None:
    with pytest.raises(StrataError, match="2 numbers but there are 3"):
        Backdoor([1, 2]).weights(BatchStrata((1, 1, 1)))
    with pytest.raises(StrataError, match="no weight"):
        Backdoor([0, 1]).weights(BatchStrata((1, 0)))


def test_names() -> None:
    assert rules.names() == (
        "joint", "backdoor", "agreement", "balanced", "mgda", "pcgrad", "imtlg", "alignedmtl",
        "cagrad", "signagreement", "trimmedmean",
    )  # fmt: skip
    assert isinstance(rules.by_name("agreement"), Agreement)
    own = Agreement()
    assert rules.by_name(own) is own
    with pytest.raises(ConfigError, match=r"joint, backdoor, agreement, .*; got 'median'"):
        rules.by_name("median")
    with pytest.raises(ConfigError, match="got int"):
        rules.by_name(3)  # type: ignore[arg-type]
