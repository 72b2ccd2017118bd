"""What `bench.validate` reports of a launch: the verdict over its stages, a row of the table, JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bench.validate.record import Recorded

# The largest difference from the interpreter, over the largest magnitude in the tensor. One unit in the last
# place of float16 is 2^-10 of the value; sums of float32 in another order differ by a few units of 2^-23.
TOLERANCES = {"float16": 2**-10, "float32": 2**-16}


class Stage(NamedTuple):
    """The module that a pass receives, executed."""

    receiver: str  # the pass
    n_diff: int = 0  # elements whose bits differ from the interpreter's
    error: float = 0.0  # the largest difference over the tolerance
    unsupported: str = ""  # the operation that ttsem does not execute
    problem: str = ""  # why the module did not run to its end
    same_as: int | None = None  # the earlier stage with the same text, which was executed instead

    @property
    def differs(self) -> bool:
        return bool(self.problem) or not self.error <= 1


@dataclass(frozen=True)
class Result:
    """The verdict on one launch."""

    op: str
    kernel: str
    label: str
    architecture: int
    tile: tuple[int, ...]  # rows, columns, warps, pipeline stages; registers, where they are limited
    programs: int
    reference: float  # the interpreter's largest error against plain PyTorch, over the package's bound
    passes: int = 0  # modules that passes receive
    executed: int = 0  # distinct ones that ran to their end
    unsupported: tuple[str, ...] = ()  # "pass: operation"
    first: str = ""  # the pass whose output differs first
    n_diff: int = 0  # the largest of the stages
    error: float = 0.0  # the largest of the stages
    problem: str = ""
    seconds: float = 0.0  # of CPU time

    @property
    def wrong(self) -> bool:
        return bool(self.first or self.problem) or not self.reference <= 1


def unexamined(recorded: Recorded, architecture: int) -> Result:
    """The result of a launch before any stage has run."""
    return Result(
        op=recorded.op,
        kernel=recorded.kernel,
        label=recorded.label,
        architecture=architecture,
        tile=tuple(value for value in recorded.tile if value is not None),
        programs=math.prod(recorded.grid),
        reference=recorded.reference,
    )


def verdict(stages: Sequence[Stage]) -> dict[str, Any]:
    """The fields of a Result that follow from its stages."""
    distinct = [stage for stage in stages if stage.same_as is None]
    decided = [stage for stage in distinct if not stage.unsupported]
    wrong = next((place for place, stage in enumerate(stages) if stage.differs), None)
    return {
        "passes": len(stages),
        "executed": sum(not stage.problem for stage in decided),
        "unsupported": tuple(
            f"{stage.receiver}: {stage.unsupported}" for stage in distinct if stage.unsupported
        ),
        "first": "" if wrong is None else producer(stages, wrong),
        "n_diff": max((stage.n_diff for stage in decided), default=0),
        "error": max((stage.error for stage in decided), default=0.0),
        "problem": "" if wrong is None else stages[wrong].problem or _size(stages[wrong]),
    }


def producer(stages: Sequence[Stage], place: int) -> str:
    """The pass that made the module of a stage: the one that received the module before it."""
    return "the front end" if place == 0 else stages[place - 1].receiver


def _size(stage: Stage) -> str:
    return f"{stage.n_diff} elements differ, by up to {stage.error:.3g} times the tolerance"


HEADER = (
    f"{'op':<20} {'kernel':<29} {'case':<15} {'arch':>5} {'tile':>13} {'stages':>7} {'n_diff':>7} "
    f"{'error':>8} {'torch':>6} {'s':>4}  first stage that differs"
)


def line(result: Result) -> str:
    """A row of the table; "26/59" is distinct modules executed and passes of the compilation."""
    stages = f"{result.executed}/{result.passes}"
    notes = [result.first and f"{result.first}: {result.problem}", "" if result.first else result.problem]
    notes += [f"unsupported {text}" for text in result.unsupported]
    if not result.reference <= 1:
        notes.append("the interpreter differs from PyTorch")
    return (
        f"{result.op:<20} {result.kernel:<29} {result.label:<15} {'sm_' + str(result.architecture):>5} "
        f"{'×'.join(map(str, result.tile)):>13} {stages:>7} {result.n_diff:>7} {result.error:>8.2g} "
        f"{result.reference:>6.2f} {result.seconds:>4.0f}  {'; '.join(filter(None, notes)) or 'none'}"
    )


def total(results: Sequence[Result], seconds: float) -> str:
    """The last line of the report."""
    passes, executed = (sum(getattr(result, name) for result in results) for name in ("passes", "executed"))
    unsupported = sum(len(result.unsupported) for result in results)
    wrong = sum(result.wrong for result in results)
    cpu = sum(result.seconds for result in results)
    return (
        f"{len(results)} launches, {passes} stages, of which {executed} distinct ones executed, "
        f"{unsupported} unsupported; {wrong} launches with a stage that differs; "
        f"{cpu / 60:.1f} minutes of CPU time, {seconds / 60:.1f} minutes in all"
    )


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """What saved reports say, as a sentence and a table with a row for each kernel and architecture."""
    if not documents:
        return "Not run: `python -m bench.validate --json FILE` runs it."
    rows: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for document in documents:
        for launch in document["launches"]:
            rows.setdefault((launch["kernel"], launch["architecture"]), []).append(launch)
    launches = [launch for group in rows.values() for launch in group]
    passes, executed, seconds = (
        sum(launch[key] for launch in launches) for key in ("passes", "executed", "seconds")
    )
    last = documents[-1]
    machine = last["machine"]
    head = [
        f"{len(launches)} launches, {passes:,} stages, of which {executed:,} distinct ones were executed in "
        f"{seconds / 60:.1f} minutes of CPU time.",
        f"{machine['date'][:10]}, commit {machine['commit']}, torch {machine['torch']}, Triton "
        f"{machine['triton']}, ttsem {last['ttsem']}, Python {machine['python']}, {machine['device']}.",
        "",
        "| kernel | sm | cases | executed / stages | unsupported | n_diff | error | torch | differs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(_row(kernel, sm, group) for (kernel, sm), group in sorted(rows.items()))])


def _row(kernel: str, sm: int, launches: Sequence[Mapping[str, Any]]) -> str:
    executed, passes = (sum(launch[key] for launch in launches) for key in ("executed", "passes"))
    unsupported = sum(len(launch["unsupported"]) for launch in launches)
    n_diff, error, reference = (
        max(math.inf if launch[key] is None else launch[key] for launch in launches)
        for key in ("n_diff", "error", "reference")
    )
    wrong = dict.fromkeys(launch["first"] or launch["problem"] for launch in launches)
    cells = [
        f"`{kernel}`",
        str(sm),
        ", ".join(dict.fromkeys(launch["label"] for launch in launches)),
        f"{executed} / {passes}",
        str(unsupported or "none"),
        str(n_diff),
        f"{error:.2g}",
        f"{reference:.2f}",
        ", ".join(filter(None, wrong)) or "none",
    ]
    return f"| {' | '.join(cells)} |"


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as JSON; an error that is not finite is null."""
    rows = [asdict(result) for result in results]
    for row in rows:
        row |= {name: None for name in ("error", "reference") if not math.isfinite(row[name])}
    return rows
