"""The forward pass: online softmax over tiles of keys, in base 2."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import LOG2E, dropout_keep, dropout_keep_quads
from kernels.launch import Launch, cdiv, dropout_arguments, precision
from kernels.tuning import Tile, next_power_of_2

# The smallest scale that is not zero in float32: masked logits are -inf before they are scaled.
_SMALLEST = torch.finfo(torch.float32).tiny


@triton.jit
def load_rows(ptr, rows, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Loads rows of a (T, D) matrix with a contiguous last dimension.

    rows: (R,) row indices. Returns (R, BLOCK_D) in the matrix's dtype, zero outside the matrix.
    MASK_ROWS=False promises that every row is inside.
    """
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if MASK_ROWS:
        tile = tl.load(ptrs, mask=(rows < T)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_rows(ptr, tile, rows, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile (R, BLOCK_D) in rows of a (T, D) matrix, rounded to its dtype.

    rows: (R,) row indices. Elements outside the matrix are not stored.
    """
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows < T)[:, None] & (offs_d < D)[None, :])


@triton.jit
def load_start(start_ptr, rows, stride, Tq, Tk):
    """The first key of each query, clamped to [0, Tk]: int32 of rows' shape.

    start_ptr: int32, one element per query, `stride` apart. rows: (R,) queries. A row past the last query
    repeats the last query's value, so that it does not widen the range of keys that its tile reads.
    """
    start = tl.load(start_ptr + tl.minimum(rows, Tq - 1).to(tl.int64) * stride)
    return tl.minimum(tl.maximum(start, 0), Tk)


@triton.jit
def key_range(pid_m, start, Tq, Tk, HAS_START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that tile `pid_m` of the queries reads: scalars lo, full_lo, full_hi, hi.

    start: (BLOCK_M,) first key of each query, read with HAS_START. [lo, hi) holds every key that a query of
    the tile sees; every query sees all keys of [full_lo, full_hi), so these keys need no mask. All but hi are
    multiples of BLOCK_N.
    """
    first = Tk - Tq + pid_m * BLOCK_M  # the position of the tile's first query
    hi = tl.minimum(first + BLOCK_M, Tk)
    full_hi = (first + 1) // BLOCK_N * BLOCK_N
    lo, full_lo = 0, 0
    if HAS_START:
        lo = tl.min(start, 0) // BLOCK_N * BLOCK_N
        full_lo = tl.minimum(tl.cdiv(tl.max(start, 0), BLOCK_N) * BLOCK_N, full_hi)
        full_hi = tl.maximum(full_hi, lo)
        full_lo = tl.maximum(full_lo, lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def masked_count(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """The number of tiles of width BLOCK that need a mask: those of [lo, full_lo) and of [full_hi, hi)."""
    return (full_lo - lo) // BLOCK + tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK)


@triton.jit
def masked_begin(i, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """The first index of the i-th tile that needs a mask: tiles of [lo, full_lo), then tiles from full_hi."""
    before = (full_lo - lo) // BLOCK
    return tl.where(i < before, lo + i * BLOCK, full_hi + (i - before) * BLOCK)


@triton.jit
def is_visible(positions, keys, start, HAS_START: tl.constexpr):
    """The causal mask: True where a query sees a key.

    positions, keys and start hold the queries' positions, the keys and the queries' first keys, as (R, 1) and
    (1, K) tiles that broadcast, or transposed. They count from the same key: one for which the columns are an
    arange, so that the machine code compares with constants. Returns a bool tile of the broadcast shape.
    """
    visible = keys <= positions
    if HAS_START:
        visible = visible & (keys >= start)
    return visible


@triton.jit
def keep_tile(seed, rows, begin, Tk, threshold, QUADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The dropout mask of the keys from `begin`: bool (R, BLOCK_N).

    rows: (R,) int64, rows of the softmax weights seen as a matrix (B * H * Tq, Tk).
    """
    if QUADS:  # Tk is a multiple of 4, so one counter covers four keys of one row
        counter = rows[:, None] * (Tk // 4) + begin // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
        keep = dropout_keep_quads(seed, counter, threshold)
    else:
        keep = dropout_keep(seed, rows[:, None] * Tk + begin + tl.arange(0, BLOCK_N)[None, :], threshold)
    return keep


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin,
    stride_kt, stride_vt, Tq, Tk, scale2, threshold,
    D: tl.constexpr, HAS_START: tl.constexpr, HAS_DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the BLOCK_N keys from `begin` to the running softmax of a tile of queries.

    Takes and returns acc (BLOCK_M, BLOCK_D), the weighted sum of values, row_sum (BLOCK_M,) and row_max
    (BLOCK_M,), all float32. q: (BLOCK_M, BLOCK_D). offs_m, start: (BLOCK_M,) queries and their first keys.
    MASKED=False promises that every query sees every one of these keys.
    """
    offs_n = begin + tl.arange(0, BLOCK_N)
    if MASKED:
        offs_n = tl.minimum(offs_n, Tk - 1)  # no query sees a key past the end: any row can replace it
    k = load_rows(k_ptr, offs_n, stride_kt, Tk, D, BLOCK_D, False)  # (BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)

    if MASKED:
        positions = offs_m - begin + (Tk - Tq)  # (BLOCK_M,)
        columns = tl.arange(0, BLOCK_N)
        visible = is_visible(positions[:, None], columns[None, :], (start - begin)[:, None], HAS_START)
        s = tl.where(visible, s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale2)  # (BLOCK_M,)
    shift = new_max
    if MASKED:
        # -inf - -inf is NaN, so a row that has seen no key yet is shifted by 0.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s * scale2 - shift[:, None])  # (BLOCK_M, BLOCK_N)

    alpha = tl.exp2(row_max - shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(keep_tile(seed, pid_bh * Tq + offs_m, begin, Tk, threshold, QUADS, BLOCK_N), p, 0.0)
    v = load_rows(v_ptr, offs_n, stride_vt, Tk, D, BLOCK_D, False)  # (BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H / GROUPS, Tk, D)
    v_ptr,  # (B, H / GROUPS, Tk, D)
    start_ptr,  # (B,) or (B, Tq) int32, the first key of each query; None: every query starts at key 0
    seed_ptr,  # 0-d int64; None: without dropout
    out_ptr,  # out: (B, H, Tq, D)
    lse2_ptr,  # out: (B, H, Tq) float32, contiguous, log2 of the sum of exp2 of a row's logits
    stride_qb, stride_qh, stride_qt,  # q: elements between batches, heads, rows
    stride_kb, stride_kh, stride_kt,  # k: the same
    stride_vb, stride_vh, stride_vt,  # v: the same
    stride_ob, stride_oh, stride_ot,  # out: the same
    stride_sb, stride_st,  # start: elements between batches, queries; 0 where all queries share one
    H,  # query heads
    Tq,  # queries per head
    Tk,  # keys per head
    scale2,  # the softmax's scale * log2(e)
    threshold,  # uint32: a weight is dropped where its random word is smaller
    keep_scale,  # 1 / (1 - dropout_p)
    GROUPS: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # head dimension
    HAS_START: tl.constexpr,  # start_ptr is not None
    HAS_DROPOUT: tl.constexpr,  # seed_ptr is not None
    QUADS: tl.constexpr,  # Tk is a multiple of 4
    PRECISION: tl.constexpr,  # input_precision of tl.dot
    BLOCK_M: tl.constexpr,  # queries per tile
    BLOCK_N: tl.constexpr,  # keys per tile
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
):  # fmt: skip
    """One program computes the output of one tile of queries of one head."""
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid = tl.program_id(0)
    # The last queries see the most keys. Their tiles run first, so that no long tile is left for the end.
    # Neighbouring programs are tiles of one head and share its keys and values in L2.
    pid_m = num_m - 1 - pid % num_m
    pid_bh = (pid // num_m).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    k_ptr += pid_b * stride_kb + pid_h // GROUPS * stride_kh
    v_ptr += pid_b * stride_vb + pid_h // GROUPS * stride_vh

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, stride_qt, Tq, D, BLOCK_D, True)
    start, seed = offs_m, 0  # placeholders, unused without key_start and dropout
    if HAS_START:
        start = load_start(start_ptr + pid_b * stride_sb, offs_m, stride_st, Tq, Tk)  # (BLOCK_M,)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    lo, full_lo, full_hi, hi = key_range(pid_m, start, Tq, Tk, HAS_START, BLOCK_M, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for begin in tl.range(full_lo, full_hi, BLOCK_N):
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin,
            stride_kt, stride_vt, Tq, Tk, scale2, threshold,
            D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, BLOCK_N, BLOCK_D, MASKED=False,
        )  # fmt: skip
    for i in tl.range(0, masked_count(lo, full_lo, full_hi, hi, BLOCK_N)):
        begin = masked_begin(i, lo, full_lo, full_hi, BLOCK_N)
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin,
            stride_kt, stride_vt, Tq, Tk, scale2, threshold,
            D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, BLOCK_N, BLOCK_D, MASKED=True,
        )  # fmt: skip

    empty = row_max == float("-inf")  # (BLOCK_M,) queries that see no key: their output is 0
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc * (keep_scale / row_sum)[:, None]
    store_rows(out_ptr + pid_b * stride_ob + pid_h * stride_oh, acc, offs_m, stride_ot, Tq, D, BLOCK_D)
    lse2 = row_max + tl.log2(row_sum)
    tl.store(lse2_ptr + pid_bh * Tq + offs_m, lse2, mask=offs_m < Tq)


def attention_forward(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse2: Tensor,
    scale: float,
    dropout_p: float,
    tile: Tile,
) -> Launch:
    """The launch that fills `out` and `lse2`.

    q, out: (B, H, Tq, D). k, v: (B, Hkv, Tk, D). The last dimensions are contiguous. key_start: int32 (B,) or
    (B, Tq). seed: 0-d int64, None without dropout. lse2: (B, H, Tq) float32, contiguous. scale: positive.
    """
    b, h, tq, _ = q.shape
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse2_ptr": lse2,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", out),
        **common_arguments(q=q, k=k, key_start=key_start, seed=seed, scale=scale, dropout_p=dropout_p),
    }
    return Launch.of(_attention_fwd_kernel, (cdiv(tq, tile.block_m) * b * h,), arguments, tile)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """The stride arguments of a kernel for x (B, H, T, D) with a contiguous last dimension."""
    b, h, t, _ = x.stride()
    return {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}t": t}


def common_arguments(
    *, q: Tensor, k: Tensor, key_start: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float
) -> dict[str, Any]:
    """The kernel arguments that forward and backward share; shapes as in `attention_forward`."""
    d = q.shape[3]
    return {
        "start_ptr": key_start,
        "stride_sb": 0 if key_start is None else key_start.stride(0),
        "stride_st": key_start.stride(1) if key_start is not None and key_start.ndim == 2 else 0,
        "H": q.shape[1],
        "Tq": q.shape[2],
        "Tk": k.shape[2],
        "scale2": max(scale * LOG2E.value, _SMALLEST),
        **dropout_arguments(seed, dropout_p),
        "GROUPS": q.shape[1] // k.shape[1],
        "D": d,
        "HAS_START": key_start is not None,
        "HAS_DROPOUT": seed is not None,
        "QUADS": k.shape[2] % 4 == 0,
        "PRECISION": precision(q.dtype),
        "BLOCK_D": block_d(d),
    }


def block_d(d: int) -> int:
    """A tile's width for head dimension `d`: a power of two for `tl.arange`, at least 16 for `tl.dot`."""
    return max(16, next_power_of_2(d))
