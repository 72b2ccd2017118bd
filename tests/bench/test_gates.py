"""The gates of compiled builds, and the recorded figures that may not get worse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import ratchet
from bench.gates import GATES, Compiled, from_json, judge, programs, to_json
from bench.machine_code import Loop
from gpt.errors import InputError

LOOPS = (
    Loop(100, matmuls=8, matmul_waits=1, barriers=2, copy_waits=(2, 1)),
    Loop(120, matmuls=8, matmul_waits=2, barriers=2, spills=2, spill_bytes=16, copy_waits=(1,)),
)
GOOD = Compiled(
    op="op",
    kernel="_kernel",
    label="bf16-D64",
    architecture=90,
    warps=8,
    stages=3,
    gated=True,
    registers=128,
    shared=64 * 1024,
    programs=2,
    hgmma=16,
    matmuls=True,
    loops=LOOPS,
)


def row(**figures: object) -> Compiled:
    """GOOD with another second loop: names of Loop's fields are figures of that loop."""
    of_loop = {name: figures.pop(name) for name in [*figures] if hasattr(LOOPS[1], name)}
    return replace(GOOD, loops=(LOOPS[0], replace(LOOPS[1], **of_loop)), **figures)


@pytest.mark.parametrize(
    ("broken", "gate", "text"),
    [
        (row(shared=228 * 1024), "memory", "shared memory 228 KB, the limit is 227 KB"),
        (row(hgmma=0), "hgmma", "no HGMMA"),
        (row(copy_waits=(2, 0)), "copies", "loop 2 waits for every copy (cp.async.wait_group 0)"),
        (row(copy_waits=()), "copies", "loop 2 copies nothing ahead"),
        (row(matmul_waits=8), "serial", "loop 2 waits 8 times for 8 HGMMA"),
        (row(spill_bytes=20), "spills", "loop 2 moves 20 bytes of spills"),
        (row(barriers=0), "barriers", "loop 2 has no barrier"),
        (row(unordered=2), "barriers", "loop 2 copies 2 times after a wait for HGMMA without a barrier"),
        (row(instructions=131), "masked", "the masked loop has 1.31 times the instructions"),
        (row(instructions=70, matmuls=4), "masked", "the masked loop has 1.40 times the instructions"),
    ],
)
def test_each_gate(broken: Compiled, gate: str, text: str) -> None:
    """A gate that a bad build passes, that judges ungated builds, or that an exception does not open."""
    assert judge(GOOD, {}).problem == ""
    assert judge(broken, {}).problem == text
    assert judge(broken, {gate: "the reason"}) == replace(broken, allowed=f"{text} (the reason)")
    others = {name: "the reason" for name in GATES if name != gate}
    assert judge(broken, others) == replace(broken, problem=text)
    assert judge(replace(broken, gated=False), {}).problem == (text if gate == "memory" else "")


def test_what_no_gate_forbids() -> None:
    """A gate that fails a good build: no matmul, HMMA, four warps, or spills outside loops."""
    plain = Loop(50, barriers=0, spill_bytes=16)
    assert judge(replace(GOOD, spills=40, loops=(plain, *LOOPS)), {}).problem == ""
    assert judge(replace(GOOD, hgmma=0, matmuls=False, loops=(plain,)), {}).problem == ""
    assert judge(replace(row(unordered=2), warps=4), {}).problem == ""
    assert judge(row(instructions=130), {}).problem == ""
    ampere = replace(row(matmul_waits=0, unordered=2), architecture=80, hgmma=0, hmma=99)
    assert judge(ampere, {}).problem == ""
    single = Loop(40, matmuls=1, matmul_waits=1, barriers=2, copy_waits=(2,))
    assert judge(replace(GOOD, loops=(single,)), {}).problem == ""


def test_several_gates_are_all_reported() -> None:
    """A second broken gate that the first one hides, with or without an exception for it."""
    broken = row(copy_waits=(0,), spill_bytes=400)
    copies, spills = "loop 2 waits for every copy (cp.async.wait_group 0)", "loop 2 moves 400 bytes of spills"
    assert judge(broken, {}).problem == f"{copies}; {spills}"
    assert judge(broken, {"copies": "small"}).problem == spills
    assert judge(broken, {"copy": "small"}).problem == f"{copies}; {spills}; no gate is called 'copy'"


def test_programs_of_a_multiprocessor() -> None:
    """A limit of a multiprocessor that is not counted: registers, warps, shared memory or programs."""
    small = replace(GOOD, warps=4, registers=32, shared=0)
    assert programs(replace(small, shared=64 * 1024)) == 3
    assert programs(replace(small, registers=128)) == 4
    assert programs(replace(small, registers=129)) == 3  # 136 are allocated
    assert programs(replace(small, registers=168)) == 3
    assert programs(replace(small, registers=255)) == 2
    assert programs(replace(small, registers=255, warps=8)) == 1
    assert programs(small) == 16
    assert programs(replace(small, architecture=86)) == 12
    assert programs(replace(small, warps=1)) == 32
    assert programs(replace(small, shared=48 * 1024, architecture=80)) == 3


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (row(instructions=126), ""),
        (row(instructions=127), "instructions of loop 2 120 -> 127"),
        (row(programs=1), "programs 2 -> 1"),
        (row(barriers=1), "barriers of loop 2 2 -> 1"),
        (row(barriers=3, programs=3, registers=255, instructions=60), ""),
        (replace(row(barriers=1), warps=4), ""),
        (replace(GOOD, loops=LOOPS[:1]), "loops 2 -> 1"),
        (replace(row(instructions=500), label="new"), ""),
    ],
)
def test_recorded_figures_may_not_get_worse(after: Compiled, text: str) -> None:
    """A loop that grows, fewer programs or fewer barriers without a message; a message for an improvement."""
    assert ratchet.worse(after, {GOOD.id: GOOD}) == (f"recorded figures: {text}" if text else "")


def test_a_table_is_read_back(tmp_path: Path) -> None:
    """A figure that the table loses; a build that does not have a line of its own."""
    path = tmp_path / "aot" / "3.6.0.json"
    rows = [GOOD, replace(GOOD, label="none", loops=(Loop(9),)), row(copy_waits=())]
    ratchet.save(path, "3.6.0", rows)
    assert ratchet.load(path, "the table") == rows
    assert len(path.read_text("utf-8").splitlines()) == 2 + len(rows)
    assert "mufu" not in path.read_text("utf-8")
    assert from_json(json.loads(json.dumps(to_json(replace(GOOD, problem="x"))))) == replace(
        GOOD, problem="x"
    )

    path.write_text('{"builds": [{"loops": {"instructions": [1]}}]}', encoding="utf-8")
    with pytest.raises(InputError, match="is not a report of bench"):
        ratchet.load(path, "the table")
    with pytest.raises(InputError, match="cannot write"):
        ratchet.save(path / "file.json", "3.6.0", rows)


def test_the_table_of_a_version() -> None:
    """A local build of Triton that finds no table, or the table of another version."""
    assert ratchet.table("3.6.0").name == "3.6.0.json"
    assert ratchet.table("3.6.0+git1234").name == "3.6.0.json"
