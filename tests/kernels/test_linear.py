"""`kernels.linear` against `torch.nn.functional.linear`."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.linear import FEW, SMALL


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 48), (2, 1, 48), (48,), (3, 2, 48), (FEW, 48), (FEW + 1, 48), (0, 48), (2, 0)]
)
def test_linear_agrees_with_torch(shape: tuple[int, ...], bias: bool) -> None:
    """Rows swapped or doubled, a lost bias, or a shape or layout that the next op refuses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(33, shape[-1], generator=generator)
    b = torch.randn(33, generator=generator) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.no_grad():
        for rows in (
            x,
            x.expand(2, *shape)[1],
            torch.stack([x, x], -1)[..., 0],
        ):  # contiguous, expanded, strided
            y = kernels.linear(rows, weight, b)
            assert y.is_contiguous()
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_only_few_float32_rows_leave_torchs_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step that reads its weights on one core, or another call that does not use F.linear."""
    calls: list[tuple[torch.Tensor | None, ...]] = []

    def recorded(*arguments: torch.Tensor | None) -> torch.Tensor:
        calls.append(arguments)
        return torch.empty(0)

    monkeypatch.setattr(F, "linear", recorded)
    x, weight = torch.randn(1, 8), torch.randn(SMALL // 8, 8)
    with torch.no_grad():
        kernels.linear(x, weight)
        assert not calls
        kernels.linear(x.bfloat16(), weight.bfloat16())
        kernels.linear(x.expand(FEW + 1, -1), weight)
        kernels.linear(x, weight[1:])
        with torch.autocast("cpu", torch.bfloat16):
            kernels.linear(x, weight)
    kernels.linear(x, weight)
    assert len(calls) == 5


@pytest.mark.parametrize("outputs", [64, 72, 65, 61])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_of_a_large_weight(outputs: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are swapped, or that leave outputs out, where the outputs have no suitable divisor too."""
    monkeypatch.setattr(sys.modules["kernels.linear"], "SMALL", 0)  # kernels.linear is the function
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    weight, b = (torch.randn(shape, generator=generator) for shape in ((outputs, 48), (outputs,)))
    for rows in (1, 3, FEW):
        x = torch.randn(rows, 48, generator=generator)
        for bias in (b, None):
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            for w in (weight, weight.T.contiguous().T):
                with torch.no_grad():
                    y = kernels.linear(x, w, bias)
                torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
