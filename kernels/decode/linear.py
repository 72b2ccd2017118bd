"""The matmuls of one decoded token with what surrounds them: LayerNorm before, the epilogue after."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import gelu
from kernels.launch import Launch, cdiv
from kernels.tuning import Tile, next_power_of_2


@triton.jit
def _centre(xs, cols, eps, K: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row minus mean, as TILES tiles, and 1 / standard deviation (ROWS,): LayerNorm before its weight.

    xs: TILES float32 tiles (ROWS, BLOCK_K), the same row in each of the ROWS. cols: (BLOCK_K,).
    """
    total = xs[0]
    for i in tl.static_range(1, TILES):
        total += xs[i]
    mean = tl.sum(total, 1) / K

    centred = ()
    square = tl.zeros_like(xs[0])
    for i in tl.static_range(TILES):
        # Columns past K hold 0, not the mean: without this they would add to the variance.
        x = tl.where((i * BLOCK_K + cols < K)[None, :], xs[i] - mean[:, None], 0.0)
        square += x * x
        centred += (x,)
    return centred, tl.rsqrt(tl.sum(square, 1) / K + eps)


@triton.jit
def _stack(values, COUNT: tl.constexpr):
    """COUNT tiles (M,), a power of two of them, as (M, 2, 2, …): tile i is column i once it is (M, COUNT)."""
    if COUNT == 1:
        stacked = values[0]
    else:
        HALF: tl.constexpr = COUNT // 2
        pairs = ()
        for i in tl.static_range(HALF):
            pairs += (tl.join(values[i], values[i + HALF]),)
        stacked = _stack(pairs, HALF)
    return stacked


