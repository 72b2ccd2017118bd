"""The forward pass: rows in registers, two-pass variance, with or without residual and dropout before it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import dropout_keep, dropout_keep_quads
from kernels.launch import Launch, cdiv
from kernels.philox import threshold
from kernels.tuning import norm_tile


@triton.jit
def keep_tile(seed, offs_m, threshold, START: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The dropout mask (BLOCK_M, BLOCK_C) of rows `offs_m` and the columns from START."""
    if C % 4 == 0:
        counter = offs_m[:, None] * (C // 4) + START // 4 + tl.arange(0, BLOCK_C // 4)[None, :]
        keep = dropout_keep_quads(seed, counter, threshold)
    else:
        keep = dropout_keep(seed, offs_m[:, None] * C + START + tl.arange(0, BLOCK_C)[None, :], threshold)
    return keep


@triton.jit
def load_columns(ptr, offs_m, cols, mask):
    """A vector's `cols` for each of the rows: each warp loads its own copy, for one to share goes through
    shared memory."""
    return tl.load(ptr + tl.zeros_like(offs_m)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, new_residual_ptr, stats_ptr,
    stride_xn, stride_rn, N, eps, threshold, keep_scale,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_c = tl.arange(0, BLOCK_C)

    rows = ()  # TILES tiles (BLOCK_M, BLOCK_C) make up whole rows
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in tl.static_range(TILES):
        cols = i * BLOCK_C + offs_c
        mask = mask_m[:, None] & (cols < C)[None, :]
        h = tl.load(x_ptr + offs_m[:, None] * stride_xn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            if seed_ptr is not None:
                keep = keep_tile(tl.load(seed_ptr), offs_m, threshold, i * BLOCK_C, C, BLOCK_C)
                h = tl.where(keep, h * keep_scale, 0.0)
            residual = tl.load(
                residual_ptr + offs_m[:, None] * stride_rn + cols[None, :], mask=mask, other=0.0
            )
            stored = (residual.to(tl.float32) + h).to(new_residual_ptr.dtype.element_ty)
            tl.store(new_residual_ptr + offs_m[:, None] * C + cols[None, :], stored, mask=mask)
            h = stored.to(tl.float32)
        rows += (h,)
        total += h
    mean = tl.sum(total, 1) / C

    square = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in tl.static_range(TILES):
        centred = tl.where((i * BLOCK_C + offs_c < C)[None, :], rows[i] - mean[:, None], 0.0)
        square += centred * centred
    rstd = tl.rsqrt(tl.sum(square, 1) / C + eps)
    tl.store(stats_ptr + offs_m, mean, mask=mask_m)
    tl.store(stats_ptr + N + offs_m, rstd, mask=mask_m)

    for i in tl.static_range(TILES):
        cols = i * BLOCK_C + offs_c
        y = (rows[i] - mean[:, None]) * rstd[:, None]
        mask = mask_m[:, None] & (cols < C)[None, :]
        y *= load_columns(weight_ptr, offs_m, cols, mask)
        if bias_ptr is not None:
            y += load_columns(bias_ptr, offs_m, cols, mask)
        tl.store(y_ptr + offs_m[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    new_residual: Tensor | None,
    stats: Tensor,
    eps: float,
    dropout_p: float,
) -> Launch:
    """y (N, C), new_residual (N, C) and stats (2, N), the rows' mean and 1 / std, of rows with a contiguous
    last dimension."""
    n, c = x.shape
    tile = norm_tile(c)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "seed_ptr": seed,
        "y_ptr": y,
        "new_residual_ptr": new_residual,
        "stats_ptr": stats,
        "stride_xn": x.stride(0),
        "stride_rn": 0 if residual is None else residual.stride(0),
        "N": n,
        "eps": eps,
        **dropout_arguments(dropout_p),
        **tile_arguments(c),
    }
    return Launch(_layer_norm_fwd_kernel, (cdiv(n, tile.block_m),), arguments, tile)


def dropout_arguments(dropout_p: float) -> dict[str, Any]:
    return {"threshold": threshold(dropout_p), "keep_scale": 1 / (1 - dropout_p)}


def tile_arguments(c: int) -> dict[str, Any]:
    tile = norm_tile(c)
    return {"C": c, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n, "TILES": cdiv(c, tile.block_n)}
