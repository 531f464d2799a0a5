"""Imports run one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Lower may not import higher; equals may, where listed.
TIERS = {
    "errors": 0, "_env": 0, "_atomic": 0, "_allocator": 0,
    "profiling": 1,
    "kernels": 2,
    "aggregation": 3, "rules": 4, "data": 3, "heads": 3, "models": 3,
    "training": 4, "report": 4,
    "cli": 5,
}  # fmt: skip
SIDEWAYS = {
    ("data", "aggregation"),  # a batch carries the StrataIndex
    ("heads", "aggregation"),  # rows are routed by RowGroups
    ("models", "aggregation"),
    ("models", "data"),
    ("models", "heads"),
}


def imports_of(path: Path, package: str) -> list[str]:
    """Return the absolute names of what a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            name = ".".join([*base, node.module] if node.module else base)
            module = name if node.level else str(node.module)
            found += [module] + [f"{module}.{alias.name}" for alias in node.names]
    return found


def sources() -> list[tuple[Path, str]]:
    files = []
    for path in sorted((REPOSITORY / "pinet_fast").rglob("*.py")):
        parent = path.relative_to(REPOSITORY).parent
        files.append((path, ".".join(parent.parts)))
    for path in sorted((REPOSITORY / "kernels").rglob("*.py")):
        parent = path.relative_to(REPOSITORY).parent
        files.append((path, ".".join(("pinet_fast", *parent.parts))))
    return files


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "pinet_fast" and len(parts) > 1 else None


def test_imports_run_one_way() -> None:
    wrong, seen = [], set()
    for path, package in sources():
        own = room_of(f"{package}.{path.stem}") if path.stem != "__init__" else room_of(package)
        if own is None:
            continue  # pinet_fast/__init__.py is the front door
        seen.add(own)
        for module in imports_of(path, package):
            other = room_of(module)
            if other is None or other == own or other not in TIERS:
                continue
            allowed = TIERS[other] < TIERS[own] or (own, other) in SIDEWAYS
            if not allowed:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {module}")
    assert not wrong
    assert {"aggregation", "cli", "data", "kernels", "report", "training"} <= seen


def test_every_room_has_a_tier() -> None:
    rooms = {room_of(f"{package}.{path.stem}") for path, package in sources()}
    assert rooms - {None, "__init__", "__main__"} - set(TIERS) == set()


def test_no_catch_all_modules() -> None:
    names = {path.name for path, _ in sources()}
    assert not names & {"utils.py", "helpers.py", "misc.py", "common.py"}


HEAVY = {
    "import pinet_fast": {"triton", "numba", "pyarrow", "typer", "matplotlib", "nvtx", "rich"},
    "from pinet_fast import GradientAggregator, rules": {
        "triton", "numba", "pyarrow", "typer", "matplotlib", "nvtx", "rich",
    },
    "import pinet_fast.kernels": {"triton", "numba", "pyarrow", "typer", "matplotlib"},
}  # fmt: skip


@pytest.mark.parametrize("statement", HEAVY)
def test_imports_stay_light(statement: str) -> None:
    """Against what torch alone imports."""
    listing = "import sys; print(' '.join(sorted(sys.modules)))"
    loaded = [
        set(
            subprocess.run(
                [sys.executable, "-c", f"{code}\n{listing}"],
                capture_output=True, text=True, check=True, cwd="/",
            ).stdout.split()
        )
        for code in ("import torch", statement)
    ]  # fmt: skip
    assert "pinet_fast" in loaded[1]
    assert (loaded[1] - loaded[0]) & HEAVY[statement] == set()


def test_one_file_reads_the_environment() -> None:
    readers = {
        path.relative_to(REPOSITORY).as_posix()
        for path, _ in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"pinet_fast/_env.py"}
