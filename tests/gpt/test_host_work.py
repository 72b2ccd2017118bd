"""The host work of a training step: kernel launches and dispatched operations per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import GPT

VIEWS = (
    "view",
    "transpose",
    "t.default",
    "unbind",
    "alias",
    "detach",
    "expand",
    "slice",
    "select",
    "empty",
    "unsqueeze",
    "_unsafe_view",
)


class Dispatches(TorchDispatchMode):
    """Counts the operations that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.").removeprefix("fused_gpt.")
        if not name.startswith(VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def step(n_layer: int, *, use_triton: bool) -> Dispatches:
    """Records one forward and backward pass, with gradients that are already allocated."""
    model = GPT(vocab_size=64, block_size=16, n_layer=n_layer, n_head=2, n_embd=32, use_triton=use_triton)
    idx = torch.randint(64, (2, 16))
    model(idx, idx).backward()
    with Dispatches() as dispatches:
        model(idx, idx).backward()
    return dispatches


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from kernels.launch import Launch

    names: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda self: names.append(self.kernel.__name__))
    return names


@pytest.mark.interpreter
def test_launches_of_a_layer(launches: list[str]) -> None:
    """Two kernels for a pass that took one; launches bound the time of a GPT-2 step."""
    step(2, use_triton=True)
    shallow = len(launches)
    launches.clear()
    step(3, use_triton=True)
    deep = len(launches)
    # Two identical steps each. Forward: attention, two norms, GELU. Backward: dQ, dK with dV, two norms and
    # their sums, GELU.
    assert (deep - shallow) // 2 == 4 + 7


@pytest.mark.interpreter
def test_operations_of_a_layer(launches: list[str]) -> None:
    """An extra copy, cast or fill between kernels, such as zeros for an unused gradient."""
    operations = {}
    for use_triton in (True, False):
        deep, shallow = step(3, use_triton=use_triton).names, step(2, use_triton=use_triton).names
        operations[use_triton] = len(deep) - len(shallow)
        assert "zeros.default" not in deep or not use_triton
    # 7 fused ops, 6 matmuls, 2 sums for biases, 1 stack of the projection's three parts, 12 additions to
    # gradients.
    assert operations[True] <= 29
    assert operations[True] < operations[False]