@triton.jit
def _decode_linear_kernel(
    x_ptr,  # (B, K)
    norm_weight_ptr,  # (K,), contiguous; None: without a norm
    norm_bias_ptr,  # (K,), contiguous, or None
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,), contiguous, or None
    residual_ptr,  # (B, N), added to the output, or None
    out_ptr,  # out: (B, N); with caches (B, H * D), the queries
    k_ptr,  # out: (B, HKV, Tmax, D), this token's keys; None: without caches
    v_ptr,  # out: (B, HKV, Tmax, D), this token's values, or None
    len_ptr,  # (B,) int32, valid keys with this token's, or None
    counter_ptr,  # out: (COUNTERS,) int32, set to 0 for the next launch, or None
    stride_xb,  # x: elements between rows
    stride_wn,  # weight: the same
    stride_rb,  # residual: the same
    stride_ob,  # out: the same
    stride_kb, stride_kh, stride_kt,  # k: elements between batches, heads, rows
    stride_vb, stride_vh, stride_vt,  # v: the same
    stride_lb,  # len: elements between batches
    N,  # rows of the weight
    H,  # query heads
    HKV,  # key heads
    Tmax,  # keys that the caches have space for
    eps,  # added to the variance
    B: tl.constexpr,  # rows of x
    K: tl.constexpr,  # columns of x and of the weight
    D: tl.constexpr,  # head dimension
    GELU: tl.constexpr,  # "tanh", or "none" for erf; None: without GELU
    COUNTERS: tl.constexpr,  # counters
    SLOTS: tl.constexpr,  # outputs per row of a tile: B * GROUPS, rounded up to a power of two
    BLOCK_N: tl.constexpr,  # rows of the weight per program
    ROWS: tl.constexpr,  # rows per tile: a warp has one, or a part of one; GROUPS of these make BLOCK_N
    BLOCK_K: tl.constexpr,  # columns per tile
    TILES: tl.constexpr,  # tiles per row, cdiv(K, BLOCK_K)
    PDL: tl.constexpr,  # whether the launch starts before the one ahead of it has ended
):  # fmt: skip
    """One program computes BLOCK_N columns of gelu(norm(x) weightᵀ + bias) + residual, for all B rows."""
    GROUPS: tl.constexpr = BLOCK_N // ROWS
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)

    # All reads of the weights start here. They stay in registers until each row of x has been multiplied.
    weights = ()  # GROUPS * TILES tiles (ROWS, BLOCK_K)
    for group in tl.static_range(GROUPS):
        offs_n = first + group * ROWS + rows
        for i in tl.static_range(TILES):
            mask = (offs_n < N)[:, None] & (i * BLOCK_K + cols < K)[None, :]
            offs = offs_n[:, None] * stride_wn + (i * BLOCK_K + cols)[None, :]
            weights += (tl.load(weight_ptr + offs, mask=mask, other=0.0),)
    same = tl.zeros_like(rows)[:, None]  # each warp reads its own copy of what all rows share
    norm_weights, norm_biases = (), ()  # TILES tiles (ROWS, BLOCK_K)
    if norm_weight_ptr is not None:
        for i in tl.static_range(TILES):
            offs = same + (i * BLOCK_K + cols)[None, :]
            norm_weights += (tl.load(norm_weight_ptr + offs, mask=offs < K, other=0.0),)
            if norm_bias_ptr is not None:
                norm_biases += (tl.load(norm_bias_ptr + offs, mask=offs < K, other=0.0),)

    # The outputs of a program: column b * GROUPS + group has those of row b of x and of a group of ROWS rows.
    slots = tl.arange(0, SLOTS)[None, :]
    pid_b = (slots // GROUPS).to(tl.int64)
    offs_n = first + slots % GROUPS * ROWS + rows[:, None]  # (ROWS, SLOTS)
    mask_n = offs_n < N
    mask = mask_n & (pid_b < B)
    bias = tl.zeros([ROWS, SLOTS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + pid_b * stride_rb + offs_n, mask=mask, other=0.0).to(tl.float32)
    if k_ptr is not None:
        index = tl.load(len_ptr + pid_b * stride_lb, mask=pid_b < B, other=1)
        index = tl.minimum(tl.maximum(index, 1), Tmax).to(tl.int64) - 1  # (1, SLOTS)

    shifts = ()  # GROUPS tiles (ROWS,): the weight times the norm's bias
    if norm_weight_ptr is not None:
        scaled = ()  # the weight times the norm's weight, float32
        for group in tl.static_range(GROUPS):
            shift = tl.zeros([ROWS, BLOCK_K], tl.float32)
            for i in tl.static_range(TILES):
                if norm_bias_ptr is not None:
                    shift += weights[group * TILES + i].to(tl.float32) * norm_biases[i].to(tl.float32)
                scaled += (weights[group * TILES + i].to(tl.float32) * norm_weights[i].to(tl.float32),)
            shifts += (tl.sum(shift, 1),)
        weights = scaled

    sums = ()  # SLOTS tiles (ROWS,)
    for b in tl.static_range(B):
        xs = ()  # TILES tiles (ROWS, BLOCK_K) float32
        for i in tl.static_range(TILES):
            offs = same + (i * BLOCK_K + cols)[None, :]
            x = tl.load(x_ptr + tl.full([], b, tl.int64) * stride_xb + offs, mask=offs < K, other=0.0)
            xs += (x.to(tl.float32),)
        if norm_weight_ptr is not None:
            xs, rstd = _centre(xs, cols, eps, K, TILES, BLOCK_K)
        for group in tl.static_range(GROUPS):
            acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
            for i in tl.static_range(TILES):
                acc += xs[i] * weights[group * TILES + i].to(tl.float32)
            value = tl.sum(acc, 1)
            if norm_weight_ptr is not None:
                value = value * rstd + shifts[group]
            sums += (value,)
    for _ in tl.static_range(B * GROUPS, SLOTS):
        sums += (sums[0],)

    value = tl.reshape(_stack(sums, SLOTS), [ROWS, SLOTS]) + bias
    if GELU is not None:
        value = gelu(value, GELU == "tanh")
    if residual_ptr is not None:
        value += residual
    value = value.to(out_ptr.dtype.element_ty)
    if k_ptr is None:
        tl.store(out_ptr + pid_b * stride_ob + offs_n, value, mask=mask)
    else:
        head, offs_d = offs_n // D, offs_n % D
        is_q, is_v = head < H, head >= H + HKV
        tl.store(out_ptr + pid_b * stride_ob + offs_n, value, mask=mask & is_q)
        k_ptrs = k_ptr + pid_b * stride_kb + (head - H) * stride_kh + index * stride_kt + offs_d
        tl.store(k_ptrs, value, mask=mask & ~is_q & ~is_v)
        v_ptrs = v_ptr + pid_b * stride_vb + (head - H - HKV) * stride_vh + index * stride_vt + offs_d
        tl.store(v_ptrs, value, mask=mask & is_v)
    if counter_ptr is not None:  # noqa: SIM102 - known when the kernel is compiled
        if first == 0:
            for tile in tl.range(COUNTERS):
                tl.store(counter_ptr + tile, 0)


def decode_linear(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
    norm: tuple[Tensor, Tensor | None] | None = None,
    eps: float = 0.0,
    gelu: str | None = None,
    residual: Tensor | None = None,
    caches: tuple[Tensor, Tensor] | None = None,
    cache_len: Tensor | None = None,
    counter: Tensor | None = None,
) -> Launch:
    """The launch that fills out = gelu(norm(x) weightᵀ + bias) + residual; None leaves a step out.

    x: (B, K). weight: (N, K). bias: (N,). out, residual: (B, N). norm: weight and bias (K,) of a LayerNorm.
    gelu: "tanh", or "none" for erf. caches: (B, HKV, Tmax, D) each. With them, the outputs are queries, keys
    and values: out (B, H D) gets the queries, the caches get the others at index cache_len - 1; cache_len:
    int32 (B,). counter: contiguous int32, filled with 0. All last dimensions are contiguous.
    """
    (b, k), n = x.shape, weight.shape[0]
    per_row = max(1, tile.block_n * x.element_size() // 512)  # warps
    rows = max(1, min(tile.block_m, tile.num_warps // per_row))
    hkv, tmax, d = (0, 0, 1) if caches is None else caches[0].shape[1:]
    norm_weight, norm_bias = norm or (None, None)
    k_cache, v_cache = caches or (None, None)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "norm_weight_ptr": norm_weight,
        "norm_bias_ptr": norm_bias,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "out_ptr": out,
        "k_ptr": k_cache,
        "v_ptr": v_cache,
        "len_ptr": cache_len,
        "counter_ptr": counter,
        "stride_xb": x.stride(0),
        "stride_wn": weight.stride(0),
        "stride_rb": 0 if residual is None else residual.stride(0),
        "stride_ob": out.stride(0),
        **cache_strides("k", k_cache),
        **cache_strides("v", v_cache),
        "stride_lb": 0 if cache_len is None else cache_len.stride(0),
        "N": n,
        "H": out.shape[1] // d,
        "HKV": hkv,
        "Tmax": tmax,
        "eps": eps,
        "B": b,
        "K": k,
        "D": d,
        "GELU": gelu,
        "COUNTERS": 0 if counter is None else counter.numel(),
        "SLOTS": next_power_of_2(b) * (tile.block_m // rows),
        "BLOCK_N": tile.block_m,
        "ROWS": rows,
        "BLOCK_K": tile.block_n,
        "TILES": cdiv(k, tile.block_n),
        "PDL": tile.pdl,
    }
    return Launch(_decode_linear_kernel, (cdiv(n, tile.block_m),), arguments, tile)


def cache_strides(name: str, cache: Tensor | None) -> dict[str, int]:
    """The stride arguments of a kernel for a cache (B, HKV, Tmax, D)."""
    strides = (0, 0, 0) if cache is None else cache.stride()[:3]
    return {f"stride_{name}{dim}": stride for dim, stride in zip("bht", strides, strict=True)}
