"""`python -m bench`: stages in their own processes, and a report even if some of them fail."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.__main__ as whole
import bench.command
import bench.generate
import bench.measure
import bench.safety
import bench.train
from bench import sanitizer
from bench.engine import find_bench
from bench.record import Report, load
from gpt.cli import run_command
from kernels.registry import SPECS
from tests.bench.reports import MACHINE, invented, models

ROOT = Path(__file__).parents[2]


def fake_stages(monkeypatch: pytest.MonkeyPatch, *programs: tuple[str, str, bool]) -> None:
    """Replaces the stages by Python programs (name, source, has a result); each gets its result's path."""

    def stages(names: object, options: object, folder: Path, **_: object) -> list[whole.Stage]:
        replaced = []
        for name, program, has_result in programs:
            result = folder / "parts" / f"{name}.json" if has_result else None
            line = [sys.executable, "-c", program, str(result)]
            replaced.append(whole.Stage(name, lambda seconds, line=line: line, result))  # type: ignore[misc]
        return replaced

    monkeypatch.setattr(whole, "stages", stages)


WRITE = (
    "import shutil, sys; from pathlib import Path; "
    "shutil.copy(Path(sys.argv[1]).parents[1] / 'ready.json', sys.argv[1])"
)


def test_a_run_survives_failing_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that crashes or hangs removes the results of the others, or is not reported."""
    monkeypatch.setattr(whole, "GRACE", 0.0)
    invented("layer_norm").save(tmp_path / "ready.json")
    fake_stages(
        monkeypatch,
        ("crash", "raise SystemExit(7)", True),
        ("good", WRITE, True),
        ("hang", "import time; time.sleep(60)", False),
        ("late", WRITE, True),
    )
    monkeypatch.setattr(whole, "WEIGHTS", {"hang": 0.1, "crash": 2, "good": 2})
    began = time.monotonic()
    flags = ["--device", "cpu", "--budget", "30s", "--out", str(tmp_path)]
    assert run_command("bench", whole.main, flags) == 1
    assert time.monotonic() - began < 30
    report = load(tmp_path / "report.json")
    assert report.complete
    assert len(report.rows) == 2 * len(invented("layer_norm").rows)
    assert "crash: FAILED with exit code 7" in report.notes
    assert any(note.startswith("hang: stopped after") for note in report.notes)
    assert (tmp_path / "report.png").exists()
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "crash: FAILED" in text
    assert "not measured" in text
    assert "=== targets" in capsys.readouterr().out


def test_a_terminated_run_keeps_its_results(tmp_path: Path) -> None:
    """A run that is terminated loses its results, or leaves a stage running."""
    invented("layer_norm").save(tmp_path / "ready.json")
    program = f"""
import sys, time
from pathlib import Path
import pytest
import bench.__main__ as whole
from tests.bench.test_main import WRITE, fake_stages
with pytest.MonkeyPatch.context() as patch:
    waiting = WRITE + "; Path(sys.argv[1] + '.started').touch(); import time; time.sleep(60)"
    fake_stages(patch, ("first", WRITE, True), ("second", waiting, True), ("third", WRITE, True))
    code = whole.run_command("bench", whole.main, ["--device", "cpu", "--out", {str(tmp_path)!r}])
sys.exit(code)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    started = tmp_path / "parts" / "second.json.started"
    for _ in range(600):
        if started.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    report = load(tmp_path / "report.json")
    assert not report.complete
    assert len(report.rows) == 2 * len(invented("layer_norm").rows)
    assert "stopped: second, third unfinished" in report.notes


def test_stages_follow_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench missing from a full run, the name of an op not passed on, or no checks on a GPU."""
    monkeypatch.setattr(sanitizer, "find", lambda: "/usr/bin/compute-sanitizer")
    options = whole.Options(quick=True)
    everything = whole.stages([], options, tmp_path, on_gpu=False)
    families = ["attention", "norm", "ffn", "loss", "decode"]
    assert [stage.name for stage in everything] == [*families, "train", "generate"]
    line = everything[0].command(61.5)
    assert line[-3:] == ["--quick", "--budget", "61s"]
    (norm,) = whole.stages(["add_layer_norm"], options, tmp_path, on_gpu=False)
    assert norm.command(5)[-5:-2] == ["--quick", "--op", "add_layer_norm"]
    stages = whole.stages(["norm", "train"], options, tmp_path, on_gpu=True)
    assert [stage.name for stage in stages] == ["gpu tests", "same bits", "norm", "train", *sanitizer.TOOLS]
    ops = [spec.name for spec in find_bench("norm").specs]
    assert stages[0].command(9)[-2:] == ["-k", " or ".join(ops)]
    names = ["--op", *ops]
    json = ["--json", str(stages[1].result)]
    assert stages[1].command(9)[1:] == ["-m", "bench.safety", *names, *json, "--budget", "9s"]
    assert stages[-1].command(9)[1 : 4 + len(names)] == ["-m", "bench.sanitizer", "synccheck", *names]
    for checks, expected in (("only", ["gpu tests", "same bits", *sanitizer.TOOLS]), ("no", ["norm"])):
        chosen = whole.stages(["norm"], whole.Options(checks=checks), tmp_path, on_gpu=True)
        assert [stage.name for stage in chosen] == expected
    assert [stage.name for stage in whole.stages(["train"], options, tmp_path, on_gpu=True)] == ["train"]
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert [stage.name for stage in whole.stages(["norm"], options, tmp_path, on_gpu=True)] == [
        "gpu tests",
        "same bits",
        "norm",
    ]


JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.t" name="a"/>
<testcase classname="tests.t" name="b[bf16]"><failure message="wrong">at</failure></testcase>
<testcase classname="tests.t" name="c"><error message="broken">at</error></testcase>
<testcase classname="tests.t" name="d"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>
"""


