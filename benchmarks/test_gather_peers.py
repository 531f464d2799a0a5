"""The gather beside what one would write with pyarrow and torch, and what other libraries do.

The other libraries' builders are written here after what they do.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.gathering import BATCH, FAR, MAX_LEN, Case, Stream, case, compared, fast, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["case"]  # the fixture, found by its name


def test_gather_over_pyarrow_take(case: Case, paired: Callable[..., Any], benchmark: Any) -> None:
    """``take`` of the rows of a list column; it cuts no window, so it copies whole sequences."""
    benchmark.group = "gather"
    column = pa.LargeListArray.from_arrays(pa.array(case.offsets), pa.array(case.items))
    mine, turn = fast(case), itertools.cycle(case.batches[FAR:])
    users = next(turn)
    taken = column.take(pa.array(users))
    for row, window in zip(taken[:50].to_pylist(), windows(case, users[:50]), strict=True):
        assert row[-MAX_LEN:] == window.tolist()
    paired(Stream(mine), Stream(lambda: column.take(pa.array(next(turn)))), rounds=30)


def test_gather_over_numpy_slices(case: Case, paired: Callable[..., Any], benchmark: Any) -> None:
    benchmark.group = "gather"
    mine, turn = fast(case), itertools.cycle(case.batches[FAR:])
    users = next(turn)
    assert (np.concatenate(windows(case, users)) == mine.batch(users)).all()
    paired(Stream(mine), Stream(lambda: np.concatenate(windows(case, next(turn)))), rounds=15)


class Windows(Dataset[torch.Tensor]):
    """One window a user, as a map-style dataset."""

    def __init__(self, case: Case) -> None:
        self.items, self.offsets = torch.from_numpy(case.items), case.offsets

    def __getitem__(self, user: int) -> torch.Tensor:
        end = int(self.offsets[user + 1])
        return self.items[max(int(self.offsets[user]), end - MAX_LEN) : end]


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_gather_over_torch_loader(case: Case, paired: Callable[..., Any], benchmark: Any) -> None:
    """Torch's DataLoader without workers: one indexing a user, padded in ``collate_fn``."""
    benchmark.group = "gather"
    loader = DataLoader(Windows(case), batch_sampler=case.batches[FAR:].tolist(), collate_fn=padded)

    def forever() -> Iterator[torch.Tensor]:
        while True:
            yield from loader

    mine, theirs = fast(case), forever()
    rows = next(theirs)
    assert rows.shape[0] == BATCH
    assert (rows[rows > 0].numpy() == mine.batch(case.batches[FAR])).all()
    mine.next = 0
    paired(Stream(mine), Stream(lambda: next(theirs)), rounds=6)


def padded_from_lists(sequences: list[list[int]], users: np.ndarray) -> torch.Tensor:
    """RecTools' way: Python lists, a float64 matrix filled row by row, then integers."""
    out = np.zeros((len(users), MAX_LEN))
    for b, user in enumerate(users.tolist()):
        row = sequences[user][-MAX_LEN:]
        out[b, -len(row) :] = row
    return torch.LongTensor(out)


def test_gather_over_rectools_style(
    case: Case, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    benchmark.group = "gather"
    theirs = case.batches[FAR : FAR + 20]
    sequences = {
        user: window.tolist()
        for users in theirs
        for user, window in zip(users.tolist(), windows(case, users), strict=True)
    }
    mine, turn = fast(case), itertools.cycle(theirs)
    rows = padded_from_lists(sequences, theirs[0])
    assert (rows[rows > 0].numpy() == mine.batch(theirs[0])).all()
    compared(
        mine, lambda: padded_from_lists(sequences, next(turn)), paired, benchmark, capsys, rounds=15
    )


def padded_by_mask(items: torch.Tensor, offsets: torch.Tensor, users: torch.Tensor) -> Any:
    """RePlay's way: a mask of the padded rectangle, one take, one where."""
    ends = offsets[users + 1]
    lengths = torch.minimum(ends - offsets[users], torch.tensor(MAX_LEN))
    column = torch.arange(MAX_LEN)
    mask = column >= MAX_LEN - lengths.unsqueeze(1)
    places = ends.unsqueeze(1) - MAX_LEN + column
    return torch.where(mask, torch.take(items, places.clamp_(min=0)), 0), mask


def test_gather_over_replay_style(
    case: Case, paired: Callable[..., Any], benchmark: Any, capsys: Any
) -> None:
    benchmark.group = "gather"
    mine, turn = fast(case), itertools.cycle(torch.from_numpy(case.batches[FAR:]))
    users = next(turn)
    items, offsets = torch.from_numpy(case.items), torch.from_numpy(case.offsets)
    rows, mask = padded_by_mask(items, offsets, users)
    assert (rows[mask].numpy() == mine.batch(users.numpy())).all()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compared(
            mine,
            lambda: padded_by_mask(items, offsets, next(turn)),
            paired,
            benchmark,
            capsys,
            rounds=30,
        )
    finally:
        torch.set_num_threads(threads)
