"""The GPU checks, tested on a CPU: repeats, budgets, and reading the sanitizer's reports."""

from __future__ import annotations

import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.safety
import bench.sanitizer
from bench.record import Report, load
from bench.safety import Call, calls, changed_names, run, zeroed_matmuls
from gpt.cli import run_command
from kernels.registry import SPECS
from tests.bench.reports import MACHINE
from tests.bench.test_engine import Wrong

CPU = torch.device("cpu")
NORM = SPECS["layer_norm"]


def nondeterministic(**inputs: Any) -> torch.Tensor:
    """LayerNorm whose gradients differ from call to call."""
    return Wrong.apply(NORM.reference(**inputs), 1 + 1e-6 * torch.rand(()).item())


def test_changed_bits_are_detected() -> None:
    """A gradient that changes between calls is missed; equal NaNs are reported as a difference."""

    def steady(**inputs: Any) -> torch.Tensor:
        return NORM.reference(**inputs) * float("nan")

    turns = iter(range(100))

    def late(**inputs: Any) -> torch.Tensor:
        return Wrong.apply(NORM.reference(**inputs), 1.0) + (next(turns) == 2)

    loss = SPECS["linear_cross_entropy"]
    for spec, expected in (
        (replace(NORM, function=nondeterministic), ["dbias", "dweight", "dx"]),
        (replace(NORM, function=late), ["out"]),
        (replace(NORM, function=steady), []),
        (loss, []),
    ):
        call = Call(spec, spec.tagged("small")[0], torch.float32, first=True)
        assert changed_names(call, CPU, 3, "reference") == expected


def test_the_first_calls_cover_every_op() -> None:
    """A budget spent on one op, or on float32 before bfloat16; a case that is never called."""
    todo = calls(list(SPECS))
    firsts = todo[: 3 * len(SPECS)]
    assert [(call.spec.name, call.dtype) for call in firsts] == [
        (name, d) for d in bench.safety.DTYPES for name in SPECS
    ]
    assert all(call.first and call.case is call.spec.tagged("small")[0] for call in firsts)
    rest = todo[len(firsts) :]
    assert not any(call.first for call in rest)
    assert [call.spec.name for call in rest[: len(SPECS)]] == list(SPECS)
    assert [call.dtype for call in rest] == sorted(
        (call.dtype for call in rest), key=bench.safety.DTYPES.index
    )
    everything = {
        (name, case.id, d)
        for name, spec in SPECS.items()
        for case in spec.tagged("small", "edge")
        for d in spec.dtypes
    }
    assert {(call.spec.name, call.case.id, call.dtype) for call in todo} == everything
    assert len(todo) == len(everything)


