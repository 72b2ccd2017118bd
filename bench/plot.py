"""Pictures of reports."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contestants import OURS, OWN
from bench.record import Machine, Report, Row
from bench.table import TITLES, WHOLE_MODEL

ACCENT = "#0b6e4f"
OTHERS = ("#5b7db1", "#9bb4d6", "#c98b5e", "#e3bd95", "#8d7aa8", "#bfb3d1", "#7f8c8d", "#b8c0c2")
PER_PANEL = 7  # cases
LIMIT = "measured limit"
SHOWN = 3  # contestants of an op in the picture of the summary, the fastest ones
SLOWER = "#c98b5e"
Panel = tuple[str, str, list[str]]  # op, direction, cases


def draw(report: Report, path: Path) -> bool:
    """Draws the headline of each op, forward + backward if it has both, with a bar for each contestant.

    Returns:
        Whether the report has any measurement to draw.
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
    """A colour for each contestant, ours first; all panels share them."""
    names = sorted(dict.fromkeys(row.contestant for row in rows), key=lambda name: name != OURS)
    others = [name for name in names if name != OURS]
    colors = {OURS: ACCENT} if OURS in names else {}
    return colors | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def _panels(rows: Sequence[Row]) -> list[Panel]:
    panels: list[Panel] = []
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
            panels += [(op, direction, cases[i : i + PER_PANEL]) for i in range(0, len(cases), PER_PANEL)]
    return panels


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
    """A panel's unit: tokens/s for whole models, TFLOP/s if operations limit the op, GB/s if bytes do."""
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
    """The parts common to all cases, and a label for each case from the rest; equal Tq and Tk become T."""
    parts = [re.sub(r"\bTq(\d+)-Tk\1\b", r"T\1", case).split("-") for case in cases]
    common = (
        [part for part in parts[0] if all(part in other for other in parts)] if len(cases) > 1 else parts[0]
    )
    return common, ["\n".join(part for part in case if part not in common) for case in parts]


def ratios(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """The time of each other contestant of one op over this package's time, the fastest first.

    This package's deterministic form is not another contestant.
    """
    ours = next((row.seconds for row in rows if row.contestant == OURS), None)
    others = [(row.contestant, row.seconds) for row in rows if row.contestant not in OWN and row.seconds]
    return [(name, seconds / ours) for name, seconds in sorted(others, key=lambda o: o[1])] if ours else []


def speed_figure(machine: Machine, groups: Sequence[Sequence[Row]]) -> Any:
    """Bars for the fastest other contestants of each op: their time over this package's, starting at 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    shown = [(rows[0], ratios(rows)[:SHOWN]) for rows in groups]
    lines = sum(1 + len(bars) for _, bars in shown)
    figure = Figure(figsize=(8, 1.1 + 0.27 * lines), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="#444444", linewidth=0.8)
    names: dict[int, str] = {}  # of the bars, by their line
    line = 0

    for row, bars in shown:
        heading = f"{row.op} {row.case} {row.dtype}"
        text: dict[str, Any] = {"va": "center", "gid": "result", "fontsize": 9}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(0.01, line, heading, transform=axes.get_yaxis_transform(), bbox=box, **text)
        for at, (name, ratio) in enumerate(bars, line + 1):
            names[at] = name
            axes.barh(at, ratio - 1, left=1, height=0.7, color=ACCENT if ratio >= 1 else SLOWER)
            axes.annotate(f"{ratio:.2f}", (max(1, ratio), at), (4, 0), textcoords="offset points", **text)
        line += 1 + len(bars)

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_yticks(list(names), list(names.values()), fontsize=9)
    axes.set_ylim(lines - 0.4, -0.7)
    axes.margins(x=0.12)
    axes.set_xlabel(f"time over {OURS}'s, log scale (above 1: {OURS} is faster)", fontsize=9)
    axes.set_title(f"{machine.device}, {machine.date[:10]}", gid="result", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def speed_svg(machine: Machine, groups: Sequence[Sequence[Row]]) -> str:
    """`speed_figure` as SVG; the same figures give the same text."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": OURS}):
        speed_figure(machine, groups).savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def results_in(svg: str) -> list[str]:
    """The title, headings and figures in the text of `speed_svg`."""
    texts = re.findall(r'<g id="result">.*?<text[^>]*>(.*?)</text>', svg, re.DOTALL)
    return [html.unescape(text) for text in texts]
