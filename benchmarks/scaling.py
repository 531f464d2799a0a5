"""``make scaling``: cost and memory of an aggregated step over a plain one, along one size a time.

Writes benchmarks/results/scaling.json and scaling.svg. Around the base, one of S, B, L, d, V, the
rule and the number of threads changes. Costs are paired ratios, of CPU time on one thread and of
wall time on several; memory is the peak of tensor memory, counted from allocations.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.curves import draw, exponent
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.pairing import Precision, measure
from benchmarks.harness.record import SCHEMA
from benchmarks.harness.tables import RESULTS
from pinet_fast import GradientAggregator, RaggedBatch, SASRec, StrataIndex

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class Point:
    """Sizes of a step: S strata, B users, L events each, width d, V items."""

    S: int = 4
    B: int = 64
    L: int = 50
    d: int = 64
    V: int = 3416
    rule: str = "agreement"
    threads: int = 1

    @property
    def needed_bytes(self) -> int:
        """Return what the tables of both models need: value, gradient, two moments, S rows."""
        return 2 * 4 * self.V * self.d * 4 + self.S * min(self.V, 3 * self.B * self.L) * self.d * 4


BASE = Point()
SIZES: dict[str, tuple[Any, ...]] = {
    "S": (1, 2, 4, 8, 16, 32, 64),
    "B": (16, 32, 64, 128, 256),
    "L": (10, 25, 50, 100, 200),
    "d": (16, 32, 64, 128, 256),
    "V": (1_000, 10_000, 100_000, 1_000_000),
    "rule": ("backdoor", "balanced", "agreement", "mgda", "pcgrad", "imtlg", "alignedmtl",
             "cagrad", "signagreement", "trimmedmean"),
    "threads": (1, 2),
}  # fmt: skip


def batch_of(point: Point) -> RaggedBatch:
    """Return a full batch of random events."""
    generator = torch.Generator().manual_seed(0)
    events = point.B * point.L
    values, targets, negatives = torch.randint(1, point.V + 1, (3, events), generator=generator)
    ids = torch.arange(point.B) * point.S // point.B
    return RaggedBatch(
        values=values,
        offsets=torch.arange(point.B + 1) * point.L,
        strata=StrataIndex(ids, point.S, torch.full((point.B,), point.L)),
        users=torch.arange(point.B),
        targets=targets,
        negatives=negatives.unsqueeze(1),
        max_len=point.L,
    )


def model_of(point: Point) -> SASRec:
    """Return SASRec with one negative an event."""
    torch.manual_seed(0)
    return SASRec(point.V, max_len=point.L, dim=point.d, loss="bce", dropout=0.2)


def check(point: Point, batch: RaggedBatch) -> None:
    """Refuse to time a wrong gradient: compare with autograd on the losses weighed by report."""
    model = model_of(point).eval()
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), point.rule)
    with opt.stratify(batch.strata):
        losses = model(batch)
    opt.backward(losses)
    weights = opt.report.weights
    if weights is None or weights.dim() == 2 or point.V > 100_000:
        return  # elementwise and per parameter: the tests compare those, and huge tables
    mine = [p.grad for p in model.parameters()]
    events = batch.strata.events
    assert events is not None
    parts: list[Tensor] = [part.mean() for part in model(batch).split(list(events.counts))]
    total = sum(float(w) * part for w, part in zip(weights, parts, strict=True))
    theirs = torch.autograd.grad(total, list(model.parameters()))
    for p, q in zip(mine, theirs, strict=True):
        assert p is not None
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


def steps_of(point: Point, batch: RaggedBatch) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return an aggregated step, proven, and a plain one."""
    model, plain_model = model_of(point), model_of(point)
    opt = GradientAggregator(torch.optim.Adam(model.parameters()), point.rule)
    plain_opt = torch.optim.Adam(plain_model.parameters())

    def aggregated() -> None:
        opt.zero_grad()
        with opt.stratify(batch.strata):
            losses = model(batch)
        opt.backward(losses)
        opt.step()

    def plain() -> None:
        plain_opt.zero_grad()
        plain_model(batch).mean().backward()
        plain_opt.step()

    for _ in range(3):
        aggregated()
        plain()
    return aggregated, plain


def measured(point: Point, seconds: float) -> dict[str, Any]:
    """Return ratio, times and peak memory at one point."""
    torch.set_num_threads(point.threads)
    batch = batch_of(point)
    check(point, batch)
    aggregated, plain = steps_of(point, batch)
    precision = Precision(half_width=0.01, seconds=seconds, least=6)
    # On one thread CPU time, which leaves out other work on the machine; else the wall's.
    clock = time.process_time if point.threads == 1 else time.perf_counter
    facts = measure(aggregated, plain, 3, precision=precision, clock=clock).facts()
    peaks = peak_bytes(aggregated), peak_bytes(plain)
    gc.collect()
    return facts | {
        "peak_bytes": peaks[0], "plain_peak_bytes": peaks[1], "memory_ratio": peaks[0] / peaks[1],
    }  # fmt: skip


def curve(name: str, seconds: float) -> list[dict[str, Any]]:
    """Measure the points along one size, those that fit memory."""
    points = []
    for value in SIZES[name]:
        point = replace(BASE, **{name: value})
        if point.needed_bytes > 0.5 * _available_bytes():
            print(f"{name} = {value}: left out, needs {point.needed_bytes / 2**30:.1f} GiB")
            continue
        facts = measured(point, seconds)
        points.append({"x": value} | facts)
        print(
            f"{name} = {value}: {facts['ratio']:.3f} [{facts['low']:.3f}, {facts['high']:.3f}], "
            f"memory {facts['memory_ratio']:.2f}",
            flush=True,
        )
    return points


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def fits(name: str, points: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the exponents of time and memory in the size; of rules and threads there are none."""
    x = [p["x"] for p in points]
    if name in ("rule", "threads"):
        return {}
    keys = ("candidate_ms", "reference_ms", "ratio", "peak_bytes", "plain_peak_bytes")
    return {key: exponent(x, [p[key] for p in points]) for key in keys}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for one point")
    parser.add_argument("--only", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    started, where, commit = time.time(), machine.describe(), machine.commit()
    curves = {name: curve(name, options.seconds) for name in options.only}
    content = {
        "schema": SCHEMA,
        "command": " ".join(["python -m benchmarks.scaling", *(arguments or sys.argv[1:])]),
        "started_at": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "commit": commit,
        "machine": where | {"threads": BASE.threads},
        "versions": machine.versions(),
        "base": vars(BASE),
        "curves": curves,
        "exponents": {name: fits(name, points) for name, points in curves.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(curves, options.out / "scaling.svg")


if __name__ == "__main__":
    main()
