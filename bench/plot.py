"""A report as one picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contestants import OURS
from bench.record import Report, Row
from bench.table import TITLES, WHOLE_MODEL

ACCENT = "#0b6e4f"
OTHERS = ("#5b7db1", "#9bb4d6", "#c98b5e", "#e3bd95", "#8d7aa8", "#bfb3d1", "#7f8c8d", "#b8c0c2")
PER_PANEL = 7  # cases
LIMIT = "measured limit"
Panel = tuple[str, str, list[str]]  # op, direction, cases


def draw(report: Report, path: Path) -> bool:
    """Draws the headline of each op: forward + backward (what else there is where it has none), a bar for
    each contestant.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.status == "measured"]
    panels = _panels(rows)
    if not panels:
        return False
    columns = 1 if len(panels) <= 3 else 2
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(11 if columns == 1 else 14, 1.2 + 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    colors = _colors(rows)
    for axes, panel in zip(places, panels, strict=False):
        _panel(axes, rows, panel, colors)
    for axes in places[len(panels) :]:
        axes.remove()
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [name for name in (*colors, LIMIT) if name in handles]
    figure.legend(
        [handles[n] for n in order], order, loc="outside lower center", ncols=6, frameon=False, fontsize=9
    )
    about = report.machine
    figure.suptitle(
        f"{about.device} · torch {about.torch} · {about.date[:10]} · {about.commit}",
        fontsize=10,
        color="#555555",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """A color for each contestant, ours first, the same in every panel."""
    names = sorted(dict.fromkeys(row.contestant for row in rows), key=lambda name: name != OURS)
    others = [name for name in names if name != OURS]
    colors = {OURS: ACCENT} if OURS in names else {}
    return colors | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def _panels(rows: Sequence[Row]) -> list[Panel]:
    found: list[Panel] = []
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        directions = list(dict.fromkeys(row.direction for row in of_op))
        chosen = (
            directions
            if directions[0] in WHOLE_MODEL
            else [("both" if "both" in directions else directions[0])]
        )
        for direction in chosen:
            cases = list(dict.fromkeys(row.case for row in of_op if row.direction == direction))
            found += [(op, direction, cases[i : i + PER_PANEL]) for i in range(0, len(cases), PER_PANEL)]
    return found


def _panel(axes: Any, rows: Sequence[Row], panel: Panel, colors: dict[str, str]) -> None:
    op, direction, cases = panel
    shown = [row for row in rows if row.op == op and row.direction == direction and row.case in cases]
    unit, value = _unit(shown)
    names = [name for name in colors if any(row.contestant == name for row in shown)]
    common, labels = _labels(cases)
    width = min(0.84 / len(names), 0.2)
    few = len(cases) * len(names) <= 12
    for i, name in enumerate(names):
        heights = [
            next((value(row) for row in shown if row.case == case and row.contestant == name), None)
            for case in cases
        ]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))]
        bars = axes.bar(places, [h or 0 for h in heights], width * 0.94, label=name, color=colors[name])
        if few or name == OURS:
            texts = ["" if h is None else f"{h:,.3g}" if h < 1000 else f"{h:,.0f}" for h in heights]
            axes.bar_label(
                bars, texts, fontsize=8, padding=1, fontweight="bold" if name == OURS else "normal"
            )
    for x, case in enumerate(cases):
        limit = next((_at_limit(row, unit) for row in shown if row.case == case), None)
        if limit is not None:
            axes.hlines([limit], [x - 0.45], [x + 0.45], "#444444", "dashed", label=LIMIT)
    axes.set_xticks(range(len(cases)), labels, fontsize=9)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_ylabel(unit)
    axes.ticklabel_format(style="plain", axis="y")
    axes.set_title(
        f"{op}, {TITLES.get(direction, direction)}  ({', '.join([*common, shown[0].dtype])})",
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def _unit(rows: Sequence[Row]) -> tuple[str, Any]:
    """What a panel shows: tokens/s of whole models, TFLOP/s where operations set the limit, GB/s where bytes
    do."""
    if all(row.tokens is not None for row in rows):
        return "tokens/s", lambda row: row.tokens_per_second
    if all((row.flops or 0) > 30 * (row.bytes or 1) for row in rows):
        return "TFLOP/s", lambda row: row.tflops
    return "GB/s", lambda row: row.gbps


def _at_limit(row: Row, unit: str) -> float | None:
    """The measured limit in the panel's unit."""
    work = {"tokens/s": row.tokens, "TFLOP/s": (row.flops or 0) / 1e12, "GB/s": (row.bytes or 0) / 1e9}[unit]
    return None if row.limit is None or not work else work / row.limit


def _labels(cases: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the parts that all cases share, a label for each case from its other parts); Tq and Tk of one size are
    T."""
    parts = [re.sub(r"\bTq(\d+)-Tk\1\b", r"T\1", case).split("-") for case in cases]
    common = (
        [part for part in parts[0] if all(part in other for other in parts)] if len(cases) > 1 else parts[0]
    )
    return common, ["\n".join(part for part in case if part not in common) for case in parts]
