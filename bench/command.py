"""The command line that all op benches share."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import table, targets
from bench.cases import Race, plan
from bench.contestants import OURS, OWN, REFERENCE
from bench.engine import Bench, Runner, lane
from bench.machine import bench_device, describe
from bench.measure import Ceilings, Clock, self_check
from bench.record import Report
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError, unknown
from gpt.training.profile import profiling
from kernels.spec import SHORT_DTYPE

DTYPES = {name: dtype for dtype, name in SHORT_DTYPE.items()}
CPU_BUDGET = "1m"


@dataclass(frozen=True)
class Options:
    """Flags of a bench."""

    quick: bool = option(False, "the most important case of each op, for a short time")
    op: tuple[str, ...] = option((), "these ops alone")
    contestants: tuple[str, ...] = option((), "these contestants alone, by the names in the table")
    dtype: str = option("auto", "auto is bf16 on a GPU, fp32 on a CPU", choices=("auto", *DTYPES))
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)")
    budget: str | None = option(
        None,
        "as in 90s or 8m: leave out the least important cases beyond it (default: 1m on a CPU, except with "
        "--quick)",
    )
    json: str | None = option(None, "write every figure to this file, as they come")
    plot: bool = option(False, "draw a PNG into --out")
    profile: bool = option(
        False, "print the top kernels of the first case, and write a Chrome trace into --out"
    )
    out: str = option(".", "where --plot and --profile write")


def command(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Runs the bench of an op family as a command line; returns the exit code."""
    return run_command(f"bench.{bench.family}", lambda arguments: _main(bench, arguments), argv)


def _main(bench: Bench, argv: Sequence[str]) -> int:
    description = (
        f"The ops of `{bench.family}`: correctness first, "
        "then time against everything else that is installed."
    )
    parser = OptionParser(f"python -m bench.{bench.family}", description, options=Options())
    _, values = parser.parse_tables(argv)
    options = Options(**values["options"])
    began, clock = time.monotonic(), Clock(bench_device(options.device))
    usual = None if clock.on_gpu or options.quick else CPU_BUDGET
    budget = parse_budget(usual if options.budget is None else options.budget)
    check_names("--op", options.op, [spec.name for spec in bench.specs])
    specs = [spec for spec in bench.specs if not options.op or spec.name in options.op]

    automatic = torch.bfloat16 if clock.on_gpu else torch.float32
    runner = Runner(
        bench=bench,
        clock=clock,
        ceilings=Ceilings(clock, 0.05 if options.quick else 0.2),
        dtype=DTYPES.get(options.dtype, automatic),
        seconds=(0.05 if options.quick else 0.1) if clock.on_gpu else (0.1 if options.quick else 0.5),
        compiled=clock.on_gpu or not options.quick,
        names=options.contestants,
    )
    _check_contestants(runner, specs)

    out = _folder(options.out) if options.plot or options.profile else Path(options.out)
    report = start_report(f"bench.{bench.family}", argv, clock)
    races = plan(specs, targets.load(), on_gpu=clock.on_gpu, quick=options.quick)
    if not clock.on_gpu:
        say(report, f"the rows `{REFERENCE}` are what this package runs on a CPU; cases are made smaller")
    deadline = None if budget is None else began + budget
    _run_all(runner=runner, races=races, report=report, path=options.json, deadline=deadline)

    if options.profile and races:
        profile(runner, races[0], out / f"{bench.family}-trace.json")
    if options.plot:
        from bench.plot import draw

        path = out / f"{bench.family}.png"
        print(f"drew {path}" if draw(report, path) else "nothing was measured, so there is nothing to draw")
    return 1 if any(row.status == "wrong" and row.contestant in OWN for row in report.rows) else 0


def start_report(module: str, argv: Sequence[str], clock: Clock) -> Report:
    """An empty report of a command.

    Prints the machine and a check of its clock, and notes a clock that cannot be trusted.
    """
    report = Report(shlex.join(["python", "-m", module, *argv]), describe(clock.device))
    print(table.machine(report.machine))
    if not clock.on_gpu:
        say(
            report,
            "no GPU was found: these are times of the CPU, which runs the references",
        )
    check = self_check(clock)
    print(
        f"clock: a sleep of known length reads {check.sleep:.3f} of it, one contestant against itself "
        f"{check.noise:.3f}"
    )
    for problem in check.problems:
        say(report, problem)
    return report


def say(report: Report, note: str) -> None:
    """Prints a note and adds it to the report."""
    report.notes.append(note)
    print(note, flush=True)


def _run_all(
    runner: Runner, races: Sequence[Race], report: Report, path: str | None, deadline: float | None
) -> None:
    longest = 0.0
    for number, race in enumerate(races):
        begin = time.monotonic()
        if deadline is not None and number > 0 and begin + longest > deadline:
            say(
                report,
                "left out for the budget: " + ", ".join(f"{r.spec.name} {r.case.id}" for r in races[number:]),
            )
            break

        rows = []
        for row in runner.run(race):
            rows.append(row)
            report.rows.append(row)
            report.ceilings |= runner.ceilings.measured()
            if path is not None:
                report.save(path)
        print("\n" + table.race(rows), flush=True)
        longest = max(longest, time.monotonic() - begin)

    print(f"\nceilings measured here: {table.ceilings(report.ceilings)}")
    report.complete = True
    if path is not None:
        report.save(path)


def profile(runner: Runner, race: Race, path: Path) -> None:
    """Profiles three calls of one contestant: prints a table, and writes a Chrome trace to `path`."""
    spec, case = race
    contestants = {c.name: c for c in runner.contestants(spec)}
    inputs = spec.make_inputs(case, runner.dtype, runner.clock.device, torch.Generator().manual_seed(0))
    contestant = contestants.get(OURS if runner.clock.on_gpu else REFERENCE) or next(
        c for c in contestants.values() if c.function is not None
    )

    call = lane(spec, contestant, [inputs], "both" if spec.gradients else "forward").calls[0]
    print(f"\n{contestant.name}: three calls of {spec.name} {case.id}")
    with runner.clock.active(), contestant.context():
        call()
        with profiling(path, runner.clock.device):
            for _ in range(3):
                call()


def check_names(where: str, names: Sequence[str], valid: Collection[str]) -> None:
    """Raises InputError for the first of `names` that is not in `valid`, with the nearest valid name."""
    for name in names:
        if name not in valid:
            raise unknown(where, name, valid)


def parse_budget(text: str | None) -> float | None:
    """Converts a --budget to seconds.

    Raises:
        InputError: The text is not a duration.
    """
    value = None if text is None else table.seconds(text)
    if text is not None and not value:
        raise InputError(f"--budget is {text!r}, expected a duration as in 90s or 8m")
    return value


def _check_contestants(runner: Runner, specs: Sequence[Any]) -> None:
    """Raises InputError if a contestant requested by name does not exist or cannot run."""
    everyone = Runner(**{**vars(runner), "names": ()})
    contestants = {c.name: c for spec in specs for c in everyone.contestants(spec)}
    check_names("--contestants", runner.names, contestants)
    for name in runner.names:
        if contestants[name].function is None:
            raise InputError(f"--contestants: {name} cannot run: {contestants[name].absent}")


def _folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot write to {path}: {error.strerror}") from error
    return Path(path)
