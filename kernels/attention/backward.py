"""The backward pass: the softmax weights are recomputed from lse2, tile by tile.

The deterministic form takes seven matmuls in two kernels: dQ over tiles of keys (three), then dK and dV over
tiles of queries (four). The atomic form takes five matmuls in the second kernel, which also adds to a
float32 dQ with atomics, in no fixed order; two small kernels prepare and convert that dQ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import (
    common_arguments,
    is_visible,
    keep_tile,
    key_range,
    load_rows,
    load_start,
    masked_begin,
    masked_count,
    store_rows,
    strides,
)
from kernels.device_functions import unfused_multiply
from kernels.launch import Launch, cdiv
from kernels.tuning import AttentionTiles


@triton.jit
def _row_statistics(
    out_ptr, do_ptr, delta_ptr, first_ptr, last_ptr, start, pid_m, pid_b, pid_h, pid_bh, num_m, offs_m,
    stride_ot, stride_dot,
    Tq, D: tl.constexpr, HAS_START: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns dO (BLOCK_M, BLOCK_D) and delta = rowsum(dO * O) (BLOCK_M,) float32 of a tile of queries.

    out_ptr and do_ptr point at the head's (Tq, D) matrices. Stores delta and, once per batch, the tile's
    smallest and largest key_start, from `start` (BLOCK_M,).
    """
    do = load_rows(do_ptr, offs_m, stride_dot, Tq, D, BLOCK_D, True)
    out = load_rows(out_ptr, offs_m, stride_ot, Tq, D, BLOCK_D, True)
    if do.dtype == tl.float32:
        terms = unfused_multiply(do, out)
    else:
        terms = do.to(tl.float32) * out.to(tl.float32)
    delta = tl.sum(terms, 1)
    tl.store(delta_ptr + pid_bh * Tq + offs_m, delta, mask=offs_m < Tq)
    if HAS_START:  # key_start is the same for all heads: head 0 stores it
        tl.store(first_ptr + pid_b * num_m + pid_m, tl.min(start, 0), mask=pid_h == 0)
        tl.store(last_ptr + pid_b * num_m + pid_m, tl.max(start, 0), mask=pid_h == 0)
    return do, delta


