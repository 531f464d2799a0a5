"""Hundreds of steps of a compiled model: nothing that is held grows, and nothing is compiled again.

What must not grow: live tensors, objects that Python tracks, those that the aggregator reaches,
graphs, and guarded entries of the compiler's cache.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch._dynamo import eval_frame

from pinet_fast import GradientAggregator
from pinet_fast.aggregation import traced_ops

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"
)
S, D, ITEMS = 3, 4, 11
WARM_UP, STEPS = 60, 400


class Recommender(nn.Module):
    """T ragged events, ids and positions, to one loss an event; the table is the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, D, padding_idx=0)
        self.positions = nn.Embedding(8, D)
        self.norm, self.hidden = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.items(ids) + self.positions(places)
        return (torch.tanh(self.hidden(self.norm(x))) @ self.items.weight.T).logsumexp(-1)


class Loop:
    """Steps of the compiled model on batches of changing B, lengths and strata."""

    def __init__(self) -> None:
        self.num_graphs = 0
        model = Recommender()
        self.opt = GradientAggregator(
            torch.optim.Adam(model.parameters(), lr=1e-3), "agreement", num_strata=S
        )
        self.compiled = torch.compile(model, backend=self._count_and_compile, dynamic=True)
        self.random = torch.Generator().manual_seed(3)

    def _count_and_compile(self, graph: Any, example_inputs: Any) -> Any:
        self.num_graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            users = int(torch.randint(5, 20, (), generator=self.random))
            lengths = torch.randint(1, 8, (users,), generator=self.random)
            strata = torch.randint(0, S, (users,), generator=self.random)
            strata[:S] = torch.arange(S)
            places = torch.cat([torch.arange(n) for n in lengths.tolist()])
            ids = torch.randint(1, ITEMS, (len(places),), generator=self.random)
            self.opt.zero_grad()
            with self.opt.stratify(strata, lengths=lengths):
                losses = self.compiled(ids, places)
            self.opt.backward(losses)
            self.opt.step()

    def held(self) -> dict[str, int]:
        """Count what is alive, and what Dynamo compiled and guards."""
        self.opt.zero_grad()
        gc.collect()
        objects = gc.get_objects()
        counters = torch._dynamo.utils.counters
        return {
            "live tensors": sum(issubclass(type(o), Tensor) for o in objects),
            "objects": len(objects),
            "objects of the aggregator": num_reachable(self.opt),
            "batches that ops of graphs can find": len(traced_ops._batches),
            "graphs": self.num_graphs,
            "frames compiled": sum(counters["frames"].values()),
            "graph breaks": sum(counters["graph_break"].values()),
            "compiled versions of the forward": num_cache_entries(),
        }


def num_cache_entries() -> int:
    """Count the compiled versions of the model's forward: each is a set of guards and a graph."""
    return len(eval_frame._debug_get_cache_entry_list(Recommender.forward.__code__))


def num_reachable(root: object) -> int:
    """Count the containers that ``root`` holds, but for modules, classes and functions' globals."""
    seen: dict[int, object] = {}
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type) or type(one).__name__ in SKIPPED:
            continue
        seen[id(one)] = one
        todo.extend(gc.get_referents(one))
    return len(seen)


SKIPPED = ("module", "function", "builtin_function_or_method", "OpOverload", "OpOverloadPacket")


def test_hundreds_of_compiled_steps_hold_nothing_more_and_compile_nothing_again() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    loop = Loop()
    loop.train(WARM_UP)
    before = loop.held()
    # Dynamo traces once more where it meets a float (eps), and throws the first graph away.
    assert before["graphs"] <= 2
    assert before["compiled versions of the forward"] == 1
    assert before["graph breaks"] == 0
    loop.train(STEPS)
    after = loop.held()
    grown = {what: after[what] - before[what] for what in before}
    # What grows does so by one a step or more; a few objects come and go with Python's own caches.
    allowed = {"live tensors": STEPS // 10, "objects": STEPS // 4}
    too_much = {what: n for what, n in grown.items() if n > allowed.get(what, 0)}
    assert not too_much, f"{STEPS} steps left more behind: {too_much}"
    assert loop.opt.report.leak == "proven"
    assert not loop.opt.coverage().unproven
    torch._dynamo.reset()
