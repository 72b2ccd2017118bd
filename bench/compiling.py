"""What `bench.aot` and `bench.validate` share: their flags, and processes in which the compiler may crash."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from gpt.errors import InputError, unknown
from kernels.registry import SPECS

PROCESSES = 2
Item = TypeVar("Item")
Row = TypeVar("Row")


def architecture_of(text: str, known: Sequence[int]) -> int:
    """The architecture that a value of --arch names, as 80 or sm_80.

    Raises:
        InputError: It is not one of `known`.
    """
    digits = text.removeprefix("sm_")
    if not digits.isdecimal() or int(digits) not in known:
        raise InputError(f"--arch is {text!r}, expected among {', '.join(map(str, known))}")
    return int(digits)


def ops_of(names: Iterable[str]) -> list[str]:
    """The ops that the values of --op name: ops or families.

    Raises:
        InputError: An unknown name.
    """
    families = {spec.family for spec in SPECS.values()}
    for name in names:
        if name not in SPECS and name not in families:
            raise unknown("--op", name, [*SPECS, *families])
    return [op for op, spec in SPECS.items() if op in names or spec.family in names]


def in_processes(
    examine: Callable[[Item], Row], items: Sequence[Item], crashed: Callable[[Item], Row]
) -> Iterator[Row]:
    """``examine(item)`` for each item, in PROCESSES processes and in order; ``crashed(item)`` where one dies.

    A crash ends all the processes of a pool. The item whose result was due is examined again, alone; the
    others go on in a new pool.
    """
    rest = list(items)
    while rest:
        broken = False
        with workers(min(PROCESSES, len(rest))) as pool:
            for future in [pool.submit(examine, item) for item in rest]:
                try:
                    yield future.result()
                except BrokenProcessPool:
                    broken = True
                    break
                rest.pop(0)
        if broken:
            yield _alone(examine, rest.pop(0), crashed)


def _alone(examine: Callable[[Item], Row], item: Item, crashed: Callable[[Item], Row]) -> Row:
    try:
        with workers(1) as pool:
            return pool.submit(examine, item).result()
    except BrokenProcessPool:
        return crashed(item)


def workers(count: int) -> ProcessPoolExecutor:
    """A pool of processes that share nothing with this one."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
