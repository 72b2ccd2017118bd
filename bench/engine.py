"""Benchmarks any op of the registry: checks every contestant, then times those that are correct."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from bench.cases import Race
from bench.contestants import COMPILED, Contestant, first_sentence, shared
from bench.measure import (
    Ceilings,
    Clock,
    Lane,
    Timing,
    capture,
    input_sets,
    interleave,
    peak_memory,
    release,
    total_bytes,
)
from bench.record import Row
from kernels.registry import SPECS
from kernels.spec import SHORT_DTYPE, Case, OpSpec
from kernels.verify import Oracle, run_case

PEER_LIMIT = 8.0  # a peer is timed if its error is at most this many times what is allowed for this package
PARTS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What an op family adds to the engine.

    Args:
        family: The op family.
        peers: (op, compiled) -> the contestants other than this package, its reference, and its reference
            under torch.compile.
        matmul: (op, case) -> (m, n, k) of the matmul whose measured rate is the op's ceiling; None if only
            the bytes limit it.
        uncompiled: Why the reference under torch.compile is left out; "" if it is included.
    """

    family: str
    peers: Callable[[OpSpec, bool], list[Contestant]] = lambda spec, compiled: []
    matmul: Callable[[OpSpec, Case], tuple[int, int, int] | None] = lambda spec, case: None
    uncompiled: str = ""

    @property
    def specs(self) -> list[OpSpec]:
        return [spec for spec in SPECS.values() if spec.family == self.family]


def find_bench(family: str) -> Bench:
    """The bench in `bench.<family>`, or one without peers if there is no such module."""
    if find_spec(f"bench.{family}") is None:
        return Bench(family)
    bench: Bench = import_module(f"bench.{family}").BENCH
    return bench


class Admission(NamedTuple):
    """Whether a contestant may be timed: one of `record.STATUSES`, why, and its error over the limit."""

    status: str
    reason: str = ""
    error: float = 0.0


