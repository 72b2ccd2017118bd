"""Dropout alone: one kernel, for the output and, with the same mask, for the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, cdiv, dropout_arguments
from kernels.norm.forward import keep_tile, tile_arguments
from kernels.tuning import norm_tile


@triton.jit
def _dropout_kernel(
    x_ptr,  # (N, C)
    seed_ptr,  # 0-d int64
    y_ptr,  # out: (N, C), contiguous
    stride_xn,  # x: elements between rows
    N,  # rows
    threshold,  # uint32: an element is dropped where its random word is smaller
    keep_scale,  # 1 / (1 - dropout_p)
    C: tl.constexpr,  # columns
    BLOCK_M: tl.constexpr,  # rows per program
    BLOCK_C: tl.constexpr,  # columns per tile
    TILES: tl.constexpr,  # tiles per row, cdiv(C, BLOCK_C)
):
    """One program drops elements of BLOCK_M whole rows."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    seed = tl.load(seed_ptr)

    for i in tl.static_range(TILES):
        cols = i * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        keep = keep_tile(seed, offs_m, threshold, i * BLOCK_C, C, BLOCK_C)
        y = tl.where(keep, x * keep_scale, 0.0)
        tl.store(y_ptr + offs_m[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout_forward(*, x: Tensor, seed: Tensor, y: Tensor, dropout_p: float) -> Launch:
    """The launch that fills y (N, C), contiguous.

    x: (N, C) with a contiguous last dimension. seed: 0-d int64. The gradient is the same function of dy.
    """
    n, c = x.shape
    tile = norm_tile(c, x.element_size())
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        "stride_xn": x.stride(0),
        "N": n,
        **dropout_arguments(seed, dropout_p),
        **tile_arguments(c, tile),
    }
    return Launch(_dropout_kernel, (cdiv(n, tile.block_m),), arguments, tile)
