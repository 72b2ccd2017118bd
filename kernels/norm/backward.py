"""LayerNorm's backward pass.

One kernel computes dx and dresidual; each of its programs, whose number is fixed, sums dweight and dbias over
its own rows. A second kernel adds up these partial sums, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import load_columns
from kernels.launch import Launch, cdiv, dropout_arguments
from kernels.norm.forward import keep_tile, tile_arguments
from kernels.tuning import Tile


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (N, C), the gradient of y
    dnew_ptr,  # (N, C), the gradient of new_residual, or None
    h_ptr,  # (N, C), what forward normalised: new_residual, or x without a residual; z if HOLDS_Z
    weight_ptr,  # (C,), contiguous
    seed_ptr,  # 0-d int64; None: without dropout
    stats_ptr,  # (2, N) float32, contiguous, mean and 1 / standard deviation of each row
    dx_ptr,  # out: (N, C), contiguous, or None
    dresidual_ptr,  # out: (N, C), contiguous, or None
    dweight_ptr,  # out: (programs, C) float32, contiguous, each program's partial sums, or None
    dbias_ptr,  # out: the same for the bias, or None
    stride_dyn,  # dy: elements between rows
    stride_dnn,  # dnew: elements between rows
    stride_hn,  # h: elements between rows
    N,  # rows
    threshold,  # uint32: an element is dropped where its random word is smaller
    keep_scale,  # 1 / (1 - dropout_p)
    C: tl.constexpr,  # columns
    BLOCK_M: tl.constexpr,  # rows per block
    BLOCK_C: tl.constexpr,  # columns per tile
    TILES: tl.constexpr,  # tiles per row, cdiv(C, BLOCK_C)
    HOLDS_Z: tl.constexpr,  # h is z already, as forward stored it
    STAGES: tl.constexpr,  # 1: a block is loaded when it is needed; 3: during the block before
):
    """A program takes every num_programs-th block of BLOCK_M whole rows."""
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)

    # TILES tiles (BLOCK_M, BLOCK_C): this program's sums over its blocks of rows, and the weight of each row.
    dweight, dbias, weights = (), (), ()
    for i in tl.static_range(TILES):
        dweight += (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)
        dbias += (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)
        if STAGES > 1:  # a pipelined loop would copy it to shared memory for each block
            cols = i * BLOCK_C + offs_c
            mask = tl.broadcast_to((cols < C)[None, :], [BLOCK_M, BLOCK_C])
            weights += (load_columns(weight_ptr, tl.arange(0, BLOCK_M), cols, mask),)

    for block in tl.range(pid, tl.cdiv(N, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < N
        if not HOLDS_Z:
            mean = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(stats_ptr + N + offs_m, mask=mask_m, other=0.0)

        # With z = (h - mean) rstd and wdy = weight dy: dh = (wdy - mean(wdy) - z mean(wdy z)) rstd.
        normed, scaled, new_dweight, new_dbias = (), (), (), ()
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        projection = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for i in tl.static_range(TILES):
            cols = i * BLOCK_C + offs_c
            mask = mask_m[:, None] & (cols < C)[None, :]
            h_ptrs = h_ptr + offs_m[:, None] * stride_hn + cols[None, :]
            dy_ptrs = dy_ptr + offs_m[:, None] * stride_dyn + cols[None, :]
            h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_C)
            dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_C)
            if STAGES == 1:
                weight = load_columns(weight_ptr, offs_m, cols, mask)
            else:
                weight = weights[i]
            z = h if HOLDS_Z else (h - mean[:, None]) * rstd[:, None]
            wdy = dy * weight
            total += wdy
            projection += wdy * z
            normed += (z,)
            scaled += (wdy,)
            new_dweight += (dweight[i] + dy * z,)
            new_dbias += (dbias[i] + dy,)
        dweight, dbias = new_dweight, new_dbias

        if dx_ptr is not None or dresidual_ptr is not None:
            # The mean of one column is this column. A fused multiply-add, dy weight - mean_wdy, would give
            # the rounding error of dy weight instead of 0.
            if C == 1:
                scaled = (total,)
            mean_wdy = (tl.sum(total, 1) / C)[:, None]  # (BLOCK_M, 1)
            mean_wdy_z = (tl.sum(projection, 1) / C)[:, None]  # (BLOCK_M, 1)
            for i in tl.static_range(TILES):
                cols = i * BLOCK_C + offs_c
                mask = mask_m[:, None] & (cols < C)[None, :]
                out = offs_m[:, None] * C + cols[None, :]
                dh = (scaled[i] - mean_wdy - normed[i] * mean_wdy_z) * rstd[:, None]
                if dnew_ptr is not None:
                    dnew_ptrs = dnew_ptr + offs_m[:, None] * stride_dnn + cols[None, :]
                    dh += tl.load(dnew_ptrs, mask=mask, other=0.0).to(tl.float32)
                if dresidual_ptr is not None:
                    tl.store(dresidual_ptr + out, dh.to(dresidual_ptr.dtype.element_ty), mask=mask)
                if dx_ptr is not None:
                    if seed_ptr is not None:
                        keep = keep_tile(tl.load(seed_ptr), offs_m, threshold, i * BLOCK_C, C, BLOCK_C)
                        dh = tl.where(keep, dh * keep_scale, 0.0)
                    tl.store(dx_ptr + out, dh.to(dx_ptr.dtype.element_ty), mask=mask)

    for i in tl.static_range(TILES):
        cols = i * BLOCK_C + offs_c
        out = pid.to(tl.int64) * C + cols
        if dweight_ptr is not None:
            tl.store(dweight_ptr + out, tl.sum(dweight[i], 0), mask=cols < C)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + out, tl.sum(dbias[i], 0), mask=cols < C)


@triton.jit
def _sum_rows(partial_ptr, out_ptr, cols, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums the columns `cols` (BLOCK_C,) of a float32 matrix (P, C) over its rows, into a vector (C,)."""
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (cols < C)[None, :]
        acc += tl.load(partial_ptr + offs_p[:, None] * C + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def _layer_norm_bwd_sum_kernel(
    partial_dweight_ptr,  # (P, C) float32, contiguous, or None
    partial_dbias_ptr,  # (P, C) float32, contiguous, or None
    dweight_ptr,  # out: (C,), or None
    dbias_ptr,  # out: (C,), or None
    P,  # rows of the partial sums
    C: tl.constexpr,  # columns
    BLOCK_P: tl.constexpr,  # rows per tile
    BLOCK_C: tl.constexpr,  # columns per program
):
    """dweight and dbias of BLOCK_C columns. The grid's second axis counts the gradients that are needed."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if dweight_ptr is not None and tl.program_id(1) == 0:
        _sum_rows(partial_dweight_ptr, dweight_ptr, cols, P, C, BLOCK_P, BLOCK_C)
    if dbias_ptr is not None and tl.program_id(1) == tl.num_programs(1) - 1:
        _sum_rows(partial_dbias_ptr, dbias_ptr, cols, P, C, BLOCK_P, BLOCK_C)


def layer_norm_backward(
    *,
    dy: Tensor,
    dnew_residual: Tensor | None,
    h: Tensor,
    holds_z: bool,
    weight: Tensor,
    seed: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dresidual: Tensor | None,
    partial_dweight: Tensor | None,
    partial_dbias: Tensor | None,
    dropout_p: float,
    programs: int,
    tile: Tile,
) -> Launch:
    """The launch that fills dx, dresidual and the partial sums of dweight and dbias, each unless it is None.

    dy, dnew_residual, h: (N, C) with a contiguous last dimension; h is what forward normalised,
    or z = (what it normalised - mean) / standard deviation with `holds_z`. weight: (C,).
    seed: 0-d int64, None without dropout. stats: (2, N) float32. dx, dresidual: (N, C), contiguous.
    partial_dweight, partial_dbias: (programs, C) float32, for `layer_norm_backward_sum`.
    """
    n, c = h.shape
    arguments = {
        "dy_ptr": dy,
        "dnew_ptr": dnew_residual,
        "h_ptr": h,
        "weight_ptr": weight,
        "stats_ptr": stats,
        "dx_ptr": dx,
        "dresidual_ptr": dresidual,
        "dweight_ptr": partial_dweight,
        "dbias_ptr": partial_dbias,
        "stride_dyn": dy.stride(0),
        "stride_dnn": 0 if dnew_residual is None else dnew_residual.stride(0),
        "stride_hn": h.stride(0),
        "N": n,
        **dropout_arguments(seed, dropout_p),
        **tile_arguments(c, tile),
        "HOLDS_Z": holds_z,
        "STAGES": tile.num_stages,
    }
    return Launch(_layer_norm_bwd_kernel, (programs,), arguments, tile)


def layer_norm_backward_sum(
    *,
    partial_dweight: Tensor | None,
    partial_dbias: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Launch:
    """The launch that fills dweight and dbias (C,) from the partial sums (P, C); at least one is not None."""
    partial = partial_dweight if partial_dweight is not None else partial_dbias
    assert partial is not None
    p, c = partial.shape
    tile = Tile(512, 16, num_warps=8)  # tall: each further turn of the loop over P would stall on memory
    arguments = {
        "partial_dweight_ptr": partial_dweight,
        "partial_dbias_ptr": partial_dbias,
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "P": p,
        "C": c,
        "BLOCK_P": tile.block_m,
        "BLOCK_C": tile.block_n,
    }
    gradients = (dweight is not None) + (dbias is not None)
    return Launch(_layer_norm_bwd_sum_kernel, (cdiv(c, tile.block_n), gradients), arguments, tile)
