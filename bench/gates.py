"""A compiled build's figures, and the gates that they must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from bench.machine_code import Loop
from kernels.tuning import REGISTERS, SHARED_MEMORY


class Multiprocessor(NamedTuple):
    """What the programs on a multiprocessor share."""

    warps: int
    programs: int
    shared: int  # KB


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164),
    86: Multiprocessor(48, 16, 100),
    89: Multiprocessor(48, 24, 100),
    90: Multiprocessor(64, 32, 228),
    100: Multiprocessor(64, 32, 228),
    120: Multiprocessor(48, 24, 100),
}


@dataclass(frozen=True)
class Compiled:
    """The resources of a build's machine code; the gates that it breaks, those that it may break."""

    op: str
    kernel: str
    label: str
    architecture: int
    warps: int
    stages: int
    gated: bool
    registers: int = 0
    stack: int = 0
    shared: int = 0
    programs: int = 0  # on one multiprocessor
    hmma: int = 0
    hgmma: int = 0
    utchmma: int = 0
    matmuls: bool = False  # whether the kernel's source multiplies matrices
    tma: int = 0
    spills: int = 0
    instructions: int = 0
    loops: tuple[Loop, ...] = ()  # the whole code of a kernel without loops
    problem: str = ""
    allowed: str = ""

    @property
    def id(self) -> str:
        return f"{self.op} {self.kernel} {self.label} sm_{self.architecture}"


LOOP_COLUMNS = tuple(field.name for field in fields(Loop))


def to_json(row: Compiled, *, short: bool = False) -> dict[str, Any]:
    """A row as JSON: each column of its loops is a list with a value for each loop.

    short: leaves out the figures that are 0, and the gates.
    """
    content = {field.name: getattr(row, field.name) for field in fields(row)}
    columns: dict[str, list[Any]] = {n: [getattr(loop, n) for loop in row.loops] for n in LOOP_COLUMNS}
    columns["copy_waits"] = [list(waits) for waits in columns["copy_waits"]]
    if short:
        del content["problem"], content["allowed"]
        content = {name: value for name, value in content.items() if value}
        columns = {name: values for name, values in columns.items() if any(values)}
    return content | {"loops": columns}


def from_json(content: Mapping[str, Any]) -> Compiled:
    """Reverses `to_json`.

    Raises:
        TypeError, KeyError, ValueError: The content is not a row.
    """
    columns = dict(content["loops"])
    if "copy_waits" in columns:
        columns["copy_waits"] = [tuple(waits) for waits in columns["copy_waits"]]
    loops = [
        Loop(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
    ]
    return Compiled(**{**content, "loops": tuple(loops)})


def programs(row: Compiled) -> int:
    """How many programs of a build a multiprocessor holds at once, by warps, registers and shared memory."""
    limits = MULTIPROCESSORS[row.architecture]
    # Each of four partitions of the register file gives a warp a multiple of 256 registers.
    per_warp = -(-max(1, row.registers) * 32 // 256) * 256
    warps = min(limits.warps, 4 * (REGISTERS // 4 // per_warp))
    reserved = 1024  # bytes of shared memory that the driver takes for each program
    return min(limits.programs, warps // row.warps, limits.shared * 1024 // (row.shared + reserved))


def _memory(row: Compiled) -> str:
    limit = SHARED_MEMORY[row.architecture] * 1024
    too_much = row.shared > limit
    return f"shared memory {row.shared / 1024:.0f} KB, the limit is {limit // 1024} KB" if too_much else ""


def _hgmma(row: Compiled) -> str:
    return "no HGMMA" if row.architecture == 90 and row.matmuls and not row.hgmma else ""


def _copies(loop: Loop, row: Compiled) -> str:
    if not loop.matmuls:
        return ""
    if not loop.copy_waits:
        return "copies nothing ahead"
    return "waits for every copy (cp.async.wait_group 0)" if 0 in loop.copy_waits else ""


def _serial(loop: Loop, row: Compiled) -> str:
    serial = row.hgmma and loop.matmuls > 1 and loop.matmul_waits >= loop.matmuls
    return f"waits {loop.matmul_waits} times for {loop.matmuls} HGMMA" if serial else ""


def _spills(loop: Loop, row: Compiled) -> str:
    return f"moves {loop.spill_bytes} bytes of spills" if loop.spill_bytes > SPILL_BYTES else ""


def _barriers(loop: Loop, row: Compiled) -> str:
    if row.warps < 8 or not row.hgmma or not loop.matmuls:
        return ""
    if not loop.barriers:
        return "has no barrier"
    return f"copies {loop.unordered} times after a wait for HGMMA without a barrier" if loop.unordered else ""


def _masked(row: Compiled) -> str:
    lengths = [loop.instructions / loop.matmuls for loop in row.loops if loop.matmuls]
    ratio = max(lengths) / min(lengths) if lengths else 1.0
    return f"the masked loop has {ratio:.2f} times the instructions" if ratio > MASKED_RATIO else ""


def _of_loops(gate: Callable[[Loop, Compiled], str]) -> Callable[[Compiled], str]:
    """The gate of a build that each of its loops must pass."""

    def broken(row: Compiled) -> str:
        texts = [(n, gate(loop, row)) for n, loop in enumerate(row.loops, 1)]
        return ", ".join(f"loop {n} {text}" for n, text in texts if text)

    return broken


SPILL_BYTES = 16  # per thread, in an iteration of a loop, or in the whole code of a kernel without loops
MASKED_RATIO = 1.3

# What `kernels.spec.Build.exceptions` names -> what a build breaks, or "".
GATES: dict[str, Callable[[Compiled], str]] = {
    "memory": _memory,
    "hgmma": _hgmma,
    "copies": _of_loops(_copies),
    "serial": _of_loops(_serial),
    "spills": _of_loops(_spills),
    "barriers": _of_loops(_barriers),
    "masked": _masked,
}


def judge(row: Compiled, exceptions: Mapping[str, str]) -> Compiled:
    """The row with the gates that it breaks, and the exceptions that it needs, each with its reason."""
    broken = {name: text for name in (GATES if row.gated else ("memory",)) if (text := GATES[name](row))}
    problems = [text for name, text in broken.items() if name not in exceptions]
    problems += [f"no gate is called {name!r}" for name in exceptions if name not in GATES]
    allowed = [f"{text} ({exceptions[name]})" for name, text in broken.items() if name in exceptions]
    return replace(row, problem="; ".join(problems), allowed="; ".join(allowed))