@dataclass(frozen=True)
class Runner:
    """Runs races on one device in one dtype, with `seconds` for each contestant in each direction."""

    bench: Bench
    clock: Clock
    ceilings: Ceilings
    dtype: torch.dtype
    seconds: float
    compiled: bool = True
    names: tuple[str, ...] = ()  # of the contestants to run; empty: all

    def contestants(self, spec: OpSpec) -> list[Contestant]:
        common = shared(spec, compiled=self.compiled)
        if self.bench.uncompiled:
            common = [
                c if c.name != COMPILED else Contestant(COMPILED, None, absent=self.bench.uncompiled)
                for c in common
            ]
        everyone = [*common, *self.bench.peers(spec, self.compiled)]
        return [c for c in everyone if not self.names or c.name in self.names]

    def run(self, race: Race) -> Iterator[Row]:
        """The rows of one race; forward and backward together, the headline, comes first."""
        spec, case = race
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # else compiled functions run eagerly after eight shapes
        sets = self.input_sets(spec, case)
        directions = ("both", "forward", "backward") if spec.gradients else ("forward",)
        template = Row(
            op=spec.name,
            case=case.id,
            dtype=SHORT_DTYPE[self.dtype],
            direction=directions[0],
            contestant="",
            status="absent",
        )

        oracle = self.oracle(spec, sets[0])
        admitted: dict[str, Contestant] = {}
        errors: dict[str, float] = {}
        for contestant in self.contestants(spec):
            admission = self.admit(spec, contestant, sets[0], oracle)
            if admission.status == "measured":
                admitted[contestant.name], errors[contestant.name] = contestant, admission.error
            else:
                verdict = admission._asdict() | {"error": admission.error or None}
                yield replace(template, **verdict, contestant=contestant.name)
        del oracle  # frees its memory before anything is timed

        for direction in directions:
            template = self._template(spec, case, direction)
            for row in self._race(spec, admitted, sets, template):
                yield replace(row, error=errors[row.contestant])
            release(self.clock)

    def oracle(self, spec: OpSpec, inputs: Inputs) -> Oracle:
        """The expected results, from the reference in a higher precision."""
        return Oracle(
            spec,
            inputs,
            self.dtype,
            oracle_dtype=torch.float64 if self.dtype == torch.float32 else torch.float32,
        )

    def input_sets(self, spec: OpSpec, case: Case) -> list[Inputs]:
        """Sets of random inputs, enough that each has left the cache before it is used again."""
        device = self.clock.device
        generator = torch.Generator(device)
        sets: list[Inputs] = []
        count = 1
        while len(sets) < count:
            with device:
                sets.append(spec.make_inputs(case, self.dtype, device, generator.manual_seed(len(sets))))
            count = input_sets(total_bytes(sets[0].values()), device)
        self.clock.synchronize()
        return sets

    def admit(self, spec: OpSpec, contestant: Contestant, inputs: Inputs, oracle: Oracle) -> Admission:
        """Runs a contestant and judges its results: only a correct one may be timed."""
        if contestant.function is None:
            return Admission("absent", contestant.absent)
        try:
            with self.clock.active(), contestant.context():
                verdicts = oracle.judge(run_case(contestant.function, inputs, spec.gradients, spec.writes))
                self.clock.synchronize()
        except torch.OutOfMemoryError:
            release(self.clock)
            return Admission("failed", "out of memory")
        except Exception as error:  # contestants refuse a case with all kinds of exceptions
            self.clock.synchronize()  # raises if the GPU itself failed
            reason = first_sentence(error)
            kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            _, no_kernel, obstacle = reason.partition("cannot be honoured: ")
            expected, reason = contestant.peer or bool(no_kernel), obstacle or reason
            return Admission("unavailable" if expected else "failed", kind + reason)
        worst = max((max(v.max_ratio, v.rms_ratio) for v in verdicts), default=0.0)
        wrong = [str(v) for v in verdicts if not v.ok]
        if wrong and not (contestant.peer and worst <= PEER_LIMIT):
            return Admission("wrong", "; ".join(wrong), worst)
        return Admission("measured", error=worst)

    def _template(self, spec: OpSpec, case: Case, direction: str) -> Row:
        flops = sum(spec.flops(case, part) for part in PARTS[direction])
        nbytes = sum(spec.bytes(case, self.dtype, part) for part in PARTS[direction])
        sizes = self.bench.matmul(spec, case)
        limit = self.ceilings.floor(
            flops, nbytes, None if sizes is None else self.ceilings.matmul(*sizes, self.dtype)
        )
        return Row(
            op=spec.name,
            case=case.id,
            dtype=SHORT_DTYPE[self.dtype],
            direction=direction,
            contestant="",
            status="failed",
            flops=flops,
            bytes=nbytes,
            limit=limit,
        )

    def _race(
        self, spec: OpSpec, admitted: Mapping[str, Contestant], sets: list[Inputs], template: Row
    ) -> list[Row]:
        lanes = {name: lane(spec, c, sets, template.direction) for name, c in admitted.items()}
        timings = self._time(lanes)
        graphs, problems = (
            self._time_graphs(spec, admitted, sets, template.direction) if self.clock.on_gpu else ({}, {})
        )
        rows = []
        for name in admitted:
            row, timing = replace(template, contestant=name), timings.get(name)
            if timing is None:
                rows.append(replace(row, reason="out of memory"))
                continue
            graph, memory = graphs.get(name), self._memory(spec, admitted[name], sets[0], template.direction)
            graph_seconds = None if graph is None else graph.median
            rows.append(
                row.measured(
                    timing, graph_seconds=graph_seconds, memory=memory, reason=problems.get(name, "")
                )
            )
        return rows

    def _time(self, lanes: Mapping[str, Lane]) -> dict[str, Timing]:
        """Times the lanes interleaved, or one by one if they do not fit into memory together.

        A lane that does not fit alone is left out.
        """
        try:
            return interleave(lanes, self.clock, self.seconds) if lanes else {}
        except torch.OutOfMemoryError:
            release(self.clock)
        if len(lanes) == 1:
            return {}
        alone = [self._time({name: lane}) for name, lane in lanes.items()]
        return {name: timing for part in alone for name, timing in part.items()}

    def _time_graphs(
        self, spec: OpSpec, admitted: Mapping[str, Contestant], sets: list[Inputs], direction: str
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """The contestants' times without launch gaps, and the reasons of those that have none."""
        captured: dict[str, Lane] = {}
        problems: dict[str, str] = {}
        for name, contestant in admitted.items():
            try:
                captured[name] = capture(
                    graph_lane(spec, contestant, sets, direction, self.clock), self.clock
                )
            except Exception as error:  # for example, it synchronises with the GPU
                self.clock.synchronize()
                problems[name] = f"no CUDA graph: {first_sentence(error)}"
        return self._time(captured), problems

    def _memory(self, spec: OpSpec, contestant: Contestant, inputs: Inputs, direction: str) -> int | None:
        """Forward: the bytes kept for backward. Otherwise: the peak of one forward and backward."""
        if not self.clock.on_gpu:
            return None
        with self.clock.active(), contestant.context():
            if direction == "forward":
                return self._kept(spec, contestant, inputs)
            call = lane(spec, contestant, [inputs], "both").calls[0]
            call()  # makes the gradients of the outputs, which do not count
            return peak_memory(call, self.clock)

    def _kept(self, spec: OpSpec, contestant: Contestant, inputs: Inputs) -> int:
        gc.collect()
        before = torch.cuda.memory_allocated(self.clock.device)
        outputs = _as_tuple(lane(spec, contestant, [inputs], "forward").calls[0]())
        return torch.cuda.memory_allocated(self.clock.device) - before - total_bytes(outputs)


def lane(spec: OpSpec, contestant: Contestant, sets: Sequence[Inputs], direction: str) -> Lane:
    """The calls of one contestant over the sets of inputs."""
    runs = [_Run(spec, contestant, inputs) for inputs in sets]
    if direction == "forward":
        return Lane([run.forward for run in runs], context=contestant.context)
    if direction == "both":
        return Lane([run.both for run in runs], context=contestant.context)

    def prepare() -> None:
        for run in runs:
            run.keep()

    return Lane([run.backward for run in runs], prepare, contestant.context)


def graph_lane(
    spec: OpSpec, contestant: Contestant, sets: Sequence[Inputs], direction: str, clock: Clock
) -> Lane:
    """Like `lane`, for capturing: a captured backward pass must keep its autograd graph."""
    if direction != "backward":
        return lane(spec, contestant, sets, direction)
    runs = [_Run(spec, contestant, inputs) for inputs in sets]
    with clock.active(), contestant.context():
        for run in runs:
            run.keep()
    return Lane([run.backward_again for run in runs], context=contestant.context)


class _Run:
    """One contestant on one set of inputs, with random gradients of its outputs."""

    def __init__(self, spec: OpSpec, contestant: Contestant, inputs: Inputs) -> None:
        assert contestant.function is not None
        self.function = contestant.function
        tensors = {n: v.detach() for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        self.leaves = {**inputs, **tensors}
        self.wanted = [tensors[n].requires_grad_() for n in spec.gradients if n in tensors]
        self.output_gradients: list[torch.Tensor] = []
        self.kept: list[tuple[torch.Tensor, ...]] = []

    def forward(self) -> Any:
        with torch.set_grad_enabled(bool(self.wanted)):
            return self.function(**self.leaves)

    def keep(self) -> None:
        self.kept.clear()  # a sample that ran out of memory may have left some
        self.kept.append(_as_tuple(self.forward()))
        self._output_gradients(self.kept[-1])

    def backward(self) -> None:
        torch.autograd.grad(self.kept.pop(), self.wanted, self.output_gradients, allow_unused=True)

    def backward_again(self) -> None:
        torch.autograd.grad(
            self.kept[-1], self.wanted, self.output_gradients, retain_graph=True, allow_unused=True
        )

    def both(self) -> None:
        outputs = _as_tuple(self.forward())
        torch.autograd.grad(outputs, self.wanted, self._output_gradients(outputs), allow_unused=True)

    def _output_gradients(self, outputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of the outputs, made once; that of a scalar loss is 1."""
        if not self.output_gradients:
            self.output_gradients = [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outputs]
        return self.output_gradients


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
