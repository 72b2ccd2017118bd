"""The scorecard: every row holds in its small form, and notices code that is broken on purpose."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the rows need fork and resource limits")

from tests.scorecard import __main__ as scorecard
from tests.scorecard import shim
from tests.scorecard.crash_worker import run_row
from tests.scorecard.row import Outcome, Row

ROWS = scorecard.list_rows()
BROKEN = [  # the row, the function that breaks the code, trials, and what a failure must say
    ("crash_rows:kill_save", "delete_before_renaming", 24, "/model"),
    ("crash_rows:kill_save", "keep_leftovers", 6, "has a stray"),
    ("crash_rows:kill_files", "write_in_place", 30, "tokenizer.save"),
    ("crash_rows:sync_before_rename", "forget_to_sync", 1, "is not synced"),
    ("crash_rows:fail_save", "ignore_failed_writes", 15, ""),
    ("crash_rows:fail_train", "report_with_a_traceback", 4, "0 lines, expected one"),
    ("races_rows:two_resumes", "ignore_locks", 3, ""),
    ("races_rows:random_kills", "forget_the_random_state", 4, "has another run/"),
    ("races_rows:signals", "always_exit_with_0", 8, "compared with an undisturbed one"),
    pytest.param(
        "rank_kills:ddp",
        "forget_the_random_state",
        3,
        "has another checkpoints/",
        marks=pytest.mark.slow,
        id="rank_kills:ddp-forget_the_random_state",
    ),
]

needs_fork = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the rows fork, on Linux")
needs_shim = pytest.mark.skipif(
    bool(shim.obstacle()), reason=shim.obstacle() or "the library can be compiled"
)


def row(name: str, outcome: Outcome | BaseException) -> Row:
    """A row that has this outcome, or raises this exception."""

    def run(trials: int, seed: int, folder: Path) -> Outcome:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return Row(name, f"the promise of {name}", run, trials=3, small=1, long=9)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Rows that attack nothing, in place of the real ones."""
    made = [
        row("good", Outcome(trials=3, slowest=0.25, worst="1.4 x file")),
        row("bad", Outcome(trials=3, failures=[f"trial {i}: it broke" for i in range(5)])),
        row("absent", Outcome(note="not run: no C compiler")),
    ]
    monkeypatch.setattr(scorecard, "list_rows", lambda: made)
    return made


@needs_fork
@pytest.mark.parametrize(
    "name",
    [
        # test_sharded.py kills a sharded run too, at each stage of a save.
        pytest.param(row.name, marks=pytest.mark.slow) if row.name == "rank-kills-fsdp" else row.name
        for row in ROWS
    ],
)
def test_the_row_holds(name: str, tmp_path: Path) -> None:
    """A promise of the README that does not hold."""
    (row,) = (row for row in ROWS if row.name == name)
    outcome = row.run(row.small, 0, tmp_path)
    if outcome.note.startswith("not run"):
        pytest.skip(outcome.note)
    assert outcome.failures == []
    assert outcome.trials >= row.small


@needs_fork
@needs_shim
@pytest.mark.parametrize(("function", "sabotage", "trials", "symptom"), BROKEN)
def test_the_row_notices(function: str, sabotage: str, trials: int, symptom: str, tmp_path: Path) -> None:
    """A row that holds whatever the code does."""
    breaking = f"tests.scorecard.crash_sabotage:{sabotage}"
    outcome = run_row(f"tests.scorecard.{function}", trials, 0, tmp_path, sabotage=breaking)
    assert any(symptom in failure for failure in outcome.failures), outcome


@needs_shim
def test_every_call_is_counted(tmp_path: Path) -> None:
    """A call that the library does not see: the rows would never attack it."""
    outcome = run_row("tests.scorecard.crash_rows:every_call", 1, 0, tmp_path)
    assert outcome.failures == []


def test_names_are_words_and_differ() -> None:
    """Two rows of one name, or a name that --only cannot take."""
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name) for name in names)


def test_the_long_form_is_as_long_as_promised() -> None:
    """Fewer kills, mutants or inputs than the README states."""
    assert all(row.small <= row.trials <= row.long for row in ROWS)


def test_without_a_compiler_a_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that looks as if it had held where it cannot run."""
    monkeypatch.setattr(shim.shutil, "which", lambda name: None)
    (row,) = (row for row in ROWS if row.name == "kill-save")
    outcome = row.run(3, 0, tmp_path)
    assert (outcome.trials, outcome.note) == (0, "not run: no C compiler")


def test_the_table_has_every_row(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """A failure that the table or the exit code does not show."""
    assert scorecard.main([]) == 1
    printed, shown = capsys.readouterr()
    lines = printed.splitlines()
    assert re.match(r"good +3 +0 +0\.25 s +0 +1\.4 x file +python -m tests\.scorecard --only good", lines[1])
    assert re.match(r"bad +3 +5 ", lines[2])
    assert "not run: no C compiler" in lines[3]
    assert lines[4:] == [*(f"FAILED bad: trial {i}: it broke" for i in range(3)), "FAILED bad: and 2 more"]
    assert "bad: 3 trials, 5 failures" in shown


def test_the_report_has_every_failure(rows: list[Row], tmp_path: Path, capsys: object) -> None:
    """A report from which a failure cannot be repeated."""
    path = tmp_path / "report.json"
    assert scorecard.main(["--only", "bad", "--seed", "4", "--json", str(path)]) == 1
    report = json.loads(path.read_text())
    assert report.keys() == {"date", "commit", "machine", "python", "versions", "rows"}
    (entry,) = report["rows"]
    assert entry["failures"] == [f"trial {i}: it broke" for i in range(5)]
    assert entry["command"] == "python -m tests.scorecard --only bad --trials 3 --seed 4"


def test_rows_can_be_named_by_pattern(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """A command of the README that runs other rows than it names."""
    assert scorecard.main(["--only", "g*", "abs?nt"]) == 0
    printed = capsys.readouterr().out
    assert "good" in printed
    assert "absent" in printed
    assert "bad" not in printed


def test_ctrl_c_shows_what_was_done(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes of results that Ctrl-C throws away."""
    rows.insert(1, row("endless", KeyboardInterrupt()))
    assert scorecard.main([]) == 130
    printed = capsys.readouterr().out
    assert "good" in printed
    assert "bad" not in printed


def test_a_row_that_raises_has_failed(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """A row that cannot run, and hides the rows after it."""
    rows.insert(0, row("broken", ZeroDivisionError("division by zero")))
    assert scorecard.main(["--only", "broken", "good"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED broken: the row itself failed" in printed
    assert "good" in printed


@pytest.mark.parametrize(
    "flags",
    [["--only", "nonsense"], ["--trials", "0"], ["--trials", "x"], ["--json", "/no/such/folder/f"], ["--x"]],
    ids=lambda flags: " ".join(flags),
)
def test_a_wrong_flag_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong flag that is reported after minutes of work, or in a traceback."""
    with pytest.raises(SystemExit) as caught:
        scorecard.main(flags)
    assert caught.value.code == 2
    assert re.fullmatch(r"tests\.scorecard: .+\n", capsys.readouterr().err)
