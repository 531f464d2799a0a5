"""The comparison of compiled kernels with their baseline, and what the baseline holds."""

from __future__ import annotations

import json
from pathlib import Path

import compile_gate
import pytest

GOOD = {
    "registers": 64, "stack": 0, "shared": 1024, "instructions": 1000, "vector_loads": 4,
    "vector_stores": 2, "wide_copies": 8, "mma": 4, "atomics": [],
}  # fmt: skip
OPS = sorted(path.parent.name for path in Path(compile_gate.HERE).glob("*/test_gate.py"))


def test_as_good_as_the_baseline_is_no_fault():
    assert compile_gate.faults(GOOD, GOOD) == []
    assert compile_gate.faults(GOOD, None) == []
    better = {**GOOD, "registers": 32, "mma": 8, "instructions": 1020}
    assert compile_gate.faults(better, GOOD) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"registers": 65}, "registers 65, was 64"),
        ({"shared": 1025}, "shared 1025, was 1024"),
        ({"instructions": 1021}, "instructions 1021, was 1000"),
        ({"vector_loads": 3}, "vector_loads 3, was 4"),
        ({"wide_copies": 0}, "wide_copies 0, was 8"),
        ({"mma": 0}, "mma 0, was 4"),
    ],
)
def test_worse_than_the_baseline_is_a_fault(change, fault):
    assert compile_gate.faults({**GOOD, **change}, GOOD) == [fault]
    assert compile_gate.faults({**GOOD, **change}, None) == []


def test_stack_and_float_atomics_are_faults_whatever_the_baseline_says():
    bad = {**GOOD, "stack": 8, "atomics": ["red.global.add.f32"]}
    assert compile_gate.faults(bad, bad) == ["8 bytes of stack", "float atomics red.global.add.f32"]
    assert compile_gate.faults(bad, None) == compile_gate.faults(bad, bad)


def test_every_folder_with_a_triton_backend_has_gates():
    kernels = Path(compile_gate.HERE).parents[1] / "kernels"
    assert sorted(path.parent.name for path in kernels.glob("*/_triton.py")) == OPS


def test_baseline_holds_every_op_on_every_architecture_and_nothing_at_fault():
    baselines = json.loads(compile_gate.BASELINE.read_text())
    assert set(baselines) == {"3.6.0", "3.7.1"}  # the oldest and the newest in use
    for kernels in baselines.values():
        for record in kernels.values():
            assert compile_gate.faults({**record, "atomics": []}, record) == []
        for op in OPS:
            names = [name.split() for name in kernels if name.split()[0] == op]
            assert {word for name in names for word in name} >= {"80", "90", "100"}, op
    first, second = (set(kernels) for kernels in baselines.values())
    assert first == second
