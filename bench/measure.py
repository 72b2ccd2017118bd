"""The protocol by which everything here is timed.

A contestant is warmed up, then sampled in turn with the others, in a new order each round, so that drifting
clocks meet all of them alike. A sample is a run of calls that goes round several sets of random inputs,
enough of them that none is still in the cache when its turn comes again. What is reported is the median of
the samples, between their 20th and 80th percentiles.

On a GPU a run is timed by events on its stream, launch gaps included, and once more as the replay of a CUDA
graph, without them. On a CPU the same code reads the wall clock.
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

QUIET = 0.03  # an A/A ratio further from 1 than this means that the machine is too noisy
SLEEP_TOLERANCE = 0.02
MIN_SAMPLES, MAX_SAMPLES = 5, 100
MAX_CALLS = 10_000  # in one sample
MAX_SETS = 64
PROCESSOR_SETS = 4  # a call on a processor takes so long that more of them would make a sample of minutes
PROCESSOR_CACHE = (
    2**25
)  # what a processor's last cache is taken to be, at most: a core's share of a larger one is no more
_abandoned: list[object] = []  # graphs whose capture failed: torch's allocator may still look at them


class Timing(NamedTuple):
    """Seconds per call: the median of the samples, their 20th and 80th percentiles, and their number."""

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
        prepare: Runs untimed before every sample; what it leaves is good for one round over `calls` (a
            backward pass needs a graph that it may consume). None: the calls can be repeated at will.
        context: Entered around every sample, so that its own cost is not measured.
        units: How many calls of the op one element of `calls` makes (a captured graph makes several).
    """

    calls: Sequence[Call]
    prepare: Call | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    units: int = 1


