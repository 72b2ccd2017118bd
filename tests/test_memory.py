"""The test helpers for memory: guard pages and sparse tensors."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from tests.memory import guard_allocations, guarded, in_a_fork, sparse

SEGFAULT = "killed by signal 11"


def test_a_guard_page_kills_a_process_that_touches_it() -> None:
    """A guard page that can be read, so that no test detects an out-of-bounds load."""
    tensor = guarded(torch.arange(7, dtype=torch.float32))
    assert tensor.tolist() == list(range(7))
    end = tensor.data_ptr() + 7 * 4
    assert in_a_fork(lambda: ctypes.string_at(end - 1, 1)) == ""
    assert in_a_fork(lambda: ctypes.string_at(end, 1)) == SEGFAULT


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
        assert in_a_fork(lambda end=end: ctypes.string_at(end, 1)) == SEGFAULT


def test_a_child_process_reports_how_it_ended() -> None:
    """A failure in a child process that the parent takes for success."""
    assert in_a_fork(lambda: None) == ""
    assert in_a_fork(lambda: [][0]).endswith("IndexError: list index out of range\n")


def test_untouched_pages_take_no_memory() -> None:
    """Sparse tensors that need as much memory as their size."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = sparse(2**33, torch.bfloat16)
    tensor[2**33 - 1] = 3
    assert tensor[2**33 - 1] == 3
    assert tensor[2**32] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
