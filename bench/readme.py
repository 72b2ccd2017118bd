"""`python -m bench.readme`: writes the figures of bench/results/ into README.md and bench/README.md.

Each block `<!-- bench:NAME -->` … `<!-- /bench:NAME -->` is rewritten; NAME is `summary`, `speed`,
`pictures`, `targets` or `validate`. The summary is also drawn as bench/results/speed.svg.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from bench import ratchet, table, targets
from bench.contestants import OURS
from bench.machine import ROOT
from bench.plot import ratios, results_in, speed_svg
from bench.record import Machine, Report, Row, load
from bench.validate.report import markdown
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError, unknown
from gpt.files import read_json

RESULTS = ROOT / "bench" / "results"
VALIDATED = RESULTS / "validate"
NOT_TIMES = {VALIDATED, ratchet.TABLES}
PICTURE = RESULTS / "speed.svg"
FILES = (ROOT / "README.md", ROOT / "bench" / "README.md")
BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n.*?<!-- /bench:(?P=name) -->", re.DOTALL)
NO_GPU = "Not measured on a GPU: run `python -m bench` on one."
# Left out of the summary: `generate` measures the whole token, and `train` the step.
PARTS = ("decode_argmax", "decode_block", "decode_embedding", "decode_head", "curves")
HEADLINES = ("both", "forward", "step", "decode")
COLUMNS = f"| op | case | {OURS} | time over {OURS}'s (above 1: slower) |"
ALONE = " GPU alone, without the host's time |"
RULE = "|---|---|---|---|"


@dataclass(frozen=True)
class Options:
    """Flags."""

    check: bool = option(False, "write nothing; the exit code is 1 where a file is out of date")


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.readme", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    reports = results()
    stale = []

    for path in FILES:
        text = path.read_text("utf-8")
        fresh = rewritten(text, path.parent, reports)
        if fresh != text:
            stale.append(path)
            if not options.check:
                path.write_text(fresh, encoding="utf-8")

    shown = headlines(reports)
    if shown is not None:
        svg = speed_svg(*shown)
        if not PICTURE.exists() or results_in(PICTURE.read_text("utf-8")) != results_in(svg):
            stale.append(PICTURE)
        if not options.check:
            PICTURE.write_text(svg, encoding="utf-8")

    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is out of date' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


def results() -> dict[Path, Report]:
    """The reports in bench/results/ by their folders; all reports in one folder are merged.

    If two reports timed the same op at the same case, the later one counts, because contestants are only
    compared within one run.
    """
    folders = sorted({path.parent for path in RESULTS.glob("*/*.json")} - NOT_TIMES)
    reports = {at: [load(path) for path in sorted(at.glob("*.json"))] for at in folders}
    return {
        at: reduce(_merge, sorted(parts, key=lambda report: report.machine.date))
        for at, parts in reports.items()
    }


def _merge(older: Report, newer: Report) -> Report:
    again = {_race(row) for row in newer.rows}
    rows = [row for row in older.rows if _race(row) not in again] + newer.rows
    commits = dict.fromkeys([*older.machine.commit.split(", "), newer.machine.commit])
    machine = replace(newer.machine, commit=", ".join(commits))
    return replace(newer, title=f"{older.title}\n{newer.title}", machine=machine, rows=rows)


def _race(row: Row) -> tuple[str, str, str]:
    return row.op, row.case, row.dtype


def rewritten(text: str, folder: Path, reports: dict[Path, Report]) -> str:
    """`text` with every block generated again; paths of pictures are relative to `folder`.

    Raises:
        InputError: A block has an unknown name, or no end.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise unknown("block", f"bench:{name}", [f"bench:{known}" for known in BLOCKS])
        on_gpu = any(report.machine.kind == "cuda" for report in reports.values())
        parts = [] if on_gpu or name in ("pictures", "validate") else [NO_GPU]
        parts += filter(None, BLOCKS[name](reports, folder))
        return f"<!-- bench:{name} -->\n" + "\n\n".join(parts) + f"\n<!-- /bench:{name} -->"

    if len(BLOCK.findall(text)) != text.count("<!-- bench:"):
        raise InputError("a <!-- bench:… --> block has no end of the same name")
    return BLOCK.sub(block, text)


