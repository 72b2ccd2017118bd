"""A virtual clock, and fakes of CUDA's events, streams and graphs that use it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import bench.measure


class Time:
    """Replaces the module `time`; with `slowdown`, the same work takes longer the later it runs."""

    def __init__(self, slowdown: float = 0.0) -> None:
        self.now, self.slowdown = 0.0, slowdown

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds * (1 + self.slowdown * self.now)

    def spend(self, seconds: float) -> Callable[[], None]:
        return lambda: self.sleep(seconds)


class Graph:
    """A fake CUDA graph: records the calls made during a capture, and repeats them in a replay."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


def fake_cuda(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    """Gives torch.cuda a fake GPU that runs in virtual time."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.now

        def synchronize(self) -> None:
            assert self.at <= time.now

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1000

    @contextmanager
    def capture(graph: Graph, pool: Any, stream: Any) -> Any:
        assert stream == "the stream"
        Graph.capturing = graph
        try:
            yield
        finally:
            Graph.capturing = None

    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "the stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(bench.measure, "time", time)


def kernel(time: Time, seconds: float, launch: float = 0.0) -> Callable[[], None]:
    """A call that takes `seconds` on the fake GPU, and `launch` seconds more outside of graphs."""

    def call() -> None:
        if Graph.capturing is not None:
            Graph.capturing.calls.append(time.spend(seconds))
        else:
            time.sleep(seconds + launch)

    return call
