"""Performance targets (targets.toml), and whether a report met them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.contestants import OURS
from bench.record import Report, Row, parse

PATH = Path(__file__).parent / "targets.toml"


@dataclass(frozen=True)
class Target:
    """One target; targets.toml explains the fields."""

    name: str
    op: str
    direction: str
    metric: str
    sizes: dict[str, int] = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    at_least: float | None = None
    at_most: float | None = None
    kind: str = "cuda"
    contestant: str = OURS

    def names(self, op: str, case: str) -> bool:
        """Whether the target covers this op at this case."""
        parts = case.split("-")
        return op == self.op and all(f"{dim}{size}" in parts for dim, size in self.sizes.items())


@dataclass(frozen=True)
class Outcome:
    """The verdict on a target; `value` is the worst over its cases, measured at `case`.

    `alone` is the worst value of the GPU alone, without the host's time, where CUDA graphs were timed.
    """

    target: Target
    status: str  # "met" | "missed" | "not measured"
    value: float | None = None
    case: str = ""
    alone: float | None = None


def load(path: Path = PATH) -> list[Target]:
    """Reads the targets in a file.

    Raises:
        InputError: An unknown field, or a value of the wrong type.
    """
    content = tomllib.loads(path.read_text("utf-8"))
    targets: list[Target] = [parse(Target, entry, path.name) for entry in content["target"]]
    return targets


def judge(target: Target, report: Report) -> Outcome:
    """Judges a report by a target; a report from another kind of machine counts as "not measured"."""
    outcome = _judge(target, report)
    if target.metric == "memory":
        return outcome
    replays = replace(report, rows=[row.alone for row in report.rows if row.graph_seconds is not None])
    return replace(outcome, alone=_judge(target, replays).value)


def _judge(target: Target, report: Report) -> Outcome:
    values = {}
    if report.machine.kind == target.kind:
        for row in report.find(
            op=target.op, direction=target.direction, contestant=target.contestant, status="measured"
        ):
            value = _METRICS[target.metric](target, row, report) if target.names(row.op, row.case) else None
            if value is not None:
                values[row.case] = value
    if not values:
        return Outcome(target, "not measured")
    if target.at_most is not None:
        case = max(values, key=values.__getitem__)
        met = values[case] <= target.at_most
    else:
        case = min(values, key=values.__getitem__)
        met = target.at_least is not None and values[case] >= target.at_least
    return Outcome(target, "met" if met else "missed", values[case], case)


def _baselines(target: Target, row: Row, report: Report) -> list[Row]:
    rows = report.find(op=row.op, case=row.case, direction=row.direction, status="measured")
    return [other for other in rows if other.contestant in target.against]


def _speedup(target: Target, row: Row, report: Report) -> float | None:
    times = [other.seconds for other in _baselines(target, row, report) if other.seconds is not None]
    return min(times) / row.seconds if times and row.seconds else None


def _memory(target: Target, row: Row, report: Report) -> float | None:
    sizes = [other.memory for other in _baselines(target, row, report) if other.memory]
    return row.memory / min(sizes) if sizes and row.memory is not None else None


_METRICS: dict[str, Callable[[Target, Row, Report], float | None]] = {
    "speedup": _speedup,
    "memory": _memory,
    "share": lambda target, row, report: row.share,
    "tokens_per_second": lambda target, row, report: row.tokens_per_second,
}
