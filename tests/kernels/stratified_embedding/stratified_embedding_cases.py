"""Inputs and the oracle of ``stratified_embedding``: a dictionary, filled entry by entry."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LAYOUTS = ("contiguous", "reversed", "strided", "padded", "expanded", "constant")
# Of index tensors: their own, a row of [2, N], a column of [N, 2], one id for all.
INDEX_LAYOUTS = ("contiguous", "row", "column", "constant")


@dataclass
class Case:
    """Arguments of one call, with room for several lists."""

    num_strata: int
    num_rows: int
    shape: tuple = (5,)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    ids: list = field(default_factory=list)
    strata: list = field(default_factory=list)
    grads: list = field(default_factory=list)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def add(self, count, layout="contiguous", index_layout="contiguous", ids=None):
        """Add a list of ``count`` lookups."""
        if ids is None:
            ids = torch.randint(self.num_rows, (count,), generator=self.generator)
        else:
            ids = torch.tensor(ids, dtype=torch.int64)
        strata = torch.randint(self.num_strata, (count,), generator=self.generator)
        if index_layout == "row":
            ids, strata = torch.stack([strata, ids]).flip(0)
        elif index_layout == "column":
            ids, strata = torch.stack([ids, strata], 1).unbind(1)
        elif index_layout == "constant" and count:
            ids, strata = ids[:1].expand(count), strata[:1].expand(count)
        self.ids.append(ids)
        self.strata.append(strata)
        self.grads.append(self.laid_out((count, *self.shape), layout))
        return self

    def laid_out(self, shape, layout):
        """Return random numbers in the given memory layout."""
        if layout == "reversed":
            return self.normal(*reversed(shape)).permute(tuple(reversed(range(len(shape)))))
        if layout == "strided":
            return self.normal(*shape, 2)[..., 1]
        if layout == "padded":
            count = torch.Size(shape[1:]).numel()
            return self.normal(shape[0], count + 3)[:, 1 : count + 1].reshape(shape)
        if layout == "expanded":
            return self.normal(*shape[1:]).expand(shape)
        if layout == "constant":
            return self.normal(1).squeeze(0).expand(shape)
        return self.normal(*shape)

    @property
    def lists(self):
        return self.ids, self.strata, self.grads

    @property
    def arguments(self):
        return *self.lists, self.num_strata, self.num_rows


def sums(case):
    """Return the sums of every (stratum, id), in the order of the entries, float32 at least."""
    wide = torch.promote_types(case.dtype, torch.float32)
    found = {}
    for ids, strata, grads in zip(*case.lists, strict=True):
        pairs = zip(strata.tolist(), ids.tolist(), strict=True)
        for n, key in enumerate(pairs):
            held = found.get(key)
            if held is None:
                held = torch.zeros(case.shape, dtype=wide)
            found[key] = held + grads[n].to(wide)
    return found


def oracle(case):
    """Return what ``stratified_embedding_reduce`` should, made from the dictionary."""
    found = sums(case)
    rows = sorted({v for _, v in found})
    values = torch.zeros((case.num_strata, len(rows), *case.shape), dtype=case.dtype)
    touched = torch.zeros(case.num_strata, len(rows), dtype=torch.bool)
    for (s, v), total in found.items():
        values[s, rows.index(v)] = total.to(case.dtype)
        touched[s, rows.index(v)] = True
    return torch.tensor(rows, dtype=torch.int64), values, touched


def added(case, dense):
    """Return what ``stratified_embedding_add`` should make of ``dense``."""
    result = dense.clone()
    for key, total in sums(case).items():
        result[key] = (dense[key].to(total.dtype) + total).to(dense.dtype)
    return result


def same(got, expected):
    """Check that tensors agree in every bit that shows, NaN included."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
