"""The capture of a CUDA graph, simulated on a CPU."""

from __future__ import annotations

import gc

import pytest
import torch

from gpt.cuda_graph import captured
from tests.gpt.graphs import fake


@pytest.mark.parametrize("fails", [False, True])
def test_no_cycle_is_freed_during_a_capture(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection in which CUDA would refuse to free an old graph, or a collector that stays off."""
    fake(monkeypatch)
    freed: list[str] = []

    class Cycle:
        def __init__(self, name: str) -> None:
            self.name, self.itself = name, self

        def __del__(self) -> None:
            freed.append(self.name)

    def run() -> None:
        with captured(torch.cuda.CUDAGraph(), torch.cuda.Stream("cpu")):
            assert freed == ["old"]
            Cycle("new")
            assert len([[] for _ in range(100_000)]) == 100_000  # enough objects for a collection
            assert freed == ["old"]
            if fails:
                raise ZeroDivisionError

    Cycle("old")
    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert gc.isenabled()
    gc.collect()
    assert freed == ["old", "new"]
