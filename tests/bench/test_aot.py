"""The ahead-of-time report: what it reads from machine code, and which builds break a gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

from bench import aot, ratchet
from bench.aot import differences, keys, line, loop_lines
from bench.compiling import in_processes
from bench.gates import Compiled, from_json, to_json
from bench.machine_code import Loop
from gpt.cli import run_command
from kernels.registry import SPECS
from kernels.spec import Build
from kernels.tuning import Tile
from tests.bench.test_gates import GOOD

ROOT = Path(__file__).parents[2]
# Runs in its own process, because the kernels are interpreted in this one.
PROGRAM = """
import json, sys
from bench.aot import examine
from bench.gates import to_json
from kernels.spec import Build
from kernels.tuning import Tile
from tests.bench import toys
signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"}
def dot(m, n, stages, dtype="bf16"):
    kinds = {k: v.replace("bf16", dtype) for k, v in signature.items()}
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64}
    return Build(toys.toy_dot_kernel, kinds, blocks, Tile(m, n, 4, stages), "toy", True, frozenset(signature))
broken = Build(toys.toy_broken_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 64}, Tile(64, 64), "toy")
small, large, single = dot(64, 64, 3), dot(256, 256, 4), dot(32, 32, 1, "fp32")
pairs = [(small, 90), (small, 80), (dot(64, 64, 2), 90), (dot(64, 64, 1), 90)]
pairs += [(large, 90), (single, 90), (broken, 90)]
print(json.dumps([to_json(examine("toy", *pair)) for pair in pairs]))
"""


def triton_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_DEFAULT_FP_FUSION": "1"
    }


def test_machine_code_is_read() -> None:
    """A column that is always 0; a gate that accepts a kernel too large, or one that does not compile."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=triton_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    hopper, ampere, double, synchronous, large, plain, broken = (
        from_json(row) for row in json.loads(done.stdout)
    )
    assert hopper.hgmma > 0
    assert hopper.hmma == 0
    assert 0 < hopper.registers <= 255
    assert hopper.shared >= 2 * 2 * 64 * 64 * 2
    assert hopper.problem == ""
    assert hopper.programs == 4  # each takes 48 KB of shared memory
    assert hopper.instructions > hopper.loops[0].instructions
    assert ampere.hmma > 0
    assert ampere.hgmma == 0
    assert ampere.problem == ""
    for row, matmuls in ((hopper, hopper.hgmma), (ampere, ampere.hmma)):
        (loop,) = row.loops
        assert loop.matmuls == matmuls
        assert loop.copy_waits == (2,)  # two groups of the three stages' four
        assert loop.barriers == 2
    assert large.spills > 0
    assert large.stack > 0
    assert double.problem == "loop 1 waits for every copy (cp.async.wait_group 0)"
    assert synchronous.problem == "loop 1 copies nothing ahead"
    memory, serial, spills = large.problem.split("; ")
    assert memory == "shared memory 256 KB, the limit is 227 KB"
    assert serial == "loop 1 waits 16 times for 16 HGMMA"
    assert spills == f"loop 1 moves {large.loops[0].spill_bytes} bytes of spills"
    assert plain.problem == "no HGMMA"
    assert broken.problem.startswith("does not compile: ")
    assert "\n" not in broken.problem


def test_a_row_is_printed() -> None:
    """A count, a loop, a broken gate or an exception that the report leaves out."""
    assert "64/227 KB" in line(GOOD)
    assert " 100+120 " in line(GOOD)
    assert line(replace(GOOD, problem="no HGMMA")).endswith("gated  BROKEN: no HGMMA")
    assert line(replace(GOOD, problem="x", allowed="y (z)")).endswith("gated  BROKEN: x  allowed: y (z)")
    assert loop_lines(GOOD)[0] == (
        "    loop 1: instructions 100, matmuls 8, matmul_waits 1, barriers 2, copy_waits 2 1"
    )


