"""Rows: a process that is killed, or whose calls fail, at each call by which it changes files."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.scorecard import shim
from tests.scorecard.crash_worker import run_row
from tests.scorecard.row import Outcome, Row


def attack(function: str, trials: int, seed: int, folder: Path) -> Outcome:
    """Runs a function of crash_rows.py in the worker; where that is impossible, the note says why."""
    if obstacle := shim.obstacle():
        return Outcome(note=obstacle)
    return run_row(f"tests.scorecard.crash_rows:{function}", trials, seed, folder)


def _row(name: str, promise: str, trials: int, small: int, long: int) -> Row:
    return Row(name, promise, functools.partial(attack, name.replace("-", "_")), trials, small, long)


KILLED = "a reader has the old or the new state whole; going on ends as if undisturbed, without strays"
FAILED = "one line or success; a reader has the old or the new state whole; the next attempt succeeds"

ROWS: tuple[Row, ...] = (
    _row("kill-save", KILLED, 120, 12, 10_000),
    _row("kill-train", KILLED, 60, 4, 10_000),
    _row("kill-resume", KILLED, 60, 6, 10_000),
    _row("kill-files", KILLED, 40, 8, 10_000),
    _row("fail-save", FAILED, 150, 12, 10_000),
    _row("fail-train", FAILED, 60, 4, 10_000),
    _row("fail-resume", FAILED, 60, 6, 10_000),
    _row("fail-files", FAILED, 60, 8, 10_000),
    _row("sync-before-rename", "a power cut after a rename cannot lose what the file has", 1, 1, 1),
)
