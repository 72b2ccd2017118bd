"""The greedy choice of a token: the index of the largest logit of each sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch
from kernels.tuning import Tile


@triton.jit
def _keep_larger(best, first, x, start):
    """`best` and where its tile starts, after the tile `x` at `start`. NaN is the largest; equals stay."""
    x = x.to(tl.float32)
    larger = (x > best) | ((x != x) & (best == best))
    return tl.where(larger, x, best), tl.where(larger, start, first)


@triton.jit
def _decode_argmax_kernel(
    logits_ptr,  # (B, V)
    out_ptr,  # out: (B,) int64
    stride_lb,  # logits: elements between rows
    stride_ob,  # out: elements between sequences
    V,  # columns
    BLOCK_N: tl.constexpr,  # columns per tile
    PDL: tl.constexpr,  # whether the launch starts before the one ahead of it has ended
):
    """One program stores the first index of a row's largest logit; NaN is the largest.

    A thread keeps the largest of each of its columns over all tiles. The threads compare theirs at the end.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid_b = tl.program_id(0).to(tl.int64)
    logits_ptr += pid_b * stride_lb
    cols = tl.arange(0, BLOCK_N)
    whole = V // BLOCK_N * BLOCK_N  # columns of tiles without a mask, which are read 16 bytes at a time

    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK_N], tl.int32)
    for start in tl.range(0, whole, BLOCK_N, loop_unroll_factor=4):
        best, first = _keep_larger(best, first, tl.load(logits_ptr + start + cols), start)
    x = tl.load(logits_ptr + whole + cols, mask=whole + cols < V, other=float("-inf"))
    best, first = _keep_larger(best, first, x, whole)

    # The order of floats as that of integers: the bits of a negative float are flipped; -0.0 + 0.0 is 0.0.
    bits = (best + 0.0).to(tl.int32, bitcast=True)
    rank = tl.where(best == best, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    key = (rank.to(tl.int64) << 32) | (0x7FFFFFFF - first - cols)  # the largest rank, then the first index
    tl.store(out_ptr + pid_b * stride_ob, 0x7FFFFFFF - (tl.max(key, 0) & 0x7FFFFFFF))


def decode_argmax_forward(*, logits: Tensor, out: Tensor, tile: Tile) -> Launch:
    """The launch that fills out[b] = argmax(logits[b]).

    logits: (B, V), with a contiguous last dimension, 1 <= V <= ARGMAX_COLUMNS. out: int64 (B,).
    """
    b, v = logits.shape
    arguments = {
        "logits_ptr": logits,
        "out_ptr": out,
        "stride_lb": logits.stride(0) if b > 1 else 0,  # with an odd V, reads of 16 bytes would be ruled out
        "stride_ob": out.stride(0),
        "V": v,
    }
    return Launch.of(_decode_argmax_kernel, (b,), arguments, tile)
