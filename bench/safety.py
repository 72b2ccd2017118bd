"""`python -m bench.safety`: checks on a GPU that repeated calls of the compiled kernels give the same bits.

All shapes are small. The first case of each op in each dtype is repeated most often. `python -m
bench.sanitizer` runs the same calls, once each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple
from unittest.mock import patch

import torch

import kernels
from bench.command import check_names, parse_budget, say
from bench.machine import describe
from bench.record import Report
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError
from kernels.registry import SPECS
from kernels.spec import SHORT_DTYPE, Case, OpSpec
from kernels.verify import run_case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the most used first
FEW = 10  # repeats of every call that is not an op's first case
DISTURBANCES = (0, 64, 512, 1536)  # sizes of the matmuls that run concurrently with the calls, in turn


@dataclass(frozen=True)
class Options:
    """Flags."""

    op: tuple[str, ...] = option(tuple(SPECS), "ops")
    repeats: int = option(
        1000, f"of each op's first case in each dtype; of others {FEW} at most; 0: each call once"
    )
    zero_matmuls: bool = option(
        False, "zero what a matmul will write: initcheck does not see cuBLAS's stores"
    )
    budget: str | None = option(None, "as in 90s or 8m: leave out the least important calls beyond it")
    json: str | None = option(None, "write what was found to this file")


class Call(NamedTuple):
    """An op at a case in a dtype; `first` marks the op's first case."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    first: bool

    def __str__(self) -> str:
        return f"{self.spec.name} {self.case.id} {SHORT_DTYPE[self.dtype]}"


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.safety", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    check_names("--op", options.op, SPECS)
    budget, began = parse_budget(options.budget), time.monotonic()
    if not torch.cuda.is_available():
        raise InputError("no GPU was found, expected one: kernels run compiled here")
    device = torch.device("cuda")
    report = Report("python -m bench.safety", describe(device))
    with zeroed_matmuls() if options.zero_matmuls else nullcontext():
        code = run(
            todo=calls(options.op),
            device=device,
            repeats=options.repeats,
            deadline=None if budget is None else began + budget,
            report=report,
        )
    torch.cuda.synchronize()
    if options.json is not None:
        report.save(options.json)
    return code


def calls(names: Sequence[str]) -> list[Call]:
    """The small and edge cases: first cases before others, then by dtype, alternating over the ops."""
    todo = []
    for dtype in DTYPES:
        lists = [
            [
                Call(spec, case, dtype, case is spec.tagged("small")[0])
                for case in spec.tagged("small", "edge")
            ]
            for spec in (SPECS[name] for name in names)
            if dtype in spec.dtypes
        ]
        todo += [call for group in zip_longest(*lists) for call in group if call is not None]
    return sorted(todo, key=lambda call: not call.first)


def run(
    todo: Sequence[Call],
    device: torch.device,
    repeats: int,
    deadline: float | None,
    report: Report,
    backend: str = "triton",
) -> int:
    """Makes the calls, notes the differences, and returns the exit code."""
    bad = done = 0
    for call in todo:
        if done and deadline is not None and time.monotonic() > deadline:
            say(report, f"left out for the budget: {len(todo) - done} of {len(todo)} calls, from {call} on")
            break
        times = repeats if call.first else min(repeats, FEW)
        changed = changed_names(call, device, times, backend)
        if changed:
            bad += 1
            say(report, f"{call}: different bits when repeated: {', '.join(changed)}")
        done += 1

    firsts = sum(call.first for call in todo[:done])
    if repeats:
        result = (
            f"{bad} of {done} calls gave different bits"
            if bad
            else f"{done} calls gave the same bits every time"
        )
        say(
            report,
            f"{result}: {firsts} repeated {repeats:,} times, {done - firsts} {min(repeats, FEW)} times",
        )
    else:
        say(report, f"{done} calls were made once")
    report.complete = done == len(todo)
    return 1 if bad else 0


def changed_names(call: Call, device: torch.device, repeats: int, backend: str = "triton") -> list[str]:
    """The names of outputs and gradients that differ in any bit between calls with the same inputs."""
    spec = call.spec
    inputs = spec.make_inputs(call.case, call.dtype, device, torch.Generator().manual_seed(0))
    changed: dict[str, torch.Tensor] = {}
    with kernels.use_backend(**{spec.name: backend}):
        first = run_case(spec.function, inputs, spec.gradients, spec.writes)
        if not repeats:
            return []
        disturb = Disturbance(device)
        for _ in range(repeats):
            disturb()
            again = run_case(spec.function, inputs, spec.gradients, spec.writes)
            for name, value in first.items():
                if value is not None:
                    differs = _differs(value, again[name])
                    changed[name] = changed[name] | differs if name in changed else differs
    return sorted(name for name, differs in changed.items() if differs)


@contextmanager
def zeroed_matmuls() -> Iterator[None]:
    """Within it, `torch.mm` zeroes the rows of `out`, with their padding, before it writes them."""
    mm = torch.mm

    def zeroing_mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:
            # A chunk of logits is narrower than its rows: the loss reads the rest too, and discards it.
            out.as_strided((out.shape[0], out.stride(0)), (out.stride(0), 1)).zero_()
        return mm(a, b, out=out)

    with patch.object(torch, "mm", zeroing_mm):
        yield


class Disturbance:
    """Concurrent work on another stream, of varying size, so that a race condition is more likely to show."""

    def __init__(self, device: torch.device) -> None:
        self.factors = [torch.randn(side, side, device=device) for side in DISTURBANCES]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.turn = 0

    def __call__(self) -> None:
        factor = self.factors[self.turn % len(self.factors)]
        self.turn += 1
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            torch.mm(factor, factor)


def _differs(a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """Whether any bit differs (a NaN equals the same NaN), as a tensor so that nothing synchronises."""
    if b is None or a.shape != b.shape:
        return torch.ones((), dtype=torch.bool, device=a.device)
    return (_bits(a) != _bits(b)).any()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    sys.exit(run_command("bench.safety", main))
