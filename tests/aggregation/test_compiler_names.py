"""Another torch may lack private names of its compiler: compiled models then run eagerly."""

from __future__ import annotations

import pkgutil
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.oracle import autograd_stratum_gradients
from torch import nn

import pinet_fast
from pinet_fast import GradientAggregator
from pinet_fast.aggregation import compiler_names, session
from pinet_fast.aggregation.compiler_names import (
    NEEDED,
    STANCES,
    can_trace,
    eager_stance,
    frame_callback,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"
)
S = 3
STRATA = torch.tensor([0, 1, 2, 2, 1, 0])


class Pick:
    """A rule that puts all weight on one stratum."""

    index = 0

    def __call__(self, gram: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(gram), dtype=gram.dtype)[self.index]


class Graphs:
    """Counts what Dynamo hands to the backend."""

    def __init__(self) -> None:
        self.count = 0
        self.backend = torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        return self.backend(graph, example_inputs)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    forget()
    yield
    torch._dynamo.reset()
    forget()


def forget() -> None:
    can_trace.cache_clear()
    frame_callback.cache_clear()


def assert_exact_steps() -> Graphs:
    """Run steps of a compiled model, each compared with plain passes; return its graphs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    rule, graphs = Pick(), Graphs()
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), rule, num_strata=S)
    compiled = torch.compile(model, backend=graphs, dynamic=True)
    for step in range(4):
        x = torch.randn(6, 3, dtype=torch.float64)
        expected = autograd_stratum_gradients(
            lambda x=x: model(x).square().sum(1), STRATA, [*model.parameters()], S
        )
        rule.index = step % S
        opt.zero_grad()
        with opt.stratify(STRATA):
            losses = compiled(x).square().sum(1)
        opt.backward(losses)
        for p, want in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, want[step % S], rtol=1e-10, atol=1e-13)
        opt.step()
    return graphs


def remove(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Take a name away from the code here: torch's own uses of it are not what is tested."""
    resolve = pkgutil.resolve_name

    def without(asked: str) -> Any:
        if asked == name:
            raise AttributeError(asked)
        return resolve(asked)

    monkeypatch.setattr(pkgutil, "resolve_name", without)


def forbidden() -> None:
    raise AssertionError("the code that needs the names was imported")


@pytest.mark.parametrize("name", ["", *STANCES])
def test_the_stance_is_put_back_with_or_without_the_quick_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = torch._dynamo.eval_frame
    remove(monkeypatch, name)
    compiler_names._quick_stance.cache_clear()
    try:
        with torch.compiler.set_stance("eager_on_recompile"):
            with eager_stance():
                assert frames._stance.stance == "force_eager"
                with eager_stance():
                    assert frames._stance.stance == "force_eager"
                assert frames._stance.stance == "force_eager"
            assert frames._stance.stance == "eager_on_recompile"
        assert (compiler_names._quick_stance() is None) == bool(name)
    finally:
        compiler_names._quick_stance.cache_clear()


@pytest.mark.parametrize("name", NEEDED)
def test_without_a_name_compiled_models_run_eagerly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, attribute = name.split(":")
    torch._dynamo.lookup_backend("aot_eager")  # what torch itself imports lazily is imported
    if attribute in ("skip_code", "get_overridable_functions"):
        monkeypatch.delattr(pkgutil.resolve_name(where), attribute)
    else:  # torch itself calls it in every step
        remove(monkeypatch, name)
    monkeypatch.setattr(session, "traceable", forbidden)
    shown = re.escape(name.replace(":", "."))
    said = (
        rf"run eagerly inside stratify: torch {re.escape(torch.__version__)} has no {shown},.*pip"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        graphs = assert_exact_steps()
    assert graphs.count == 0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact_steps()  # said once


def test_a_torch_that_keeps_no_list_of_backends_is_taken_to_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo import eval_frame

    from pinet_fast.aggregation.envelope import is_compiler_used

    assert not is_compiler_used()
    with monkeypatch.context() as patch:
        patch.delattr(eval_frame, "cached_backends")
        assert is_compiler_used()


def test_with_all_names_graphs_run() -> None:
    assert can_trace()
    assert assert_exact_steps().count >= 1


def test_the_list_is_what_the_code_uses() -> None:
    """A private name of the compiler that the list lacks would be an AttributeError one day."""
    folder = Path(pinet_fast.__file__).parent / "aggregation"
    code = "\n".join(
        re.sub(r'""".*?"""|``.*?``', "", path.read_text(), flags=re.DOTALL)
        for path in folder.rglob("*.py")
        if path.name != "compiler_names.py"
    )
    used = set(re.findall(r"torch\._dynamo\.(\w+)\(", code))
    used |= set(re.findall(r"torch\._C\._dynamo\.eval_frame\.(\w+)", code))
    for names in re.findall(r"from torch\._dynamo[\w.]* import (.+)", code):
        used |= {name.strip() for name in names.split(",")}
    config = {"donated_buffer"}  # read off a module, not called
    assert used == {name.split(":")[1] for name in NEEDED} - config
