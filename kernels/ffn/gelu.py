"""Bias + GELU in one pass, and its derivative with the bias's gradient and GELU again in another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import gelu, gelu_derivative
from kernels.launch import Launch, cdiv
from kernels.tuning import gelu_tile


@triton.jit
def _bias_gelu_kernel(
    h_ptr, bias_ptr, a_ptr, N, F,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(F, BLOCK_N)
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < N)[:, None] & (offs_n < F)[None, :]
    offs = offs_m[:, None] * F + offs_n[None, :]
    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs_n, mask=offs_n < F, other=0.0).to(tl.float32)[None, :]
    tl.store(a_ptr + offs, gelu(h, TANH).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    da_ptr, h_ptr, bias_ptr, dh_ptr, a_ptr, dbias_ptr, N, F,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < F, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.range(pid_m, tl.cdiv(N, BLOCK_M), tl.num_programs(1)):
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


def launch_forward(h: Tensor, bias: Tensor | None, a: Tensor, tanh: bool) -> Launch:
    """a = gelu(h + bias) for contiguous h (N, F), which a may be."""
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


def launch_backward(
    da: Tensor,
    h: Tensor,
    bias: Tensor | None,
    dh: Tensor,
    a: Tensor | None,
    dbias: Tensor | None,
    tanh: bool,
    programs: int,
) -> Launch:
    """dh = da gelu'(h + bias), which may be da, and a = gelu(h + bias), all (N, F); float32 partial sums of
    dh (programs, F)."""
    n, f = h.shape
    tile = gelu_tile(f)
    arguments = {
        "da_ptr": da,
        "h_ptr": h,
        "bias_ptr": bias,
        "dh_ptr": dh,
        "a_ptr": a,
        "dbias_ptr": dbias,
        "N": n,
        "F": f,
        "TANH": tanh,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    return Launch(_bias_gelu_bwd_kernel, (cdiv(f, tile.block_n), programs), arguments, tile)
