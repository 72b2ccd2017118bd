"""What the feed-forward computes between its matmuls: bias + GELU, and the backward pass of both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import gelu, gelu_derivative, load_columns
from kernels.launch import Launch, cdiv
from kernels.tuning import Tile, gelu_tile


@triton.jit
def _bias_gelu_kernel(
    h_ptr,  # (N, F), contiguous
    bias_ptr,  # (F,), contiguous, or None
    a_ptr,  # out: (N, F), contiguous, gelu(h + bias); may be h
    N,  # rows
    F: tl.constexpr,  # columns
    TANH: tl.constexpr,  # GELU by tanh, else by erf
    BLOCK_M: tl.constexpr,  # rows per tile
    BLOCK_N: tl.constexpr,  # columns per tile
):
    """One program computes one tile."""
    num_n = tl.cdiv(F, BLOCK_N)
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < N)[:, None] & (offs_n < F)[None, :]
    offs = offs_m[:, None] * F + offs_n[None, :]

    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        h += load_columns(bias_ptr, offs_m, offs_n, mask)
    tl.store(a_ptr + offs, gelu(h, TANH).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    da_ptr,  # (N, F), contiguous, the gradient of a
    h_ptr,  # (N, F), contiguous
    bias_ptr,  # (F,), contiguous, or None
    dh_ptr,  # out: (N, F), contiguous, da gelu'(h + bias); may be da
    a_ptr,  # out: (N, F), contiguous, gelu(h + bias), or None
    dbias_ptr,  # out: (programs, F) float32, contiguous, each program's partial sums of dh, or None
    N,  # rows
    F: tl.constexpr,  # columns
    TANH: tl.constexpr,  # GELU by tanh, else by erf
    BLOCK_M: tl.constexpr,  # rows per tile
    BLOCK_N: tl.constexpr,  # columns per tile
    STAGES: tl.constexpr,  # 1: a block is loaded when it is needed; 3: during the block before
):
    """The grid's axes are blocks of columns and programs; a program takes every programs-th block of rows."""
    pid_m = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < F, other=0.0).to(tl.float32)

    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over this program's blocks of rows
    for block in tl.range(pid_m, tl.cdiv(N, BLOCK_M), tl.num_programs(1), num_stages=STAGES):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m < N)[:, None] & (offs_n < F)[None, :]
        offs = offs_m[:, None] * F + offs_n[None, :]

        h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dh = tl.load(da_ptr + offs, mask=mask, other=0.0).to(tl.float32) * gelu_derivative(h, TANH)
        dbias += dh
        tl.store(dh_ptr + offs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if a_ptr is not None:
            tl.store(a_ptr + offs, gelu(h, TANH).to(a_ptr.dtype.element_ty), mask=mask)

    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid_m.to(tl.int64) * F + offs_n, tl.sum(dbias, 0), mask=offs_n < F)


def bias_gelu_forward(*, h: Tensor, bias: Tensor | None, a: Tensor, tanh: bool) -> Launch:
    """The launch that fills a = gelu(h + bias).

    h, a: (N, F), contiguous; they may be one tensor. bias: (F,), contiguous. tanh: GELU by tanh, else by erf.
    """
    n, f = h.shape
    tile = gelu_tile(f)
    arguments = {
        "h_ptr": h,
        "bias_ptr": bias,
        "a_ptr": a,
        "N": n,
        "F": f,
        "TANH": tanh,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    return Launch(_bias_gelu_kernel, (cdiv(n, tile.block_m) * cdiv(f, tile.block_n),), arguments, tile)


def bias_gelu_backward(
    *,
    da: Tensor,
    h: Tensor,
    bias: Tensor | None,
    dh: Tensor,
    a: Tensor | None,
    partial_dbias: Tensor | None,
    tanh: bool,
    programs: int,
    tile: Tile,
) -> Launch:
    """The launch that fills dh = da gelu'(h + bias) and, unless they are None, a and partial_dbias.

    da, h, dh, a: (N, F), contiguous; dh may be da; a = gelu(h + bias) is recomputed. bias: (F,), contiguous.
    partial_dbias: (programs, F) float32, the sums of dh over each program's rows.
    """
    f = h.shape[1]
    arguments = {
        "da_ptr": da,
        "h_ptr": h,
        "bias_ptr": bias,
        "dh_ptr": dh,
        "a_ptr": a,
        "dbias_ptr": partial_dbias,
        "N": h.shape[0],
        "F": f,
        "TANH": tanh,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.num_stages,
    }
    return Launch(_bias_gelu_bwd_kernel, (cdiv(f, tile.block_n), programs), arguments, tile)
