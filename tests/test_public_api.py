"""The public names, pinned: a change here is a change for users."""

from __future__ import annotations

import importlib

import pytest

import pinet_fast

PUBLIC = {
    "pinet_fast": [
        "AggregationReport", "DIN", "GRU4Rec", "GradientAggregator", "Negatives", "PINet",
        "PluginHeads", "RaggedBatch", "RaggedLoader", "RunConfig", "SASRec", "SequenceStore",
        "Split", "Strata", "StrataIndex", "StratifiedBatchSampler", "__version__", "prepare",
        "register_head", "rules", "shared", "train",
    ],
    "pinet_fast.aggregation": [
        "AggregationReport", "GradientAggregator", "RowGroups", "StrataIndex", "shared",
    ],
    "pinet_fast.rules": [
        "Agreement", "AlignedMTL", "Backdoor", "Balanced", "BatchStrata", "CAGrad", "Claim",
        "ConstantRule", "EMA", "ElementwiseRule", "FunctionRule", "GramRule", "IMTLG", "Joint",
        "MGDA", "PCGrad", "Rule", "SignAgreement", "TrimmedMean", "Warmup", "by_name",
        "from_torchjd", "names",
    ],
    "pinet_fast.heads": [
        "GatedHeads", "Heads", "PluginHeads", "PredictionHeads", "head_names", "make_heads",
        "register_head",
    ],
    "pinet_fast.models": ["Backbone", "DIN", "GRU4Rec", "PINet", "SASRec", "SequenceModel"],
    "pinet_fast.training": ["Observer", "RunConfig", "train"],
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    names = importlib.import_module(module).__all__
    assert sorted(names) == sorted(PUBLIC[module])


def test_every_public_name_resolves() -> None:
    for name in pinet_fast.__all__:
        assert getattr(pinet_fast, name) is not None
        assert name in dir(pinet_fast)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Aggregator'"):
        pinet_fast.Aggregator  # noqa: B018
