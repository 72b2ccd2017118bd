"""The timing protocol: what is timed, what is not, and whether the clock can be trusted."""

from __future__ import annotations

import gc
import time
import weakref
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


def test_a_sleep_is_timed_correctly() -> None:
    """Wrong units, or a wrong number of calls or rounds, in the conversion to seconds per call."""
    nap = Lane([lambda: time.sleep(0.01)] * 2)
    assert min(Clock(CPU).sample(nap, 1) for _ in range(10)) == pytest.approx(0.01, rel=0.02)


def test_seconds_are_per_call(virtual: Time) -> None:
    """A sample not divided by its rounds, its sets of inputs or the calls in its graph."""
    lane = Lane([virtual.spend(1), virtual.spend(3)], units=2)
    assert Clock(CPU).sample(lane, 5) == pytest.approx(1.0)
    assert interleave({"a": lane, "b": Lane([virtual.spend(5)])}, Clock(CPU), 0)["b"].median == pytest.approx(
        5
    )


def test_event_times_are_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The milliseconds of CUDA events taken for seconds."""
    virtual = Time()
    fake_cuda(monkeypatch, virtual)
    assert Clock(CUDA).sample(Lane([kernel(virtual, 0.25)]), 4) == pytest.approx(0.25)


def test_a_graph_has_no_launch_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph timed as one call although it makes one for each set of inputs, or never replayed."""
    virtual = Time()
    fake_cuda(monkeypatch, virtual)
    clock = Clock(CUDA)
    lane = Lane([kernel(virtual, 0.001, launch=0.004), kernel(virtual, 0.003, launch=0.004)])
    assert clock.sample(lane, 1) == pytest.approx(0.006)
    assert clock.sample(capture(lane, clock), 1) == pytest.approx(0.002)


def test_a_graph_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of outputs that are freed after the capture, while replays still read them."""
    virtual = Time()
    fake_cuda(monkeypatch, virtual)
    clock, call = Clock(CUDA), kernel(virtual, 0.001)
    captured, owner = capture(Lane([call]), clock), weakref.ref(call)
    del call
    gc.collect()
    assert owner() is not None
    del captured
    gc.collect()
    assert owner() is None


def test_synchronising_calls_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture started although it must fail; a failed capture after which torch frees no memory."""
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

    def synchronises() -> None:
        if torch.cuda.get_sync_debug_mode() == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        capture(Lane([synchronises]), clock)
    assert not ended
    assert torch.cuda.get_sync_debug_mode() == "default"

    def fails() -> None:
        if Graph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(Lane([fails]), clock)
    assert ended == [(0, (0, 1))]
    assert streams == ["the default stream"]


def test_drift_affects_all_contestants_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants timed one after the other: on a machine that slows down, the later one looks slower."""
    virtual = Time(slowdown=0.05)
    monkeypatch.setattr(bench.measure, "time", virtual)
    timings = interleave(
        {"first": Lane([virtual.spend(0.1)]), "second": Lane([virtual.spend(0.1)])}, Clock(CPU), 10
    )
    assert timings["first"].median / timings["second"].median == pytest.approx(1, abs=0.03)
    assert timings["first"].high > 1.1 * timings["first"].low


def test_periodic_noise_affects_all_contestants_equally(virtual: Time) -> None:
    """A fixed order of contestants, in which periodic noise always hits the same one."""
    durations = iter([1.0, 2.0] * 1000)
    call = Lane([lambda: virtual.sleep(next(durations))])
    timings = interleave({"first": call, "second": call}, Clock(CPU), 1e9)
    assert {timing.low for timing in timings.values()} == {1.0}
    assert {timing.high for timing in timings.values()} == {2.0}


def test_preparation_and_context_are_not_timed(virtual: Time) -> None:
    """Backward timed with its forward pass or its context; a sample without its preparation."""
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


def test_a_sample_holds_many_short_calls(virtual: Time) -> None:
    """A sample so short that it measures the clock's resolution."""
    clock, calls = Clock(CPU), []

    def short() -> None:
        calls.append(True)
        virtual.sleep(clock.sample_seconds / 50)

    timing = interleave({"short": Lane([short])}, clock, 0)["short"]
    assert len(calls) >= 50 * timing.samples >= 50 * bench.measure.MIN_SAMPLES


def test_the_sampling_time_is_kept(virtual: Time) -> None:
    """The seconds per contestant are ignored, or the warm-up is counted as samples."""
    interleave({name: Lane([virtual.spend(0.02)]) for name in "abc"}, Clock(CPU), 1.0)
    assert virtual.now == pytest.approx(3.0, rel=0.1)


def test_median_and_spread() -> None:
    """A mean instead of the median, so that one interruption changes the result."""
    assert Timing.of([5, 1, 2, 3, 4, 100]) == (3.5, 2, 5, 6)
    assert Timing.of([2.0]) == (2, 2, 2, 1)


def test_inputs_rotate_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same buffer in every call, so that the cache is measured."""

    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert input_sets(2**20, CUDA) == bench.measure.MAX_SETS
    assert input_sets(50 * 2**20, CUDA) == 3
    assert input_sets(2**30, CUDA) == 1
    assert input_sets(2**20, CPU) > 1
    assert total_bytes([torch.zeros(3), None, 2.0, torch.zeros(2, dtype=torch.int64)]) == 28


def test_the_clock_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A noisy machine or a wrong clock that is not reported."""
    assert SelfCheck(1.01, 0.99).problems == []
    assert len(SelfCheck(1.1, 0.9).problems) == 2
    assert "noisy" in SelfCheck(1.0, 1.05).problems[0]
    virtual = Time()
    monkeypatch.setattr(bench.measure, "time", virtual)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: virtual.sleep(0.001))
    check = self_check(Clock(CPU))
    assert check.sleep == pytest.approx(1)
    assert check.noise == pytest.approx(1)


def test_ceilings_count_what_moves(virtual: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that counts only half of its bytes, a matmul without its factor of two, or inputs of zeros."""
    ceilings = Ceilings(Clock(CPU), 0.01)
    copied: list[int] = []

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        assert source.count_nonzero() > source.numel() // 2
        copied.append(source.nbytes)
        virtual.sleep(1)

    def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        assert a.shape == (4, 5)
        assert b.shape == (5, 6)
        assert a.count_nonzero() > 0
        virtual.sleep(2)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "mm", matmul)
    assert ceilings.copy() == 2 * copied[0]
    assert ceilings.matmul(4, 6, 5, torch.float32) == pytest.approx(120)
    assert ceilings.measured() == {"copy": 2 * copied[0], "4x6x5 float32": pytest.approx(120)}
    assert ceilings.floor(1200, 0, 120.0) == 10
    assert ceilings.floor(0, 4 * copied[0], 120.0) == ceilings.floor(0, 4 * copied[0], None) == 2
