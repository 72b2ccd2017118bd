"""`python -m bench.readme`: writes the figures and pictures of bench/results/ into README.md and
bench/README.md.

Each `<!-- bench:NAME -->` … `<!-- /bench:NAME -->` is rewritten; NAME is `summary`, `speed`, `pictures` or
`targets`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

from bench import table, targets
from bench.contestants import OURS
from bench.machine import ROOT
from bench.record import Report, Row, load
from gpt.cli import OptionParser, run_command
from gpt.errors import InputError, unknown

RESULTS = ROOT / "bench" / "results"
FILES = (ROOT / "README.md", ROOT / "bench" / "README.md")
BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n.*?<!-- /bench:(?P=name) -->", re.DOTALL)
NOTHING = "Not measured on a GPU yet: `python -m bench` measures on the one at hand."
HEADLINES = ("both", "forward", "step", "decode")
COLUMNS = f"| op | case | {OURS} | the others' time over ours |"
RULE = "|---|---|---|---|"


@dataclass(frozen=True)
class Options:
    """Flags."""

    check: bool = field(
        default=False, metadata={"help": "write nothing; the exit code is 1 where a file is out of date"}
    )


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.readme", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    stale = False
    for path in FILES:
        text = path.read_text("utf-8")
        fresh = rewritten(text, path.parent, results())
        stale = stale or fresh != text
        if fresh != text:
            print(f"{path.relative_to(ROOT)}: {'is out of date' if options.check else 'rewritten'}")
        if not options.check:
            path.write_text(fresh, encoding="utf-8")
    return 1 if stale and options.check else 0


def results() -> dict[Path, Report]:
    """The kept reports, by their folders; several in one folder, of one machine, count as one.

    Of two that timed the same op at the same case the later one counts: contestants are compared within one
    run alone.
    """
    folders = sorted({path.parent for path in RESULTS.glob("*/*.json")})
    reports = {at: [load(path) for path in sorted(at.glob("*.json"))] for at in folders}
    return {
        at: reduce(_joined, sorted(found, key=lambda report: report.machine.date))
        for at, found in reports.items()
    }


def _joined(older: Report, newer: Report) -> Report:
    again = {_race(row) for row in newer.rows}
    rows = [row for row in older.rows if _race(row) not in again] + newer.rows
    commits = dict.fromkeys([*older.machine.commit.split(", "), newer.machine.commit])
    machine = replace(newer.machine, commit=", ".join(commits))
    return replace(newer, title=f"{older.title}\n{newer.title}", machine=machine, rows=rows)


def _race(row: Row) -> tuple[str, str, str]:
    return row.op, row.case, row.dtype


def rewritten(text: str, folder: Path, reports: dict[Path, Report]) -> str:
    """`text` with every block made anew; pictures are named as seen from `folder`.

    Raises:
        InputError: A block of an unknown name.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise unknown("block", f"bench:{name}", [f"bench:{known}" for known in BLOCKS])
        parts = [NOTHING] if all(report.machine.kind != "cuda" for report in reports.values()) else []
        parts += filter(None, BLOCKS[name](reports, folder))
        return f"<!-- bench:{name} -->\n" + "\n\n".join(parts) + f"\n<!-- /bench:{name} -->"

    if len(BLOCK.findall(text)) != text.count("<!-- bench:"):
        raise InputError("a <!-- bench:… --> block has no end of the same name")
    return BLOCK.sub(block, text)


def summary(reports: dict[Path, Report], folder: Path) -> list[str]:
    """One table, which is to stay short: of the GPU measured last a line for each op, at the case that came
    first; of processors every case."""
    gpus = sorted(
        (at for at, report in reports.items() if report.machine.kind == "cuda"),
        key=lambda at: reports[at].machine.date,
    )
    told = {at: report for at, report in reports.items() if at not in gpus[:-1]}
    lines: dict[object, str] = {}
    for at, report in sorted(told.items(), key=lambda entry: entry[0] not in gpus):
        for rows in table.races(row for row in report.rows if row.status == "measured"):
            line = _headline(rows)
            if line is not None:
                lines.setdefault(
                    (at, rows[0].op if at in gpus else _race(rows[0])), f"| {report.machine.device} {line}"
                )
    about = [f"{table.machine(report.machine)}." for report in told.values()]
    drawn = [
        f"![{told[at].machine.device}]({_seen_from(at / 'report.png', folder)})"
        for at in told
        if (at / "report.png").exists()
    ]
    return (
        ["\n".join([f"| machine {COLUMNS}", f"|---{RULE}", *lines.values()]), "\n".join([*drawn, *about])]
        if lines
        else []
    )


def _each(tell: Callable[[Report, Path, Path], str]) -> Callable[[dict[Path, Report], Path], list[str]]:
    return lambda reports, folder: [tell(report, at, folder) for at, report in reports.items()]


def speed(report: Report, at: Path, folder: Path) -> str:
    """Each op's headline at every case, and how many times as long everybody else took."""
    commands = re.sub(r" --json \S+", "", report.title)
    lines = [_headline(rows) for rows in table.races(row for row in report.rows if row.status == "measured")]
    return "\n".join(
        [
            "```sh",
            commands,
            "```",
            "",
            f"{table.machine(report.machine)}:",
            "",
            COLUMNS,
            RULE,
            *filter(None, lines),
        ]
    )


def _headline(rows: Sequence[Row]) -> str | None:
    """The line of one op at one case."""
    direction = next((d for d in HEADLINES if any(row.direction == d for row in rows)), None)
    return None if direction is None else _line([row for row in rows if row.direction == direction])


def _line(rows: Sequence[Row]) -> str:
    ours = next((row for row in rows if row.contestant == OURS), None)
    others = sorted((row for row in rows if row is not ours), key=lambda row: row.seconds or 0)
    base = ours.seconds if ours is not None else None
    cells = [f"{row.contestant} {row.seconds / base:.2f}" for row in others if row.seconds and base]
    return f"| {rows[0].op} | {rows[0].case} {rows[0].dtype} | {_figure(ours)} | {' · '.join(cells) or '-'} |"


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
    """Every PNG beside the report."""
    paths = sorted(at.glob("*.png"))
    return "\n".join(f"![{report.machine.device}: {path.name}]({_seen_from(path, folder)})" for path in paths)


def _seen_from(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def met(report: Report, at: Path, folder: Path) -> str:
    """The targets for such a machine with their outcomes, where any was measured."""
    outcomes = [
        targets.judge(target, report) for target in targets.load() if target.kind == report.machine.kind
    ]
    if all(outcome.status == "not measured" for outcome in outcomes):
        return ""
    return f"{report.machine.device}, {report.machine.date[:10]}:\n\n```\n{table.outcomes(outcomes)}\n```"


BLOCKS: dict[str, Callable[[dict[Path, Report], Path], list[str]]] = {
    "summary": summary,
    "speed": _each(speed),
    "pictures": _each(pictures),
    "targets": _each(met),
}

if __name__ == "__main__":
    sys.exit(run_command("bench.readme", main))
