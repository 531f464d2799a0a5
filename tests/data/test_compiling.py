"""The first batch on a machine: what is compiled is said, and it takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from pinet_fast.data import simulate_log
from pinet_fast.data.compiling import CompileNotes, notes, told

CODE = """
import sys
from pinet_fast import *
from pinet_fast.data.compiling import told
with told(lambda text: print(text, file=sys.stderr)):
    store = prepare(sys.argv[1], store_dir=sys.argv[2])
    split = Split.leave_one_out()
    strata = Strata.by_activeness(store, split=split, edges="head:0.2")
    sampler = StratifiedBatchSampler(strata, batch_size=64)
    loader = RaggedLoader(
        store, sampler, split=split, strata=strata, max_len=20, negatives=Negatives(1), threads=2
    )
    next(iter(loader))
"""


def run(folder):
    log = folder / "log.parquet"
    if not log.exists():
        simulate_log(log, users=200, items=100)
    command = [sys.executable, "-c", CODE, str(log), str(folder / "stores")]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("compiling the kernel")]
    return said, time.perf_counter() - started


@pytest.mark.slow
def test_a_cold_cache_says_what_it_compiles_once(tmp_path):
    said, cold = run(tmp_path)
    names = [line.split()[3].rstrip(",") for line in said]
    assert {"first_events", "plan", "gather_next", "draw_uniform", "before"} <= set(names)
    assert len(set(names)) == len(names)
    assert not {"subkey", "mix", "below", "plan_user"} & set(names), "callees are not named"
    # Ten seconds are the goal on a free machine, benchmarks measure it; this is no benchmark.
    assert cold < 120
    assert run(tmp_path)[0] == []


class Dispatcher:
    def __init__(self, module, name):
        self.py_func = SimpleNamespace(__module__=module, __name__=name)


class Event:
    def __init__(self, dispatcher):
        self.data = {"dispatcher": dispatcher}


def test_only_outer_kernels_of_this_package_are_named():
    seen = []
    found = CompileNotes()
    found.tell = seen.append
    own, other = Dispatcher("pinet_fast.data._x", "_outer"), Dispatcher("elsewhere.x", "their")
    for chain in ([own, own, other], [other], [other, own], [own]):
        for dispatcher in chain:
            found.on_start(Event(dispatcher))
        for dispatcher in chain:
            found.on_end(Event(dispatcher))
    assert [line.split()[3] for line in seen] == ["outer,", "outer,"]


def test_notes_go_to_a_terminal_only_unless_told(capsys):
    own = Event(Dispatcher("pinet_fast.data._x", "_outer"))
    seen = []
    with told(seen.append):
        notes.on_start(own)
        notes.on_end(own)
    notes.on_start(own)
    notes.on_end(own)
    assert len(seen) == 1
    assert capsys.readouterr().err == "", "stderr is no terminal here"
