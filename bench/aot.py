"""`python -m bench.aot`: compiles every kernel ahead of time; no GPU is needed.

For each tile, dtype and architecture that the ops declare, it reports registers, stack, spills, shared memory
and its limit, the programs that a multiprocessor holds, matrix instructions (HMMA, HGMMA, UTCHMMA) and TMA
transfers, and the instructions of each loop. The exit code is 1 if a gate is broken: a kernel does not
compile, or needs more shared memory than the architecture has. A build that its op gates must also pass the
other gates of `bench.gates`, and be no worse than the figures recorded for the installed version of Triton.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import ratchet
from bench.compiling import architecture_of, in_processes, ops_of
from bench.gates import Compiled, judge, programs, to_json
from bench.machine_code import read
from bench.record import write_json
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError
from kernels import launch
from kernels.registry import SPECS
from kernels.spec import Build
from kernels.tuning import SHARED_MEMORY

ARCHITECTURES = tuple(SHARED_MEMORY)
INSTRUCTIONS = {  # column -> opcodes in the disassembly
    "hmma": r"HMMA",
    "hgmma": r"HGMMA",
    "utchmma": r"UTC[A-Z]*MMA",
    "tma": r"UTMA(?:LDG|STG|REDG)",
    "spills": r"LDL|STL",
}


class Key(NamedTuple):
    """Identifies a build: its op, its architecture, and its index among the op's builds for that."""

    op: str
    architecture: int
    place: int

    @property
    def build(self) -> Build:
        return builds(self.op, self.architecture)[self.place]


@dataclass(frozen=True)
class Options:
    """Flags of the report."""

    arch: tuple[str, ...] = option(tuple(map(str, ARCHITECTURES)), "architectures, as in 80 or sm_90")
    op: tuple[str, ...] = option(tuple(SPECS), "ops or families")
    match: str = option("", "only builds whose kernel name and label contain this text")
    gated: bool = option(False, "only the builds that an op gates")
    loops: bool = option(False, "print what each loop executes in an iteration")
    record: bool = option(False, "record the figures of the gated builds for the installed version of Triton")
    json: str | None = option(None, "write the report to this file")
    diff: str | None = option(None, "say what changed since the report in this file")