def test_differences_between_reports_are_listed() -> None:
    """A new spill, or a removed build, that the comparison of two reports omits."""
    other = replace(GOOD, label="fp16-D64")
    grown = (GOOD.loops[0], replace(GOOD.loops[1], instructions=140, copy_waits=(0,)))
    lines = differences(
        [GOOD, other], [replace(GOOD, spills=2, registers=255, loops=grown), replace(GOOD, label="bf16-D128")]
    )
    assert lines == [
        f"{GOOD.id}: registers 128 -> 255, spills 0 -> 2, loop instructions [100, 120] -> [100, 140], "
        "loop copy_waits [[2, 1], [1]] -> [[2, 1], [0]]",
        f"{replace(GOOD, label='bf16-D128').id}: new",
        f"{other.id}: gone",
    ]
    assert differences([GOOD], [GOOD]) == []


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the builds of layer_norm by two: one gated and broken, one fine. Nothing is compiled."""
    monkeypatch.setattr(ratchet, "TABLES", tmp_path)

    class Kernel:
        def __init__(self, name: str) -> None:
            self.__name__ = name

    def builds(architecture: int) -> list[Build]:
        return [
            Build(Kernel("_a"), {}, {}, Tile(1, 1), "x", gated=True),
            Build(Kernel("_b"), {}, {}, Tile(1, 1), "y"),
        ]

    def examine(function: object, chosen: list[aot.Key], crashed: object) -> list[Compiled]:
        return [
            replace(
                aot._without_figures(key.op, key.build, key.architecture),
                programs=2,
                loops=(Loop(100),),
                problem="no HGMMA" if key.place == 0 else "",
            )
            for key in chosen
        ]

    monkeypatch.setitem(SPECS, "layer_norm", replace(SPECS["layer_norm"], builds=builds))
    monkeypatch.setattr(aot, "in_processes", examine)
    monkeypatch.delenv("TRITON_INTERPRET")


def command(*arguments: str) -> int:
    return run_command("bench.aot", aot.main, arguments)


@pytest.mark.usefixtures("declared")
def test_a_broken_gate_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for a broken gate; a saved report that cannot be read back for a comparison."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = str(tmp_path / "aot.json")
    assert command("--op", "layer_norm", "--arch", "sm_90", "86", "--gated", "--json", path) == 1
    assert "2 builds, 2 broken" in capsys.readouterr().out
    assert command("--op", "layer_norm", "--match", "_b", "--arch", "90") == 0
    assert command("--op", "layer_norm", "--arch", "90", "86", "--gated", "--diff", path) == 1
    assert f"the same as {path}" in capsys.readouterr().out
    assert [to_json(row) for row in ratchet.load(Path(path), "--diff")] == json.loads(
        Path(path).read_text("utf-8")
    )["builds"]
    assert [key.place for key in keys(["layer_norm"], [90])] == [0, 1]


def test_sm_89_passes_the_gates_of_sm_86() -> None:
    """A gated build of sm_89 that is worse than that of sm_86: .ci/run compiles those of sm_86 for both.

    Registers may differ: ptxas of Triton 3.7.1 gives one build 136 for sm_89 and 128 for sm_86.
    """
    for table in ratchet.TABLES.glob("*.json"):
        rows = ratchet.load(table, "the table")
        older, newer = (
            {row.id: row for row in (replace(row, architecture=0, programs=0) for row in of_one)}
            for of_one in ([row for row in rows if row.architecture == sm] for sm in (86, 89))
        )
        assert older.keys() == newer.keys() != set()
        for name, row in newer.items():
            assert ratchet.worse(row, older) == ""
            assert (row.problem, row.spills) == (older[name].problem, older[name].spills)


@pytest.mark.usefixtures("declared")
def test_figures_are_recorded_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that --record loses, worse figures that pass, or a missing table that is not mentioned."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(aot, "SPECS", {"layer_norm": SPECS["layer_norm"]})
    monkeypatch.setattr(aot, "_triton_version", lambda: "1.2.3+local")
    path = tmp_path / "1.2.3.json"

    assert command("--op", "layer_norm", "--arch", "90", "86", "--record") == 1
    assert "2 gated builds have no figures recorded for triton 1.2.3+local: " in capsys.readouterr().out
    rows = ratchet.load(path, "the table")
    assert [(row.architecture, row.label, row.programs) for row in rows] == [(86, "x", 2), (90, "x", 2)]

    better = [replace(row, loops=(Loop(60),)) for row in rows]
    ratchet.save(path, "1.2.3", better)
    assert command("--op", "layer_norm", "--arch", "90", "--gated") == 1
    worse = "no HGMMA; recorded figures: instructions of loop 1 60 -> 100"
    assert f"BROKEN: {worse}\n1 builds, 1 broken\n" in capsys.readouterr().out
    assert command("--op", "layer_norm", "--arch", "90", "--gated", "--diff", str(path)) == 1
    assert "sm_90: loop instructions [60] -> [100]\n" in capsys.readouterr().out

    assert command("--op", "layer_norm", "--arch", "90", "--record") == 1
    assert [row.loops[0].instructions for row in ratchet.load(path, "the table")] == [60, 100]


def test_bad_flags_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, or an empty report, for a wrong flag."""
    (tmp_path / "other.json").write_text('{"builds": [{"a": 1}]}', encoding="utf-8")
    for arguments, message in (
        (["--arch", "91"], "'91', expected among 80, 86"),
        (["--op", "atention"], "the nearest valid one is 'attention'"),
        (["--gatd"], "the nearest valid one is '--gated'"),
        (["--diff", str(tmp_path / "none.json")], "cannot read"),
        (["--diff", str(tmp_path / "other.json")], "is not a report of bench.aot"),
    ):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command("--op", "norm") == 2
    assert "TRITON_INTERPRET is 1" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(aot, "_triton_version", lambda: None)
    assert command("--op", "norm") == 2
    assert "triton is not installed" in capsys.readouterr().err


class Crash:
    """A fake process pool whose worker is killed by one build; it is also the future of a build."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.crashed = fatal, False

    def __enter__(self) -> Crash:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: object, key: aot.Key) -> Crash:
        self.crashed = self.crashed or key.place == self.fatal
        future = Crash(self.fatal)
        future.crashed, future.key = self.crashed, key  # type: ignore[attr-defined]
        return future

    def result(self) -> int:
        if self.crashed:
            raise BrokenProcessPool
        return self.key.place  # type: ignore[attr-defined, no-any-return]


def test_a_crash_of_the_compiler_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that crashes the compiler removes the rows of other builds, or blocks the report."""
    monkeypatch.setattr("bench.compiling.workers", lambda count: Crash(2))
    monkeypatch.setattr(
        aot, "builds", lambda op, architecture: [Build(int, {}, {}, Tile(1, 1), str(i)) for i in range(4)]
    )
    keys = [aot.Key("op", 90, place) for place in range(4)]
    rows = list(in_processes(aot.examine_key, keys, aot._crashed))
    assert [row if isinstance(row, int) else row.problem for row in rows] == [
        0,
        1,
        "the compiler crashed",
        3,
    ]
