"""The backward pass: dx in one pass over the rows, dweight and dbias through partial sums of a fixed number
of programs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, cdiv
from kernels.norm.forward import dropout_arguments, keep_tile, load_columns, tile_arguments
from kernels.tuning import Tile, norm_tile


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dnew_ptr, h_ptr, weight_ptr, seed_ptr, stats_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    stride_dyn, stride_dnn, stride_hn, N, threshold, keep_scale,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    dweight, dbias = (), ()  # this program's sums over its rows
    for _ in tl.static_range(TILES):
        dweight += (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)
        dbias += (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)

    for block in tl.range(pid, tl.cdiv(N, BLOCK_M), tl.num_programs(0)):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < N
        mean = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(stats_ptr + N + offs_m, mask=mask_m, other=0.0)
        normed, scaled, new_dweight, new_dbias = (), (), (), ()
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        projection = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for i in tl.static_range(TILES):
            cols = i * BLOCK_C + offs_c
            mask = mask_m[:, None] & (cols < C)[None, :]
            h = tl.load(h_ptr + offs_m[:, None] * stride_hn + cols[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            dy = tl.load(dy_ptr + offs_m[:, None] * stride_dyn + cols[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            weight = load_columns(weight_ptr, offs_m, cols, mask)
            z = (h - mean[:, None]) * rstd[:, None]
            wdy = dy * weight
            total += wdy
            projection += wdy * z
            normed += (z,)
            scaled += (wdy,)
            new_dweight += (dweight[i] + dy * z,)
            new_dbias += (dbias[i] + dy,)
        dweight, dbias = new_dweight, new_dbias

        if dx_ptr is not None or dresidual_ptr is not None:
            total_row = (tl.sum(total, 1) / C)[:, None]
            projection_row = (tl.sum(projection, 1) / C)[:, None]
            for i in tl.static_range(TILES):
                cols = i * BLOCK_C + offs_c
                mask = mask_m[:, None] & (cols < C)[None, :]
                out = offs_m[:, None] * C + cols[None, :]
                dh = (scaled[i] - total_row - normed[i] * projection_row) * rstd[:, None]
                if dnew_ptr is not None:
                    dh += tl.load(
                        dnew_ptr + offs_m[:, None] * stride_dnn + cols[None, :], mask=mask, other=0.0
                    ).to(tl.float32)
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
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (cols < C)[None, :]
        acc += tl.load(partial_ptr + offs_p[:, None] * C + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def _layer_norm_bwd_sum_kernel(
    partial_dweight_ptr, partial_dbias_ptr, dweight_ptr, dbias_ptr, P,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight and dbias: the sums of P programs' rows, always in the same order."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if dweight_ptr is not None and tl.program_id(1) == 0:
        _sum_rows(partial_dweight_ptr, dweight_ptr, cols, P, C, BLOCK_P, BLOCK_C)
    if dbias_ptr is not None and tl.program_id(1) == tl.num_programs(1) - 1:
        _sum_rows(partial_dbias_ptr, dbias_ptr, cols, P, C, BLOCK_P, BLOCK_C)


def launch_backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    h: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dropout_p: float,
    programs: int,
) -> Launch:
    """dx and dresidual (N, C), and each program's float32 partial sums of dweight and dbias (programs, C),
    where h was normed."""
    n, c = h.shape
    arguments = {
        "dy_ptr": dy,
        "dnew_ptr": dnew_residual,
        "h_ptr": h,
        "weight_ptr": weight,
        "seed_ptr": seed,
        "stats_ptr": stats,
        "dx_ptr": dx,
        "dresidual_ptr": dresidual,
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "stride_dyn": dy.stride(0),
        "stride_dnn": 0 if dnew_residual is None else dnew_residual.stride(0),
        "stride_hn": h.stride(0),
        "N": n,
        **dropout_arguments(dropout_p),
        **tile_arguments(c),
    }
    return Launch(_layer_norm_bwd_kernel, (programs,), arguments, norm_tile(c))


def launch_sum(
    partial_dweight: Tensor | None, partial_dbias: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Launch:
    """dweight and dbias (C,) from the partial sums (P, C) of `launch_backward`."""
    partial = partial_dweight if partial_dweight is not None else partial_dbias
    assert partial is not None
    p, c = partial.shape
    tile = Tile(512, 16, num_warps=8)  # a loop over the partial sums would wait for the memory each time
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
    sums = (dweight is not None) + (dbias is not None)
    return Launch(_layer_norm_bwd_sum_kernel, (cdiv(c, tile.block_n), sums), arguments, tile)
