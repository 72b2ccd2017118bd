"""Triton's interpreter, except for `-m gpu` and .ci/compiled; one seed and thread policy for all tests."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Iterator

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
EXECUTION = "tests.compiled.plugin"  # executes compiled kernels without a GPU


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads the variable when it is first imported, and torch may import it, for example when an
    # optimizer is constructed. Interpreted and compiled kernels cannot share a process.
    on_a_gpu = "gpu" in config.option.markexpr.replace("not gpu", "")
    if not on_a_gpu and not config.pluginmanager.hasplugin(EXECUTION):
        os.environ["TRITON_INTERPRET"] = "1"
    import hypothesis
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed run still reports its failures
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("repeatable")
    if HAS_TRITON and interpreting():
        from tests.interpreter import patch_interpreter

        patch_interpreter()


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Slow tests run last: time on a GPU is limited.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    executing = config.pluginmanager.hasplugin(EXECUTION)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        reason = obstacle(marks, executing)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def obstacle(marks: set[str], executing: bool) -> str | None:
    """The reason why a test with these markers cannot run in this process; None if it can.

    executing: compiled kernels are executed without a GPU.
    """
    import torch

    if "compiled" in marks and not executing:
        return "needs ttsem: run .ci/compiled"
    if "gpu" in marks:
        if not torch.cuda.is_available():
            return "no CUDA GPU"
        if interpreting():
            return "kernels are interpreted in this run: use -m gpu"
        if "driver" in marks and executing:
            return "no real GPU"
    elif marks & {"interpreter", "kernels"}:  # a module's mark does not keep its GPU tests off the GPU
        if not HAS_TRITON:
            return "triton is not installed"
        if not interpreting() and ("interpreter" in marks or not executing):
            return "kernels are compiled in this run, and CPU tensors need the interpreter"
    return None


@pytest.fixture(autouse=True)
def seeded() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shared_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees a test's GPU memory, because the workers share one GPU."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()
