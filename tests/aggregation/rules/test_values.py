"""What each rule says in particular, against its definition and against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pinet_fast.errors import ConfigError
from pinet_fast.rules import (
    IMTLG,
    MGDA,
    AlignedMTL,
    Balanced,
    CAGrad,
    PCGrad,
    SignAgreement,
    TrimmedMean,
)


def gradients_of(seed: int, strata: int, width: int, repeat: bool = False) -> Tensor:
    torch.manual_seed(seed)
    gradients = torch.randn(strata, width, dtype=torch.float64)
    if repeat and strata > 1:
        gradients[1] = gradients[0]
    return gradients


examples = settings(max_examples=60, deadline=None)
many = given(
    seed=st.integers(0, 9999), strata=st.integers(2, 8), width=st.integers(1, 12),
    repeat=st.booleans(),
)  # fmt: skip


def test_balanced_contributions_have_the_mean_norm_over_k() -> None:
    gradients = gradients_of(0, 5, 9) * torch.tensor([[1.0], [10], [100], [0.1], [1]]).double()
    weights = Balanced().weights(gradients @ gradients.T)
    norms = gradients.norm(dim=1)
    expected = (norms.mean() / 5).expand(5)
    torch.testing.assert_close((weights.unsqueeze(1) * gradients).norm(dim=1), expected)


def test_balanced_leaves_out_strata_without_gradient() -> None:
    gradients = torch.tensor([[3.0, 0], [0, 0], [0, 1.0]]).double()
    weights = Balanced().weights(gradients @ gradients.T)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 0, 1.0]).double())


@examples
@many
def test_mgda_meets_the_optimality_conditions(
    seed: int, strata: int, width: int, repeat: bool
) -> None:
    """w is minimal over the simplex if and only if <g_s, g_w> >= ||g_w||^2 for every s."""
    gradients = gradients_of(seed, strata, width, repeat)
    gram = gradients @ gradients.T
    weights = MGDA().weights(gram)
    inner = gram @ weights
    assert inner.min() - inner @ weights >= -1e-8 * gram.diagonal().max()


def test_mgda_of_two_in_closed_form() -> None:
    for first, second, share in (
        ([1.0, 0], [0, 1.0], 0.5),
        ([1.0, 0], [2.0, 0], 1.0),
        ([1.0, 0], [-1.0, 0], 0.5),
        ([2.0, 0], [0, 1.0], 0.2),
    ):
        gradients = torch.tensor([first, second]).double()
        weights = MGDA().weights(gradients @ gradients.T)
        torch.testing.assert_close(weights, torch.tensor([share, 1 - share]).double())


def test_mgda_of_two_is_the_general_method() -> None:
    """Two strata and a third that is too far to count."""
    gradients = gradients_of(3, 3, 9)
    gradients[2] = (gradients[0] + gradients[1]) * 50
    weights = MGDA().weights(gradients @ gradients.T)
    two = MGDA().weights(gradients[:2] @ gradients[:2].T)
    torch.testing.assert_close(weights[:2], two, rtol=0, atol=1e-6)


def projected(gradients: Tensor, orders: list[list[int]]) -> Tensor:
    """Algorithm 1 of PCGrad on the gradients themselves; the mean of the projected ones."""
    result = []
    for i, order in enumerate(orders):
        g = gradients[i].clone()
        for j in order:
            if g @ gradients[j] < 0:
                g = g - (g @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        result.append(g)
    return torch.stack(result).mean(0)


def test_pcgrad_takes_the_most_conflicting_stratum_first() -> None:
    gradients = gradients_of(5, 4, 3)
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    orders = [
        sorted((j for j in range(4) if j != i), key=lambda j: float(cosines[i, j]))
        for i in range(4)
    ]
    weights = PCGrad().weights(gradients @ gradients.T)
    torch.testing.assert_close(weights @ gradients, projected(gradients, orders))


def test_random_pcgrad_has_the_expectation_of_all_orders() -> None:
    gradients = gradients_of(6, 3, 2)
    others = [[j for j in range(3) if j != i] for i in range(3)]
    choices = itertools.product(*(itertools.permutations(o) for o in others))
    expected = torch.stack([projected(gradients, [list(o) for o in c]) for c in choices]).mean(0)
    rule, total = PCGrad(order="random"), torch.zeros(2).double()
    for _ in range(2000):
        total += rule.weights(gradients @ gradients.T) @ gradients
        rule.commit()
    torch.testing.assert_close(total / 2000, expected, rtol=0, atol=0.05)


def test_random_pcgrad_changes_its_order_at_steps_only_and_resumes() -> None:
    gradients = gradients_of(6, 6, 3)
    gram = gradients @ gradients.T
    rule, other = PCGrad(order="random", seed=3), PCGrad(order="random", seed=3)
    first = rule.weights(gram)
    torch.testing.assert_close(rule.weights(gram), first, rtol=0, atol=0)
    for _ in range(5):
        rule.commit()
    assert not torch.equal(rule.weights(gram), first)
    other.load_state_dict(rule.state_dict())
    torch.testing.assert_close(other.weights(gram), rule.weights(gram), rtol=0, atol=0)


def test_pcgrad_without_conflict_is_the_mean() -> None:
    gradients = gradients_of(1, 4, 6).abs()
    weights = PCGrad().weights(gradients @ gradients.T)
    torch.testing.assert_close(weights, torch.full((4,), 0.25).double())


@examples
@given(seed=st.integers(0, 9999), strata=st.integers(2, 6))
def test_imtlg_projections_are_equal(seed: int, strata: int) -> None:
    gradients = gradients_of(seed, strata, 20)
    weights = IMTLG().weights(gradients @ gradients.T)
    assert float(weights.sum()) == pytest.approx(1)
    projections = (gradients / gradients.norm(dim=1, keepdim=True)) @ (weights @ gradients)
    torch.testing.assert_close(projections, projections.mean().expand(strata))


def test_aligned_mtl_is_the_mean_of_the_aligned_gradients() -> None:
    gradients = gradients_of(2, 4, 9)
    left, sizes, right = torch.linalg.svd(gradients, full_matrices=False)
    aligned = sizes.min() * left @ right
    weights = AlignedMTL().weights(gradients @ gradients.T)
    torch.testing.assert_close(weights @ gradients, aligned.mean(0))


def test_aligned_mtl_counts_dependent_gradients_as_one_component() -> None:
    gradients = gradients_of(2, 3, 9)
    gradients[2] = gradients[1]
    left, sizes, right = torch.linalg.svd(gradients, full_matrices=False)
    aligned = sizes[1] * left[:, :2] @ right[:2]
    weights = AlignedMTL().weights(gradients @ gradients.T)
    torch.testing.assert_close(weights @ gradients, aligned.mean(0))


@examples
@given(
    seed=st.integers(0, 9999), strata=st.integers(2, 8), width=st.integers(1, 12),
    repeat=st.booleans(), c=st.sampled_from([0.1, 0.5, 0.9]),
)  # fmt: skip
def test_cagrad_is_the_best_of_its_ball(
    seed: int, strata: int, width: int, repeat: bool, c: float
) -> None:
    """Weak duality: any point of the simplex bounds the worst gain; the gap is closed."""
    gradients = gradients_of(seed, strata, width, repeat)
    gram = gradients @ gradients.T
    size = gram.diagonal().max()
    weights = CAGrad(c).weights(gram) * (1 + c)
    step, mean = weights @ gradients, gradients.mean(0)
    radius = c * mean.norm()
    assert (step - mean).norm() <= radius + 1e-5 * size.sqrt()
    weights = weights - 1 / strata
    dual = weights / weights.sum()
    bound = dual @ gram.mean(1) + radius * (dual @ gram @ dual).clamp_min(0).sqrt()
    assert (gradients @ step).min() >= bound - 1e-4 * size


def test_cagrad_without_radius_is_the_mean() -> None:
    gradients = gradients_of(4, 4, 9)
    weights = CAGrad(c=0).weights(gradients @ gradients.T)
    torch.testing.assert_close(weights, torch.full((4,), 0.25).double())


def test_sign_agreement_follows_the_majority() -> None:
    gradients = torch.tensor([[1.0, 1.0, 1.0, 0.0], [3.0, -2.0, -1.0, 0.0], [5.0, 4.0, 0.0, 6.0]])
    got = SignAgreement().combine(gradients, None)
    torch.testing.assert_close(got, torch.tensor([3.0, 5 / 3, 0.0, 2.0]))
    strict = SignAgreement(unanimous=True).combine(gradients, None)
    torch.testing.assert_close(strict, torch.tensor([3.0, 0.0, 0.0, 0.0]))


def test_sign_agreement_of_two_is_agr_sum_halved() -> None:
    gradients = torch.randn(2, 50)
    agree = gradients[0].sign() == gradients[1].sign()
    expected = torch.where(agree, gradients.sum(0), 0.0) / 2
    for rule in (SignAgreement(), SignAgreement(unanimous=True)):
        torch.testing.assert_close(rule.combine(gradients, None), expected)


def test_trimmed_mean_drops_the_extremes() -> None:
    gradients = torch.tensor([[100.0, 1.0], [1.0, 2.0], [2.0, 3.0], [-50.0, 4.0], [3.0, 50.0]])
    got = TrimmedMean().combine(gradients, None)
    torch.testing.assert_close(got, torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(TrimmedMean(9).combine(gradients, None), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(TrimmedMean().combine(gradients[:2], None), gradients[:2].mean(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAGrad(c=1.0), "0 <= c < 1, got 1.0"),
        (lambda: PCGrad(order="fixed"), "order"),
        (lambda: TrimmedMean(trim=-1), "trim"),
        (lambda: TrimmedMean(trim=0.5), "trim"),
    ],
)
def test_bad_options_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
