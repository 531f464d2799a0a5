"""One whole aggregated step with each backend forced: autograd's gradients, and every op ran."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.batches import ragged_batch
from torch import nn

from pinet_fast import GradientAggregator, SASRec
from pinet_fast.kernels import _registry

NUM_STRATA, NUM_ITEMS, DIM, LENGTH = 3, 30, 8, 7
STRATA = torch.tensor([0, 2, 1, 0, 2, 1])
LENGTHS = [3, 6, 1, 5, 2, 4]

BACKWARD = {
    "stratified_linear_backward", "stratified_norm_backward", "stratum_gram", "stratum_solve",
    "stratum_combine",
}  # fmt: skip
"""What every model with linear and norm layers runs in a step under a Gram rule."""

SPARSE = {"stratified_embedding_reduce"}
DENSE = {"stratified_embedding_add"}  # a table that is the output layer too
ATTENTION = {"ragged_attention", "ragged_attention_backward"}
MASKS = {"dropout_mask"}
SUMS = {"stratum_sums"}  # a bias or a gate of its own


class TiedEncoder(nn.Module):
    """nn.TransformerEncoder whose item table is its output layer, full softmax."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, DIM)
        self.positions = nn.Parameter(torch.randn(LENGTH, DIM))
        self.gate = nn.Parameter(torch.randn(DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, 2, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, items, targets):
        """Return one loss a user: its last event's cross-entropy."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.encoder(self.items(items) + self.positions, mask=mask, is_causal=True)
        x = x[:, -1] * self.gate
        return F.cross_entropy(x @ self.items.weight.T, targets, reduction="none")


def tied_encoder():
    model = TiedEncoder()
    data = torch.randint(NUM_ITEMS, (len(STRATA), LENGTH)), torch.randint(NUM_ITEMS, (len(STRATA),))
    return model, data, STRATA, STRATA


def sasrec(loss, dropout=0.0):
    model = SASRec(NUM_ITEMS, max_len=LENGTH, dim=DIM, num_blocks=1, dropout=dropout, loss=loss)
    batch = ragged_batch(STRATA.tolist(), LENGTHS, num_strata=NUM_STRATA, num_items=NUM_ITEMS)
    return model, (batch,), batch.strata, batch.strata.events.ids


CASES = {
    "sasrec_bce": (lambda: sasrec("bce", 0.2), BACKWARD | SPARSE | ATTENTION | MASKS),
    "sasrec_ce": (lambda: sasrec("ce"), BACKWARD | DENSE | ATTENTION),
    "tied_encoder": (tied_encoder, BACKWARD | DENSE | SUMS),
}


def relative_errors(model, data, strata, row_ids, rule):
    """Take one step; return how far every gradient is from autograd's weighted sum, and report."""
    model.train()
    parameters = list(model.parameters())
    torch.manual_seed(1)  # both forwards drop the same
    losses = model(*data)
    means = torch.stack([losses[row_ids == s].mean() for s in range(NUM_STRATA)])
    separate = [torch.autograd.grad(mean, parameters, retain_graph=True) for mean in means]

    opt = GradientAggregator(torch.optim.SGD(parameters, lr=0.0), rule, num_strata=NUM_STRATA)
    opt.zero_grad()
    torch.manual_seed(1)
    with opt.stratify(strata):
        losses = model(*data)
    opt.backward(losses)
    opt.step()
    weights = opt.report.weights
    errors = []
    for i, (p, *of_strata) in enumerate(zip(parameters, *separate, strict=True)):
        by_stratum = weights if weights.dim() == 1 else weights[i]
        right = sum(w * g for w, g in zip(by_stratum.to(p.dtype), of_strata, strict=True))
        errors.append(float((p.grad - right).abs().max() / right.abs().max().clamp_min(1e-6)))
    return errors, opt.report


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
@pytest.mark.parametrize("rule", ["balanced", "agreement"])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_step_runs_every_op_and_equals_autograd(name, rule, backend, monkeypatch):
    make, ops = CASES[name]
    if backend == "cpp" and (reason := _registry.backend_status()["cpp"]):
        pytest.skip(reason)
    monkeypatch.setenv("PINET_FAST_BACKEND", backend)
    case = make()
    before = dict(_registry._calls)
    errors, report = relative_errors(*case, rule)
    assert report.leak == "proven"
    assert max(errors) < 1e-4
    ran = {key for key, count in _registry._calls.items() if count > before.get(key, 0)}
    assert {op for op, _ in ran} >= ops
    assert {used for _, used in ran} == {backend}


def test_every_op_is_run_by_some_step():
    """No kernel that nothing calls: heads run ``routed_linear`` in a stage of their own."""
    heads = {"routed_linear", "routed_linear_backward"}
    in_steps = set().union(*(ops for _, ops in CASES.values()))
    assert set(_registry.ops()) == in_steps | heads


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
def test_a_step_of_plugin_heads_runs_the_routed_ops(backend, monkeypatch):
    from pinet_fast import PINet, PluginHeads

    if backend == "cpp" and (reason := _registry.backend_status()["cpp"]):
        pytest.skip(reason)
    monkeypatch.setenv("PINET_FAST_BACKEND", backend)
    backbone, (batch,), *_ = sasrec("ce")
    net = PINet(backbone, PluginHeads(NUM_STRATA, DIM), None)
    before = dict(_registry._calls)
    net(batch).mean().backward()
    assert net.heads.up_weight.grad.abs().sum() > 0
    for op in ("routed_linear", "routed_linear_backward"):
        assert _registry.num_calls(op, backend) == before.get((op, backend), 0) + 2
