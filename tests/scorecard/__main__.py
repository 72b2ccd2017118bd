"""`python -m tests.scorecard`: attacks what the project promises, and prints what held."""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from tests.scorecard.row import Outcome, Row

MODULES = ("crash", "races", "mutants", "fuzz", "limits", "processes", "kernel_mutants")
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "tiktoken", "matplotlib")
SHOWN, SHOWN_LENGTH = 3, 400  # failures of a row below the table; the JSON file has all of them in full


@dataclass
class Done:
    """A row, what came of it, and how it is repeated."""

    row: Row
    outcome: Outcome
    seconds: float
    command: str


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong flag in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tests.scorecard: {message}\n")


def list_rows() -> list[Row]:
    """All rows, in the order of MODULES."""
    modules = [importlib.import_module(f"tests.scorecard.{name}") for name in MODULES]
    return list(itertools.chain.from_iterable(module.ROWS for module in modules))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rows that the command line names; 1 if any promise is broken, 130 after Ctrl-C."""
    os.environ.update({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})  # before the rows import torch
    rows = list_rows()
    arguments = _parse(rows, argv)
    if arguments.list:
        for row in rows:
            print(f"{row.name:20} {row.trials:6} {row.promise}")
        return 0

    done: list[Done] = []
    interrupted = False
    try:
        for row in rows:
            if any(fnmatch(row.name, pattern) for pattern in arguments.only or ("*",)):
                done.append(_run(row, arguments))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: these rows were done", file=sys.stderr)
    print(table(done))
    if arguments.json:
        report = json.dumps({**describe(), "rows": [_as_json(item) for item in done]}, indent=1)
        arguments.json.write_text(report + "\n", encoding="utf-8")
    return 130 if interrupted else int(any(item.outcome.failures for item in done))


def table(done: Sequence[Done]) -> str:
    """One line for each row, and the first failures of those that have any."""
    lines = [
        ("row", "trials", "failures", "slowest", "seconds", "worst case, or what was not run", "repeat with")
    ]
    for item in done:
        outcome = item.outcome
        lines.append(
            (
                item.row.name,
                f"{outcome.trials:,}",
                f"{len(outcome.failures):,}",
                f"{outcome.slowest:.2f} s",
                f"{item.seconds:.0f}",
                "; ".join(filter(None, (outcome.worst, outcome.note))) or "-",
                item.command,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    for item in done:
        failures = item.outcome.failures
        text += [f"FAILED {item.row.name}: {failure[:SHOWN_LENGTH]}" for failure in failures[:SHOWN]]
        text += [f"FAILED {item.row.name}: and {len(failures) - SHOWN} more"] if failures[SHOWN:] else []
    return "\n".join(text)


def describe() -> dict[str, Any]:
    """The machine, the versions, the time and the commit of a report."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
    }


def _parse(rows: Sequence[Row], argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m tests.scorecard", description=__doc__, allow_abbrev=False)
    parser.add_argument("--trials", type=_positive, help="attacks of each row (default: its own number)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows, also by pattern: 'kill-*'")
    parser.add_argument("--long", action="store_true", help="attack every call, and more often at random")
    parser.add_argument("--seed", type=int, default=0, help="of the random attacks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a report with every failure")
    parser.add_argument("--list", action="store_true", help="print the rows and what they promise")
    arguments = parser.parse_args(argv)
    for pattern in arguments.only or ():
        if not any(fnmatch(row.name, pattern) for row in rows):
            parser.error(f"--only: no row is called {pattern!r} (--list prints the rows)")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a folder")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _run(row: Row, arguments: argparse.Namespace) -> Done:
    """Runs a row in an empty folder, with a line on stderr before and after."""
    trials = arguments.trials or (row.long if arguments.long else row.trials)
    command = f"python -m tests.scorecard --only {row.name} --trials {trials} --seed {arguments.seed}"
    print(f"{row.name}: {row.promise} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="scorecard-", ignore_cleanup_errors=True) as folder:
        try:
            with redirect_stdout(io.StringIO()):  # of the small runs that a row prepares
                outcome = row.run(trials, arguments.seed, Path(folder).resolve())
        except Exception:
            outcome = Outcome(failures=[f"the row itself failed: {traceback.format_exc()}"])
    seconds = time.perf_counter() - started
    print(
        f"{row.name}: {outcome.trials:,} trials, {len(outcome.failures):,} failures, {seconds:.0f} s "
        f"{outcome.note}".rstrip(),
        file=sys.stderr,
        flush=True,
    )
    return Done(row, outcome, seconds, command)


def _as_json(item: Done) -> dict[str, Any]:
    """The row as the report has it."""
    return {
        "name": item.row.name,
        "promise": item.row.promise,
        "seconds": round(item.seconds, 1),
        "command": item.command,
        **asdict(item.outcome),
    }


if __name__ == "__main__":
    sys.exit(main())
