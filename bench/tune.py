"""`python -m bench.tune`: searches tiles for the installed GPU, and reports where the reference is faster.

Every function of kernels/tuning.py that returns tiles is a knob. For each bench case that calls it, the
search starts at its present tile. It compares the forms that bench/candidates.py lists, one kernel after the
other. Then it changes one block size, warp count or stage count at a time, as long as that makes the op
faster. Every candidate is checked by `kernels.tolerance` first; one that does not compile, does not fit or is
wrong is rejected. The results are rows of text to copy into kernels/tuning.py.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import candidates, targets
from bench.aot import HEADER, line
from bench.cases import Race, plan
from bench.command import check_names, parse_budget, start_report
from bench.compiling import architecture_of
from bench.contestants import OURS, REFERENCE, Contestant, shared
from bench.engine import Inputs, Runner, find_bench, lane
from bench.machine import bench_device
from bench.measure import Ceilings, Clock, interleave, release
from bench.record import write_json
from bench.table import duration
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError
from kernels import tuning
from kernels.registry import SPECS
from kernels.spec import SHORT_DTYPE
from kernels.tuning import Tile
from kernels.verify import Oracle

GAIN = 0.02  # a candidate must be faster by this share
STARTS = (Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 2))  # for a knob without a tile
LIMITS = Tile(256, 4096, 16, 5)
SMALLEST = Tile(1, 16, 1, 1)


class Query(NamedTuple):
    """One call of a knob: a function of kernels/tuning.py and its arguments."""

    function: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        keywords = (f"{name}={value!r}" for name, value in self.keywords)
        return f"{self.function}({', '.join([*map(repr, self.arguments), *keywords])})"


@dataclass(frozen=True)
class Finding:
    """The result of the search for one knob at one case."""

    op: str
    case: str
    dtype: str
    query: str
    before: str
    after: str
    seconds_before: float
    seconds_after: float
    seconds_reference: float
    tried: int
    rejected: int
    slower: str  # the row of `tuning.SLOWER` that selects the reference here

    def __str__(self) -> str:
        gain = self.seconds_before / self.seconds_after
        text = (
            f"{self.query} -> {self.after}  # {self.op} "
            f"{self.case} {self.dtype}: {duration(self.seconds_after)}, "
        )
        text += f"{gain:.2f}x of {self.before} ({self.tried} tried, {self.rejected} rejected)"
        if self.seconds_reference < self.seconds_after:
            text += f"; the REFERENCE is faster, {duration(self.seconds_reference)}: {self.slower}"
        return text


@dataclass(frozen=True)
class Options:
    """Flags."""

    op: tuple[str, ...] = option(tuple(SPECS), "ops")
    budget: str = option("10m", "time for the whole search; the least important cases beyond it are left out")
    quick: bool = option(False, "the most important case of each op")
    device: str | None = option(None, "cuda (default: a GPU if there is one)")
    out: str = option("out/tune", "the folder that gets rows.txt and rows.json")
    compile_only: tuple[str, ...] = option((), "only compile the listed forms, for 80, 86 or 90")


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.tune", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    check_names("--op", options.op, SPECS)
    if options.compile_only:
        return _compile([architecture_of(text, tuple(candidates.FORMS)) for text in options.compile_only])
    deadline = time.monotonic() + (parse_budget(options.budget) or 0.0)
    clock = Clock(bench_device(options.device))
    if not clock.on_gpu:
        print("no GPU was found: there is nothing to tune, because a CPU runs the references")
        return 0

    start_report("bench.tune", argv, clock)
    findings: list[Finding] = []
    races = plan([SPECS[name] for name in options.op], targets.load(), on_gpu=True, quick=options.quick)
    for number, race in enumerate(races):
        if time.monotonic() > deadline:
            print(
                "left out for the budget: " + ", ".join(f"{r.spec.name} {r.case.id}" for r in races[number:])
            )
            break

        share = (deadline - time.monotonic()) / (len(races) - number)
        runner = Runner(
            bench=find_bench(race.spec.family),
            clock=clock,
            ceilings=Ceilings(clock),
            dtype=torch.bfloat16,
            seconds=0.1,
            compiled=False,
        )
        for finding in search(runner, race, time.monotonic() + share):
            findings.append(finding)
            print(finding, flush=True)
            _write(Path(options.out), findings)
    return 0


def _compile(architectures: Sequence[int]) -> int:
    """Prints the ahead-of-time report of the listed forms."""
    print(HEADER)
    rows = [row for architecture in architectures for row in candidates.compiled(architecture)]
    print("\n".join(map(line, rows)))
    return 1 if any(row.problem for row in rows) else 0


def search(runner: Runner, race: Race, deadline: float) -> Iterator[Finding]:
    """Optimises every knob that the op uses at this case, one after the other."""
    contestants = {c.name: c for c in shared(race.spec, compiled=False)}
    sets = runner.input_sets(race.spec, race.case)
    oracle = runner.oracle(race.spec, sets[0])
    admitted = runner.admit(race.spec, contestants[OURS], sets[0], oracle)
    if admitted.status != "measured":
        print(f"{race.spec.name} {race.case.id}: {admitted.reason}")
        return

    for query, start in queries(runner, race, contestants[OURS], sets[0], oracle).items():
        yield _climb(
            runner=runner,
            race=race,
            contestants=contestants,
            sets=sets,
            oracle=oracle,
            query=query,
            start=start,
            deadline=deadline,
        )
        release(runner.clock)


def _climb(
    runner: Runner,
    race: Race,
    contestants: dict[str, Contestant],
    sets: list[Inputs],
    oracle: Oracle,
    query: Query,
    start: Any,
    deadline: float,
) -> Finding:
    """Compares the listed forms, then moves to the fastest neighbour until none is faster by GAIN.

    It ends early when the time is up.
    """
    spec, direction = race.spec, "both" if race.spec.gradients else "forward"
    tried = {start: with_answer(contestants[OURS], query, start)}
    best, rejected, seconds_before = start, 0, math.inf
    forms = candidates.forms(query.function, query.arguments, dict(query.keywords))
    while True:
        correct = {best: tried[best]}
        moves = [best._replace(**change) for change in forms.pop(0)] if forms else neighbours(best)
        for candidate in [answer for answer in moves if answer not in tried]:
            tried[candidate] = with_answer(contestants[OURS], query, candidate)
            if time.monotonic() > deadline:
                continue
            if runner.admit(spec, tried[candidate], sets[0], oracle).status == "measured":
                correct[candidate] = tried[candidate]
            else:
                rejected += 1

        lanes = {repr(key): lane(spec, contestant, sets, direction) for key, contestant in correct.items()}
        lanes[REFERENCE] = lane(spec, contestants[REFERENCE], sets, direction)
        times = {
            name: timing.median for name, timing in interleave(lanes, runner.clock, runner.seconds).items()
        }

        here = times[repr(best)]
        if best == start:
            seconds_before = min(seconds_before, here)
        winner = min(correct, key=lambda key: times[repr(key)])
        faster = times[repr(winner)] <= here * (1 - GAIN)
        if (not faster and not forms) or time.monotonic() > deadline:
            after = winner if faster else best
            return Finding(
                op=spec.name,
                case=race.case.id,
                dtype=SHORT_DTYPE[runner.dtype],
                query=str(query),
                before=_show(start),
                after=_show(after),
                seconds_before=seconds_before,
                seconds_after=times[repr(after)],
                seconds_reference=times[REFERENCE],
                tried=len(tried),
                rejected=rejected,
                slower=_slower(race, runner),
            )
        best = winner if faster else best


def queries(runner: Runner, race: Race, ours: Contestant, inputs: Inputs, oracle: Oracle) -> dict[Query, Any]:
    """The calls that the op makes to kernels/tuning.py at this case, and their results."""
    asked: dict[Query, Any] = {}

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **keywords: Any) -> Any:
            answer = function(*arguments, **keywords)
            asked.setdefault(Query(name, arguments, tuple(sorted(keywords.items()))), answer)
            return answer

        return record

    with ExitStack() as stack:
        for name, function in knobs().items():
            stack.enter_context(substituted(name, recording(name, function)))
        runner.admit(race.spec, ours, inputs, oracle)
    return asked


def knobs() -> dict[str, Callable[..., Any]]:
    """The functions of kernels/tuning.py that return tiles."""
    return {
        name: function
        for name, function in vars(tuning).items()
        if not name.startswith("_")
        and callable(function)
        and not inspect.isclass(function)
        and "Tile" in str(inspect.signature(function).return_annotation)
    }


def with_answer(contestant: Contestant, query: Query, answer: Any) -> Contestant:
    """The contestant with kernels/tuning.py changed so that `query` returns `answer`."""
    original: Callable[..., Any] = getattr(tuning, query.function)

    @functools.wraps(original)
    def answered(*arguments: Any, **keywords: Any) -> Any:
        asked = Query(query.function, arguments, tuple(sorted(keywords.items())))
        return answer if asked == query else original(*arguments, **keywords)

    @contextmanager
    def context() -> Iterator[None]:
        with contestant.context(), substituted(query.function, answered):
            yield

    return Contestant(contestant.name, contestant.function, context, peer=contestant.peer)


@contextmanager
def substituted(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces the tuning function `name` by `function` in every module of kernels that imported it."""
    original = getattr(tuning, name)
    users = [
        m
        for key, m in list(sys.modules.items())
        if key.split(".")[0] == "kernels" and vars(m).get(name) is original
    ]
    for module in users:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module in users:
            setattr(module, name, original)


