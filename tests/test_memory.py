"""The tests' own memory: guard pages that bite, sparse memory that costs nothing."""

from __future__ import annotations

import ctypes
import resource
import signal

import pytest
import torch

from tests.memory import exit_status, guard_allocations, guarded, sparse


def test_a_guard_page_bites() -> None:
    """A guard that lets a read past the end go through, and so hides every out-of-bounds load."""
    tensor = guarded(torch.arange(7, dtype=torch.float32))
    assert tensor.tolist() == list(range(7))
    end = tensor.data_ptr() + 7 * 4
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: ctypes.string_at(end - 1, 1) and None) == 0
    assert exit_status(lambda: ctypes.string_at(end, 1) and None) == -signal.SIGSEGV


def test_strides_are_kept() -> None:
    """A guarded copy with other strides than the original tensor."""
    for tensor in (
        torch.randn(4, 6)[:, ::2],
        torch.randn(3, 1).expand(3, 5),
        torch.randn(2, 3).mT,
        torch.randn(0, 3),
    ):
        copy = guarded(tensor)
        assert copy.stride() == tensor.stride()
        assert torch.equal(copy, tensor)


def test_allocations_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a launcher allocates without a guard page."""
    guard_allocations(monkeypatch)
    x = torch.empty(5)
    for tensor in (
        x,
        x.new_empty(3, 3),
        torch.empty_like(x),
        x.new_zeros(2),
        torch.randn(3, 2).mT.contiguous(),
    ):
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        assert exit_status(lambda end=end: ctypes.string_at(end, 1) and None) == -signal.SIGSEGV


def test_sparse_memory_costs_nothing() -> None:
    """A test of far offsets that needs gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = sparse(2**33, torch.bfloat16)
    tensor[2**33 - 1] = 3
    assert tensor[2**33 - 1] == 3
    assert tensor[2**32] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
