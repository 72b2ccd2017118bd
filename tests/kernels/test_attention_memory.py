"""Attention's addresses: no access past a tensor's end, and offsets beyond 2**31 elements."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import kernels
from kernels.philox import philox
from kernels.verify import run_case
from tests.kernels.attention_suite import reaches_far_along, stays_inside
from tests.memory import in_a_fork, sparse

triton, tl, forward, backward, torch_op = (
    pytest.importorskip(name, reason="triton is not installed")
    for name in (
        "triton",
        "triton.language",
        *(f"kernels.attention.{file}" for file in ("forward", "backward", "torch_op")),
    )
)
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(sys.platform != "linux", reason="guard pages and sparse memory need Linux's mmap"),
]
keep_tile, query_range = forward.keep_tile, backward._query_range


@triton.jit
def _keep_kernel(rows_ptr, out_ptr, Tk, QUADS: tl.constexpr):
    """The mask of 16 keys from key 32, of rows (16,) int64, into out (16, 16) int32."""
    rows, offs = tl.load(rows_ptr + tl.arange(0, 16)), tl.arange(0, 16)
    keep = keep_tile(9, rows, 32, Tk, 2**31, QUADS, 16)
    tl.store(out_ptr + offs[:, None] * 16 + offs[None, :], keep.to(tl.int32))


@triton.jit
def _range_kernel(
    first_ptr, last_ptr, out_ptr, key, num_rows, Tq, Tk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """query_range for tiles of 32 queries, into out (4,) int32."""
    lo, full_lo, full_hi, hi = query_range(
        key, first_ptr, last_ptr, num_rows, Tq, Tk, True, BLOCK_M, BLOCK_N, 32
    )
    tl.store(out_ptr, lo)
    tl.store(out_ptr + 1, full_lo)
    tl.store(out_ptr + 2, full_hi)
    tl.store(out_ptr + 3, hi)


@pytest.mark.parametrize("kind", ["documents", "window", "one late query", "one early query"])
def test_the_queries_of_a_tile_of_keys_in_a_long_text(kind: str) -> None:
    """Queries past the first 8,192 that add nothing to dK, or that are assumed to see a whole tile."""
    tq, tk = 10_000, 10_040
    position = torch.arange(tk - tq, tk)
    start = {
        "documents": position - position % 700,
        "window": (position - 900).clamp(min=0),
        "one late query": torch.where(position == 9_000, 8_990, 0),
        "one early query": torch.where(position == 9_001, 0, position),
    }[kind]
    padded = torch.nn.functional.pad(start, (0, -tq % 32), value=int(start[-1])).reshape(-1, 32)
    first, last = (x.to(torch.int32) for x in (padded.amin(1), padded.amax(1)))
    out = torch.zeros(4, dtype=torch.int32)
    for key, block in itertools.product((0, 32, 700, 5_000, 8_160, 8_960, 9_984), (16, 64)):
        _range_kernel[(1,)](first, last, out, key // 32 * 32, len(first), tq, tk, BLOCK_M=block, BLOCK_N=32)

        lo, full_lo, full_hi, hi = out.tolist()
        tile = key // 32 * 32 + torch.arange(32)
        seen = (tile <= position[:, None]) & (tile >= start[:, None]) & (tile < tk)
        rows = torch.arange(tq)
        assert not seen[(rows < lo) | (rows >= hi)].any(), key
        assert seen[full_lo:full_hi, : tk - key].all(), key
        assert lo % block == full_lo % block == full_hi % block == 0
        assert lo <= full_lo <= full_hi


def test_nothing_past_the_end_is_touched() -> None:
    """A load past the end of a tensor, which a masked store hides, or a store past the end."""
    assert in_a_fork(lambda: stays_inside(torch_op)) == ""


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batches", "heads", "rows"])
def test_offsets_beyond_2_to_the_31(dim: int) -> None:
    """The offset of an element that is computed in 32 bits."""
    assert in_a_fork(lambda: reaches_far_along(dim)(torch_op)) == ""


def test_key_starts_beyond_2_to_the_31() -> None:
    """The offset of a query's key_start that is computed in 32 bits."""
    stride = 2**30 + 16
    start = sparse(4 * stride, torch.int32).as_strided((1, 4), (4 * stride, stride))
    start.copy_(torch.tensor([[0, 1, 0, 3]]))
    inputs = {"q": torch.randn(1, 1, 4, 16), "k": torch.randn(1, 1, 4, 16), "v": torch.randn(1, 1, 4, 16)}
    with kernels.use_backend("triton"):
        near, far = (
            run_case(kernels.causal_attention, inputs | {"key_start": x}, ("q", "k", "v"))
            for x in (start.contiguous(), start)
        )
    assert all(torch.equal(near[name], far[name]) for name in near)


def test_dropout_index_beyond_2_to_the_31() -> None:
    """A mask that repeats because the index of an element is truncated to 32 bits."""
    rows = torch.arange(16) * 10**9
    for tk in (4096, 4097):
        out = torch.zeros(16, 16, dtype=torch.int32)
        _keep_kernel[(1,)](rows, out, tk, QUADS=tk % 4 == 0)
        index = rows[:, None] * tk + 32 + torch.arange(16)
        words = torch.stack(philox(9, index // 4), -1)
        expected = words.gather(-1, (index % 4)[..., None])[..., 0] >= 2**31
        assert torch.equal(out.bool(), expected)
