"""A compiled build's figures, and the gates that they must pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
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
    """The resources of a build's machine code; `problem` is the gate that it breaks."""

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
    tma: int = 0
    spills: int = 0
    instructions: int = 0
    loops: tuple[Loop, ...] = ()  # the whole code of a kernel without loops
    problem: str = ""

    @property
    def id(self) -> str:
        return f"{self.op} {self.kernel} {self.label} sm_{self.architecture}"


LOOP_COLUMNS = tuple(field.name for field in fields(Loop))


def to_json(row: Compiled) -> dict[str, Any]:
    """A row as JSON: each column of its loops is a list with a value for each loop."""
    columns: dict[str, Any] = {name: [getattr(loop, name) for loop in row.loops] for name in LOOP_COLUMNS}
    columns["copy_waits"] = [list(waits) for waits in columns["copy_waits"]]
    return {name: value for name, value in asdict(row).items() if name != "loops"} | {"loops": columns}


def from_json(content: dict[str, Any]) -> Compiled:
    """Reverses `to_json`.

    Raises:
        TypeError, KeyError, ValueError: The content is not a row.
    """
    columns = dict(content["loops"])
    columns["copy_waits"] = [tuple(waits) for waits in columns["copy_waits"]]
    loops = tuple(Loop(*values) for values in zip(*(columns[n] for n in LOOP_COLUMNS), strict=True))
    return Compiled(**{**content, "loops": loops})


def programs(row: Compiled) -> int:
    """How many programs of a build a multiprocessor holds at once, by warps, registers and shared memory."""
    limits = MULTIPROCESSORS[row.architecture]
    # Each of four partitions of the register file gives a warp a multiple of 256 registers.
    per_warp = -(-max(1, row.registers) * 32 // 256) * 256
    warps = min(limits.warps, 4 * (REGISTERS // 4 // per_warp))
    reserved = 1024  # bytes of shared memory that the driver takes for each program
    return min(limits.programs, warps // row.warps, limits.shared * 1024 // (row.shared + reserved))


def broken_gate(row: Compiled, has_matmuls: bool) -> str:
    """The gate that a compiled build breaks, or ""."""
    limit = SHARED_MEMORY[row.architecture] * 1024
    if row.shared > limit:
        return f"shared memory {row.shared / 1024:.0f} KB, the limit is {limit // 1024} KB"
    if row.gated and row.spills:
        return f"{row.spills} spill instructions"
    if row.gated and row.architecture == 90 and has_matmuls and not row.hgmma:
        return "no HGMMA"
    return ""
