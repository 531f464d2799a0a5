"""NVTX ranges: nothing while off, the right names and nesting while on."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pinet_fast import profiling

if TYPE_CHECKING:
    from collections.abc import Iterator


class Recorder:
    """Stands in for an NVTX domain."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def get_event_attributes(self, message: str, category: str) -> str:
        return f"{category}/{message}"

    def push_range(self, attributes: str) -> None:
        self.calls.append(f"+{attributes}")

    def pop_range(self) -> None:
        self.calls.append("-")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(profiling, "_domain", recorder)
    ranges = [r for r in vars(profiling).values() if isinstance(r, profiling.Range)]
    for each in ranges:
        monkeypatch.setattr(each, "_attributes", None)
    yield recorder
    for each in ranges:
        each._attributes = None


def test_a_step_is_bracketed(recorder: Recorder) -> None:
    import torch

    from pinet_fast import GradientAggregator

    model = torch.nn.Linear(2, 2)
    opt = GradientAggregator(torch.optim.SGD(model.parameters(), lr=0.1), "agreement")
    with opt.stratify(torch.tensor([0, 1, 1])):
        losses = model(torch.randn(3, 2)).sum(1)
    opt.backward(losses)
    opt.step()
    names = ["model/forward", "backward/backward", "aggregate/gram", "aggregate/rule",
             "aggregate/combine", "optim/step"]  # fmt: skip
    expected = [call for name in names for call in (f"+{name}", "-")]
    assert recorder.calls == expected


def test_off_by_default_and_real_nvtx_works() -> None:
    code = (
        "from pinet_fast import profiling as p\n"
        "assert not p.is_enabled()\n"
        "import sys; assert 'nvtx' not in sys.modules\n"
        "p.enable(); assert p.is_enabled()\n"
        "with p.STEP, p.GRAM: pass\n"
        "p.disable(); assert not p.is_enabled()\n"
        "with p.STEP: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    check = "from pinet_fast import profiling as p; assert p.is_enabled()"
    subprocess.run([sys.executable, "-c", check], check=True, env={"PINET_FAST_NVTX": "1"})
