"""A pytest plugin that executes compiled kernels without a GPU: `pytest -p tests.compiled.plugin -m …`.

It keeps a session of ttsem (session.py) open in each pytest process, for the architecture in `FUSED_GPT_ARCH`
(default 90: sm_90), and counts launches and faults.

Tests marked `gpu` run with the shipped tiles. Tests marked `kernels` run with the interpreter's small tiles,
because they need several tiles and programs at small shapes. Tests marked `driver` cannot run.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from ttsem import sanitize

from tests.compiled.outcomes import take_small_tiles
from tests.compiled.session import ARCHITECTURE, session


class Execution:
    """The open session of this process, what it counts, and the tests that are left to a GPU."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.stack = ExitStack()
        self.state = self.stack.enter_context(session(on_stop=self.stopped))
        self.faults: Counter[str] = Counter()
        self.of_workers: Counter[str] = Counter()
        self.left: dict[str, str] = {}  # test -> reason

    def stopped(self, error: Exception) -> None:
        self.faults[error.fault.kind if isinstance(error, sanitize.KernelFault) else "other"] += 1

    def counts(self) -> Counter[str]:
        own = Counter(launches=self.state.launches, unchecked=self.state.races_unchecked)
        return own + self.faults + self.of_workers


EXECUTION: pytest.StashKey[Execution] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EXECUTION] = Execution()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("driver"):
            config.stash[EXECUTION].left[item.nodeid.partition("[")[0]] = mark.args[0]


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles and program counts of the interpreter, in tests that are about logic."""
    if request.node.get_closest_marker("kernels"):
        take_small_tiles(monkeypatch)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        execution = session.config.stash[EXECUTION]
        session.config.workeroutput["execution"] = dict(execution.counts()), execution.left


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    counts, left = getattr(node, "workeroutput", {}).get("execution", ({}, {}))
    execution = node.config.stash[EXECUTION]
    execution.of_workers.update(counts)
    execution.left.update(left)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    execution = config.stash[EXECUTION]
    for test, reason in sorted(execution.left.items()):
        terminalreporter.write_line(f"left to a GPU: {test} ({reason})")

    counts, minutes = execution.counts(), (time.monotonic() - execution.start) / 60
    terminalreporter.write_line(
        f"{counts['launches']:,} launches for sm_{ARCHITECTURE} were executed in {minutes:.1f} minutes: "
        f"{counts['oob_read'] + counts['oob_write']} out of bounds, {counts['race']} races, "
        f"{counts['poison'] + counts['other']} other faults; "
        f"{counts['unchecked']} launches were too large to be checked for races"
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[EXECUTION].stack.close()
