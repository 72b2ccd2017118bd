"""`python -m bench`: runs all checks and benches, and writes one report.

Each stage runs in its own process. On a GPU the checks come first (the `gpu` tests, and that repeated calls
give the same bits), then every bench, then the tools of compute-sanitizer if it is installed. A table
compares the results with targets.toml. The report is rewritten after each stage, so a run that is stopped
keeps its results.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from bench import sanitizer, table, targets
from bench.command import check_names, parse_budget
from bench.machine import ROOT, bench_device, describe
from bench.plot import draw
from bench.record import Report, load
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError
from kernels.registry import SPECS

MODELS = ("train", "generate")
WEIGHTS = {  # of the stages, for sharing out the time; the others have 1.5
    "gpu tests": 4.0,
    "attention": 5.0,
    "train": 3.5,
    "generate": 2.5,
    **dict.fromkeys(sanitizer.TOOLS, 0.8),
}
GRACE = 45.0  # seconds that a stage may exceed its share by before it is stopped
PATIENCE = 15.0  # seconds that a stopped stage gets to write its results
CHECKS = ("yes", "no", "only")
WORKERS = 8  # processes of the tests, which spend most of their time in the compiler
ENGINE = (
    "import sys; from bench.command import command; from bench.engine import find_bench; "
    "sys.exit(command(find_bench(sys.argv.pop(1))))"
)


@dataclass(frozen=True)
class Options:
    """Flags."""

    quick: bool = option(False, "the most important case of each bench, for a short time")
    budget: str = option("9m", "time for everything; the least important cases beyond it are left out")
    checks: str = option(
        "yes", "what must be right on a GPU: with the benches, not at all, or alone", choices=CHECKS
    )
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)")
    out: str = option("out/bench", "the folder of the report")


@dataclass
class Stage:
    """One process of the run; `command` makes its command line from the seconds that it may take."""

    name: str
    command: Callable[[float], list[str]]
    result: Path | None = None  # the report that it writes, or pytest's results as XML

    @property
    def weight(self) -> float:
        return WEIGHTS.get(self.name, 1.5)

    @property
    def grace(self) -> float:
        """Seconds it may exceed its share by: a bench ends by itself, but finishes the case it is at."""
        return 0.0 if self.result is None or self.result.suffix == ".xml" else GRACE


@dataclass
class Run:
    """A whole run: the report so far and its folder."""

    report: Report
    folder: Path
    failed: bool = False
    drawn: int = 0  # rows in the last picture

    def stage(self, stage: Stage, seconds: float) -> None:
        """Runs a stage within its share of the time, and adds its results to the report."""
        print(f"\n=== {stage.name} (up to {seconds:.0f} s)", flush=True)
        began = time.monotonic()
        code = run_process(stage.command(seconds), seconds + stage.grace)
        took = time.monotonic() - began
        self.keep(stage)
        outcome = {None: f"stopped after {took:.0f} s, unfinished", 0: f"passed in {took:.0f} s"}.get(
            code, f"FAILED with exit code {code}"
        )
        if not stage.grace or code != 0:
            self.report.notes.append(f"{stage.name}: {outcome}")
            print(f"{stage.name}: {outcome}", flush=True)
        self.failed = self.failed or code not in (0, None)
        self.save()

    def keep(self, stage: Stage) -> None:
        """Adds what a stage has written so far to the report."""
        if stage.result is None or not stage.result.exists():
            return
        if stage.result.suffix == ".xml":
            count, bad = tally(stage.result)
            self.failed = self.failed or bool(bad)
            self.report.notes.append(
                f"{stage.name}: {count} run, {len(bad)} failed{': ' if bad else ''}{', '.join(bad[:20])}"
            )
            return

        part = load(stage.result)
        self.report.rows += part.rows
        self.report.ceilings |= part.ceilings
        self.report.notes += [f"{stage.name}: {note}" for note in part.notes]

    def save(self) -> list[targets.Outcome]:
        """Writes report.json, report.md and report.png."""
        self.report.save(self.folder / "report.json")
        outcomes = [targets.judge(target, self.report) for target in targets.load()]
        if len(self.report.rows) != self.drawn and draw(self.report, self.folder / "report.png"):
            self.drawn = len(self.report.rows)
        pictures = ["report.png"] if self.drawn else []
        (self.folder / "report.md").write_text(
            table.markdown(self.report, outcomes, pictures), encoding="utf-8"
        )
        return outcomes


def stages(names: Sequence[str], options: Options, folder: Path, *, on_gpu: bool) -> list[Stage]:
    """The stages of a run, in order."""
    families = list(dict.fromkeys(spec.family for spec in SPECS.values()))
    chosen = [
        name
        for name in (*families, *MODELS)
        if not names or name in names or any(op in names for op in _ops(name))
    ]

    checks = _checks([op for family in chosen for op in _ops(family)], folder, whole=not names)
    checks = checks if on_gpu and options.checks != "no" else []

    benches = []
    for name in chosen if options.checks != "only" else ():
        result = _result(folder, name)
        picked = [op for op in _ops(name) if op in names] if name not in names else []
        benches.append(Stage(name, _bench(name, options, result, picked), result))

    slow = [stage for stage in checks if stage.name in sanitizer.TOOLS]
    return [*(stage for stage in checks if stage not in slow), *benches, *slow]


def _result(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name.replace(' ', '-')}.json"


def _ops(family: str) -> list[str]:
    return [op for op, spec in SPECS.items() if spec.family == family]


def _bench(name: str, options: Options, result: Path, picked: Sequence[str]) -> Callable[[float], list[str]]:
    program = ["-m", f"bench.{name}"] if name in MODELS else ["-c", ENGINE, name]
    flags = (
        ["--json", str(result)]
        + (["--quick"] if options.quick else [])
        + (["--op", *picked] if picked else [])
    )
    device = ["--device", options.device] if options.device is not None else []
    return lambda seconds: [sys.executable, *program, *flags, *device, *_budget(seconds)]


def _budget(seconds: float) -> list[str]:
    return ["--budget", f"{max(1, int(seconds))}s"]


def _checks(ops: Sequence[str], folder: Path, *, whole: bool) -> list[Stage]:
    """The stages that check correctness on a GPU."""
    checks: list[Stage] = []
    if not ops:
        return checks

    if (ROOT / "tests").is_dir():
        parallel = (
            ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
            if find_spec("xdist")
            else []
        )
        chosen = [] if whole else ["-k", " or ".join(ops)]
        result = folder / "parts" / "gpu-tests.xml"
        flags = ["-m", "gpu and not slow", "-q", "--maxfail=20", f"--junitxml={result}", *parallel]
        tests = [sys.executable, "-m", "pytest", *flags, "tests", *chosen]
        checks.append(Stage("gpu tests", lambda seconds: tests, result))

    programs = {"same bits": ["bench.safety"]}
    if sanitizer.find() is not None:
        programs |= {tool: ["bench.sanitizer", tool] for tool in sanitizer.TOOLS}
    for name, program in programs.items():
        result = _result(folder, name)
        line = [sys.executable, "-m", *program, "--op", *ops, "--json", str(result)]
        checks.append(Stage(name, lambda seconds, line=line: [*line, *_budget(seconds)], result))  # type: ignore[misc]
    return checks


def tally(path: Path) -> tuple[int, list[str]]:
    """How many of pytest's tests ran (skipped ones did not), and the names of those that failed."""
    cases = [
        case for case in ElementTree.parse(path).getroot().iter("testcase") if case.find("skipped") is None
    ]
    bad = [
        case.get("name", "")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return len(cases), bad


def run_process(command: Sequence[str], limit: float) -> int | None:
    """Runs a process in ROOT.

    Returns:
        Its exit code; None if it was stopped after `limit` seconds.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env=environment, start_new_session=True, cwd=ROOT)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Not SIGINT: shells make background processes ignore it.
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)


def main(argv: Sequence[str]) -> int:
    parser = OptionParser("python -m bench", __doc__ or "", arguments="[OP ...]", options=Options())
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        default=[],
        help="ops, families, train or generate (default: everything)",
    )
    given, values = parser.parse_tables(argv)
    options = Options(**values["options"])
    valid = [*SPECS, *dict.fromkeys(spec.family for spec in SPECS.values()), *MODELS]
    check_names("OP", given.ops, valid)
    seconds = parse_budget(options.budget) or 0.0
    device = bench_device(options.device)

    folder = Path(options.out).resolve()
    try:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        (folder / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot write to {options.out}: {error.strerror}") from error

    run = Run(Report(shlex.join(["python", "-m", "bench", *argv]), describe(device)), folder)
    print(table.machine(run.report.machine))

    todo = stages(given.ops, options, folder, on_gpu=device.type == "cuda")
    signal.signal(signal.SIGTERM, _interrupt)
    code = _run_all(run, todo, time.monotonic() + seconds)

    outcomes = run.save()
    print("\n=== targets\n" + table.outcomes(outcomes) + f"\n\nreport: {folder / 'report.md'}")
    return code or int(run.failed)


def _run_all(run: Run, todo: list[Stage], deadline: float) -> int:
    """Runs every stage within its share of the remaining time; returns 130 if the run was stopped, else 0."""
    try:
        while todo:
            left = deadline - time.monotonic()
            if left <= 0:
                run.report.notes.append("left out for the budget: " + ", ".join(stage.name for stage in todo))
                return 0
            run.stage(todo[0], left * todo[0].weight / sum(stage.weight for stage in todo))
            todo.pop(0)
    except KeyboardInterrupt:
        run.keep(todo[0])
        run.report.notes.append("stopped: " + ", ".join(stage.name for stage in todo) + " unfinished")
        return 130
    run.report.complete = True
    return 0


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_command("bench", main))
