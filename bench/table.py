"""Formats rows and outcomes as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from bench.contestants import OURS, REFERENCE
from bench.record import Machine, Report, Row
from bench.targets import Outcome

WHOLE_MODEL = ("step", "first token", "decode")
WGMMA_PTXAS = 13, 1  # an older ptxas can overwrite registers that a wgmma still reads
TITLES = {"both": "forward + backward"}
COLUMNS = (
    "contestant",
    "time",
    "±",
    "graph",
    "TFLOP/s",
    "GB/s",
    "tokens/s",
    "% limit",
    "×",
    "memory",
    "error",
)


def duration(seconds: float | None) -> str:
    """A time with three digits and a unit."""
    if seconds is None:
        return "-"
    unit, scale = next(
        ((u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * s >= 1), ("ns", 1e9)
    )
    return f"{seconds * scale:#.3g} {unit}".replace(". ", " ")


def size(nbytes: int | None) -> str:
    """A size in MiB or GiB."""
    if nbytes is None:
        return "-"
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def figure(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def cells(row: Row, base: Row | None) -> tuple[str, ...]:
    """A measured row under COLUMNS; "×" is its time over that of `base`, above 1 where `base` is faster."""
    spread = (
        None
        if not row.seconds or row.low is None or row.high is None
        else 50 * (row.high - row.low) / row.seconds
    )
    ratio = None if base is None or not base.seconds or row.seconds is None else row.seconds / base.seconds
    flag = " !" if row.error is not None and row.error > 1 else ""
    return (
        row.contestant,
        duration(row.seconds),
        "-" if spread is None else f"{spread:.0f}%",
        duration(row.graph_seconds),
        figure(row.tflops, ".3g"),
        figure(row.gbps, ".3g"),
        figure(row.tokens_per_second, ",.0f"),
        figure(None if row.share is None else 100 * row.share, ".0f"),
        figure(ratio, ".2f"),
        size(row.memory),
        figure(row.error, ".2f") + flag,
    )


def grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligns columns, the first to the left, and leaves out those that are empty (all "-")."""
    rows = [list(line) for line in lines]
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] != "-" for row in rows)]
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in kept]
    text = [
        "  ".join(
            row[i].ljust(w) if i == 0 else row[i].rjust(w) for i, w in zip(kept, widths, strict=True)
        ).rstrip()
        for row in [list(header), *rows]
    ]
    return "\n".join("  " + line for line in text)


def race(rows: Sequence[Row]) -> str:
    """A table for each direction of one op at one case, then the contestants without a time and why."""
    first = rows[0]
    parts = [f"{first.op} {first.case} {first.dtype}"]
    for direction, group in groupby(
        (row for row in rows if row.status == "measured"), key=lambda row: row.direction
    ):
        measured = sorted(group, key=lambda row: row.seconds or 0)
        by_name = {row.contestant: row for row in measured}
        base = OURS if OURS in by_name else REFERENCE
        header = [f"× {base}" if name == "×" else name for name in COLUMNS]
        lines = [cells(row, by_name.get(base)) for row in measured]
        parts += [f" {TITLES.get(direction, direction)}", grid(header, lines)]

    refused: dict[str, dict[str, None]] = {}  # reason -> the contestants, once each
    for row in rows:
        if row.reason or row.status != "measured":
            refused.setdefault(refusal(row), {})[row.contestant] = None
    parts += [f"  {' · '.join(names)}: {reason}" for reason, names in refused.items()]
    return "\n".join(parts)


def refusal(row: Row) -> str:
    """Why a contestant has no figures, or only some."""
    verdict = {
        "measured": "",
        "absent": "",
        "unavailable": "unavailable: ",
        "wrong": "WRONG result, not timed: ",
        "failed": "FAILED: ",
    }[row.status]
    return verdict + row.reason


def races(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups the rows by op, case and dtype, in the order in which they were measured."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.case, row.dtype), []).append(row)
    return list(groups.values())


def outcomes(results: Sequence[Outcome]) -> str:
    """A line for each target."""
    lines = []
    for outcome in results:
        target = outcome.target
        goal = f"≥ {target.at_least:,g}" if target.at_most is None else f"≤ {target.at_most:g}"
        value = figure(outcome.value, ".3g" if (outcome.value or 0) < 1000 else ",.0f")
        alone = figure(outcome.alone, ".3g")
        lines.append((target.name, goal, value, outcome.status, alone, outcome.case or "-"))
    titles = ["target", "goal", "measured", "outcome", "GPU alone", "worst case"]
    if all(outcome.alone is None for outcome in results):
        titles.remove("GPU alone")
        lines = [(*line[:4], line[5]) for line in lines]
    return grid(tuple(titles), lines)


def machine(about: Machine) -> str:
    """The machine, its software, the commit and the date in one line."""
    parts = [f"{about.device} ({about.architecture}, {about.memory_bytes / 2**30:.0f} GiB)"]
    parts.append(
        f"driver {about.driver}, CUDA {about.cuda}"
        if about.kind == "cuda"
        else f"{about.threads} threads, no GPU"
    )
    triton = f"triton {about.triton or 'not installed'}" + _assembler(about)
    parts.append(f"torch {about.torch}, {triton}, Python {about.python}")
    return "; ".join([*parts, f"commit {about.commit}", about.date])


def _assembler(about: Machine) -> str:
    """The ptxas of a machine, with a warning if it may miscompile wgmma, which the kernels use on sm_90."""
    if about.ptxas is None:
        return ""
    version = tuple(int(part) for part in re.findall(r"\d+", about.ptxas.partition(" ")[0]))
    risky = about.architecture == "sm_90" and version < WGMMA_PTXAS
    needed = ".".join(map(str, WGMMA_PTXAS))
    return f", ptxas {about.ptxas}" + (f" WARNING: below {needed} it can miscompile wgmma" if risky else "")


def markdown(report: Report, results: Sequence[Outcome], pictures: Sequence[str] = ()) -> str:
    """The whole report as Markdown."""
    state = "" if report.complete else " (incomplete: the run was stopped)"
    parts = [f"# {report.title}{state}", machine(report.machine)]
    if report.ceilings:
        parts.append("Measured ceilings: " + ceilings(report.ceilings) + ".")
    parts += [f"![{name}]({name})" for name in pictures]
    if results:
        parts.append("## Targets\n\n```\n" + outcomes(results) + "\n```")
    if report.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes))
    if report.rows:
        parts.append(
            "## Measurements\n\n```\n" + "\n\n".join(race(rows) for rows in races(report.rows)) + "\n```"
        )
    parts.append("## Formulas\n\n" + "\n".join(f"- {name}: {text}" for name, text in report.formulas.items()))
    return "\n\n".join(parts) + "\n"


def ceilings(rates: dict[str, float]) -> str:
    """Rates as text: "copy 4,100 GB/s, 8192x8192x8192 bfloat16 780 TFLOP/s"."""
    return ", ".join(
        f"{name} {value / 1e9:,.0f} GB/s" if name == "copy" else f"{name} {value / 1e12:.3g} TFLOP/s"
        for name, value in rates.items()
    )


def seconds(text: str) -> float | None:
    """Converts "8m", "90s", "1.5h" or "90" to seconds; None for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    return None if match is None else float(match[1]) * {"s": 1, None: 1, "m": 60, "h": 3600}[match[2]]
