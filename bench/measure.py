"""How everything here is timed.

Every contestant is warmed up. Then all of them are sampled in turn, in a new order each round, so that a
drifting clock rate affects all of them equally. A sample is a run of calls that cycles through several sets
of random inputs, enough of them that a set has left the cache before it is used again. The result is the
median of the samples, with their 20th and 80th percentiles.

On a GPU, CUDA events on the stream time a run, launch gaps included. The replay of a CUDA graph gives a
second time without the gaps. On a CPU the same code reads the wall clock.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]

QUIET = 0.03  # the machine is too noisy if an A/A ratio is further from 1 than this
SLEEP_TOLERANCE = 0.02
MIN_SAMPLES, MAX_SAMPLES = 5, 100
MAX_CALLS = 10_000  # in one sample
MAX_SETS = 64
CPU_SETS = 4  # at most, on a CPU: calls there are slow, and more sets would make a sample last minutes
CPU_CACHE = 2**25  # bytes of a CPU's last-level cache, at most: one core's share of a larger one is no more
_abandoned: list[
    object
] = []  # graphs whose capture failed, kept because torch's allocator may still use them


class Timing(NamedTuple):
    """Seconds per call: the median of the samples, their 20th and 80th percentiles, and their count."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered)
        )


@dataclass(frozen=True)
class Lane:
    """One contestant's calls, ready to run.

    Args:
        calls: One for each set of inputs.
        prepare: Runs untimed before every sample and prepares one round over `calls` (a backward pass
            consumes the autograd graph that it needs). None: the calls can be repeated freely.
        context: Entered around every sample, outside the timed part.
        units: How many calls of the op one element of `calls` makes (a captured graph makes several).
    """

    calls: Sequence[Call]
    prepare: Call | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    units: int = 1


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.sample_seconds = 0.005 if self.on_gpu else 0.02

    def synchronize(self) -> None:
        """Synchronises with the GPU; does nothing on a CPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def active(self) -> AbstractContextManager[object]:
        """Enters the stream that all timed work uses.

        A CUDA graph can only capture backward passes whose forward pass ran on the capturing stream.
        """
        return torch.cuda.stream(self.stream) if self.on_gpu else nullcontext()

    def time(self, calls: Sequence[Call], rounds: int = 1) -> float:
        """The seconds that `rounds` rounds over `calls` take."""
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(rounds):
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def sample(self, lane: Lane, rounds: int) -> float:
        """Takes one sample, in seconds per call of the op."""
        with self.active(), lane.context():
            if lane.prepare is not None:
                lane.prepare()
                self.synchronize()
            seconds = self.time(lane.calls, rounds)
        return seconds / (rounds * len(lane.calls) * lane.units)


def interleave(lanes: Mapping[str, Lane], clock: Clock, seconds: float) -> dict[str, Timing]:
    """Samples the lanes in turn, about `seconds` for each (at least `MIN_SAMPLES` samples)."""
    rounds: dict[str, int] = {}
    durations: list[float] = []
    clock.synchronize()  # work on other streams, such as making the inputs, is complete

    for name, lane in lanes.items():
        clock.sample(lane, 1)  # compiles, loads modules, fills the allocator's cache
        clock.synchronize()
        once = clock.sample(lane, 1) * len(lane.calls) * lane.units
        wanted = math.ceil(clock.sample_seconds / max(once, 1e-9))
        rounds[name] = 1 if lane.prepare is not None else max(1, min(wanted, MAX_CALLS // len(lane.calls)))
        durations.append(once * rounds[name])

    count = int(seconds * len(lanes) / max(sum(durations), 1e-9))
    count = max(MIN_SAMPLES, min(count, MAX_SAMPLES))
    samples: dict[str, list[float]] = {name: [] for name in lanes}
    order, shuffler = list(lanes), random.Random(0)
    for _ in range(count):
        shuffler.shuffle(order)
        for name in order:
            clock.synchronize()
            samples[name].append(clock.sample(lanes[name], rounds[name]))
    return {name: Timing.of(values) for name, values in samples.items()}


def capture(lane: Lane, clock: Clock) -> Lane:
    """Captures the lane's calls as one CUDA graph, whose replay has no launch gaps.

    Raises:
        Exception: The calls cannot be captured, for example because they synchronise with the GPU.
    """
    with clock.active(), lane.context(), synchronization_raises():
        for call in lane.calls:
            call()
    clock.synchronize()

    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with lane.context(), torch.cuda.graph(graph, pool=pool, stream=clock.stream):
            for call in lane.calls:
                call()
    except Exception:
        _abandon(graph, pool, clock)
        raise
    return Lane([_Replay(graph, lane.calls)], units=len(lane.calls))


@dataclass(frozen=True)
class _Replay:
    """Replays a graph. The calls that it was captured from own tensors that it reads, so they stay alive."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Call]

    def __call__(self) -> None:
        self.graph.replay()