@triton.jit
def _add_dq(
    dq, q, do, lse2, delta, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin,
    stride_kt, stride_vt, Tq, Tk, scale2, threshold, keep_scale,
    D: tl.constexpr, HAS_START: tl.constexpr, HAS_DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Returns dq plus the share of the BLOCK_N keys from `begin`.

    dq: (BLOCK_M, BLOCK_D) float32, not yet multiplied by the scale. q, do: (BLOCK_M, BLOCK_D). lse2, delta,
    start, offs_m: (BLOCK_M,). MASKED=False promises that every query sees every one of these keys.
    """
    offs_n = begin + tl.arange(0, BLOCK_N)
    if MASKED:
        offs_n = tl.minimum(offs_n, Tk - 1)  # no query sees a key past the end: any row can replace it
    k = load_rows(k_ptr, offs_n, stride_kt, Tk, D, BLOCK_D, False)  # (BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, offs_n, stride_vt, Tk, D, BLOCK_D, False)  # (BLOCK_N, BLOCK_D)

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    s = s * scale2 - lse2[:, None]
    if MASKED:
        positions = offs_m - begin + (Tk - Tq)  # (BLOCK_M,)
        columns = tl.arange(0, BLOCK_N)
        visible = is_visible(positions[:, None], columns[None, :], (start - begin)[:, None], HAS_START)
        s = tl.where(visible, s, float("-inf"))
    p = tl.exp2(s)

    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if HAS_DROPOUT:
        keep = keep_tile(seed, pid_bh * Tq + offs_m, begin, Tk, threshold, QUADS, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H / GROUPS, Tk, D)
    v_ptr,  # (B, H / GROUPS, Tk, D)
    out_ptr,  # (B, H, Tq, D), the output of forward
    do_ptr,  # (B, H, Tq, D), the gradient of out
    start_ptr,  # (B,) or (B, Tq) int32, the first key of each query; None: every query starts at key 0
    seed_ptr,  # 0-d int64; None: without dropout
    lse2_ptr,  # (B, H, Tq) float32, contiguous, as forward stored it
    delta_ptr,  # out: (B, H, Tq) float32, contiguous, rowsum(dO * O), which the dK and dV kernel reads
    first_ptr,  # out: (B, cdiv(Tq, BLOCK_M)) int32, the smallest key_start of each tile of queries, or None
    last_ptr,  # out: the largest, or None
    dq_ptr,  # out: (B, H, Tq, D)
    stride_qb, stride_qh, stride_qt,  # q: elements between batches, heads, rows
    stride_kb, stride_kh, stride_kt,  # k: the same
    stride_vb, stride_vh, stride_vt,  # v: the same
    stride_ob, stride_oh, stride_ot,  # out: the same
    stride_dob, stride_doh, stride_dot,  # do: the same
    stride_dqb, stride_dqh, stride_dqt,  # dq: the same
    stride_sb, stride_st,  # start: elements between batches, queries; 0 where all queries share one
    H,  # query heads
    Tq,  # queries per head
    Tk,  # keys per head
    scale,  # the softmax's scale
    scale2,  # scale * log2(e)
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
    """One program computes dQ of one tile of queries of one head."""
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = num_m - 1 - pid % num_m  # the longest tiles first, as in forward
    pid_bh = (pid // num_m).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    k_ptr += pid_b * stride_kb + pid_h // GROUPS * stride_kh
    v_ptr += pid_b * stride_vb + pid_h // GROUPS * stride_vh

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start, seed = offs_m, 0  # placeholders, unused without key_start and dropout
    if HAS_START:
        start = load_start(start_ptr + pid_b * stride_sb, offs_m, stride_st, Tq, Tk)  # (BLOCK_M,)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    do, delta = _row_statistics(
        out_ptr + pid_b * stride_ob + pid_h * stride_oh, do_ptr + pid_b * stride_dob + pid_h * stride_doh,
        delta_ptr, first_ptr, last_ptr, start, pid_m, pid_b, pid_h, pid_bh, num_m, offs_m,
        stride_ot, stride_dot, Tq, D, HAS_START, BLOCK_D,
    )  # fmt: skip
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, stride_qt, Tq, D, BLOCK_D, True)
    lse2 = tl.load(lse2_ptr + pid_bh * Tq + offs_m, mask=offs_m < Tq, other=float("inf"))
    lo, full_lo, full_hi, hi = key_range(pid_m, start, Tq, Tk, HAS_START, BLOCK_M, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in tl.range(full_lo, full_hi, BLOCK_N):
        dq = _add_dq(
            dq, q, do, lse2, delta, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin,
            stride_kt, stride_vt, Tq, Tk, scale2, threshold, keep_scale,
            D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, BLOCK_N, BLOCK_D, MASKED=False,
        )  # fmt: skip
    for i in tl.range(0, masked_count(lo, full_lo, full_hi, hi, BLOCK_N)):
        begin = masked_begin(i, lo, full_lo, full_hi, BLOCK_N)
        dq = _add_dq(
            dq, q, do, lse2, delta, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin,
            stride_kt, stride_vt, Tq, Tk, scale2, threshold, keep_scale,
            D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, BLOCK_N, BLOCK_D, MASKED=True,
        )  # fmt: skip

    dq_ptr += pid_b * stride_dqb + pid_h * stride_dqh
    store_rows(dq_ptr, dq * scale, offs_m, stride_dqt, Tq, D, BLOCK_D)


@triton.jit
def _attention_bwd_delta_kernel(
    out_ptr,  # (B, H, Tq, D), the output of forward
    do_ptr,  # (B, H, Tq, D), the gradient of out
    start_ptr,  # (B,) or (B, Tq) int32, the first key of each query; None: every query starts at key 0
    delta_ptr,  # out: (B, H, Tq) float32, contiguous, rowsum(dO * O)
    first_ptr,  # out: (B, cdiv(Tq, BLOCK_M)) int32, the smallest key_start of each tile of queries, or None
    last_ptr,  # out: the largest, or None
    sum_ptr,  # out: (B, H, D, Tq) float32, contiguous, zeros; None: the deterministic form
    stride_ob, stride_oh, stride_ot,  # out: elements between batches, heads, rows
    stride_dob, stride_doh, stride_dot,  # do: the same
    stride_sb, stride_st,  # start: elements between batches, queries; 0 where all queries share one
    H,  # query heads
    Tq,  # queries per head
    Tk,  # keys per head
    D: tl.constexpr,  # head dimension
    HAS_START: tl.constexpr,  # start_ptr is not None
    BLOCK_M: tl.constexpr,  # queries per tile
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
):  # fmt: skip
    """delta and the ranges of key_start without the dQ kernel; one tile of queries per program."""
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid_m = tl.program_id(0) % num_m
    pid_bh = (tl.program_id(0) // num_m).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    start = offs_m
    if HAS_START:
        start = load_start(start_ptr + pid_b * stride_sb, offs_m, stride_st, Tq, Tk)  # (BLOCK_M,)
    _row_statistics(
        out_ptr + pid_b * stride_ob + pid_h * stride_oh, do_ptr + pid_b * stride_dob + pid_h * stride_doh,
        delta_ptr, first_ptr, last_ptr, start, pid_m, pid_b, pid_h, pid_bh, num_m, offs_m,
        stride_ot, stride_dot, Tq, D, HAS_START, BLOCK_D,
    )  # fmt: skip

    if sum_ptr is not None:
        sums = sum_ptr + pid_bh * Tq * D + offs_d[:, None].to(tl.int64) * Tq + offs_m[None, :]
        mask = (offs_d < D)[:, None] & (offs_m < Tq)[None, :]
        tl.store(sums, tl.zeros([BLOCK_D, BLOCK_M], tl.float32), mask=mask)


@triton.jit
def _attention_bwd_convert_kernel(
    sum_ptr,  # (B, H, D, Tq) float32, contiguous, dQ without the scale
    dq_ptr,  # out: (B, H, Tq, D)
    stride_dqb, stride_dqh, stride_dqt,  # dq: elements between batches, heads, rows
    H,  # query heads
    Tq,  # queries per head
    scale,  # the softmax's scale
    D: tl.constexpr,  # head dimension
    BLOCK_M: tl.constexpr,  # queries per tile
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
):  # fmt: skip
    """The atomic form's dQ, scaled and in its own dtype; one tile of queries of one head per program."""
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid_m = tl.program_id(0) % num_m
    pid_bh = (tl.program_id(0) // num_m).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)

    sums = sum_ptr + pid_bh * Tq * D + offs_d[:, None].to(tl.int64) * Tq + offs_m[None, :]
    dq = tl.load(sums, mask=(offs_d < D)[:, None] & (offs_m < Tq)[None, :], other=0.0)  # (BLOCK_D, BLOCK_M)
    dq_ptr += pid_bh // H * stride_dqb + pid_bh % H * stride_dqh
    store_rows(dq_ptr, tl.trans(dq) * scale, offs_m, stride_dqt, Tq, D, BLOCK_D)


@triton.jit
def _query_range(
    key, first_ptr, last_ptr, num_rows, Tq, Tk,
    HAS_START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The queries that the BLOCK_N keys from `key` concern: scalars lo, full_lo, full_hi, hi.

    first_ptr, last_ptr: (num_rows,) int32, the smallest and largest key_start of each tile of ROWS queries,
    read with HAS_START. [lo, hi) holds every query that sees one of the keys; every query of
    [full_lo, full_hi) sees all of them, so these queries need no mask. All but hi are multiples of BLOCK_M.
    """
    lo = tl.maximum(key - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
    hi = Tq
    full_lo = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BLOCK_M
    full_hi = Tq // BLOCK_M * BLOCK_M

    if HAS_START:
        # hi: the end of the last tile with a query that starts at or before one of the keys.
        # full_hi: the begin of the first tile, past full_lo, with a query that starts after `key`.
        hi = 0
        for begin in tl.range(0, num_rows, 256):
            offs = begin + tl.arange(0, 256)
            first = tl.load(first_ptr + offs, mask=offs < num_rows, other=key + BLOCK_N)  # (256,)
            last = tl.load(last_ptr + offs, mask=offs < num_rows, other=0)  # (256,)
            hi = tl.maximum(hi, tl.max(tl.where(first < key + BLOCK_N, (offs + 1) * ROWS, 0), 0))
            late = (last > key) & ((offs + 1) * ROWS > full_lo)
            full_hi = tl.minimum(full_hi, tl.min(tl.where(late, offs * ROWS, full_hi), 0))
        hi = tl.minimum(hi, Tq)
        full_hi = tl.minimum(full_hi, hi) // BLOCK_M * BLOCK_M

    full_lo = tl.maximum(tl.minimum(full_lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M), lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, start_ptr, sum_ptr, seed, pid_bh, key, begin,
    stride_qt, stride_dot, stride_st, Tq, Tk, scale2, threshold, keep_scale,
    D: tl.constexpr, HAS_START: tl.constexpr, HAS_DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr, ADD_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Returns dk and dv plus the share of the BLOCK_M queries from `begin`, for the BLOCK_N keys from `key`.

    dk, dv: (BLOCK_N, BLOCK_D) float32, dk not yet multiplied by the scale. k, v: (BLOCK_N, BLOCK_D). Every
    pointer but start_ptr points at the data of one query head. MASKED=False promises that every one of these
    queries sees every one of these keys. With ADD_DQ, dQ is added at sum_ptr (D, Tq) with atomics.
    """
    offs_m, offs_n = begin + tl.arange(0, BLOCK_M), key + tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr, offs_m, stride_qt, Tq, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
    do = load_rows(do_ptr, offs_m, stride_dot, Tq, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
    if MASKED:
        # Where q and dO are zeros, lse2 = 0 makes the weights 1: they add nothing, and zeros cost no select.
        lse2 = tl.load(lse2_ptr + offs_m, mask=offs_m < Tq, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
    else:
        lse2 = tl.load(lse2_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)

    # S and dP are computed transposed, so that dV and dK need no transpose of a computed tile.
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    st = st * scale2 - lse2[None, :]
    if MASKED:
        first = begin + (Tk - Tq)  # the position of the first query
        columns = tl.arange(0, BLOCK_M)
        visible = is_visible(columns[None, :], (offs_n - first)[:, None], columns[None, :], False)
        if HAS_START:
            start = tl.load(start_ptr + offs_m.to(tl.int64) * stride_st, mask=offs_m < Tq, other=0)
            visible = visible & (offs_n[:, None] >= start[None, :])  # in range without being clamped
        st = tl.where(visible, st, float("-inf"))
    pt = tl.exp2(st)

    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    dropped = pt
    if HAS_DROPOUT:
        keep = tl.trans(keep_tile(seed, pid_bh * Tq + offs_m, key, Tk, threshold, QUADS, BLOCK_N))
        dropped = tl.where(keep, pt * keep_scale, 0.0)
        dpt = tl.where(keep, dpt * keep_scale, 0.0)
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
    dst = (pt * (dpt - delta[None, :])).to(q.dtype)
    dk = tl.dot(dst, q, dk, input_precision=PRECISION)

    if ADD_DQ:
        offs_d = tl.arange(0, BLOCK_D)
        dqt = tl.dot(tl.trans(k), dst, input_precision=PRECISION)  # (BLOCK_D, BLOCK_M)
        sums = sum_ptr + offs_d[:, None].to(tl.int64) * Tq + offs_m[None, :]
        tl.atomic_add(sums, dqt, mask=(offs_d < D)[:, None] & (offs_m < Tq)[None, :], sem="relaxed")
    return dk, dv


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H / GROUPS, Tk, D)
    v_ptr,  # (B, H / GROUPS, Tk, D)
    do_ptr,  # (B, H, Tq, D), the gradient of out
    start_ptr,  # (B,) or (B, Tq) int32, the first key of each query; None: every query starts at key 0
    seed_ptr,  # 0-d int64; None: without dropout
    lse2_ptr,  # (B, H, Tq) float32, contiguous, as forward stored it
    delta_ptr,  # (B, H, Tq) float32, contiguous, rowsum(dO * O)
    first_ptr,  # (B, cdiv(Tq, ROWS)) int32, the smallest key_start of each tile of ROWS queries, or None
    last_ptr,  # the largest, or None
    dk_ptr,  # out: (B, H / GROUPS, Tk, D)
    dv_ptr,  # out: (B, H / GROUPS, Tk, D)
    sum_ptr,  # in and out, with ADD_DQ: (B, H, D, Tq) float32, contiguous, dQ is added here without the scale
    stride_qb, stride_qh, stride_qt,  # q: elements between batches, heads, rows
    stride_kb, stride_kh, stride_kt,  # k: the same
    stride_vb, stride_vh, stride_vt,  # v: the same
    stride_dob, stride_doh, stride_dot,  # do: the same
    stride_dkb, stride_dkh, stride_dkt,  # dk: the same
    stride_dvb, stride_dvh, stride_dvt,  # dv: the same
    stride_sb, stride_st,  # start: elements between batches, queries; 0 where all queries share one
    H,  # query heads
    Tq,  # queries per head
    Tk,  # keys per head
    scale,  # the softmax's scale
    scale2,  # scale * log2(e)
    threshold,  # uint32: a weight is dropped where its random word is smaller
    keep_scale,  # 1 / (1 - dropout_p)
    GROUPS: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # head dimension
    HAS_START: tl.constexpr,  # start_ptr is not None
    HAS_DROPOUT: tl.constexpr,  # seed_ptr is not None
    QUADS: tl.constexpr,  # Tk is a multiple of 4
    PRECISION: tl.constexpr,  # input_precision of tl.dot
    ADD_DQ: tl.constexpr,  # the atomic form: dQ is computed here too
    ROWS: tl.constexpr,  # queries per tile of the kernel that stored first and last
    BLOCK_M: tl.constexpr,  # queries per tile
    BLOCK_N: tl.constexpr,  # keys per tile
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
):  # fmt: skip
    """One program computes dK and dV of one tile of keys, summed over the query heads that share them."""
    num_n, num_rows = tl.cdiv(Tk, BLOCK_N), tl.cdiv(Tq, ROWS)
    pid = tl.program_id(0)
    pid_n = pid % num_n  # the first keys, which the most queries see, come first
    pid_bk = (pid // num_n).to(tl.int64)
    pid_b, pid_k = pid_bk // (H // GROUPS), pid_bk % (H // GROUPS)

    key = pid_n * BLOCK_N
    offs_n = key + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + pid_b * stride_kb + pid_k * stride_kh, offs_n, stride_kt, Tk, D, BLOCK_D, True)
    v = load_rows(v_ptr + pid_b * stride_vb + pid_k * stride_vh, offs_n, stride_vt, Tk, D, BLOCK_D, True)
    seed = 0
    if HAS_START:
        start_ptr += pid_b * stride_sb
        first_ptr += pid_b * num_rows
        last_ptr += pid_b * num_rows
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    lo, full_lo, full_hi, hi = _query_range(
        key, first_ptr, last_ptr, num_rows, Tq, Tk, HAS_START, BLOCK_M, BLOCK_N, ROWS
    )

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for group in tl.range(GROUPS):
        pid_h = pid_k * GROUPS + group
        pid_bh = pid_b * H + pid_h
        q_head = q_ptr + pid_b * stride_qb + pid_h * stride_qh
        do_head = do_ptr + pid_b * stride_dob + pid_h * stride_doh
        lse2_head, delta_head = lse2_ptr + pid_bh * Tq, delta_ptr + pid_bh * Tq
        sum_head = sum_ptr
        if ADD_DQ:
            sum_head = sum_ptr + pid_bh * Tq * D

        for begin in tl.range(full_lo, full_hi, BLOCK_M):
            dk, dv = _add_dkdv(
                dk, dv, k, v, q_head, do_head, lse2_head, delta_head, start_ptr, sum_head, seed, pid_bh, key,
                begin, stride_qt, stride_dot, stride_st, Tq, Tk, scale2, threshold, keep_scale,
                D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, ADD_DQ, BLOCK_M, BLOCK_N, BLOCK_D, MASKED=False,
            )  # fmt: skip
        for i in tl.range(0, masked_count(lo, full_lo, full_hi, hi, BLOCK_M)):
            begin = masked_begin(i, lo, full_lo, full_hi, BLOCK_M)
            dk, dv = _add_dkdv(
                dk, dv, k, v, q_head, do_head, lse2_head, delta_head, start_ptr, sum_head, seed, pid_bh, key,
                begin, stride_qt, stride_dot, stride_st, Tq, Tk, scale2, threshold, keep_scale,
                D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, ADD_DQ, BLOCK_M, BLOCK_N, BLOCK_D, MASKED=True,
            )  # fmt: skip

    dk_ptr += pid_b * stride_dkb + pid_k * stride_dkh
    store_rows(dk_ptr, dk * scale, offs_n, stride_dkt, Tk, D, BLOCK_D)
    dv_ptr += pid_b * stride_dvb + pid_k * stride_dvh
    store_rows(dv_ptr, dv, offs_n, stride_dvt, Tk, D, BLOCK_D)


def attention_backward(
    *,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse2: Tensor,
    key_start: Tensor | None,
    seed: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    dropout_p: float,
    tiles: AttentionTiles,
) -> list[Launch]:
    """The launches, in order, that fill dq, or dk and dv, or all three.

    grad, q, out, dq: (B, H, Tq, D). k, v, dk, dv: (B, Hkv, Tk, D). The last dimensions are contiguous.
    key_start: int32 (B,) or (B, Tq). seed: 0-d int64, None without dropout. lse2: (B, H, Tq) float32,
    contiguous.
    """
    b, h, tq, d = q.shape
    atomic = tiles.atomic if dq is not None and dk is not None else None
    dq_alone = dq is not None and atomic is None  # dQ has a kernel of its own, which also computes delta
    rows = tiles.dq if dq_alone else tiles.delta
    num_rows = cdiv(tq, rows.block_m)

    available = common_arguments(q=q, k=k, key_start=key_start, seed=seed, scale=scale, dropout_p=dropout_p)
    available["scale"] = scale
    tensors = {"q": q, "k": k, "v": v, "o": out, "do": grad, "dq": dq, "dk": dk, "dv": dv}
    for name, tensor in tensors.items():
        if tensor is not None:
            available |= {"out_ptr" if name == "o" else f"{name}_ptr": tensor, **strides(name, tensor)}
    available |= {
        "lse2_ptr": lse2,
        "delta_ptr": torch.empty_like(lse2),
        "first_ptr": None if key_start is None else key_start.new_empty(b * num_rows),
        "last_ptr": None if key_start is None else key_start.new_empty(b * num_rows),
        "sum_ptr": None if atomic is None else lse2.new_empty(b * h * d * tq),
        "ROWS": rows.block_m,
        "ADD_DQ": atomic is not None,
    }

    by_query = (num_rows * b * h,)
    first = _attention_bwd_dq_kernel if dq_alone else _attention_bwd_delta_kernel
    launches = [Launch.of(first, by_query, available, rows)]
    if dk is not None:
        keys = atomic or tiles.dkdv
        by_key = (cdiv(k.shape[2], keys.block_n) * b * k.shape[1],)
        launches.append(Launch.of(_attention_bwd_dkdv_kernel, by_key, available, keys))
    if atomic is not None:
        launches.append(Launch.of(_attention_bwd_convert_kernel, by_query, available, rows))
    return launches
