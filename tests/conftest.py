"""Triton's interpreter for every test except `-m gpu`; one seed and one thread policy for all tests."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Iterator

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads the variable when it is first imported, and torch may import it, for example when an
    # optimizer is constructed. Interpreted and compiled kernels cannot share a process.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # Slow tests run last: time on a GPU is limited.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
            elif interpreting():
                item.add_marker(pytest.mark.skip(reason="kernels are interpreted in this run: use -m gpu"))
        elif item.get_closest_marker("interpreter"):
            if not HAS_TRITON:
                item.add_marker(pytest.mark.skip(reason="triton is not installed"))
            elif not interpreting():
                item.add_marker(
                    pytest.mark.skip(
                        reason="kernels are compiled in this run, and CPU tensors need the interpreter"
                    )
                )


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
