"""What every kind of plugin heads is, and the registry of kinds."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pinet_fast.aggregation.strata_index import RowGroups

    Kind: TypeAlias = Callable[[int, int], "Heads"]


class Heads(nn.Module):
    """One small network a stratum on the states of a frozen backbone.

    A kind of heads is made by ``kind(num_strata, dim)``. Untrained heads are the identity, so that
    training starts from the backbone's scores; every entry of the state dict has the strata as its
    first dimension, so that each stratum's head can be kept at its own best epoch; and a row goes
    through the head of its stratum alone. ``tests/support/head_contract.py`` checks all of this.

    Attributes:
        num_strata: S.
    """

    num_strata: int

    def forward(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Route every row to the head of its stratum.

        Args:
            rows: [N, d].
            groups: The N rows grouped by stratum, as ``batch.strata.users`` or ``.events``.

        Returns:
            [N, d], in the order of ``rows``.

        Raises:
            StrataError: ``groups`` are of another number of rows or strata.
        """
        raise NotImplementedError


_KINDS: dict[str, Kind] = {}


def register_head(name: str, kind: Kind) -> None:
    """Make a kind of heads known by name, as in ``pinet-fast train --head NAME``.

    Args:
        name: The name.
        kind: A class, or anything that makes heads from (num_strata, dim).

    Raises:
        ConfigError: The name is taken by another kind.
    """
    if _KINDS.get(name, kind) is not kind:
        raise ConfigError(f"register_head: {name!r} is taken; choose another name")
    _KINDS[name] = kind


def head_names() -> tuple[str, ...]:
    """Return the names of the kinds of heads."""
    return tuple(sorted(_KINDS))


def make_heads(name: str, num_strata: int, dim: int) -> Heads:
    """Return new heads of a kind.

    Args:
        name: The kind.
        num_strata: S.
        dim: Width of the states.

    Raises:
        ConfigError: No such kind.
    """
    if name not in _KINDS:
        near = get_close_matches(name, _KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"head: expected one of {', '.join(head_names())}; got {name!r}{hint}")
    return _KINDS[name](num_strata, dim)