class Clock:
    """Times runs of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.sample_seconds = 0.005 if self.on_gpu else 0.02

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def active(self) -> AbstractContextManager[object]:
        """The stream that everything is timed on: a graph can only capture backward passes that belong to its
        own stream."""
        return torch.cuda.stream(self.stream) if self.on_gpu else nullcontext()

    def time(self, calls: Sequence[Call], rounds: int = 1) -> float:
        """Seconds that `rounds` rounds over `calls` take."""
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
        """Seconds per call of one sample."""
        with self.active(), lane.context():
            if lane.prepare is not None:
                lane.prepare()
                self.wait()
            seconds = self.time(lane.calls, rounds)
        return seconds / (rounds * len(lane.calls) * lane.units)


def interleave(lanes: Mapping[str, Lane], clock: Clock, seconds: float) -> dict[str, Timing]:
    """Times the lanes in turns, spending about `seconds` on each (at least `MIN_SAMPLES` samples)."""
    rounds: dict[str, int] = {}
    durations: list[float] = []
    clock.wait()  # what was made on another stream is there
    for name, lane in lanes.items():
        clock.sample(lane, 1)  # compiles, loads modules, fills the allocator's cache
        clock.wait()
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
            clock.wait()
            samples[name].append(clock.sample(lanes[name], rounds[name]))
    return {name: Timing.of(values) for name, values in samples.items()}


def capture(lane: Lane, clock: Clock) -> Lane:
    """The lane's calls as one CUDA graph, which is replayed without launch gaps.

    Raises:
        Exception: The calls cannot be captured (they wait for the GPU, say).
    """
    with clock.active(), lane.context(), never_waiting():
        for call in lane.calls:
            call()
    clock.wait()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with lane.context(), torch.cuda.graph(graph, pool=pool, stream=clock.stream):
            for call in lane.calls:
                call()
    except Exception:
        _abandon(graph, pool, clock)
        raise
    return Lane([graph.replay], units=len(lane.calls))


@contextmanager
def never_waiting() -> Iterator[None]:
    """What waits for the GPU fails here, in a call that can still be given up: a capture that fails harms the
    whole process."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype, once
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _abandon(graph: object, pool: Any, clock: Clock) -> None:
    """Cleans up behind a failed capture: torch before 2.12 leaves its stream current, and its allocator frees
    nothing more."""
    _abandoned.append(graph)
    torch.cuda.set_stream(torch.cuda.default_stream(clock.device))
    with suppress(RuntimeError):  # there is nothing left to end
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` each it takes that a set has left the cache when its turn comes
    again."""
    if device.type == "cuda":
        cache, most = torch.cuda.get_device_properties(device).L2_cache_size, MAX_SETS
    else:
        known = (
            os.sysconf("SC_LEVEL3_CACHE_SIZE")
            if "SC_LEVEL3_CACHE_SIZE" in getattr(os, "sysconf_names", ())
            else 0
        )
        cache, most = (
            min(known, PROCESSOR_CACHE) if known > 0 else PROCESSOR_CACHE,
            min(MAX_SETS, PROCESSOR_SETS),
        )
    return max(1, min(most, math.ceil(3 * cache / max(1, nbytes))))


def peak_memory(call: Call, clock: Clock) -> int | None:
    """Bytes that one call allocates at its peak beyond what was there before it; None on a CPU, which does
    not count them."""
    if not clock.on_gpu:
        return None
    gc.collect()
    clock.wait()
    before = torch.cuda.memory_allocated(clock.device)
    torch.cuda.reset_peak_memory_stats(clock.device)
    with clock.active():
        call()
    clock.wait()
    return torch.cuda.max_memory_allocated(clock.device) - before


@dataclass
class Ceilings:
    """What the machine itself can do, measured when first asked for: no kernel runs past these."""

    clock: Clock
    seconds: float = 0.2
    products: dict[str, float] = field(default_factory=dict)  # "MxNxK dtype" -> FLOP/s
    _copy: float | None = None

    def copy(self) -> float:
        """Bytes per second, read and written, of a copy far larger than the cache."""
        if self._copy is None:
            elements = 2**28 if self.clock.on_gpu else 2**24
            source = torch.randn(elements, device=self.clock.device)
            target = torch.empty_like(source)
            timing = self._time(lambda: target.copy_(source))
            self._copy = 2 * source.nbytes / timing
        return self._copy

    def product(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        """FLOP per second of an (m, k) by (k, n) matrix product of random numbers."""
        key = f"{m}x{n}x{k} {str(dtype).removeprefix('torch.')}"
        if key not in self.products:
            device = self.clock.device
            a = torch.randn(m, k, device=device).to(dtype)
            b = torch.randn(n, k, device=device).to(dtype)
            out = torch.empty(m, n, device=device, dtype=dtype)
            self.products[key] = 2 * m * n * k / self._time(lambda: torch.mm(a, b.T, out=out))
        return self.products[key]

    def measured(self) -> dict[str, float]:
        """What is known so far: "copy" in byte/s, products in FLOP/s."""
        return self.products if self._copy is None else {"copy": self._copy, **self.products}

    def floor(self, flops: int, nbytes: int, rate: float | None) -> float:
        """Seconds below which `flops` operations at `rate`, and `nbytes` moved, cannot be done."""
        return max(nbytes / self.copy(), 0.0 if rate is None else flops / rate)

    def _time(self, call: Call) -> float:
        return interleave({"ceiling": Lane([call])}, self.clock, self.seconds)["ceiling"].median


class SelfCheck(NamedTuple):
    """Whether the clock can be believed here and now.

    `sleep` is the measured length of a known sleep over its true length, `noise` the ratio of one
    contestant's time to its own.
    """

    sleep: float
    noise: float

    @property
    def problems(self) -> list[str]:
        found = []
        if abs(self.sleep - 1) > SLEEP_TOLERANCE:
            found.append(f"a known sleep was timed {self.sleep:.3f} times its length")
        if abs(self.noise - 1) > QUIET:
            found.append(
                f"the machine is too noisy: one contestant against itself reads {self.noise:.3f}, not 1.00 "
                f"± {QUIET}"
            )
        return found


def self_check(clock: Clock, seconds: float = 0.3) -> SelfCheck:
    """Times a sleep of known length, and a matrix product against itself."""
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
    """Gives back what the last contestants held."""
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()


def total_bytes(tensors: Iterable[object]) -> int:
    """Bytes of all tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