@contextmanager
def synchronization_raises() -> Iterator[None]:
    """Makes synchronising with the GPU an error.

    This finds calls that cannot be captured before a capture is tried: a failed one harms the whole process.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _abandon(graph: object, pool: Any, clock: Clock) -> None:
    """Cleans up after a failed capture.

    Before torch 2.12 its stream stays current, and the allocator frees no more memory.
    """
    _abandoned.append(graph)
    torch.cuda.set_stream(torch.cuda.default_stream(clock.device))
    with suppress(RuntimeError):  # the capture has already ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of `nbytes` are needed so that a set has left the cache before it is used again."""
    if device.type == "cuda":
        cache, most = torch.cuda.get_device_properties(device).L2_cache_size, MAX_SETS
    else:
        name = "SC_LEVEL3_CACHE_SIZE"
        known = os.sysconf(name) if name in getattr(os, "sysconf_names", ()) else 0
        cache, most = min(known, CPU_CACHE) if known > 0 else CPU_CACHE, min(MAX_SETS, CPU_SETS)
    return max(1, min(most, math.ceil(3 * cache / max(1, nbytes))))


def peak_memory(call: Call, clock: Clock) -> int | None:
    """Bytes that one call allocates at its peak; None on a CPU, where they are not counted."""
    if not clock.on_gpu:
        return None
    gc.collect()
    clock.synchronize()
    before = torch.cuda.memory_allocated(clock.device)
    torch.cuda.reset_peak_memory_stats(clock.device)
    with clock.active():
        call()
    clock.synchronize()
    return torch.cuda.max_memory_allocated(clock.device) - before


@dataclass
class Ceilings:
    """The machine's limits, each measured when it is first needed: the rates of a copy and of matmuls."""

    clock: Clock
    seconds: float = 0.2
    matmuls: dict[str, float] = field(default_factory=dict)  # "MxNxK dtype" -> FLOP/s
    _copy: float | None = None

    def copy(self) -> float:
        """Bytes per second, read plus written, of a copy far larger than the cache."""
        if self._copy is None:
            elements = 2**28 if self.clock.on_gpu else 2**24
            source = torch.randn(elements, device=self.clock.device)
            target = torch.empty_like(source)
            timing = self._time(lambda: target.copy_(source))
            self._copy = 2 * source.nbytes / timing
        return self._copy

    def matmul(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        """FLOP per second of an (m, k) by (k, n) matmul of random values."""
        key = f"{m}x{n}x{k} {str(dtype).removeprefix('torch.')}"
        if key not in self.matmuls:
            device = self.clock.device
            a = torch.randn(m, k, device=device).to(dtype)
            b = torch.randn(n, k, device=device).to(dtype)
            out = torch.empty(m, n, device=device, dtype=dtype)
            self.matmuls[key] = 2 * m * n * k / self._time(lambda: torch.mm(a, b.T, out=out))
        return self.matmuls[key]

    def measured(self) -> dict[str, float]:
        """The rates measured so far: "copy" in byte/s, matmuls in FLOP/s."""
        return self.matmuls if self._copy is None else {"copy": self._copy, **self.matmuls}

    def floor(self, flops: int, nbytes: int, rate: float | None) -> float:
        """The least seconds for `flops` operations at `rate` FLOP/s and for moving `nbytes`."""
        return max(nbytes / self.copy(), 0.0 if rate is None else flops / rate)

    def _time(self, call: Call) -> float:
        return interleave({"ceiling": Lane([call])}, self.clock, self.seconds)["ceiling"].median


class SelfCheck(NamedTuple):
    """Whether the clock can be trusted on this machine now.

    `sleep` is the measured length of a sleep over its true length; `noise` is the ratio of two timings of one
    contestant.
    """

    sleep: float
    noise: float

    @property
    def problems(self) -> list[str]:
        problems = []
        if abs(self.sleep - 1) > SLEEP_TOLERANCE:
            problems.append(f"a sleep of known length was timed as {self.sleep:.3f} of its length")
        if abs(self.noise - 1) > QUIET:
            problems.append(
                f"the machine is too noisy: one contestant against itself reads {self.noise:.3f}, expected "
                f"1.00 ± {QUIET}"
            )
        return problems


def self_check(clock: Clock, seconds: float = 0.3) -> SelfCheck:
    """Times a sleep of known length, and a matmul against itself."""
    length = 0.02
    nap = Lane([lambda: time.sleep(length)])
    sleeping = statistics.median(clock.sample(nap, 2) for _ in range(5))

    size = 4096 if clock.on_gpu else 256
    a = torch.randn(size, size, device=clock.device)
    out = torch.empty_like(a)
    lane = Lane([lambda: torch.mm(a, a, out=out)])
    pair = interleave({"A": lane, "A again": lane}, clock, seconds)
    return SelfCheck(sleeping / length, pair["A"].median / pair["A again"].median)


def release(clock: Clock) -> None:
    """Frees the memory of contestants that are no longer used."""
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()


def total_bytes(tensors: Iterable[object]) -> int:
    """The bytes of all tensors in `tensors`; other values count as none."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
