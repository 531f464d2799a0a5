"""What others pay for the S gradients of a batch, beside our one pass, in the same run.

Each candidate computes the S stratum gradients of the same batch, weighs them by the same rule and
steps; the reference is a plain training step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from benchmarks.test_step import full_batch, make
from pinet_fast import GradientAggregator, RaggedBatch, StrataIndex
from pinet_fast.rules import Balanced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pinet_fast import SASRec


def stratum_means(losses: Tensor, batch: RaggedBatch) -> list[Tensor]:
    """Return the mean loss of every stratum."""
    events = batch.strata.events
    assert events is not None
    parts = losses.split(list(events.counts))  # the strata of these batches are sorted
    return [part.mean() for part in parts]


def follow(parameters: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> None:
    """Leave the combination of the S gradients in every ``p.grad``, by Gram and rule."""
    stacked = [torch.stack(parts) for parts in zip(*gradients, strict=True)]
    flat = [g.flatten(1) for g in stacked]
    gram = torch.stack([g @ g.T for g in flat]).sum(0).double()
    weights = Balanced().weights(gram).to(flat[0].dtype)
    for p, g in zip(parameters, stacked, strict=True):
        p.grad = torch.einsum("s,s...->...", weights, g)


def part_of(batch: RaggedBatch, stratum: int) -> RaggedBatch:
    """Return the users of one stratum as a batch of their own."""
    users, events = batch.strata.users, batch.strata.events
    assert events is not None
    a, b = users.offsets[stratum : stratum + 2]
    i, j = events.offsets[stratum : stratum + 2]
    lengths = batch.offsets.diff()[a:b]
    return RaggedBatch(
        values=batch.values[i:j],
        offsets=batch.offsets[a : b + 1] - batch.offsets[a],
        strata=StrataIndex(torch.zeros(b - a, dtype=torch.int64), 1, lengths),
        users=batch.users[a:b],
        targets=None if batch.targets is None else batch.targets[i:j],
        negatives=None if batch.negatives is None else batch.negatives[i:j],
        max_len=batch.max_len,
    )


def ours(model: SASRec, batch: RaggedBatch) -> Callable[[], None]:
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), "balanced")

    def step() -> None:
        opt.zero_grad()
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        opt.step()

    return step


def retained(model: SASRec, batch: RaggedBatch) -> Callable[[], None]:
    """One forward, S backwards over its graph."""
    parameters = list(model.parameters())
    opt = torch.optim.Adam(parameters)

    def step() -> None:
        means = stratum_means(model(batch), batch)
        follow(parameters, [torch.autograd.grad(m, parameters, retain_graph=True) for m in means])
        opt.step()

    return step


def vmapped(model: SASRec, batch: RaggedBatch) -> Callable[[], None]:
    """One forward, its S backwards vectorized by vmap."""
    parameters = list(model.parameters())
    opt = torch.optim.Adam(parameters)

    def step() -> None:
        means = torch.stack(stratum_means(model(batch), batch))
        stacked = torch.autograd.grad(
            means, parameters, torch.eye(len(means)), is_grads_batched=True
        )
        follow(parameters, [[g[s] for g in stacked] for s in range(len(means))])
        opt.step()

    return step


def micro_batches(model: SASRec, batch: RaggedBatch) -> Callable[[], None]:
    """S forwards and backwards, one a stratum."""
    parameters = list(model.parameters())
    opt = torch.optim.Adam(parameters)
    parts = [part_of(batch, s) for s in range(batch.strata.num_strata)]

    def step() -> None:
        follow(parameters, [torch.autograd.grad(model(p).mean(), parameters) for p in parts])
        opt.step()

    return step


def torchjd_autojac(model: SASRec, batch: RaggedBatch) -> Callable[[], None]:
    torchjd = pytest.importorskip("torchjd", reason="TorchJD is not installed")
    from torchjd.autojac import backward, jac_to_grad

    parameters = list(model.parameters())
    opt = torch.optim.Adam(parameters)
    aggregator = torchjd.aggregation.AlignedMTL()

    def step() -> None:
        opt.zero_grad()
        backward(stratum_means(model(batch), batch))
        jac_to_grad(parameters, aggregator)
        opt.step()

    return step


def torchjd_autogram(model: SASRec, batch: RaggedBatch) -> Callable[[], None]:
    torchjd = pytest.importorskip("torchjd", reason="TorchJD is not installed")
    from torchjd.autogram import Engine

    opt = torch.optim.Adam(model.parameters())
    engine = Engine(model, batch_dim=None)
    weighting = torchjd.aggregation.AlignedMTLWeighting()

    def step() -> None:
        opt.zero_grad()
        losses = torch.stack(stratum_means(model(batch), batch))
        losses.backward(weighting(engine.compute_gramian(losses)))
        opt.step()

    return step


PEERS = {
    "ours": ours,
    "S retained backwards": retained,
    "vmapped backwards": vmapped,
    "S micro-batches": micro_batches,
    "TorchJD autojac": torchjd_autojac,
    "TorchJD autogram": torchjd_autogram,
}


def check(peer: str, batch: RaggedBatch) -> None:
    """Nobody is timed on a wrong gradient: ours and the plain ways agree."""
    gradients = []
    for make_step in (retained, PEERS[peer]):
        model = make("bce").eval()
        make_step(model, batch)()
        gradients.append([p.grad for p in model.parameters()])
    for theirs, mine in zip(*gradients, strict=True):
        assert theirs is not None
        assert mine is not None
        assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def rounds_for(step: Callable[[], None]) -> int:
    """Return as many pairs as fit a few seconds: some peers take a hundred times a step."""
    started = time.perf_counter()
    step()
    return max(4, min(12, int(6 / (time.perf_counter() - started))))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # ops that vmap loops over
@pytest.mark.parametrize("num_strata", [4, 8])
@pytest.mark.parametrize("peer", PEERS)
def test_step_of(peer: str, num_strata: int, paired: Callable[..., Any], benchmark: Any) -> None:
    benchmark.group = "peers"
    batch = full_batch(num_strata)
    if "TorchJD" not in peer:  # which follows a rule of its own
        check(peer, batch)
    try:
        candidate = PEERS[peer](make("bce"), batch)
        candidate()
        rounds = rounds_for(candidate)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"{peer} does not run this model: {str(error).splitlines()[0][:120]}")
    plain_model = make("bce")
    plain_opt = torch.optim.Adam(plain_model.parameters())

    def plain() -> None:
        plain_opt.zero_grad()
        plain_model(batch).mean().backward()
        plain_opt.step()

    assert paired(candidate, plain, rounds=rounds).ratio > 0