def test_repeats_and_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number of repeats; a budget that is ignored; a difference that is not reported."""
    made: list[int] = []

    def counted(call: Call, device: Any, repeats: int, backend: str) -> list[str]:
        made.append(repeats)
        return []

    todo = [Call(NORM, case, torch.float32, first=i == 0) for i, case in enumerate(NORM.tagged("small")[:3])]
    report = Report("test", MACHINE)
    with monkeypatch.context() as patch:
        patch.setattr(bench.safety, "changed_names", counted)
        assert run(todo, CPU, 1000, None, report) == 0
        assert made == [1000, 10, 10]
        assert report.notes == ["3 calls gave the same bits every time: 1 repeated 1,000 times, 2 10 times"]
        assert report.complete
        report = Report("test", MACHINE)
        assert run(todo, CPU, 1000, 0.0, report) == 0
    assert "left out for the budget: 2 of 3 calls" in report.notes[0]
    assert not report.complete
    bad = todo[0]._replace(spec=replace(NORM, function=nondeterministic))
    report = Report("test", MACHINE)
    assert run([bad], CPU, 2, None, report, "reference") == 1
    assert report.notes[0] == "layer_norm N5-C17 fp32: different bits when repeated: dbias, dweight, dx"
    assert run(todo, CPU, 0, None, report, "reference") == 0
    assert report.notes[-1] == "3 calls were made once"


def test_rows_that_a_matmul_writes_are_zeroed() -> None:
    """Padding that initcheck reports, a row of another chunk that is erased, or a result that is lost."""
    a, b = torch.randn(2, 4), torch.randn(4, 5)
    buffer = torch.full((4, 8), math.nan)
    with zeroed_matmuls():
        torch.mm(a, b, out=buffer[1:3, :5])
    assert torch.equal(buffer[1:3, :5], torch.mm(a, b))
    assert not buffer[1:3, 5:].any()
    assert buffer[0].isnan().all()
    assert buffer[3].isnan().all()
    with zeroed_matmuls():
        assert torch.equal(torch.mm(a, b), buffer[1:3, :5])


OURS = """\
========= COMPUTE-SANITIZER
a line of the program
========= Invalid __global__ read of size 2 bytes
=========     at _attention_fwd_kernel+0x1a70 in forward.py:150
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f2e is out of bounds
=========
========= Invalid __global__ read of size 2 bytes
=========     at _attention_fwd_kernel+0x1a70 in forward.py:150
=========     by thread (4,0,0) in block (1,0,0)
=========     Address 0x7f30 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
OTHERS = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, float>(int, float)+0x70
=========     by thread (3,0,0) in block (1,0,0)
=========
========= Warning: Race reported between Write access at void cutlass::Kernel2<cutlass_80>(T1::Params)+0x70
=========     and Read access at void cutlass::Kernel2<cutlass_80>(T1::Params)+0x90 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""
RACE = """\
========= Error: Race reported between Write access at _layer_norm_bwd_kernel+0x70
=========     and Read access at _layer_norm_bwd_kernel+0x90 [4 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "code", "expected", "note"),
    [
        (CLEAN, 0, 0, "0 reports about this package's kernels, 0 about others"),
        (OURS, 0, 1, "2 reports about this package's kernels, 0 about others"),
        (RACE, 0, 1, "1 reports about this package's kernels, 0 about others"),
        (
            OTHERS,
            0,
            0,
            "0 reports about this package's kernels, 2 about others; vectorized_elementwise_kernel: 1; "
            "Kernel2: 1",
        ),
        (CLEAN, 1, 1, "ended with exit code 1"),
        (
            "========= Error: No attachable process found\n",
            0,
            1,
            "ended with exit code 0 and without a summary",
        ),
    ],
)
def test_reports_are_attributed_to_kernels(
    output: str, code: int, expected: int, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report about torch fails the run, one about our kernels does not, or a tool that never ran passes."""
    path = tmp_path / "output"
    path.write_text(output, encoding="utf-8")
    report = Report("test", MACHINE)
    assert bench.sanitizer.run("memcheck", ["sh", "-c", f"cat {path}; exit {code}"], report) == expected
    assert note in report.notes
    if output == OURS:
        assert report.notes[1] == (
            "2 times: Invalid __global__ read of size 2 bytes at _attention_fwd_kernel+0x1a70 in "
            "forward.py:150"
        )
        out = capsys.readouterr().out
        assert "a line of the program" in out
        assert out.count("_attention_fwd_kernel") == 2  # where it is reported, and at the end


@pytest.mark.parametrize("tool", bench.sanitizer.TOOLS)
def test_a_tool_is_called_with_its_flags(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool run on repeated calls, with torch's caching allocator, a launch timeout or wrong flags."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/line\necho $PYTORCH_NO_CUDA_MEMORY_CACHING >> {tmp_path}/line\n'
        "echo '========= ERROR SUMMARY: 0 errors'\n",
        encoding="utf-8",
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.sanitizer, "describe", lambda device: MACHINE)
    flags = [tool, "--op", "layer_norm", "--budget", "9s", "--json", str(tmp_path / "report.json")]
    assert run_command("bench.sanitizer", bench.sanitizer.main, flags) == 0
    line, uncached = (tmp_path / "line").read_text("utf-8").splitlines()
    before, after = line.split(" -- ")
    assert f"--tool {tool}" in before
    assert "--launch-timeout 0" in before
    assert ("--padding" in before) == (tool == "memcheck")
    assert uncached == ("1" if tool in ("memcheck", "initcheck") else "")
    zeroed = " --zero_matmuls" if tool == "initcheck" else ""
    assert after.endswith(f"-m bench.safety --repeats 0 --op layer_norm{zeroed} --budget 9s")
    assert load(tmp_path / "report.json").notes == ["0 reports about this package's kernels, 0 about others"]


def test_every_kernel_name_is_known() -> None:
    """A kernel of this package whose reports count as third-party."""
    names = bench.sanitizer.kernel_names()
    assert {
        "_attention_fwd_kernel",
        "_layer_norm_bwd_kernel",
        "_cross_entropy_kernel",
        "_bias_gelu_kernel",
    } <= names
    assert not any(name in OTHERS for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memchek"], "nearest valid one is 'memcheck'"),
        (["memcheck", "--op", "layer_nrm"], "nearest valid one is 'layer_norm'"),
        (["memcheck", "--budget", "soon"], "expected a duration"),
        (["memcheck"], "compute-sanitizer was not found"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for an unknown tool or one that is not installed."""
    monkeypatch.setattr(bench.sanitizer, "find", lambda: None)
    assert run_command("bench.sanitizer", bench.sanitizer.main, arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
