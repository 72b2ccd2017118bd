"""Which cases are timed, and in what order: those that a target names come first; a CPU gets smaller ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import torch

from bench.targets import Target
from kernels.spec import Case, OpSpec

# The limit on a CPU for the operations of a case, and for twice its bytes, forward and backward together.
CPU_WORK = 10**9
DIRECTIONS = ("forward", "backward")


class Race(NamedTuple):
    """One op at one case."""

    spec: OpSpec
    case: Case


def plan(specs: Iterable[OpSpec], targets: Iterable[Target], *, on_gpu: bool, quick: bool) -> list[Race]:
    """The races by importance: first those that a target names. Each group alternates over the ops."""
    lists = []
    for spec in specs:
        cases = spec.tagged("bench")
        if not on_gpu:
            cases = tuple({cut.id: cut for cut in (fit(spec, case, CPU_WORK) for case in cases)}.values())
        lists.append([Race(spec, case) for case in (cases[:1] if quick else cases)])
    races = [race for group in zip_longest(*lists) for race in group if race is not None]
    named = list(targets)
    return sorted(
        races, key=lambda race: not any(target.names(race.spec.name, race.case.id) for target in named)
    )


def fit(spec: OpSpec, case: Case, limit: int) -> Case:
    """Halves the sizes of `case` until its operations, and twice its bytes, are at most `limit`.

    The first size is halved as far as needed, then the next. Sizes that share their first letter (Tq and Tk,
    H and Hkv) are halved together.
    """
    sizes = dict(case.sizes)

    def fits() -> bool:
        trial = replace(case, sizes=sizes)
        flops = sum(spec.flops(trial, direction) for direction in DIRECTIONS)
        return (
            max(flops, 2 * sum(spec.bytes(trial, torch.float32, direction) for direction in DIRECTIONS))
            <= limit
        )

    for name in case.sizes:
        while sizes[name] > 1 and not fits():
            sizes |= {other: max(1, size // 2) for other, size in sizes.items() if other[0] == name[0]}
    return replace(case, sizes=sizes)
