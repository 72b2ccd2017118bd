"""`bench.validate`: its launches, verdicts and messages; and, where ttsem is installed, edited modules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.validate import command as validate
from bench.validate.report import HEADER, Result, Stage, as_json, line, markdown, total, verdict
from gpt.cli import run_command
from gpt.errors import InputError
from kernels.registry import SPECS

ROOT = Path(__file__).parents[2]
GOOD = Result(
    op="op",
    kernel="_kernel",
    label="D64",
    architecture=90,
    tile=(128, 64, 4, 3),
    programs=3,
    reference=0.5,
    passes=3,
    executed=2,
    n_diff=7,
    error=0.1,
    seconds=15.0,
)
# A pass that changes nothing, one that changes the text, and one whose output is not executed.
STAGES = [
    Stage("First", n_diff=3, error=0.2),
    Stage("Second", n_diff=3, error=0.2, same_as=0),
    Stage("Third", n_diff=5, error=0.5),
    Stage("Fourth", unsupported="tt.rare"),
]


@pytest.mark.parametrize("architecture", validate.ARCHITECTURES)
def test_every_kernel_is_launched(architecture: int) -> None:
    """A kernel that no sample launches, so that the report does not have it."""
    pytest.importorskip("triton", reason="triton is not installed")
    from bench.validate.cases import samples

    written = {
        name
        for path in (ROOT / "kernels").rglob("*.py")
        for name in re.findall(r"@triton\.jit\ndef (_\w+_kernel)\(", path.read_text("utf-8"))
    }
    launched = {
        launch.kernel.fn.__name__
        for op in SPECS
        for sample in samples(op, architecture)
        for launch in sample.launches
    }
    assert len(written) > 10
    assert launched == written


def test_a_launch_is_recorded() -> None:
    """Storages that are recorded after the launch only, or a wrong kernel that agrees with plain PyTorch."""
    pytest.importorskip("triton", reason="triton is not installed")
    from bench.validate.cases import samples
    from bench.validate.record import record

    scale = next(sample for sample in samples("linear_cross_entropy", 90) if sample.label == "scale")
    scale.actual["out"].fill_(torch.nan)
    (recorded,) = record(scale)
    out = recorded.buffers["out_ptr"]
    assert recorded.kernel == "_scale_kernel"
    assert torch.from_numpy(out.before).isnan().all()
    assert torch.equal(torch.from_numpy(out.after).view(4, 1040), scale.actual["out"])
    assert recorded.reference <= 1
    assert recorded.arguments["N"] == 4160
    assert "in_ptr" not in recorded.arguments

    wrong = replace(scale, launches=[])
    scale.actual["out"][2, 3] += 1
    assert record(wrong) == []
    from bench.validate.record import compare

    assert compare(wrong) > 1


def test_stages_that_agree() -> None:
    """A repeated module that is counted as executed, or an unsupported one that is not reported."""
    fields = verdict(STAGES)
    assert fields == {
        "passes": 4,
        "executed": 2,
        "unsupported": ("Fourth: tt.rare",),
        "first": "",
        "n_diff": 5,
        "error": 0.5,
        "problem": "",
    }
    assert not replace(GOOD, **fields).wrong


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (Stage("Fifth", n_diff=9, error=1.5), "9 elements differ, by up to 1.5 times the tolerance"),
        (Stage("Fifth", n_diff=9, error=float("nan")), "9 elements differ, by up to nan times the tolerance"),
        (Stage("Fifth", problem="out of bounds"), "out of bounds"),
    ],
)
def test_the_first_stage_that_differs(stage: Stage, problem: str) -> None:
    """The pass that receives a wrong module is blamed, not the pass that made it; NaN passes."""
    fields = verdict([*STAGES, stage, Stage("Sixth", error=7.0)])
    assert fields["first"] == "Fourth"
    assert fields["problem"] == problem
    assert replace(GOOD, **fields).wrong
    assert verdict([stage])["first"] == "the front end"


def test_wrong_launches() -> None:
    """A launch without stages, or one that the interpreter gets wrong, passes."""
    assert not GOOD.wrong
    assert replace(GOOD, problem="does not compile").wrong
    assert replace(GOOD, reference=1.1).wrong
    assert replace(GOOD, reference=float("nan")).wrong


def test_table() -> None:
    """A column that is lost, or a row that hides what differs."""
    assert HEADER.split()[:5] == ["op", "kernel", "case", "arch", "tile"]
    good = line(GOOD).split()
    assert good == ["op", "_kernel", "D64", "sm_90", "128×64×4×3", "2/3", "7", "0.1", "0.50", "15", "none"]
    wrong = replace(GOOD, first="Second", problem="out of bounds", unsupported=("Third: tt.rare",))
    assert line(wrong).endswith("Second: out of bounds; unsupported Third: tt.rare")
    assert line(replace(GOOD, problem="does not compile")).endswith("  does not compile")
    assert line(replace(GOOD, reference=2.0)).endswith("the interpreter differs from PyTorch")
    assert total([GOOD, wrong], 90.0) == (
        "2 launches, 6 stages, of which 4 distinct ones executed, 1 unsupported; "
        "1 launches with a stage that differs; 0.5 minutes of CPU time, 1.5 minutes in all"
    )


def test_json() -> None:
    """A report that is not JSON, since an error is infinite."""
    rows = json.loads(json.dumps(as_json([GOOD, replace(GOOD, error=float("inf"))]), allow_nan=False))
    assert rows[0]["error"] == 0.1
    assert rows[0]["tile"] == [128, 64, 4, 3]
    assert rows[1]["error"] is None


def test_the_table_shows_the_worst_launch_of_a_kernel() -> None:
    """A launch that differs, or the largest difference, hidden by another launch of the kernel."""
    bad = replace(
        GOOD, label="D128", first="Third", problem="7 differ", error=torch.inf, unsupported=("P: op",)
    )
    machine = {name: name for name in ("date", "commit", "torch", "triton", "python", "device")}
    launches = as_json([GOOD, bad, replace(GOOD, architecture=80)])
    text = markdown([{"machine": machine, "ttsem": "0.1.0", "launches": launches}])
    assert text.startswith("3 launches, 9 stages, of which 6 distinct ones were executed in 0.8 minutes")
    assert text.splitlines()[-2:] == [
        "| `_kernel` | 80 | D64 | 2 / 3 | none | 7 | 0.1 | 0.50 | none |",
        "| `_kernel` | 90 | D64, D128 | 4 / 6 | 1 | 7 | inf | 0.50 | Third |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "--arch is '75', expected among 80, 90"),
        (["--arch", "sm_x"], "--arch is 'sm_x', expected among 80, 90"),
        (["--op", "norms"], "norms"),
    ],
)
def test_bad_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback instead of one line, or a run that ignores a misspelt name."""
    assert run_command("bench.validate", validate.main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("versions", "interpret", "message"),
    [
        ({"ttsem": "0.1.0", "triton": validate.TRITON}, "1", "TRITON_INTERPRET is 1, expected it unset"),
        ({"triton": validate.TRITON}, "", "ttsem is not installed"),
        ({"ttsem": "0.1.0", "triton": "3.7.1"}, "", f"triton is 3.7.1, expected {validate.TRITON}"),
        ({"ttsem": "0.1.0"}, "", f"triton is None, expected {validate.TRITON}"),
    ],
)
def test_unfit_environment(
    versions: dict[str, str], interpret: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import error of ttsem, or a wrong verdict from kernels that are interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(validate, "installed", versions.get)
    with pytest.raises(InputError, match=re.escape(message)):
        validate.check_environment()


# Runs in its own process, since kernels are interpreted in this one. It edits the last module of a launch.
EDITS = """
import json, re
from bench.validate.command import record
from bench.validate.report import verdict
from bench.validate.stages import as_record, modules, run_stages

def increased(pattern):
    return lambda text: re.sub(pattern, lambda match: match[1] + str(int(match[2]) + 1), text)

def other_buffer(text):
    indices = re.findall(r'"ttg.memdesc_index"\\(%\\w+, (%\\w+)\\)', text)
    copy, matmul = indices[0], indices[4]  # the first copy's buffer is 0, the matmul's is the loop's
    assert copy != matmul
    return re.sub(rf'("ttg.memdesc_index"\\(%x\\w+, ){matmul}\\)', rf"\\1{copy})", text, count=1)

def swapped(text):
    return re.sub(r'"arith.addf"\\((%[\\w#]+), (%[\\w#]+)\\)', r'"arith.subf"(\\1, \\2)', text, count=1)

edits = {
    "copy wait": increased(r'("ttg.async_wait"\\(%[^<]*<\\{num = )(\\d+)'),
    "matmul wait": increased(r"(pendings = )(\\d+)"),
    "buffer": other_buffer,
    "operation": swapped,
}
launch = next(launch for launch in record(["gelu_ffn"], 90) if launch.kernel == "_gelu_gemm_kernel")
compiled = as_record(launch)
stages = modules(compiled, 90)
report = {"shipped": verdict(run_stages(compiled, stages))}
last = stages[-1]
for name, edit in edits.items():
    text = edit(last[1])
    assert text != last[1], name
    report[name] = verdict(run_stages(compiled, [last, ("the edit", text)]))
print(json.dumps(report))
"""


@pytest.mark.compiled
def test_the_command_examines_a_kernel(tmp_path: Path) -> None:
    """A command whose processes cannot import it, or a report without the launch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.validate", "--arch", "90", "--op", "loss", "--match", "scale"]
    command += ["--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (launch,) = json.loads((tmp_path / "report.json").read_text("utf-8"))["launches"]
    assert (launch["kernel"], launch["first"]) == ("_scale_kernel", "")
    assert launch["executed"] > 5


@pytest.mark.compiled
def test_an_edited_module_differs() -> None:
    """A validator that passes a copy or a matmul nobody waits for, a wrong buffer, or a wrong operation."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", EDITS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    shipped = report.pop("shipped")
    assert shipped["first"] == ""
    assert shipped["unsupported"] == []
    assert shipped["passes"] > shipped["executed"] > 10
    assert set(report) == {"copy wait", "matmul wait", "buffer", "operation"}
    for name, fields in report.items():
        assert fields["first"] == "the conversion to LLVM", (name, fields)
        assert not fields["error"] <= 1, (name, fields)
