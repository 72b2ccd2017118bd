"""The protocol: what is timed, what is not, and whether it can be believed."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import bench.measure
from bench.measure import (
    Ceilings,
    Clock,
    Lane,
    SelfCheck,
    Timing,
    capture,
    input_sets,
    interleave,
    self_check,
    total_bytes,
)
from tests.bench.clocks import Graph, Time, fake_cuda, kernel

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Time:
    virtual = Time()
    monkeypatch.setattr(bench.measure, "time", virtual)
    return virtual


def test_a_sleep_is_timed_right() -> None:
    """A unit, a count of calls or a round that is lost on the way from the clock to seconds per call."""
    nap = Lane([lambda: time.sleep(0.01)] * 2)
    assert min(Clock(CPU).sample(nap, 1) for _ in range(10)) == pytest.approx(0.01, rel=0.02)


def test_seconds_are_per_call(virtual: Time) -> None:
    """Rounds, sets of inputs or the calls in a graph that are not divided out."""
    lane = Lane([virtual.spend(1), virtual.spend(3)], units=2)
    assert Clock(CPU).sample(lane, 5) == pytest.approx(1.0)
    assert interleave({"a": lane, "b": Lane([virtual.spend(5)])}, Clock(CPU), 0)["b"].median == pytest.approx(
        5
    )


def test_events_are_read_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's milliseconds taken for seconds."""
    virtual = Time()
    fake_cuda(monkeypatch, virtual)
    assert Clock(CUDA).sample(Lane([kernel(virtual, 0.25)]), 4) == pytest.approx(0.25)


def test_a_graph_has_no_launch_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is timed as one call, though it makes one for each set of inputs, or that is not replayed
    at all."""
    virtual = Time()
    fake_cuda(monkeypatch, virtual)
    clock = Clock(CUDA)
    lane = Lane([kernel(virtual, 0.001, launch=0.004), kernel(virtual, 0.003, launch=0.004)])
    assert clock.sample(lane, 1) == pytest.approx(0.006)
    assert clock.sample(capture(lane, clock), 1) == pytest.approx(0.002)


def test_what_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that is bound to fail, begun all the same; a failed one after which torch frees no memory any
    more."""
    virtual = Time()
    fake_cuda(monkeypatch, virtual)
    ended: list[Any] = []
    streams: list[Any] = []
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *where: ended.append(where), raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the default stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    clock = Clock(CUDA)

    def waits() -> None:
        if torch.cuda.get_sync_debug_mode() == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        capture(Lane([waits]), clock)
    assert not ended
    assert torch.cuda.get_sync_debug_mode() == "default"

    def fails() -> None:
        if Graph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(Lane([fails]), clock)
    assert ended == [(0, (0, 1))]
    assert streams == ["the default stream"]


def test_drift_meets_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants timed one after the other while the machine slows down: the later one looks slower than its
    twin."""
    virtual = Time(slowdown=0.05)
    monkeypatch.setattr(bench.measure, "time", virtual)
    twins = interleave(
        {"first": Lane([virtual.spend(0.1)]), "second": Lane([virtual.spend(0.1)])}, Clock(CPU), 10
    )
    assert twins["first"].median / twins["second"].median == pytest.approx(1, abs=0.03)
    assert twins["first"].high > 1.1 * twins["first"].low


def test_a_rhythm_meets_all_alike(virtual: Time) -> None:
    """Contestants that take turns in a fixed order while something else on the machine keeps the same
    beat."""
    beat = iter([1.0, 2.0] * 1000)
    call = Lane([lambda: virtual.sleep(next(beat))])
    twins = interleave({"first": call, "second": call}, Clock(CPU), 1e9)
    assert {timing.low for timing in twins.values()} == {1.0}
    assert {timing.high for timing in twins.values()} == {2.0}


def test_preparation_and_context_are_not_timed(virtual: Time) -> None:
    """A forward pass, or the entering of a context, that is charged to backward; preparation that is left out
    of a sample."""
    prepared = []

    def prepare() -> None:
        virtual.sleep(7)
        prepared.append(True)

    def backward() -> None:
        prepared.pop()
        virtual.sleep(2)

    @contextmanager
    def context() -> Any:
        virtual.sleep(5)
        yield
        virtual.sleep(5)

    timing = interleave({"backward": Lane([backward], prepare, context)}, Clock(CPU), 1)["backward"]
    assert timing.median == timing.high == pytest.approx(2)
    assert not prepared


def test_short_calls_are_gathered_into_samples(virtual: Time) -> None:
    """A sample so short that the clock's own resolution is measured."""
    clock, calls = Clock(CPU), []

    def short() -> None:
        calls.append(True)
        virtual.sleep(clock.sample_seconds / 50)

    timing = interleave({"short": Lane([short])}, clock, 0)["short"]
    assert len(calls) >= 50 * timing.samples >= 50 * bench.measure.MIN_SAMPLES


def test_time_is_spent_as_asked(virtual: Time) -> None:
    """A budget that is ignored, or the warm-up counted as samples."""
    interleave({name: Lane([virtual.spend(0.02)]) for name in "abc"}, Clock(CPU), 1.0)
    assert virtual.now == pytest.approx(3.0, rel=0.1)


def test_median_and_spread() -> None:
    """A mean in the place of the median, which one interruption spoils."""
    assert Timing.of([5, 1, 2, 3, 4, 100]) == (3.5, 2, 5, 6)
    assert Timing.of([2.0]) == (2, 2, 2, 1)


def test_inputs_rotate_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer used again and again, so that the cache is measured."""

    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert input_sets(2**20, CUDA) == bench.measure.MAX_SETS
    assert input_sets(50 * 2**20, CUDA) == 3
    assert input_sets(2**30, CUDA) == 1
    assert input_sets(2**20, CPU) > 1
    assert total_bytes([torch.zeros(3), None, 2.0, torch.zeros(2, dtype=torch.int64)]) == 28


def test_the_clock_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A noisy machine, or a clock that is off, that nobody is told of."""
    assert SelfCheck(1.01, 0.99).problems == []
    assert len(SelfCheck(1.1, 0.9).problems) == 2
    assert "noisy" in SelfCheck(1.0, 1.05).problems[0]
    virtual = Time()
    monkeypatch.setattr(bench.measure, "time", virtual)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: virtual.sleep(0.001))
    found = self_check(Clock(CPU))
    assert found.sleep == pytest.approx(1)
    assert found.noise == pytest.approx(1)


def test_ceilings_count_what_moves(virtual: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read but not written left out of the copy, a factor of two lost in the product, or zeros
    multiplied."""
    ceilings = Ceilings(Clock(CPU), 0.01)
    copied: list[int] = []

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        assert source.count_nonzero() > source.numel() // 2
        copied.append(source.nbytes)
        virtual.sleep(1)

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        assert a.shape == (4, 5)
        assert b.shape == (5, 6)
        assert a.count_nonzero() > 0
        virtual.sleep(2)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "mm", product)
    assert ceilings.copy() == 2 * copied[0]
    assert ceilings.product(4, 6, 5, torch.float32) == pytest.approx(120)
    assert ceilings.measured() == {"copy": 2 * copied[0], "4x6x5 float32": pytest.approx(120)}
    assert ceilings.floor(1200, 0, 120.0) == 10
    assert ceilings.floor(0, 4 * copied[0], 120.0) == ceilings.floor(0, 4 * copied[0], None) == 2
