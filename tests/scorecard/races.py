"""Rows: kills and signals at random times, and processes that share a folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from tests.scorecard.crash_worker import run_row
from tests.scorecard.row import Outcome, Row


def race(function: str, trials: int, seed: int, folder: Path) -> Outcome:
    """Runs a function of races_rows.py, or one named "module:name", in the worker, which forks."""
    if not hasattr(os, "fork") or not hasattr(os, "pidfd_open"):
        return Outcome(note="not run: this system cannot fork, or has no pidfd_open")
    name = function if ":" in function else f"races_rows:{function}"
    return run_row(f"tests.scorecard.{name}", trials, seed, folder)


def _row(name: str, promise: str, trials: int, small: int, long: int) -> Row:
    return Row(name, promise, functools.partial(race, name.replace("-", "_")), trials, small, long)


KILLED_RANK = "the other rank names it; no checkpoint is lost; resumed, the run ends as undisturbed"

ROWS: tuple[Row, ...] = (
    _row("random-kills", "a killed run, resumed, ends as an undisturbed one, bit for bit", 60, 3, 400),
    _row("random-kills-saving", "a reader has a whole state; the next save leaves no stray", 45, 3, 300),
    _row("signals", "the right exit code, no traceback; resumed, the run ends as undisturbed", 56, 4, 280),
    _row("ctrl-c-at-start", "130 and at most one line while a command imports", 4, 1, 30),
    _row("two-trainers", "one trains as if alone; the other ends with 2 and says why", 9, 2, 45),
    _row("two-resumes", "one resumes as if alone; the other ends with 2 and names its process", 9, 2, 45),
    _row("reader-beside-trainer", "gpt.sample, eval and info of a run in progress end with 0", 30, 3, 150),
    Row("rank-kills", KILLED_RANK, functools.partial(race, "rank_kills:ddp"), 25, 2, 250),
    Row("rank-kills-fsdp", KILLED_RANK, functools.partial(race, "rank_kills:fsdp"), 15, 1, 250),
    _row("two-cache-builders", "both get the tokens of the text; the cache is whole", 20, 2, 100),
    _row("exporter-beside-reader", "a reader has the old or the new model whole", 40, 4, 200),
)
