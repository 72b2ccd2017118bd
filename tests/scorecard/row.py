"""A row of the scorecard: a kind of attack, how often it is tried, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HANG = 5.0  # seconds after which a trial counts as a hang


@dataclass
class Outcome:
    """What the trials of a row showed.

    Attributes:
        trials: How many attacks were made.
        failures: One line for each attack that broke a promise; it says how to repeat that one.
        slowest: Seconds of the longest trial.
        worst: The worst case in words, where the longest trial does not say it: "1.4 x file + 120 MB".
        note: What was not tried, and why: "no C compiler".
    """

    trials: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    worst: str = ""
    note: str = ""

    @contextmanager
    def trial(self, name: str, limit: float = HANG) -> Iterator[None]:
        """Counts one attack; an AssertionError, or more than `limit` seconds, is a failure."""
        self.trials += 1
        started = time.perf_counter()
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{name}: {' '.join(str(error).split())}")
        seconds = time.perf_counter() - started
        self.slowest = max(self.slowest, seconds)
        if seconds > limit:
            self.failures.append(f"{name}: {seconds:.1f} s, expected at most {limit:g} s")


@dataclass(frozen=True)
class Row:
    """One kind of attack.

    Attributes:
        name: As --only takes it: lower-case words with hyphens.
        promise: What must hold in each trial, in one clause.
        run: Makes `trials` attacks with this seed, in an empty folder. Equal arguments make equal attacks.
        trials: How many, by default; all rows together take at most ten minutes on two cores.
        small: How many in the tests, where all rows together take about a minute.
        long: How many with --long.
    """

    name: str
    promise: str
    run: Callable[[int, int, Path], Outcome]
    trials: int
    small: int
    long: int