def test_a_full_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that loses its results, fails without failing the run, or is called with unknown flags."""
    monkeypatch.setattr(sanitizer, "find", lambda: "/usr/bin/compute-sanitizer")
    monkeypatch.setattr(whole, "bench_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(whole, "describe", lambda device: MACHINE)
    parsers = {"bench.safety": bench.safety.Options, "bench.sanitizer": sanitizer.Options}
    parsers |= {"bench.train": bench.train.Options, "bench.generate": bench.generate.Options}
    ran: list[str] = []

    def stand_in(line: list[str], limit: float) -> int | None:
        assert line[0] == sys.executable
        module = line[2] if line[1] == "-m" else line[3]
        ran.append(f"{module} {line[3]}" if module == "bench.sanitizer" else module)
        if module == "pytest":
            assert line[3:5] == ["-m", "gpu and not slow"]
            (xml,) = [flag.removeprefix("--junitxml=") for flag in line if flag.startswith("--junitxml=")]
            Path(xml).write_text(JUNIT, encoding="utf-8")
            return None
        known = {f.name for f in fields(parsers.get(module, bench.command.Options))}
        assert {flag.removeprefix("--") for flag in line if flag.startswith("--")} <= known
        report = Report(module, MACHINE, notes=["a note"], complete=True)
        if module in ("attention", "norm", "ffn", "loss", "decode"):
            report = invented(*(spec.name for spec in find_bench(module).specs))
        elif module in ("bench.train", "bench.generate"):
            report.rows = [row for row in models() if row.op == module.removeprefix("bench.")]
        report.save(line[line.index("--json") + 1])
        return {"bench.sanitizer": 1, "ffn": None}.get(module, 0)

    pictures: list[tuple[Path, int]] = []

    def draw(report: Report, path: Path) -> bool:  # test_report.py draws a picture, which takes seconds
        pictures.append((path, len(report.rows)))
        return bool(report.rows)

    monkeypatch.setattr(whole, "draw", draw)
    monkeypatch.setattr(whole, "run_process", stand_in)
    assert run_command("bench", whole.main, ["--device", "cuda", "--out", str(tmp_path)]) == 1
    assert pictures[-1] == (tmp_path / "report.png", len(load(tmp_path / "report.json").rows))
    tools = [f"bench.sanitizer {tool}" for tool in sanitizer.TOOLS]
    families = ["attention", "norm", "ffn", "loss", "decode"]
    assert ran == ["pytest", "bench.safety", *families, "bench.train", "bench.generate", *tools]
    report = load(tmp_path / "report.json")
    assert report.complete
    assert report.rows == [*invented(*SPECS).rows, *models()]
    for note in (
        "gpu tests: 3 run, 2 failed: b[bf16], c",
        "same bits: a note",
        "racecheck: a note",
        "racecheck: FAILED with exit code 1",
    ):
        assert note in report.notes
    assert any(note.startswith("ffn: stopped after") for note in report.notes)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert re.search(r"training GPT-2 124M, tokens/s +≥ 600,000 +655,360 +met", text)
    assert "report.png" in text

    monkeypatch.setattr(sanitizer, "find", lambda: None)  # now only tests fail, and they are stopped as well
    flags = ["norm", "--device", "cuda", "--out", str(tmp_path / "norm")]
    assert run_command("bench", whole.main, flags) == 1


TESTS = """
import pathlib, time
def test_wrong():
    assert False
def test_long():
    pathlib.Path({begun!r}).touch()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "flags",
    [pytest.param([], id="one process", marks=pytest.mark.slow), pytest.param(["-n", "2"], id="two workers")],
)
def test_stopped_tests_report_their_failures(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests stopped at their time limit lose the names of the failed ones, or ignore the signal."""
    begun, result = tmp_path / "begun", tmp_path / "result.xml"
    (tmp_path / "test_some.py").write_text(TESTS.format(begun=str(begun)), encoding="utf-8")
    plugins = ["-p", "tests.conftest", "-p", "no:cacheprovider"]
    options = [*plugins, f"--junitxml={result}", f"--rootdir={tmp_path}", *flags]
    wait = subprocess.Popen.wait

    def until_begun(process: Any, timeout: float) -> int:
        if process.args[-1] == str(tmp_path) and not begun.exists():
            while not begun.exists():
                assert process.poll() is None
                time.sleep(0.1)
            time.sleep(0.5)  # until the worker has sent the failure
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_begun)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # else the stage takes itself for a worker
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert whole.run_process([sys.executable, "-m", "pytest", *options, str(tmp_path)], 1.0) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert whole.tally(result)[1] == ["test_wrong"]


def test_a_stage_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ignores SIGTERM runs on and keeps the GPU occupied."""
    monkeypatch.setattr(whole, "PATIENCE", 0.5)
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert whole.run_process([sys.executable, "-c", program], 0.5) is None
    assert time.monotonic() - began < 10
