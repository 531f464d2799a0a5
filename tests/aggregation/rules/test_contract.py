"""What every rule promises: its ``claims``, and what holds for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pinet_fast import rules

if TYPE_CHECKING:
    from pinet_fast.rules import ElementwiseRule, GramRule

GRAM_RULES: list[GramRule] = [
    rules.Agreement(per_parameter=False),
    rules.Balanced(),
    rules.MGDA(),
    rules.PCGrad(),
    rules.PCGrad(order="random", seed=7),
    rules.IMTLG(),
    rules.AlignedMTL(),
    rules.CAGrad(),
    rules.CAGrad(c=0.9),
    rules.CAGrad(c=0.0),
    rules.EMA("mgda"),
]
ELEMENTWISE_RULES: list[ElementwiseRule] = [
    rules.SignAgreement(),
    rules.SignAgreement(unanimous=True),
    rules.TrimmedMean(),
    rules.TrimmedMean(trim=0),
    rules.TrimmedMean(trim=3),
]
STATELESS = [rule for rule in GRAM_RULES if not isinstance(rule, rules.EMA)]
BATCHED = [rule for rule in STATELESS if "random" not in repr(rule)]
TOLERANCE = 2e-5  # of weights that interior-point methods leave undecided within 1e-10 of optimal


def gram_of(gradients: Tensor) -> Tensor:
    return gradients.double() @ gradients.double().mT


def fresh(rule: GramRule) -> GramRule:
    rule.discard()
    return rule


@pytest.fixture(params=GRAM_RULES, ids=repr)
def rule(request: pytest.FixtureRequest) -> GramRule:
    return fresh(request.param)


def claiming(claim: str) -> list[GramRule]:
    return [rule for rule in GRAM_RULES if claim in rule.claims]


def test_every_own_gram_rule_is_under_contract() -> None:
    named = {type(rules.by_name(name)) for name in rules.names()}
    tested = {type(rule) for rule in [*GRAM_RULES, *ELEMENTWISE_RULES]}
    assert named - tested == {rules.Joint, rules.Backdoor}


class TestGram:
    def test_weights_are_float64_of_the_strata(self, rule: GramRule) -> None:
        for num_strata in (1, 2, 3, 8, 16):
            rule = fresh(rule)
            weights = rule.weights(gram_of(torch.randn(num_strata, 20)))
            assert weights.shape == (num_strata,)
            assert weights.dtype == torch.float64

    def test_one_stratum_keeps_its_gradient(self, rule: GramRule) -> None:
        torch.testing.assert_close(
            rule.weights(gram_of(torch.randn(1, 5))), torch.ones(1, dtype=torch.float64)
        )

    def test_equal_gradients_give_the_mean(self, rule: GramRule) -> None:
        assert "mean" in rule.claims
        for num_strata in (2, 3, 4, 8):
            rule = fresh(rule)
            weights = rule.weights(gram_of(torch.ones(num_strata, 3)))
            expected = torch.full((num_strata,), 1 / num_strata, dtype=torch.float64)
            torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE)

    def test_equal_random_gradients_give_the_mean(self, rule: GramRule) -> None:
        gradient = torch.randn(1, 30, dtype=torch.float64)
        weights = rule.weights(gram_of(gradient.expand(5, -1)))
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)

    def test_zero_gradients_are_finite(self, rule: GramRule) -> None:
        for num_strata in (1, 2, 5):
            assert (
                fresh(rule).weights(torch.zeros(num_strata, num_strata).double()).isfinite().all()
            )

    def test_overflow_shows(self, rule: GramRule) -> None:
        """Under a loss scaler a Gram may overflow: no error, and no finite gradient either."""
        for bad in (torch.nan, torch.inf):
            gram = gram_of(torch.randn(4, 9))
            gram[1, 2] = gram[2, 1] = gram[1, 1] = bad
            assert not (fresh(rule).weights(gram) @ gram).isfinite().all()
        fresh(rule)

    def test_absent_strata_are_dropped(self, rule: GramRule) -> None:
        gram = gram_of(torch.randn(4, 9))
        present = [True, False, True, True]
        kept = torch.tensor([0, 2, 3])
        expected = rule.weights(gram[kept][:, kept])
        got = fresh(rule).stratum_weights(gram, present)
        assert got[1] == 0
        torch.testing.assert_close(got[kept], expected)

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 999),
        strata=st.integers(1, 8),
        rank=st.integers(0, 3),
        spread=st.sampled_from([0.0, 1.0, 4.0]),
    )
    @pytest.mark.parametrize("rule", GRAM_RULES, ids=repr)
    def test_finite_on_singular_grams(
        self, rule: GramRule, seed: int, strata: int, rank: int, spread: float
    ) -> None:
        torch.manual_seed(seed)
        gradients = torch.randn(strata, rank, dtype=torch.float64)
        gradients *= 10 ** (spread * torch.randn(strata, 1))
        rule = fresh(rule)
        weights = rule.weights(gram_of(gradients))
        assert weights.isfinite().all()
        if "convex" in rule.claims:
            assert (weights >= 0).all()
            assert float(weights.sum()) == pytest.approx(1)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 999), strata=st.integers(2, 8), width=st.integers(2, 20))
    @pytest.mark.parametrize("rule", claiming("non_conflicting"), ids=repr)
    def test_non_conflicting(self, rule: GramRule, seed: int, strata: int, width: int) -> None:
        torch.manual_seed(seed)
        gram = gram_of(torch.randn(strata, width))
        assert (gram @ rule.weights(gram)).min() >= -1e-9 * gram.diagonal().max()

    @pytest.mark.parametrize("rule", claiming("equivariant"), ids=repr)
    def test_permutation_equivariance(self, rule: GramRule) -> None:
        for strata in (2, 3, 5, 8):
            gradients = torch.randn(strata, 12, dtype=torch.float64)
            order = torch.randperm(strata)
            permuted = fresh(rule).weights(gram_of(gradients[order]))
            expected = fresh(rule).weights(gram_of(gradients))[order]
            torch.testing.assert_close(permuted, expected, rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("rule", claiming("scale_invariant"), ids=repr)
    def test_weights_do_not_depend_on_the_loss_scale(self, rule: GramRule) -> None:
        for strata in (2, 5):
            gram = gram_of(torch.randn(strata, 12))
            expected = fresh(rule).weights(gram)
            for scale in (65536.0**2, 1e-30):
                got = fresh(rule).weights(gram * scale)
                torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("rule", BATCHED, ids=repr)
    def test_batched_grams_are_solved_one_by_one(self, rule: GramRule) -> None:
        for strata in (2, 5):
            grams = torch.stack([gram_of(torch.randn(strata, 9)) for _ in range(6)])
            expected = torch.stack([rule.weights(gram) for gram in grams])
            torch.testing.assert_close(rule.weights(grams), expected, rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("rule", GRAM_RULES, ids=repr)
    def test_no_value_is_read_on_the_host(self, rule: GramRule) -> None:
        """On CUDA that would wait for the device (``eigh`` does, and says so)."""
        for strata in (2, 5):
            gram = gram_of(torch.randn(strata, 9))
            with NoHostReads():
                fresh(rule).stratum_weights(gram, [True] * strata)

    @pytest.mark.parametrize("rule", BATCHED, ids=repr)
    def test_compiles_to_one_graph(self, rule: GramRule) -> None:
        torch.compiler.reset()
        gram = gram_of(torch.randn(4, 9))
        compiled = torch.compile(rule.weights, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(gram), rule.weights(gram))


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        assert func.overloadpacket not in reads, func
        return func(*args, **(kwargs or {}))


def test_host_reads_are_seen() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        bool(torch.ones(()) > 0)


@pytest.mark.parametrize("rule", ELEMENTWISE_RULES, ids=repr)
class TestElementwise:
    def test_equal_gradients_give_the_mean(self, rule: ElementwiseRule) -> None:
        gradient = torch.randn(6, 3)
        for strata in (1, 2, 3, 5):
            gradients = gradient.expand(strata, -1, -1)
            for touched in (None, torch.ones(strata, 6, dtype=torch.bool)):
                got = rule.aggregate(gradients, touched, [True] * strata)
                torch.testing.assert_close(got, gradient)

    def test_any_shape(self, rule: ElementwiseRule) -> None:
        for shape in ((), (3,), (2, 3), (2, 3, 4)):
            assert rule.combine(torch.randn(4, *shape), None).shape == shape

    def test_permutation_equivariance(self, rule: ElementwiseRule) -> None:
        gradients, touched = torch.randn(5, 7, 3), torch.rand(5, 7) > 0.4
        gradients = gradients * touched.unsqueeze(-1)
        order = torch.randperm(5)
        for here in (None, touched):
            permuted = rule.combine(gradients[order], None if here is None else here[order])
            torch.testing.assert_close(permuted, rule.combine(gradients, here))

    def test_scaling(self, rule: ElementwiseRule) -> None:
        gradients = torch.randn(5, 7, 3)
        torch.testing.assert_close(
            rule.combine(gradients * 1024, None), rule.combine(gradients, None) * 1024
        )

    def test_only_strata_that_touched_a_row_count(self, rule: ElementwiseRule) -> None:
        gradients, touched = torch.randn(5, 9, 3), torch.rand(5, 9) > 0.5
        gradients = gradients * touched.unsqueeze(-1)
        got = rule.combine(gradients, touched)
        for row in range(9):
            strata = touched[:, row].nonzero().squeeze(-1)
            if len(strata) == 0:
                expected = torch.zeros(3)
            else:
                expected = rule.combine(gradients[strata, row], None)
            torch.testing.assert_close(got[row], expected)

    def test_absent_strata_are_dropped(self, rule: ElementwiseRule) -> None:
        gradients = torch.randn(4, 6, 3)
        gradients[1] = 0
        got = rule.aggregate(gradients, None, [True, False, True, True])
        torch.testing.assert_close(got, rule.combine(gradients[[0, 2, 3]], None))
        touched = torch.ones(4, 6, dtype=torch.bool)
        touched[1] = False
        got = rule.aggregate(gradients, touched, [True, False, True, True])
        torch.testing.assert_close(got, rule.combine(gradients, touched))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_overflow_shows(self, rule: ElementwiseRule, bad: float) -> None:
        gradients = torch.randn(5, 7)
        gradients[2, 3] = bad
        assert not rule.aggregate(gradients, None, [True] * 5)[3].isfinite()

    def test_no_value_is_read_on_the_host(self, rule: ElementwiseRule) -> None:
        gradients, touched = torch.randn(5, 7, 3), torch.rand(5, 7) > 0.4
        with NoHostReads():
            rule.aggregate(gradients, touched, [True] * 5)
            rule.aggregate(gradients, None, [True] * 5)


@pytest.mark.parametrize("rule", STATELESS, ids=repr)
def test_absent_strata_are_not_read(rule: GramRule) -> None:
    """What lies there may be anything; random orders are drawn for the present strata alone."""
    gram, present = gram_of(torch.randn(5, 9)), [True, False, True, True, False]
    kept = torch.tensor([0, 2, 3])
    expected = rule.weights(gram[kept][:, kept])
    gram[[1, 4]], gram[:, [1, 4]] = torch.nan, torch.inf
    got = rule.stratum_weights(gram, present)
    torch.testing.assert_close(got[kept], expected, rtol=1e-12, atol=1e-12)
    assert got[[1, 4]].tolist() == [0, 0]


def test_a_subclass_may_say_otherwise() -> None:
    class Twice(rules.MGDA):
        def weights(self, gram: Tensor) -> Tensor:
            return 2 * super().weights(gram)

    gram = gram_of(torch.randn(4, 9))
    for present in ([True] * 4, [True, False, True, True]):
        expected = 2 * rules.MGDA().stratum_weights(gram, present)
        torch.testing.assert_close(Twice().stratum_weights(gram, present), expected)


@pytest.mark.parametrize("rule", STATELESS, ids=repr)
def test_one_call_of_the_op_gives_the_weights(rule: GramRule) -> None:
    from pinet_fast.kernels import _registry

    def calls() -> int:
        return sum(
            _registry.num_calls("stratum_solve", backend.name)
            for backend in _registry.backends("stratum_solve")
        )

    before = calls()
    rule.stratum_weights(gram_of(torch.randn(4, 9)), [True, False, True, True])
    assert calls() == before + 1
