"""LayerNorm's forward pass: rows in registers, two-pass variance, with or without residual and dropout."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import dropout_keep, dropout_keep_quads, load_columns
from kernels.launch import Launch, cdiv, dropout_arguments
from kernels.tuning import Tile, norm_tile


@triton.jit
def keep_tile(seed, offs_m, threshold, START: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The dropout mask of the columns from START of an (N, C) matrix: bool (BLOCK_M, BLOCK_C).

    offs_m: (BLOCK_M,) int64, rows. seed, threshold: scalars as in `dropout_keep`.
    """
    if C % 4 == 0:  # one counter covers four columns of one row
        counter = offs_m[:, None] * (C // 4) + START // 4 + tl.arange(0, BLOCK_C // 4)[None, :]
        keep = dropout_keep_quads(seed, counter, threshold)
    else:
        keep = dropout_keep(seed, offs_m[:, None] * C + START + tl.arange(0, BLOCK_C)[None, :], threshold)
    return keep


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C); None: y = layer_norm(x)
    weight_ptr,  # (C,), contiguous
    bias_ptr,  # (C,), contiguous, or None
    seed_ptr,  # 0-d int64; None: without dropout
    y_ptr,  # out: (N, C), contiguous
    new_residual_ptr,  # out: (N, C), contiguous, residual + dropout(x); None without a residual
    stats_ptr,  # out: (2, N) float32, contiguous, mean and 1 / standard deviation of each row
    z_ptr,  # out: (N, C), contiguous, the rows before weight and bias, for backward; None: not stored
    stride_xn,  # x: elements between rows
    stride_rn,  # residual: elements between rows
    N,  # rows
    eps,  # added to the variance
    threshold,  # uint32: an element is dropped where its random word is smaller
    keep_scale,  # 1 / (1 - dropout_p)
    C: tl.constexpr,  # columns
    BLOCK_M: tl.constexpr,  # rows per program
    BLOCK_C: tl.constexpr,  # columns per tile
    TILES: tl.constexpr,  # tiles per row, cdiv(C, BLOCK_C)
):
    """One program normalises BLOCK_M whole rows."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_c = tl.arange(0, BLOCK_C)

    rows = ()  # TILES tiles (BLOCK_M, BLOCK_C) float32: the whole rows stay in registers
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in tl.static_range(TILES):
        cols = i * BLOCK_C + offs_c
        mask = mask_m[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xn + cols[None, :], mask=mask, other=0.0)
        h = x.to(tl.float32)  # (BLOCK_M, BLOCK_C)
        if residual_ptr is not None:
            if seed_ptr is not None:
                keep = keep_tile(tl.load(seed_ptr), offs_m, threshold, i * BLOCK_C, C, BLOCK_C)
                h = tl.where(keep, h * keep_scale, 0.0)
            residual_ptrs = residual_ptr + offs_m[:, None] * stride_rn + cols[None, :]
            residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
            stored = (residual + h).to(new_residual_ptr.dtype.element_ty)
            tl.store(new_residual_ptr + offs_m[:, None] * C + cols[None, :], stored, mask=mask)
            h = stored.to(tl.float32)  # backward normalises the stored, rounded value too
        rows += (h,)
        total += h
    mean = tl.sum(total, 1) / C  # (BLOCK_M,)

    square = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in tl.static_range(TILES):
        # Columns past C hold 0, not the mean: without this they would add to the variance.
        centred = tl.where((i * BLOCK_C + offs_c < C)[None, :], rows[i] - mean[:, None], 0.0)
        square += centred * centred
    rstd = tl.rsqrt(tl.sum(square, 1) / C + eps)  # (BLOCK_M,)
    tl.store(stats_ptr + offs_m, mean, mask=mask_m)
    tl.store(stats_ptr + N + offs_m, rstd, mask=mask_m)

    for i in tl.static_range(TILES):
        cols = i * BLOCK_C + offs_c
        mask = mask_m[:, None] & (cols < C)[None, :]
        out = offs_m[:, None] * C + cols[None, :]
        z = (rows[i] - mean[:, None]) * rstd[:, None]
        if z_ptr is not None:
            tl.store(z_ptr + out, z.to(z_ptr.dtype.element_ty), mask=mask)
        y = z * load_columns(weight_ptr, offs_m, cols, mask)
        if bias_ptr is not None:
            y += load_columns(bias_ptr, offs_m, cols, mask)
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


def layer_norm_forward(
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    new_residual: Tensor | None,
    stats: Tensor,
    z: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Launch:
    """The launch that fills `y`, `stats`, with a residual `new_residual`, and `z` unless it is None.

    x, residual: (N, C) with a contiguous last dimension. weight, bias: (C,), contiguous. seed: 0-d int64,
    None without dropout. y, new_residual, z: (N, C), contiguous. stats: (2, N) float32.
    """
    n, c = x.shape
    tile = norm_tile(c, max(t.element_size() for t in (x, residual) if t is not None))
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": y,
        "new_residual_ptr": new_residual,
        "stats_ptr": stats,
        "z_ptr": z,
        "stride_xn": x.stride(0),
        "stride_rn": 0 if residual is None else residual.stride(0),
        "N": n,
        "eps": eps,
        **dropout_arguments(seed, dropout_p),
        **tile_arguments(c, tile),
    }
    return Launch(_layer_norm_fwd_kernel, (cdiv(n, tile.block_m),), arguments, tile)


def tile_arguments(c: int, tile: Tile) -> dict[str, Any]:
    """The kernel arguments that follow from the number of columns and the tile."""
    return {"C": c, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n, "TILES": cdiv(c, tile.block_n)}
