"""Dropout alone: one pass over the rows, with the same mask for the output and for the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, cdiv
from kernels.norm.forward import dropout_arguments, keep_tile, tile_arguments
from kernels.tuning import norm_tile


@triton.jit
def _dropout_kernel(
    x_ptr,  # (N, C), contiguous last dimension
    seed_ptr,  # int64, one element
    y_ptr,  # (N, C), contiguous
    stride_xn, N,
    threshold, keep_scale,  # floor(p * 2**32), 1 / (1 - p)
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
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


def launch_dropout(x: Tensor, seed: Tensor, y: Tensor, dropout_p: float) -> Launch:
    """y (N, C), contiguous, from x (N, C) with a contiguous last dimension."""
    n, c = x.shape
    tile = norm_tile(c)
    arguments = {
        "x_ptr": x,
        "seed_ptr": seed,
        "y_ptr": y,
        "stride_xn": x.stride(0),
        "N": n,
        **dropout_arguments(dropout_p),
        **tile_arguments(c),
    }
    return Launch(_dropout_kernel, (cdiv(n, tile.block_m),), arguments, tile)