def headlines(reports: dict[Path, Report]) -> tuple[Machine, list[list[Row]]] | None:
    """What the summary shows: the machine, and the headline rows of each op.

    The machine is the GPU measured last, with the first case of each op; without one it is the CPU measured
    last, with every case. The ops of one decoded token are left out: `generate` measures the whole token.
    """
    if not reports:
        return None
    report = max(reports.values(), key=lambda report: (report.machine.kind == "cuda", report.machine.date))
    groups: dict[object, list[Row]] = {}
    for rows in table.races(row for row in report.rows if row.status == "measured"):
        headline = _headline(rows)
        if headline and rows[0].op not in PARTS:
            key = rows[0].op if report.machine.kind == "cuda" else _race(rows[0])
            groups.setdefault(key, headline)
    return (report.machine, list(groups.values())) if groups else None


def summary(reports: dict[Path, Report], folder: Path) -> list[str]:
    """A short table for the main README, and the machine that it is from."""
    shown = headlines(reports)
    if shown is None:
        return []
    machine, groups = shown
    return [_table(groups), f"{table.machine(machine)}."]


def _each(render: Callable[[Report, Path, Path], str]) -> Callable[[dict[Path, Report], Path], list[str]]:
    return lambda reports, folder: [render(report, at, folder) for at, report in reports.items()]


def speed(report: Report, at: Path, folder: Path) -> str:
    """A table of one machine: each op at every case, with the other contestants' times."""
    commands = re.sub(r" --json \S+", "", report.title)
    groups = map(_headline, table.races(row for row in report.rows if row.status == "measured"))
    return "\n".join(
        [
            "```sh",
            commands,
            "```",
            "",
            f"{table.machine(report.machine)}:",
            "",
            _table([rows for rows in groups if rows]),
        ]
    )


def _headline(rows: Sequence[Row]) -> list[Row]:
    """The rows of one op at one case in the first of HEADLINES that was measured."""
    direction = next((d for d in HEADLINES if any(row.direction == d for row in rows)), None)
    return [row for row in rows if row.direction == direction]


def _table(groups: Sequence[Sequence[Row]]) -> str:
    """A line for each op at one case; the GPU's time alone has a column where CUDA graphs were timed."""
    alone = any(row.graph_seconds is not None for rows in groups for row in rows)
    lines = [COLUMNS + ALONE * alone, RULE + "---|" * alone]
    for rows in groups:
        ours = next((row for row in rows if row.contestant == OURS), None)
        cells = [f"{rows[0].op}", f"{rows[0].case} {rows[0].dtype}", _figure(ours), _ratios(rows)]
        replays = [row.alone for row in rows]
        if alone:
            cells.append(_ratios(replays))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(rows: Sequence[Row]) -> str:
    return " · ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(rows)) or "-"


def _figure(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.tokens is not None:
        return f"{row.tokens_per_second:,.0f} tokens/s"
    return (
        f"{table.duration(row.seconds)} "
        f"({table.figure(None if row.share is None else 100 * row.share, '.0f')}% of the limit)"
    )


def pictures(report: Report, at: Path, folder: Path) -> str:
    """Links to every PNG in the report's folder."""
    paths = sorted(at.glob("*.png"))
    return "\n".join(f"![{report.machine.device}: {path.name}]({_seen_from(path, folder)})" for path in paths)


def _seen_from(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def met(report: Report, at: Path, folder: Path) -> str:
    """The targets for this kind of machine with their outcomes; "" if none was measured."""
    outcomes = [
        targets.judge(target, report) for target in targets.load() if target.kind == report.machine.kind
    ]
    if all(outcome.status == "not measured" for outcome in outcomes):
        return ""
    return f"{report.machine.device}, {report.machine.date[:10]}:\n\n```\n{table.outcomes(outcomes)}\n```"


def validated(reports: dict[Path, Report], folder: Path) -> list[str]:
    """The verdicts of bench.validate on every kernel."""
    return [markdown([read_json(path, "bench.validate") for path in sorted(VALIDATED.glob("*.json"))])]


BLOCKS: dict[str, Callable[[dict[Path, Report], Path], list[str]]] = {
    "summary": summary,
    "speed": _each(speed),
    "pictures": _each(pictures),
    "targets": _each(met),
    "validate": validated,
}

if __name__ == "__main__":
    sys.exit(run_command("bench.readme", main))
