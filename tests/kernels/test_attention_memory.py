"""Attention at the edges of memory: nothing past a tensor's end is touched, offsets beyond 2**31 are right, no order matters."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

import kernels
from kernels.philox import philox
from kernels.preflight import run_case
from tests.kernels.attention_suite import reaches_far_along, stays_inside
from tests.kernels.memory import guarded, in_a_fork, sparse

triton, tl, forward, kernel = (
    pytest.importorskip(name, reason="triton is not installed")
    for name in ("triton", "triton.language", "kernels.attention.forward", "kernels.attention.kernel")
)
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(sys.platform != "linux", reason="guard pages and sparse memory are made with Linux's mmap"),
]
keep_tile = forward.keep_tile


@triton.jit
def _keep_kernel(rows_ptr, out_ptr, Tk, QUADS: tl.constexpr):
    rows, offs = tl.load(rows_ptr + tl.arange(0, 16)), tl.arange(0, 16)
    keep = keep_tile(9, rows, 32, Tk, 2**31, QUADS, 16)
    tl.store(out_ptr + offs[:, None] * 16 + offs[None, :], keep.to(tl.int32))


def test_a_guard_page_is_deadly() -> None:
    """Guard pages that guard nothing."""
    x = guarded(torch.zeros(5))
    assert in_a_fork(lambda: ctypes.string_at(x.data_ptr(), 20)) == ""
    assert in_a_fork(lambda: ctypes.string_at(x.data_ptr(), 21)) == "killed by signal 11"


def test_nothing_past_the_end_is_touched() -> None:
    """A load or store past the end of a tensor, which a mask at the store would hide."""
    assert in_a_fork(lambda: stays_inside(kernel)) == ""


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batches", "heads", "rows"])
def test_offsets_beyond_2_to_the_31(dim: int) -> None:
    """An offset computed in 32 bits."""
    assert in_a_fork(lambda: reaches_far_along(dim)(kernel)) == ""


def test_dropout_index_beyond_2_to_the_31() -> None:
    """A mask that repeats because the index of an element was cut to 32 bits."""
    rows = torch.arange(16) * 10**9
    for tk in (4096, 4097):
        out = torch.zeros(16, 16, dtype=torch.int32)
        _keep_kernel[(1,)](rows, out, tk, QUADS=tk % 4 == 0)
        index = rows[:, None] * tk + 32 + torch.arange(16)
        words = torch.stack(philox(9, index // 4), -1)
        expected = words.gather(-1, (index % 4)[..., None])[..., 0] >= 2**31
        assert torch.equal(out.bool(), expected)


def test_no_program_depends_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race: programs that add to the same memory give other bits when they run in another order."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    inputs = {"q": torch.randn(2, 4, 70, 16), "k": torch.randn(2, 2, 70, 16), "v": torch.randn(2, 2, 70, 16)}
    with kernels.use_backend("triton"):
        forwards = run_case(kernels.causal_attention, inputs, ("q", "k", "v"))
        place = builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_idx", lambda self, x, y, z: place(self, self.grid_dim[0] - 1 - x, y, z))
        backwards = run_case(kernels.causal_attention, inputs, ("q", "k", "v"))
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_sparse_memory_is_sparse() -> None:
    """A test that needs the memory it pretends to have."""
    memory = sparse(2**34, torch.float16)
    memory[2**33] = 3
    assert memory[2**33 - 1 : 2**33 + 2].tolist() == [0, 3, 0]