def neighbours(answer: Any) -> list[Any]:
    """Answers that differ from `answer` in one value of one tile; None is replaced by each of STARTS."""
    if answer is None:
        return list(STARTS)
    if not isinstance(answer, Tile):
        return [
            answer._replace(**{name: other})
            for name in answer._fields
            if isinstance(getattr(answer, name), Tile | None)
            for other in neighbours(getattr(answer, name))
        ]
    moves = [
        Tile(**answer._asdict() | {name: f(getattr(answer, name))})
        for name in answer._fields[:3]
        for f in (_halve, _double)
    ]
    moves += [answer._replace(num_stages=answer.num_stages + step) for step in (-1, 1)]
    return [tile for tile in moves if _allowed(tile)]


def _allowed(tile: Tile) -> bool:
    sizes = zip(SMALLEST[:4], tile[:4], LIMITS[:4], strict=True)
    return all(smallest <= size <= limit for smallest, size, limit in sizes)


def _halve(size: int) -> int:
    return size // 2


def _double(size: int) -> int:
    return size * 2


def _show(answer: Any) -> str:
    """An answer as Python source for kernels/tuning.py."""
    if isinstance(answer, Tile):
        chosen = [(n, v) for n, v in answer._asdict().items() if v != Tile._field_defaults.get(n)]
        sizes = [str(value) for value in answer[:4]]
        return f"Tile({', '.join(sizes + [f'{n}={v}' for n, v in chosen if n not in answer._fields[:4]])})"
    if answer is None:
        return "None"
    return f"{type(answer).__name__}({', '.join(f'{n}={_show(v)}' for n, v in answer._asdict().items())})"


def _slower(race: Race, runner: Runner) -> str:
    """A row of `tuning.SLOWER` for exactly this case, as Python source; its sizes can be widened manually."""
    sizes = {name: (size, size) for name, size in race.case.sizes.items()}
    return f"Slower({tuning.architecture(runner.clock.device)}, {race.spec.name!r}, {runner.dtype}, {sizes})"


def _write(folder: Path, findings: Sequence[Finding]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.txt").write_text("".join(f"{finding}\n" for finding in findings), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: cannot write to {folder}: {error.strerror}") from error
    write_json(folder / "rows.json", [asdict(finding) for finding in findings])


if __name__ == "__main__":
    sys.exit(run_command("bench.tune", main))