def compile_build(build: Build, architecture: int) -> Any:
    """Compiles a build with Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {n: "constexpr" if n in build.constants else build.signature[n] for n in names}
    aligned: dict[Any, Any] = {(names.index(n),): [["tt.divisibility", 16]] for n in build.divisible}
    source = ASTSource(build.kernel, signature, constexprs=dict(build.constants), attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=launch.options(build.tile)
    )


def _without_figures(op: str, build: Build, architecture: int) -> Compiled:
    return Compiled(
        op=op,
        kernel=build.kernel.__name__,
        label=build.label,
        architecture=architecture,
        warps=build.tile.num_warps,
        stages=build.tile.num_stages,
        gated=build.gated,
    )


def examine(op: str, build: Build, architecture: int) -> Compiled:
    """Compiles a build and reads its machine code."""
    row = _without_figures(op, build, architecture)
    try:
        compiled = compile_build(build, architecture)
    except Exception as error:  # any failure of the compiler is reported
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return replace(row, problem=f"does not compile: {type(error).__name__}: {lines[-1].strip()}")

    code = read(compiled.asm["cubin"], compiled.asm["ptx"])
    counts: dict[str, Any] = {
        column: sum(count for opcode, count in code.counts.items() if re.fullmatch(pattern, opcode))
        for column, pattern in INSTRUCTIONS.items()
    }
    row = replace(
        row,
        registers=code.registers,
        stack=code.stack,
        shared=max(code.shared, compiled.metadata.shared),
        instructions=sum(code.counts.values()),
        loops=code.loops,
        matmuls="tt.dot" in compiled.asm["ttir"],
        **counts,
    )
    return judge(replace(row, programs=programs(row)), build.exceptions)


def builds(op: str, architecture: int) -> list[Build]:
    """The builds that an op declares for an architecture; none if it has no kernel of its own."""
    declared = SPECS[op].builds
    return [] if declared is None else list(declared(architecture))


def keys(
    ops: Iterable[str], architectures: Iterable[int], *, gated: bool = False, match: str = ""
) -> list[Key]:
    """The keys of the selected builds."""
    return [
        Key(op, architecture, place)
        for op in ops
        for architecture in architectures
        for place, build in enumerate(builds(op, architecture))
        if (build.gated or not gated) and match in f"{build.kernel.__name__} {build.label}"
    ]


def examine_key(key: Key) -> Compiled:
    return examine(key.op, key.build, key.architecture)


def _crashed(key: Key) -> Compiled:
    return replace(_without_figures(key.op, key.build, key.architecture), problem="the compiler crashed")


HEADER = (
    f"{'op':<22} {'kernel':<32} {'build':<26} {'arch':>6} {'warps':>5} {'stages':>6} {'regs':>5} "
    f"{'stack':>5} {'spills':>6} {'shared':>11} {'programs':>8} {'MMA':>12} {'TMA':>4} {'loops':>15}"
)


def line(row: Compiled) -> str:
    """A row of the table; "64/227 KB" is shared memory used and available, "16 HGMMA" matrix instructions.

    "541+964" are the instructions of two loops.
    """
    shared = f"{row.shared / 1024:.0f}/{SHARED_MEMORY[row.architecture]} KB"
    kinds = {"HMMA": row.hmma, "HGMMA": row.hgmma, "UTCHMMA": row.utchmma}
    matmuls = " ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "-"
    loops = "+".join(str(loop.instructions) for loop in row.loops)
    text = (
        f"{row.op:<22} {row.kernel:<32} {row.label:<26} {'sm_' + str(row.architecture):>6} {row.warps:>5} "
        f"{row.stages:>6} {row.registers:>5} {row.stack:>5} {row.spills:>6} {shared:>11} {row.programs:>8} "
        f"{matmuls:>12} {row.tma:>4} {loops:>15}"
    )
    notes = {
        "gated": row.gated,
        f"BROKEN: {row.problem}": row.problem,
        f"allowed: {row.allowed}": row.allowed,
    }
    return "  ".join([text, *(note for note, given in notes.items() if given)])


def loop_lines(row: Compiled) -> list[str]:
    """A line for each loop of a build: the counts that are not 0."""
    return [
        f"    loop {n}: "
        + ", ".join(f"{name} {_text(value)}" for name, value in asdict(loop).items() if value)
        for n, loop in enumerate(row.loops, 1)
    ]


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def differences(old: Sequence[Compiled], new: Sequence[Compiled]) -> list[str]:
    """A line for each build that differs between the reports, or that only one of them has."""
    before, after = {row.id: _figures(row) for row in old}, {row.id: _figures(row) for row in new}
    lines = []
    for name in [*after, *(name for name in before if name not in after)]:
        if name not in before or name not in after:
            lines.append(f"{name}: {'new' if name not in before else 'gone'}")
            continue
        changed = [f"{k} {v!r} -> {after[name][k]!r}" for k, v in before[name].items() if v != after[name][k]]
        lines += [f"{name}: {', '.join(changed)}"] if changed else []
    return lines


def _figures(row: Compiled) -> dict[str, Any]:
    content = {k: v for k, v in to_json(row).items() if k not in ("matmuls", "problem", "allowed")}
    return content | {f"loop {name}": values for name, values in content.pop("loops").items()}


def main(argv: Sequence[str]) -> int:
    parser = OptionParser("python -m bench.aot", __doc__ or "", options=Options())
    _, values = parser.parse_tables(argv)
    options = Options(**values["options"])
    architectures, ops = [architecture_of(text, ARCHITECTURES) for text in options.arch], ops_of(options.op)
    version = _check_triton()

    old = None if options.diff is None else ratchet.load(Path(options.diff), "--diff")
    for op in ops:
        if SPECS[op].builds is None:
            print(f"{op}: has no kernel of its own to compile")
    chosen = keys(ops, architectures, gated=options.gated, match=options.match)
    path = ratchet.table(version)
    recorded = {row.id: row for row in ratchet.load(path, "the table")} if path.exists() else {}

    rows: list[Compiled] = []
    print(HEADER)
    for row in in_processes(examine_key, chosen, _crashed):
        if row.gated and not options.record:
            problems = [row.problem, ratchet.worse(row, recorded)]
            row = replace(row, problem="; ".join(filter(None, problems)))
        rows.append(row)
        print("\n".join([line(row), *(loop_lines(row) if options.loops else ())]), flush=True)
    broken = [row for row in rows if row.problem]
    print(f"{len(rows)} builds, {len(broken)} broken")
    if unknown := sum(row.gated and row.id not in recorded for row in rows):
        print(f"{unknown} gated builds have no figures recorded for triton {version}: growth is not checked")

    if options.json is not None:
        write_json(options.json, {"triton": version, "builds": [to_json(row) for row in rows]})
    if options.record:
        ratchet.save(path, version, _recorded(rows, recorded))
    if old is not None:
        changes = differences([row for row in old if _selected(row, ops, architectures, options)], rows)
        print("\n".join(changes) if changes else f"the same as {options.diff}")
    return 1 if broken else 0


def _recorded(rows: Sequence[Compiled], old: Mapping[str, Compiled]) -> list[Compiled]:
    """The figures to record: for each gated build those of this run, if it compiles, else the old ones."""
    known = {**old, **{row.id: row for row in rows if row.loops}}
    declared = [
        _without_figures(op, build, architecture).id
        for op in SPECS
        for architecture in ARCHITECTURES
        for build in builds(op, architecture)
        if build.gated
    ]
    return [known[name] for name in declared if name in known]


def _selected(row: Compiled, ops: Sequence[str], architectures: Sequence[int], options: Options) -> bool:
    """Whether the flags select a row of a saved report."""
    chosen = row.op in ops and row.architecture in architectures and (row.gated or not options.gated)
    return chosen and options.match in f"{row.kernel} {row.label}"


def _check_triton() -> str:
    """The version of the installed Triton.

    Raises:
        InputError: Triton is missing, or is set to interpret kernels.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET is 1, expected it unset: interpreted kernels cannot be compiled")
    version = _triton_version()
    if version is None:
        raise InputError("triton is not installed, expected it for compiling kernels")
    return version


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(run_command("bench.aot", main))
