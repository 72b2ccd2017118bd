"""The feed-forward's first matmul with bias + GELU in its epilogue.

It runs where `tuning.gelu_gemm_tile` gives a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import gelu
from kernels.launch import Launch, cdiv, precision
from kernels.tuning import Tile


@triton.jit
def _gelu_gemm_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,), contiguous, or None
    h_ptr,  # out: (M, N), contiguous, x wᵀ
    a_ptr,  # out: (M, N), contiguous, gelu(h + bias)
    stride_xm, stride_xk,  # x: elements between rows, columns
    stride_wn, stride_wk,  # w: elements between rows, columns
    M,  # rows of x
    N,  # rows of w
    K,  # columns of both
    TANH: tl.constexpr,  # GELU by tanh, else by erf
    PRECISION: tl.constexpr,  # input_precision of tl.dot
    GROUP_M: tl.constexpr,  # rows of tiles that run together
    BLOCK_M: tl.constexpr,  # rows per tile of the output
    BLOCK_N: tl.constexpr,  # columns per tile of the output
    BLOCK_K: tl.constexpr,  # columns of x and w per step
):  # fmt: skip
    """One program computes one tile of h and a."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Programs run through GROUP_M rows of tiles column by column, so that these rows of x and the column of w
    # stay in L2.
    first = pid // (GROUP_M * num_n) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    pid_m = first + pid % (GROUP_M * num_n) % height
    pid_n = pid % (GROUP_M * num_n) // height

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    h = acc.to(h_ptr.dtype.element_ty)
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(h_ptr + offs, h, mask=mask)

    # GELU of the stored, rounded value, since backward reads that value.
    h = h.to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(a_ptr + offs, gelu(h, TANH).to(a_ptr.dtype.element_ty), mask=mask)


def gelu_gemm_forward(
    *, x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, a: Tensor, tanh: bool, tile: Tile
) -> Launch:
    """The launch that fills h = x wᵀ and a = gelu(h + bias).

    x: (M, K) and w: (N, K), any strides. bias: (N,), contiguous. h, a: (M, N), contiguous.
    """
    (m, k), n = x.shape, w.shape[0]
    arguments = {
        "x_ptr": x,
        "w_ptr": w,
        "bias_ptr": bias,
        "h_ptr": h,
        "a_ptr": a,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": w.stride(0),
        "stride_wk": w.stride(1),
        "M": m,
        "N": n,
        "K": k,
        "TANH": tanh,
        "PRECISION": precision(x.dtype),
        "GROUP_M": 8,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": 128 // x.element_size(),
    }
    return Launch(_gelu_gemm_kernel, (cdiv(m, tile.block_m) * cdiv(n, tile.block_n),), arguments, tile)
