"""Functions and TorchJD's weightings as rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pinet_fast import rules
from pinet_fast.errors import AggregationError, ConfigError
from pinet_fast.rules import FunctionRule


def gram_of(strata: int, width: int = 12) -> Tensor:
    gradients = torch.randn(strata, width, dtype=torch.float64)
    return gradients @ gradients.T


def inverse_norms(gram: Tensor) -> Tensor:
    weights = gram.diagonal().rsqrt()
    return (weights / weights.sum()).float()


def test_a_function_is_a_rule() -> None:
    rule = rules.by_name(inverse_norms)
    assert isinstance(rule, FunctionRule)
    assert repr(rule) == "FunctionRule(inverse_norms)"
    weights = rule.stratum_weights(gram_of(4), [True, False, True, True])
    assert weights.dtype == torch.float64
    assert weights[1] == 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)


def test_a_function_by_parameter() -> None:
    grams = torch.stack([gram_of(3) for _ in range(4)])
    rule = FunctionRule(inverse_norms, per_parameter=True)
    expected = torch.stack([inverse_norms(gram).double() for gram in grams])
    torch.testing.assert_close(rule.weights(grams), expected)


def test_wrong_answers_are_refused() -> None:
    with pytest.raises(AggregationError, match=r"<lambda>: expected a tensor of 3 weights.*\[3, 3"):
        FunctionRule(lambda gram: gram).weights(gram_of(3))
    with pytest.raises(AggregationError, match="got float"):
        FunctionRule(lambda gram: 1.0).weights(gram_of(3))  # type: ignore[arg-type,return-value]
    with pytest.raises(AggregationError, match="finite weights"):
        FunctionRule(lambda gram: gram[0] / 0).weights(gram_of(3))


def test_an_overflow_is_not_shown_to_the_function() -> None:
    def refuse(gram: Tensor) -> Tensor:
        raise AssertionError

    assert FunctionRule(refuse).weights(gram_of(3) * torch.nan).isnan().all()


def test_classes_are_no_rules() -> None:
    with pytest.raises(ConfigError, match=r"the class MGDA; write MGDA\(\.\.\.\)"):
        rules.by_name(rules.MGDA)


def test_foreign_objects_are_no_weightings() -> None:
    with pytest.raises(ConfigError, match=r"AlignedMTLWeighting.*got function"):
        rules.from_torchjd(inverse_norms)


class TestTorchJD:
    @pytest.fixture(autouse=True)
    def _torchjd(self) -> None:
        self.peers = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")

    def theirs(self, name: str, *args: object, **options: object) -> rules.GramRule:
        try:
            weighting = getattr(self.peers, name)(*args, **options)
        except Exception as error:
            pytest.skip(f"{name} needs an extra of torchjd: {error}")
        rule = rules.by_name(weighting)
        assert isinstance(rule, rules.GramRule)
        assert repr(rule) == f"TorchJDRule({name})"
        return rule

    @pytest.mark.parametrize("strata", [2, 3, 4, 8])
    def test_imtlg(self, strata: int) -> None:
        for _ in range(20):
            gram = gram_of(strata)
            expected = self.theirs("IMTLGWeighting").weights(gram)
            torch.testing.assert_close(rules.IMTLG().weights(gram), expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("strata", [2, 3, 4, 8])
    def test_aligned_mtl(self, strata: int) -> None:
        for _ in range(20):
            gram = gram_of(strata)
            expected = self.theirs("AlignedMTLWeighting").weights(gram)
            torch.testing.assert_close(rules.AlignedMTL().weights(gram), expected)

    @pytest.mark.parametrize("strata", [2, 3, 4, 8])
    def test_mgda(self, strata: int) -> None:
        """Theirs stops early: ours is nowhere longer, and close where theirs ran long."""
        peer = self.theirs("MGDAWeighting", epsilon=1e-7, max_iters=2000)
        for _ in range(5):
            gram = gram_of(strata)
            ours, theirs = rules.MGDA().weights(gram), peer.weights(gram)
            assert ours @ gram @ ours <= theirs @ gram @ theirs + 1e-9 * gram.diagonal().max()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)

    def test_pcgrad_of_two(self) -> None:
        peer = self.theirs("PCGradWeighting")
        for _ in range(20):
            gram = gram_of(2, width=3)
            torch.testing.assert_close(rules.PCGrad().weights(gram) * 2, peer.weights(gram))

    def test_pcgrad_in_expectation(self) -> None:
        peer, ours = self.theirs("PCGradWeighting"), rules.PCGrad(order="random")
        gram = gram_of(4, width=3)
        totals = torch.zeros(2, 4, dtype=torch.float64)
        for _ in range(400):
            totals[0] += ours.weights(gram) * 4
            totals[1] += peer.weights(gram)
            ours.commit()
        torch.testing.assert_close(totals[0] / 400, totals[1] / 400, rtol=0.1, atol=0.1)

    @pytest.mark.parametrize("strata", [2, 4])
    def test_cagrad(self, strata: int) -> None:
        peer = self.theirs("CAGradWeighting", c=0.5)
        for _ in range(5):
            gram = gram_of(strata)
            ours = rules.CAGrad(c=0.5).weights(gram) * 1.5
            torch.testing.assert_close(ours, peer.weights(gram), rtol=0, atol=1e-2)

    def test_others_that_are_allowed(self) -> None:
        for name in ("MeanWeighting", "SumWeighting", "RandomWeighting"):
            assert self.theirs(name).weights(gram_of(3)).shape == (3,)
        assert self.theirs("KrumWeighting", n_byzantine=1).weights(gram_of(5)).shape == (5,)

    def test_trimmed_mean(self) -> None:
        gradients = torch.randn(5, 30)
        expected = self.peers.TrimmedMean(1)(gradients)
        torch.testing.assert_close(rules.TrimmedMean(1).combine(gradients, None), expected)

    def test_the_others_are_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match="GradVacWeighting; it changes its state"):
            rules.by_name(self.peers.GradVacWeighting())
        with pytest.raises(ConfigError, match=r"got MGDA; .* pass MGDAWeighting\(\.\.\.\)"):
            rules.by_name(self.peers.MGDA())
        with pytest.raises(ConfigError, match="got ExcessMTLWeighting"):
            rules.from_torchjd(self.peers.ExcessMTLWeighting())
