"""A pytest plugin that executes compiled kernels without a GPU: `pytest -p tests.compiled.plugin -m …`.

It opens a session of ttsem in each pytest process. Triton's front end compiles every launch for the
architecture in `FUSED_GPT_ARCH` (default 90: sm_90), and ttsem executes the IR on CPU tensors that say that
they are on a GPU. A launch that accesses memory outside its tensors, that races with another program, or that
has an undefined result fails its test. `torch.empty` returns NaN.

Tests marked `gpu` run with the shipped tiles. Tests marked `kernels` run with the interpreter's small tiles,
because they need several tiles and programs at small shapes. Tests marked `driver` cannot run: there is none.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import Any

import pytest
import torch
from ttsem import harness, mlir, sanitize

ARCHITECTURE = int(os.environ.get("FUSED_GPT_ARCH", "90"))
CHILD = [sys.executable, "-c", "from tests.compiled.plugin import serve; serve()"]


class Generator(torch.Generator):
    """A CPU generator that says that it is on the device that was asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator = super().__new__(cls, device="cpu")
        generator.requested = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:
        return self.requested


class Autocast(torch.autocast):
    """Autocast for the CPU, where the tensors are, whatever device type was asked for."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


class FrontEnd:
    """`harness.ir_for_launch` without what follows in the compiler, and with each module compiled once.

    The session executes the module that the front end produces. By default it compiles the launch down to
    machine code first, which takes most of a test's time.
    """

    def __init__(self) -> None:
        mlir.enable_generic_printing()
        self.modules: dict[Any, str] = {}

    def __call__(self, record: harness.LaunchRecord, stage: str, target: Any) -> str:
        key = record.fn, repr(harness._specialize(record.fn, record.args, record.kwargs, target))
        if key not in self.modules:
            self.modules[key] = mlir.to_generic(harness._stage_text(record, stage, target))
        return self.modules[key]


class Execution:
    """The open session of one process, and what it counts."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.faults: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()
        self.session = sanitize.session(ARCHITECTURE, "<pytest>", on_stop=self.stopped)

    def open(self) -> None:
        self.state = self.session.__enter__()
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        self.patch.setattr(harness, "ir_for_launch", FrontEnd())
        self.patch.setattr(torch, "Generator", Generator)
        self.patch.setattr(torch, "autocast", Autocast)
        self.patch.setattr(torch.amp, "autocast", Autocast)
        self.patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu"))
        self.patch.setattr(torch, "get_autocast_dtype", lambda kind="cpu": dtype("cpu"))

    def close(self) -> None:
        self.patch.undo()
        self.session.__exit__(None, None, None)

    def stopped(self, error: Exception) -> None:
        self.faults[error.fault.kind if isinstance(error, sanitize.KernelFault) else error.verdict] += 1

    def counts(self) -> Counter[str]:
        return Counter(launches=self.state.launches, unchecked=self.state.races_unchecked) + self.faults


def serve() -> None:
    """The child process of preflight, whose kernels run in a session too."""
    from kernels.preflight import serve as serve_cases

    execution = Execution()
    execution.open()
    serve_cases()


EXECUTION: pytest.StashKey[Execution] = pytest.StashKey()
LEFT: pytest.StashKey[dict[str, str]] = pytest.StashKey()
TOTAL: pytest.StashKey[Counter[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    import kernels.preflight  # noqa: F401

    config.stash[TOTAL], config.stash[LEFT] = Counter(), {}
    config.stash[EXECUTION] = Execution()
    config.stash[EXECUTION].open()
    sys.modules["kernels.preflight"].CHILD = CHILD


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("driver"):
            config.stash[LEFT][item.nodeid.partition("[")[0]] = mark.args[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[EXECUTION].close()


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles and program counts of the interpreter, in tests that are about logic."""
    if request.node.get_closest_marker("kernels"):
        for family in ("attention", "ffn"):
            monkeypatch.setattr(f"kernels.{family}.torch_op.architecture", lambda device: 0)
        monkeypatch.setattr("kernels.tuning._multiprocessors", lambda device: 2)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["counts"] = dict(config.stash[EXECUTION].counts())
    else:
        config.stash[TOTAL].update(config.stash[EXECUTION].counts())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    node.config.stash[TOTAL].update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for test, reason in sorted(config.stash[LEFT].items()):
        terminalreporter.write_line(f"left to a GPU: {test} ({reason})")

    counts = config.stash[TOTAL]
    faults = {
        "out of bounds": counts.pop("oob_read", 0) + counts.pop("oob_write", 0),
        "races": counts.pop("race", 0),
    }
    launches, unchecked = counts.pop("launches", 0), counts.pop("unchecked", 0)
    faults["other faults"] = counts.total()
    minutes = (time.monotonic() - config.stash[EXECUTION].start) / 60
    terminalreporter.write_line(
        f"compiled for sm_{ARCHITECTURE} and executed in {minutes:.1f} minutes: {launches:,} launches; "
        f"{', '.join(f'{count} {kind}' for kind, count in faults.items())}; "
        f"{unchecked} launches were too large to be checked for races"
    )
