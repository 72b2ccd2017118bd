"""Reads the PTX and the machine code (SASS) of a compiled kernel, and counts what its loops execute.

A loop is a natural loop of the control flow graph: a branch goes back to an instruction that every path to
the branch passes. Each instruction counts for the innermost loop that contains it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_LABEL = re.compile(r"^\s*([$.\w]+):")
_SASS = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_PTX = re.compile(r"^\s*(?:@(?P<guard>!?%?\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);")
_TARGET = re.compile(r"^\s*`?\(?(?P<label>[$.]?\w+)\)?\s*$")
_MATMUL = re.compile(r"^(?:HMMA|HGMMA|IMMA|UTC\w*MMA)\b|^(?:mma|wgmma\.mma_async|tcgen05\.mma)\b")
_SPILLS = ("LDL", "STL")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # modifier -> bytes; 4 without one


class Instruction(NamedTuple):
    """An instruction; `target` is the index of the instruction that it may branch to."""

    opcode: str
    operands: str = ""
    guarded: bool = False  # executed under a predicate
    target: int | None = None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never executed after this one."""
        return not self.guarded and self.opcode.split(".")[0] in (
            "BRA",
            "EXIT",
            "RET",
            "bra",
            "ret",
            "exit",
            "trap",
        )

    def is_a(self, *names: str) -> bool:
        return any(self.opcode == name or self.opcode.startswith(f"{name}.") for name in names)


@dataclass(frozen=True)
class Loop:
    """What one iteration of a loop executes, without the loops inside it.

    Args:
        instructions: All instructions.
        matmuls: HMMA, HGMMA and UTCHMMA.
        matmul_waits: Waits for asynchronous matmuls (WARPGROUP.DEPBAR).
        barriers: Barriers of the whole program (BAR.SYNC).
        unordered: Asynchronous copies that no barrier separates from the last wait for matmuls.
        spills: Loads and stores of spilled registers (LDL, STL).
        spill_bytes: Bytes that they move, per thread.
        mufu: Special functions such as EX2 (MUFU).
        copy_waits: Groups of asynchronous copies that each wait leaves in flight (cp.async.wait_group, PTX).
    """

    instructions: int
    matmuls: int = 0
    matmul_waits: int = 0
    barriers: int = 0
    unordered: int = 0
    spills: int = 0
    spill_bytes: int = 0
    mufu: int = 0
    copy_waits: tuple[int, ...] = ()


def sass(text: str) -> list[Instruction]:
    """The instructions of the disassembly of one kernel, without the trap and the padding after the last."""
    code = _parse(text, _SASS, "BRA")
    while code and (code[-1].opcode == "NOP" or code[-1].target == len(code) - 1):
        code.pop()
    return code


def ptx(text: str) -> list[Instruction]:
    """The instructions of the PTX of one kernel."""
    return _parse(text, _PTX, "bra")


