"""The models that runs can train, by name, from a run's options."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pinet_fast.data import item_attributes
from pinet_fast.models import DIN, GRU4Rec, SASRec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from pinet_fast.data import SequenceStore
    from pinet_fast.training.config import RunConfig


def _sasrec(config: RunConfig, store: SequenceStore) -> nn.Module:
    return SASRec(
        store.num_items,
        max_len=config.max_len,
        dim=config.dim,
        num_blocks=config.blocks,
        num_heads=config.attention_heads,
        dropout=config.dropout,
        loss=config.loss,
        tied=config.tied,
        gbce_t=config.gbce_t,
        norm=config.norm,  # type: ignore[arg-type] # checked by RunConfig
    )


def _gru4rec(config: RunConfig, store: SequenceStore) -> nn.Module:
    return GRU4Rec(
        store.num_items,
        max_len=config.max_len,
        dim=config.dim,
        num_layers=config.blocks,
        dropout=config.dropout,
        loss=config.loss,
        tied=config.tied,
        gbce_t=config.gbce_t,
    )


def _din(config: RunConfig, store: SequenceStore) -> nn.Module:
    categories = None
    if config.attributes:
        found = item_attributes(store, config.attributes, item=config.item_col)
        categories = torch.from_numpy(found)
    return DIN(
        store.num_items,
        max_len=config.max_len,
        dim=config.dim,
        dropout=config.dropout,
        categories=categories,
        pooling="mean" if config.model == "din-mean" else "attention",
    )


BUILDERS: dict[str, Callable[[RunConfig, SequenceStore], nn.Module]] = {
    "sasrec": _sasrec,
    "gru4rec": _gru4rec,
    "din": _din,
    "din-mean": _din,
}
"""Makes the backbone of a run; the names are ``pinet_fast.training.config.MODELS``."""


def backbone_of(config: RunConfig, store: SequenceStore) -> nn.Module:
    """Return the untrained backbone of a run.

    Args:
        config: The options.
        store: The log: its number of items, and the ids that attributes belong to.

    Raises:
        DataError: The attributes cannot be used.
    """
    return BUILDERS[config.model](config, store)
