"""Generates a log with a long tail of users, in which activeness confounds what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from pinet_fast._atomic import replacing
from pinet_fast.data.logs import SIMULATED_KEY
from pinet_fast.errors import ConfigError, DataError

IntArray = npt.NDArray[np.int64]

PARAMETERS_KEY = b"pinet_fast.simulated.parameters"
"""Key of the Parquet schema metadata that holds the parameters of the generator, as JSON."""

_VERSION = 1
_MIN_EVENTS, _MAX_EVENTS = 5, 300
_PARETO_SHAPE, _PARETO_SCALE = 1.6, 6.0
_FULLY_HEAD = 60  # events at which a user behaves like a head user and nothing else
_ITEMS_PER_CLUSTER = 50
_NEXT, _HEAD_NEXT, _STAY = 0.45, 0.30, 0.25
_START, _SPAN_S, _GAP_S = 1_600_000_000, 3 * 365 * 86_400, 86_400


def simulate_log(path: str | Path, *, users: int = 6000, items: int = 1500, seed: int = 0) -> Path:
    """Write a generated log; every number measured on it must be labelled as simulated.

    The generator, all of it decided by the seed:

    - **Activeness.** A user has 5 + floor(6 X) events, X Pareto (Lomax) of shape 1.6, at most 300:
      about 15 in the mean and 8 in the median. Headness h in 0..1 rises with log activeness, from
      5 events (0) to 60 (1).
    - **Items** lie in latent clusters of about 50, in which popularity is Zipf's, 1 / rank.
    - **Taste.** Each user has a Dirichlet taste over clusters. Its prior goes from one order of the
      clusters (h = 0) to another (h = 1), and head users spread over more of them.
    - **Sequences** are Markov chains. From an item, the next one is, with probability 0.45, one
      of two successors that are the same for all users; with 0.30 h, a successor that only head
      users follow, in any cluster; with 0.25 (1 - h), another item of the cluster; and else an
      item of a cluster of the user's taste. The same item never comes twice in a row.
    - **Times** are seconds; gaps are exponential, a day in the mean, and a user has no ties.

    The shared successors are what a backbone should learn for everyone. Tastes and head successors
    depend on activeness, and head users give most events, so joint training bends towards the
    head: activeness confounds. Rows come in order of time, as in a real log, and ids say nothing
    about activeness or popularity.

    Args:
        path: File to write, ending in ``.parquet``; the columns are user, item, timestamp, int64.
        users: Number of users, at least 10.
        items: Size of the catalogue, at least 100; rare items may not occur.
        seed: An integer >= 0.

    Returns:
        The path.

    Raises:
        ConfigError: A number below its least.
        DataError: Another suffix, or a folder that is missing or cannot be written.
    """
    path = Path(path)
    for name, value, least in (("users", users, 10), ("items", items, 100), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"simulate: expected {name} to be an integer >= {least}, got {value}")
    if path.suffix.lower() != ".parquet":
        raise DataError(f"log {path}: expected a name ending in .parquet, got {path.suffix!r}")
    rng = np.random.Generator(np.random.Philox(seed))
    world = _World(rng, items)
    lengths = np.sort(_lengths(rng, users))[::-1]
    sequences = _sequences(rng, world, lengths)
    times = _times(rng, lengths)
    user_ids = np.repeat(rng.permutation(users) + 1, lengths)
    item_ids = (rng.permutation(items) + 1)[sequences]
    by_time = np.lexsort((user_ids, times))
    table = pa.table(
        {"user": user_ids[by_time], "item": item_ids[by_time], "timestamp": times[by_time]}
    )
    parameters = {"version": _VERSION, "users": users, "items": items, "seed": seed}
    metadata = {SIMULATED_KEY: b"true", PARAMETERS_KEY: json.dumps(parameters).encode()}
    try:
        with replacing(path) as file:
            pa.parquet.write_table(table.replace_schema_metadata(metadata), file)
    except OSError as error:
        raise DataError(
            f"log {path}: cannot be written ({error.strerror}); choose a folder that exists"
        ) from error
    return path


class _World:
    """What all users share. Items are numbered cluster by cluster, popular ones first."""

    def __init__(self, rng: np.random.Generator, num_items: int) -> None:
        num_clusters = max(2, num_items // _ITEMS_PER_CLUSTER)
        numbers = np.arange(num_items)
        self.cluster_of = np.sort(numbers % num_clusters)  # [V]
        self.starts = np.searchsorted(self.cluster_of, np.arange(num_clusters + 1))  # [C + 1]
        ranks = numbers - self.starts[self.cluster_of]
        self.mass = np.concatenate(([0.0], np.cumsum(1.0 / (ranks + 1))))  # [V + 1], popularity
        sizes = np.diff(self.starts)[self.cluster_of]
        self.neighbour = numbers - ranks + (ranks + 1) % sizes  # the next rank of the cluster
        zipf = 1.0 / np.arange(1, num_clusters + 1)
        self.tail_prior = rng.permutation(zipf / zipf.sum())  # [C]
        self.head_prior = rng.permutation(zipf / zipf.sum())
        self.successors = np.stack([self.items_in(rng, self.cluster_of) for _ in range(2)])
        self.head_successors = self.items_in(rng, rng.integers(0, num_clusters, num_items))

    def items_in(self, rng: np.random.Generator, clusters: IntArray) -> IntArray:
        """Draw an item of each cluster by popularity."""
        first, end = self.starts[clusters], self.starts[clusters + 1]
        low, high = self.mass[first], self.mass[end]
        places = low + rng.random(len(clusters)) * (high - low)
        items = np.searchsorted(self.mass, places, "right") - 1
        inside: IntArray = np.clip(items, first, end - 1)  # rounding may step over a border
        return inside


def _lengths(rng: np.random.Generator, users: int) -> IntArray:
    extra = np.floor(rng.pareto(_PARETO_SHAPE, users) * _PARETO_SCALE)
    lengths: IntArray = np.minimum(_MIN_EVENTS + extra, _MAX_EVENTS).astype(np.int64)
    return lengths


def _sequences(rng: np.random.Generator, world: _World, lengths: IntArray) -> IntArray:
    # Lengths descend, so the users that still have an event at step t are the first `active`.
    headness = np.log(lengths / _MIN_EVENTS) / np.log(_FULLY_HEAD / _MIN_EVENTS)
    headness = np.minimum(headness, 1.0)[:, None]
    prior = (1 - headness) * world.tail_prior + headness * world.head_prior
    tastes = rng.standard_gamma(prior * (3 + 12 * headness)) + 1e-9
    tastes = np.cumsum(tastes / tastes.sum(axis=1, keepdims=True), axis=1)
    shares = [np.full_like(headness, _NEXT), _HEAD_NEXT * headness, _STAY * (1 - headness)]
    limits = np.cumsum(np.hstack(shares), axis=1)
    firsts = np.concatenate(([0], np.cumsum(lengths)))
    out = np.empty(firsts[-1], np.int64)
    item = np.zeros(0, np.int64)
    for t in range(int(lengths[0])):
        active = int(np.count_nonzero(lengths > t))
        wish = (tastes[:active] < rng.random((active, 1))).sum(axis=1)
        wish = np.minimum(wish, len(world.tail_prior) - 1)
        if t == 0:
            item = world.items_in(rng, wish)
        else:
            item = item[:active]
            # 0 to 3: a shared successor, a head successor, the same cluster, the user's taste.
            move = (limits[:active] < rng.random((active, 1))).sum(axis=1)
            options = [
                world.successors[rng.integers(0, 2, active), item],
                world.head_successors[item],
                world.items_in(rng, world.cluster_of[item]),
                world.items_in(rng, wish),
            ]
            chosen = np.choose(move, options)
            item = np.where(chosen == item, world.neighbour[item], chosen)
        out[firsts[:active] + t] = item
    return out


def _times(rng: np.random.Generator, lengths: IntArray) -> IntArray:
    gaps = 1 + rng.exponential(_GAP_S, int(lengths.sum())).astype(np.int64)
    firsts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    gaps[firsts] = 0
    elapsed = np.cumsum(gaps)
    begin = _START + rng.integers(0, _SPAN_S, len(lengths))
    times: IntArray = elapsed + np.repeat(begin - elapsed[firsts], lengths)
    return times