def _parse(text: str, pattern: re.Pattern[str], branch: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    parsed: list[tuple[Instruction, str | None]] = []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(parsed)
        elif match := pattern.match(line):
            opcode, operands = match["opcode"], match["operands"].strip()
            instruction, label = Instruction(opcode, operands, match["guard"] is not None), None
            if instruction.is_a(branch):
                *conditions, last = operands.split(",")
                target = _TARGET.match(last)
                label = target["label"] if target else None
                # A branch on an operand, as in `BRA P1, (.L_x_3)`, may also go on.
                instruction = instruction._replace(guarded=instruction.guarded or bool(conditions))
            parsed.append((instruction, label))
    return [i if label is None else i._replace(target=labels.get(label)) for i, label in parsed]


def loops(code: Sequence[Instruction]) -> list[list[int]]:
    """The loops in the order of their first instruction; each is the indices that no inner loop contains."""
    blocks = _blocks(code)
    bodies = [
        sorted(i for first in body for i in range(first, blocks[first][0])) for body in _natural_loops(blocks)
    ]
    bodies.sort(key=lambda body: (body[0], -len(body)))
    inner = [{i for other in bodies if len(other) < len(body) for i in other} for body in bodies]
    return [[i for i in body if i not in inside] for body, inside in zip(bodies, inner, strict=True)]


Blocks = dict[int, tuple[int, list[int]]]  # first instruction -> (end, first instructions of the successors)


def _blocks(code: Sequence[Instruction]) -> Blocks:
    starts = {0} | {i.target for i in code if i.target is not None}
    starts |= {n + 1 for n, i in enumerate(code) if i.target is not None or i.ends}
    bounds = sorted(start for start in starts if start < len(code))
    blocks: Blocks = {}
    for first, end in zip(bounds, [*bounds[1:], len(code)], strict=True):
        last = code[end - 1]
        following = [last.target, None if last.ends else end]
        blocks[first] = (end, [i for i in following if i is not None and i < len(code)])
    return blocks


def _natural_loops(blocks: Blocks) -> list[set[int]]:
    """The blocks of each loop, by their first instructions; loops with the same header are one."""
    before: dict[int, set[int]] = {first: set() for first in blocks}
    for first, (_, successors) in blocks.items():
        for successor in successors:
            before[successor].add(first)
    dominators = _dominators(blocks, before)

    bodies: dict[int, set[int]] = {}
    for first, (_, successors) in blocks.items():
        for header in successors:
            if header in dominators.get(first, ()):
                body, rest = bodies.setdefault(header, {header}), [first]
                while rest:
                    block = rest.pop()
                    if block not in body and block in dominators:
                        body.add(block)
                        rest += before[block]
    return list(bodies.values())


def _dominators(blocks: Blocks, before: dict[int, set[int]]) -> dict[int, set[int]]:
    """For each block that the kernel's first instruction reaches, the blocks that every path to it passes."""
    reached, rest = {0}, [0]
    while rest:
        new = set(blocks[rest.pop()][1]) - reached
        reached |= new
        rest += new

    order = sorted(reached)
    dominators = {block: set(order) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(dominators[b] for b in before[block] if b in reached)) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def count(code: Sequence[Instruction], copy_waits: Iterable[int] = ()) -> Loop:
    """Counts a loop, or a kernel without loops, from its instructions in SASS and its waits in PTX."""
    return Loop(
        instructions=len(code),
        matmuls=sum(is_matmul(i) for i in code),
        matmul_waits=sum(i.is_a("WARPGROUP.DEPBAR") for i in code),
        barriers=sum(i.is_a("BAR.SYNC") for i in code),
        unordered=_unordered(code),
        spills=sum(i.is_a(*_SPILLS) for i in code),
        spill_bytes=sum(_width(i) for i in code if i.is_a(*_SPILLS)),
        mufu=sum(i.is_a("MUFU") for i in code),
        copy_waits=tuple(copy_waits),
    )


def _width(access: Instruction) -> int:
    """Bytes that a load or a store moves."""
    return next((_WIDTHS[part] for part in access.opcode.split(".") if part in _WIDTHS), 4)


def is_matmul(instruction: Instruction) -> bool:
    return bool(_MATMUL.match(instruction.opcode))


def _unordered(code: Sequence[Instruction]) -> int:
    """How many copies into shared memory the previous wait for matmuls reaches without a barrier between.

    A warp passes WARPGROUP.DEPBAR when its own warp group has finished. Another warp group of the program may
    still read the buffer that the copy overwrites, unless a barrier follows the wait. An iteration begins
    after the end of the previous one.
    """
    events = [i.opcode.split(".")[0] for i in code if i.is_a("WARPGROUP.DEPBAR", "BAR.SYNC", "LDGSTS")]
    copies, last = 0, next((event for event in reversed(events) if event != "LDGSTS"), "")
    for event in events:
        if event == "LDGSTS":
            copies += last == "WARPGROUP"
        else:
            last = event
    return copies


def copy_waits(code: Sequence[Instruction]) -> list[tuple[int, ...]]:
    """For each loop of a PTX text with a matmul: the groups of copies that its waits leave in flight."""
    bodies = [[code[i] for i in loop] for loop in loops(code)]
    return [
        tuple(_left_in_flight(i) for i in body if i.is_a("cp.async.wait_group", "cp.async.wait_all"))
        for body in bodies
        if any(map(is_matmul, body))
    ]


def _left_in_flight(wait: Instruction) -> int:
    return int(wait.operands, 0) if wait.operands else 0


class MachineCode(NamedTuple):
    """What the files of a compiled kernel hold; a kernel without loops has its whole code as the only one."""

    registers: int
    stack: int
    shared: int
    counts: Counter[str]  # opcode without modifiers -> instructions in the kernel
    loops: tuple[Loop, ...]


def read(cubin: bytes, ptx_text: str) -> MachineCode:
    """Disassembles a cubin and counts its loops; `ptx_text` is the PTX that it was made from."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        # No analysis (-ndf) of the branch stack, which sm_80 and newer do not have: it takes a third longer.
        code = sass(_output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path)))
    match = _RESOURCES.search(usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resources: {usage.strip()}")
    registers, stack, shared = map(int, match.groups())
    counts = Counter(i.opcode.split(".")[0] for i in code)
    return MachineCode(registers, stack, shared, counts, counted(code, ptx(ptx_text)))


def counted(code: Sequence[Instruction], source: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The loops of a disassembly, each with the waits of its loop in the PTX; the whole code if it has none.

    Loops with a matmul correspond in their order. If their numbers differ, each takes the waits of all.
    """
    bodies = [[code[i] for i in loop] for loop in loops(code)] or [list(code)]
    with_matmul = [n for n, body in enumerate(bodies) if any(map(is_matmul, body))]
    waits = copy_waits(source)
    if len(waits) != len(with_matmul):
        waits = [tuple(wait for loop in waits for wait in loop)] * len(with_matmul)
    of_loop = dict(zip(with_matmul, waits, strict=True))
    return tuple(count(body, of_loop.get(n, ())) for n, body in enumerate(bodies))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
