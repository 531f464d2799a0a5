"""The loader with threads: the same stream, the same state, and nothing left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from pinet_fast.data import Negatives, RaggedLoader, Split, Strata, StratifiedBatchSampler
from pinet_fast.data import loader as loader_module
from pinet_fast.data._blocks import Layout, Ring
from pinet_fast.data._pipeline import Inline, Pipeline
from pinet_fast.errors import ConfigError

SPLIT = Split.leave_one_out()


@pytest.fixture(scope="module")
def store(store_with_lengths):
    lengths = np.random.default_rng(1).integers(3, 15, 60)
    return store_with_lengths(lengths.tolist(), num_items=90)


def make(store, seed=0, drawn=None, **options):
    strata = Strata.by_activeness(store, split=SPLIT, edges=[6])
    sampler = StratifiedBatchSampler(strata, seed=seed, **drawn or {"batch_size": 4})
    options = {"max_len": 5, "negatives": Negatives(2), "seed": seed} | options
    return RaggedLoader(store, sampler, split=SPLIT, strata=strata, **options)


def content(batch):
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in pytree.tree_leaves(batch)]  # fmt: skip


def num_data_threads():
    return sum(thread.name.startswith("pinet-data") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("lifetime", ["copy", "lease"])
def test_stream_is_the_same_for_any_number_of_threads(store, threads, lifetime):
    options = {"crop": "random_window", "negatives": Negatives(2, dist="popularity", log_q=True)}
    plain = make(store, **options)
    other = make(store, threads=threads, lifetime=lifetime, **options)
    for _ in range(3):
        expected = [content(batch) for batch in plain]
        assert [content(batch) for batch in other] == expected
        assert other.state_dict() == plain.state_dict()
    assert num_data_threads() == 0


@pytest.mark.parametrize("stop", [1, 2, 7, 15, 16, 29])
def test_resume_with_threads_is_bit_identical(store, stop):
    whole, first = make(store), make(store, threads=2)
    stream = [content(batch) for _ in range(3) for batch in whole]
    seen = []
    while len(seen) < stop:
        for batch in first:
            seen.append(content(batch))
            if len(seen) == stop:
                break
    resumed = make(store, threads=3, prefetch=5)
    resumed.load_state_dict(first.state_dict())
    while len(seen) < len(stream):
        seen += [content(batch) for batch in resumed]
    assert seen == stream


@pytest.mark.parametrize(
    "drawn",
    [
        {"batch_size": 5, "mix": "uniform"},
        {"batch_size": 7, "mix": {"6+ events": 0.3, 0: 0.7}, "steps_per_epoch": 6},
        {"max_events": 20, "max_len": 5},
        {"max_events": 20, "max_len": 5, "mix": "sqrt", "rank": 1, "world_size": 2},
    ],
    ids=["uniform", "shares", "events", "rank"],
)
def test_any_sampler_gives_the_same_stream_in_threads_and_after_a_resume(store, drawn):
    plain = make(store, drawn=drawn)
    stream = [content(batch) for _ in range(2) for batch in plain]
    for threads in (1, 4):
        other = make(store, drawn=drawn, threads=threads)
        assert [content(batch) for _ in range(2) for batch in other] == stream
    for stop in range(1, len(stream)):
        first, seen = make(store, drawn=drawn, threads=2), 0
        while seen < stop:
            for _ in first:
                seen += 1
                if seen == stop:
                    break
        resumed = make(store, drawn=drawn, threads=stop % 3)
        resumed.load_state_dict(first.state_dict())
        rest = [content(batch) for batch in resumed]
        assert rest == stream[stop : stop + len(rest)]
        assert len(rest) == len(plain) - stop % len(plain)


def test_state_counts_delivered_batches_only(store):
    loader, plain = make(store, threads=2, prefetch=4), make(store)
    for _, _ in zip(loader, plain, strict=True):
        assert loader.state_dict() == plain.state_dict()
        assert loader.sampler.epoch == plain.sampler.epoch
        assert loader.sampler.step == plain.sampler.step


def test_break_and_go_on(store):
    loader, plain = make(store, threads=2), make(store)
    expected = [content(batch) for batch in plain]
    found = []
    while len(found) < len(expected):
        for batch in loader:
            found.append(content(batch))
            if len(found) % 3 == 0:
                break
    assert found == expected


def test_moving_the_position_while_iterating(store):
    loader, plain = make(store, threads=2), make(store)
    plain.set_epoch(5)
    batches = iter(loader)
    next(batches)
    loader.set_epoch(5)
    assert [content(batch) for batch in batches] == [content(batch) for batch in plain]


def test_two_iterations_share_the_position(store):
    loader, plain = make(store, threads=1), make(store)
    one, two = iter(loader), iter(loader)
    found = [content(next(iterator)) for iterator in (one, two) * 3]
    assert found == [content(batch) for batch, _ in zip(plain, range(6), strict=False)]
    one.close()
    two.close()
    assert num_data_threads() == 0


def test_copied_batches_stay_as_they_were(store):
    for threads in (0, 2):
        batches = list(make(store, threads=threads, lifetime="copy"))
        assert [content(batch) for batch in batches] == [content(batch) for batch in make(store)]


def test_leased_memory_is_used_again(store):
    loader = make(store, threads=2, prefetch=3, lifetime="lease")
    places = {batch.values.data_ptr() for _ in range(4) for batch in loader}
    # Slots grow at first; the least that shows reuse is fewer places than batches.
    assert len(places) < 4 * len(loader) / 2
    assert loader._maker.ring.num_free <= 3 + 2
    loader.close()
    assert loader._maker.ring.num_free == 0


def test_error_of_a_thread_reaches_the_caller_in_order(store, monkeypatch):
    loader = make(store, threads=2)
    build = loader._maker._builder.build

    def broken(epoch, step, users, take):
        if step == 3:
            raise ValueError("broken at three")
        return build(epoch, step, users, take)

    monkeypatch.setattr(loader._maker._builder, "build", broken)
    seen = []
    with pytest.raises(ValueError, match="broken at three") as caught:
        seen.extend(loader)
    assert len(seen) == 3
    assert "broken" in [entry.name for entry in caught.traceback]
    assert num_data_threads() == 0
    assert loader.state_dict()["step"] == 3


def resident_pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
@pytest.mark.parametrize("lifetime", ["copy", "lease"])
def test_partial_epochs_leave_nothing_behind(store, lifetime):
    loader = make(store, threads=2, lifetime=lifetime)

    def partial(times):
        for _ in range(times):
            for i, _ in enumerate(loader):
                if i == 1:
                    break
        gc.collect()

    partial(50)
    before = threading.active_count(), len(os.listdir("/proc/self/fd")), resident_pages()
    partial(1000)
    assert threading.active_count() <= before[0]
    assert len(os.listdir("/proc/self/fd")) <= before[1]
    assert resident_pages() - before[2] < (8 << 20) // os.sysconf("SC_PAGE_SIZE")


def test_dropping_the_loader_stops_its_threads(store):
    loader = make(store, threads=2)
    batches = iter(loader)
    next(batches)
    assert num_data_threads() == 2
    gone = weakref.ref(loader)
    del loader, batches
    gc.collect()
    assert gone() is None
    assert num_data_threads() == 0


def test_close_and_context_manager_stop_the_threads(store):
    with make(store, threads=2) as loader:
        batches = iter(loader)
        next(batches)
        assert num_data_threads() == 2
    assert num_data_threads() == 0
    loader.close()
    assert len(list(batches)) == len(loader) - 1, "going on starts them again"


def test_threads_start_at_the_first_batch(store):
    loader = make(store, threads=2)
    batches = iter(loader)
    assert num_data_threads() == 0
    next(batches)
    batches.close()


def _in_child(batches, result):
    result.put([content(batch) for batch in batches])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_starts_threads_of_its_own(store):
    expected = [content(batch) for batch in make(store)]
    loader = make(store, threads=2)
    batches = iter(loader)
    next(batches)
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(batches, result))
    child.start()
    assert result.get() == expected[1:]
    child.join(30)
    assert child.exitcode == 0
    assert [content(batch) for batch in batches] == expected[1:]


def test_stats_add_up(store):
    for threads in (0, 2):
        loader = make(store, threads=threads)
        assert loader.stats().wait_share == loader.stats().users_per_second == 0
        batches = []
        for batch in loader:
            batches.append(batch)
            time.sleep(0.001)
        stats = loader.stats()
        assert stats.batches == len(loader)
        assert stats.users == sum(batch.num_users for batch in batches)
        assert stats.events == sum(batch.num_events for batch in batches)
        assert stats.num_bytes >= sum(2 * batch.values.nbytes for batch in batches)
        assert 0 < stats.wait_seconds < stats.seconds
        assert stats.seconds >= 0.001 * len(loader)
        assert stats.users_per_second == pytest.approx(stats.users / stats.seconds)
        assert stats.events_per_second > stats.users_per_second
        assert stats.bytes_per_second > 0
        assert stats.ring_depth > 0  # without threads, small batches are built several at a time


def test_bad_thread_options_are_refused(store):
    for options in ({"threads": -1}, {"threads": True}, {"prefetch": 0}, {"lifetime": "loan"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make(store, **options)


def test_pipeline_never_runs_further_ahead_than_allowed():
    begun = []
    pipeline = Pipeline(
        lambda number: begun.append(number) or number,
        first=2, last=40, threads=3, ahead=4, discard=lambda number: None,
    )  # fmt: skip
    for number in range(2, 40):
        assert pipeline.get() == number
        assert max(begun) <= number + 4
    pipeline.close()
    pipeline.close()
    assert sorted(begun) == list(range(2, 40))


def test_without_threads_results_are_built_several_at_a_time():
    begun, dropped = [], []
    pipeline = Inline(
        lambda number: begun.append(number) or number,
        first=2, last=9, at_a_time=lambda number: 3 if number < 5 else 1, discard=dropped.append,
    )  # fmt: skip
    seen = [(pipeline.position, pipeline.get(), pipeline.num_ready, len(begun)) for _ in range(5)]
    assert seen == [(2, 2, 2, 3), (3, 3, 1, 3), (4, 4, 0, 3), (5, 5, 0, 4), (6, 6, 0, 5)]
    assert pipeline.is_open
    pipeline.close()
    assert not pipeline.is_open
    assert dropped == []
    ahead = Inline(int, first=0, last=9, at_a_time=lambda number: 20, discard=dropped.append)
    assert ahead.get() == 0
    ahead.close()
    assert dropped == list(range(1, 9))


def test_without_threads_an_error_waits_for_its_turn():
    attempts = []

    def build(number):
        attempts.append(number)
        if number == 2:
            raise ValueError("second")
        return number

    pipeline = Inline(
        build, first=0, last=5, at_a_time=lambda number: 5, discard=lambda number: None
    )
    assert [pipeline.get(), pipeline.get()] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="second"):
            pipeline.get()
    assert attempts == [0, 1, 2, 2, 2]


def test_large_batches_are_built_one_at_a_time(store, monkeypatch):
    monkeypatch.setattr(loader_module, "_WORDS_AT_A_TIME", 1)
    loader = make(store, threads=0)
    list(loader)
    assert loader.stats().ring_depth == 0


def test_layout_places_arrays_without_overlap():
    layout = Layout()
    layout.add("a", 3)
    layout.add("b", 3, 1, dtype=np.float32)
    layout.add("c", 0, 2)
    layout.add("d", 2)
    slot = Ring(pinned=False).take(layout.num_words)
    arrays, tensors = layout.arrays(slot.memory.numpy()), layout.tensors(slot.memory)
    for i, array in enumerate(arrays.values()):
        array[:] = i
    for i, (name, shape) in enumerate({"a": (3,), "b": (3, 1), "c": (0, 2), "d": (2,)}.items()):
        assert tensors[name].shape == shape
        assert (tensors[name] == i).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("threads", [0, 2])
def test_batches_on_the_gpu_are_the_same(store, threads):
    expected = [content(batch) for batch in make(store)]
    loader = make(store, threads=threads, device="cuda")
    batches = list(loader)
    assert all(batch.values.is_cuda for batch in batches)
    assert [content(batch) for batch in batches] == expected
