"""Markdown tables made from the committed results, each with what it was measured on and how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import run_tables
from benchmarks.harness.markdown import caption, cell, grid, inverse, span

RESULTS = Path(__file__).resolve().parents[1] / "results"
CPU = "cpu.json"

Run = Mapping[str, Any]
Result = Mapping[str, Any]

_MARKED = re.compile(
    r"(?P<open><!-- table: (?P<name>[^\n]+?) -->\n)(?P<body>.*?)(?P<close><!-- /table -->)",
    re.DOTALL,
)


def read(file: str = CPU, folder: Path = RESULTS) -> Run:
    """Return a committed run.

    Raises:
        FileNotFoundError: There is none.
    """
    run: Run = json.loads((folder / file).read_text())
    return run


def find(run: Run, test: str) -> list[Result]:
    """Return the results of a test function, one for every set of its parameters."""
    return [r for r in run["results"] if _test_of(r) == test]


def _test_of(result: Result) -> str:
    name: str = result["name"]
    return name.split("::")[-1].split("[")[0]


def one(run: Run, test: str) -> Result | None:
    """Return the only result of a test function, or None."""
    found = find(run, test)
    return found[0] if found else None


# The tables ---------------------------------------------------------------------------------------


def step(run: Run) -> str:
    """Cost of an aggregated step over a plain one, by rule, loss and number of strata."""
    found = find(run, "test_aggregated_step")
    found += find(run, "test_aggregated_step_of_the_reference_backend")
    strata = sorted({r["params"]["num_strata"] for r in found})
    rows = []
    for rule, loss in dict.fromkeys(map(_kind, found)):
        by_strata = {r["params"]["num_strata"]: r for r in found if _kind(r) == (rule, loss)}
        rows.append([rule, loss, *(span(by_strata.get(s)) for s in strata)])
    return grid(["rule", "loss", *(f"S = {s}" for s in strata)], rows)


_OF_REFERENCE = {
    "all": ", reference backend",
    "aggregation": ", reference backend but for attention",
}


def _kind(result: Result) -> tuple[str, str]:
    """Return the rule and the loss of a step, as they are shown."""
    params = result["params"]
    backend = _OF_REFERENCE[params["ops"]] if "ops" in params else ""
    return f"`{params['rule']}`{backend}", params.get("loss", "bce").upper()


def peers(run: Run) -> str:
    """What others pay for the S gradients of a batch, over a plain step."""
    found = [r for r in run["results"] if r["group"] == "peers"]
    strata = sorted({r["params"]["num_strata"] for r in found})
    rows = []
    for file, who in dict.fromkeys((_file(r), _who(r)) for r in found):
        by_strata = {
            r["params"]["num_strata"]: r for r in found if (_file(r), _who(r)) == (file, who)
        }
        rows.append([who, *(span(by_strata.get(s)) for s in strata)])
    skipped = [s for s in run["skipped"] if "step_of" in s["name"]]
    lines = [f"- {s['name'].split('[')[-1].rstrip(']')}: {s['reason']}" for s in skipped]
    notes = "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""
    return grid(["way to the S gradients", *(f"S = {s}" for s in strata)], rows) + notes


def _file(result: Result) -> str:
    name: str = result["name"]
    return name.split("::")[0]


def _who(result: Result) -> str:
    params = result["params"]
    return str(params["peer"]) if "peer" in params else f"{params['way']}, padded model"


def data(run: Run) -> str:
    """Sampler, gather and negatives against their floors and other builders."""
    rows = [
        ["eta, memory floor over measured time",
         cell(one(run, "test_gather_over_floor"), "eta"), ">= 0.50"],
        ["over `memcpy` of the same bytes", span(one(run, "test_gather_over_memcpy")), "<= 8"],
        ["a plain Numba loop over it",
         inverse(one(run, "test_gather_over_plain_loop")), ">= 1.8"],
        ["RecTools-style builder over it",
         inverse(one(run, "test_gather_over_rectools_style")), ">= 30"],
        ["RePlay-style builder over it",
         inverse(one(run, "test_gather_over_replay_style")), ">= 20"],
        ["`pyarrow.take` over it", inverse(one(run, "test_gather_over_pyarrow_take")), ""],
        ["torch `DataLoader` over it", inverse(one(run, "test_gather_over_torch_loader")), ""],
        ["two threads, share of linear, best twentieth of the rounds",
         cell(one(run, "test_two_threads_over_one"), "scaling, gather", "q05"), ">= 0.9"],
        ["Python-set rejection over negatives without history",
         inverse(one(run, "test_negatives_over_set_rejection")), ">= 5"],
        ["`state_dict()`, 200 million users",
         cell(one(run, "test_state_dict"), "us", unit=" us"), "< 10 us"],
        ["any batch of any epoch, 200 million users", _seek(run), "< 1 ms"],
        ["first batch with an empty kernel cache",
         cell(one(run, "test_first_batch_with_a_cold_cache"), "cold", "first_batch", unit=" s"),
         "< 10 s"],
    ]  # fmt: skip
    return grid(["what", "measured", "goal"], [row for row in rows if row[1] != "-"])


def _seek(run: Run) -> str:
    times = [r["ms"] for r in find(run, "test_seek")]
    return f"{min(times):.2f} to {max(times):.2f} ms" if times else "-"


def group(run: Run, name: str) -> str:
    """Every benchmark of a group with a ratio."""
    found = [r for r in run["results"] if r["group"] == name and "low" in r]
    rows = [
        [f"`{_test_of(r).removeprefix('test_')}`", _given(r), span(r), _share(r)] for r in found
    ]
    has_share = any(row[3] for row in rows)
    head = ["benchmark", "with", "ratio", "share of floor"]
    return grid(head if has_share else head[:3], rows if has_share else [r[:3] for r in rows])


def _given(result: Result) -> str:
    return ", ".join(f"{name}={value}" for name, value in result["params"].items())


def _share(result: Result) -> str:
    for key in ("eta", "share_of_bandwidth", "share_of_copy_bandwidth"):
        if key in result:
            return f"{result[key]:.2f}"
    return ""


def scaling(run: Run) -> str:
    """How cost and memory of an aggregated step grow with one size, the others at the base."""
    rows = []
    for name, points in run["curves"].items():
        fits = run["exponents"][name]
        ends = (
            (points[0], points[-1]) if fits else (min(points, key=_ratio), max(points, key=_ratio))
        )
        powers = [f"{fits[key]:.2f}" if fits else "" for key in ("candidate_ms", "reference_ms")]
        memory = "{:.2f} to {:.2f}".format(*(end["memory_ratio"] for end in ends))
        rows.append([f"{name}: {ends[0]['x']} to {ends[1]['x']}", span(ends[0]), span(ends[1]),
                     *powers, memory])  # fmt: skip
    head = ["size", "time over plain, first", "last", "exponent", "exponent, plain", "memory"]
    return grid(head, rows)


def _ratio(point: Result) -> float:
    return float(point["ratio"])


TABLES: dict[str, Callable[[Run], str]] = {
    "step": step, "peers": peers, "data": data, "scaling": scaling,
}  # fmt: skip
RUN_TABLES: dict[str, Callable[[Path], str]] = {
    "published": run_tables.published, "clicks": run_tables.clicks, "compared": run_tables.compared,
}  # fmt: skip
FILES = {"scaling": "scaling.json"}  # of tables that do not come from CPU


# Documents ----------------------------------------------------------------------------------------


def table(name: str, folder: Path = RESULTS) -> str:
    """Return a table and its caption.

    Args:
        name: One of ``TABLES`` or ``RUN_TABLES``, or ``group NAME`` for every ratio of a benchmark
            group; a second word after a comma names another file of results, as in
            ``group step, gpu.json``.
        folder: Where the results are.

    Raises:
        ValueError: There is no such table, or nothing was measured for it.
    """
    if name in RUN_TABLES:
        of_runs = RUN_TABLES[name](folder / "runs")
        if not of_runs:
            raise ValueError(f"table {name!r}: no run is kept; run python -m benchmarks.published")
        return f"{of_runs}\n\n{run_tables.versions(folder / 'runs')}\n"
    kind, _, file = (part.strip() for part in name.partition(","))
    file = file or FILES.get(kind, CPU)
    run = read(file, folder)
    if kind.startswith("group "):
        body = group(run, kind.removeprefix("group "))
    elif kind in TABLES:
        body = TABLES[kind](run)
    else:
        known = ", ".join([*TABLES, *RUN_TABLES, "group NAME"])
        raise ValueError(f"table {name!r}: expected one of {known}")
    if body.count("\n") < 2:
        raise ValueError(f"table {name!r}: {file} holds no result for it; run make bench")
    return f"{body}\n\n{caption(run)}\n"


def regenerate(text: str, folder: Path = RESULTS) -> str:
    """Return a document whose marked tables are made anew.

    Raises:
        ValueError: A marker that names no table, or one that is not closed.
    """
    if text.count("<!-- table: ") != len(_MARKED.findall(text)):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- /table -->` behind it")

    def made(match: re.Match[str]) -> str:
        return f"{match['open']}\n{table(match['name'], folder)}\n{match['close']}"

    return _MARKED.sub(made, text)


def everything(run: Run) -> str:
    """Return a document with every ratio of a run, group by group."""
    parts = ["# Benchmarks", caption(run)]
    for name in dict.fromkeys(r["group"] for r in run["results"]):
        if any("low" in r for r in run["results"] if r["group"] == name):
            parts += [f"## {name}", group(run, name)]
    others = [[f"`{r['name']}`", _figures(r)] for r in run["results"] if "low" not in r]
    parts += ["## Without a reference", grid(["benchmark", "figures"], others)]
    if run["skipped"]:
        skipped = [[f"`{s['name']}`", s["reason"]] for s in run["skipped"]]
        parts += ["## Skipped", grid(["benchmark", "reason"], skipped)]
    if run["failed"]:
        parts += ["## Failed", *(f"- `{name}`" for name in run["failed"])]
    return "\n\n".join(parts) + "\n"


def _figures(result: Result) -> str:
    shown = {k: v for k, v in result.items() if k not in ("name", "group", "params", "threads")}
    return ", ".join(
        f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, (int, float))
    )
