"""The backward pass: P is computed again from lse2, tile by tile.

The deterministic form takes seven products: dQ over tiles of keys (three), then dK and dV over tiles of
queries (four). The other form takes five: one pass over tiles of keys, which adds dQ into float32 memory in
no fixed order.
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
    masked_tile,
    masked_tiles,
    store_rows,
    strides,
)
from kernels.launch import Launch, cdiv
from kernels.tuning import AttentionTiles


@triton.jit
def _row_statistics(
    out_ptr, do_ptr, delta_ptr, start, first_ptr, last_ptr, pid_m, pid_h, pid_bh, num_m, pid_b, offs_m,
    stride_ot, stride_dot,
    Tq, D: tl.constexpr, HAS_START: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dO, and delta = rowsum(dO * O), which is also stored; head 0 stores the tile's smallest and largest
    key_start."""
    do = load_rows(do_ptr, offs_m, stride_dot, Tq, D, BLOCK_D, True)
    out = load_rows(out_ptr, offs_m, stride_ot, Tq, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + pid_bh * Tq + offs_m, delta, mask=offs_m < Tq)
    if HAS_START:
        tl.store(first_ptr + pid_b * num_m + pid_m, tl.min(start, 0), mask=pid_h == 0)
        tl.store(last_ptr + pid_b * num_m + pid_m, tl.max(start, 0), mask=pid_h == 0)
    return do, delta


@triton.jit
def _add_dq(
    dq, q, do, lse2, delta, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin, stride_kt, stride_vt,
    Tq, Tk, scale2, threshold, keep_scale,
    D: tl.constexpr, HAS_START: tl.constexpr, HAS_DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ's share from one tile of keys, from `begin`."""
    offs_n = begin + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, stride_kt, Tk, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, offs_n, stride_vt, Tk, D, BLOCK_D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    s = s * scale2 - lse2[:, None]
    if MASKED:
        visible = is_visible(offs_m[:, None], offs_n[None, :], start[:, None], Tq, Tk, HAS_START)
        s = tl.where(visible, s, float("-inf"))
    p = tl.exp2(s)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = keep_tile(seed, pid_bh * Tq + offs_m, begin, Tk, threshold, QUADS, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, start_ptr, seed_ptr, lse2_ptr, delta_ptr, first_ptr, last_ptr,
    dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    stride_sb, stride_st,
    H, Tq, Tk, scale, scale2, threshold, keep_scale,
    GROUPS: tl.constexpr, D: tl.constexpr, HAS_START: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = num_m - 1 - pid % num_m
    pid_bh = (pid // num_m).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    k_ptr += pid_b * stride_kb + pid_h // GROUPS * stride_kh
    v_ptr += pid_b * stride_vb + pid_h // GROUPS * stride_vh

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start, seed = offs_m, 0
    if HAS_START:
        start = load_start(start_ptr + pid_b * stride_sb, offs_m, stride_st, Tq, Tk)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    do, delta = _row_statistics(
        out_ptr + pid_b * stride_ob + pid_h * stride_oh, do_ptr + pid_b * stride_dob + pid_h * stride_doh,
        delta_ptr,
        start, first_ptr, last_ptr, pid_m, pid_h, pid_bh, num_m, pid_b, offs_m, stride_ot, stride_dot, Tq,
        D, HAS_START, BLOCK_D,
    )  # fmt: skip
    q = load_rows(q_ptr + pid_b * stride_qb + pid_h * stride_qh, offs_m, stride_qt, Tq, D, BLOCK_D, True)
    lse2 = tl.load(lse2_ptr + pid_bh * Tq + offs_m, mask=offs_m < Tq, other=float("inf"))
    lo, full_lo, full_hi, hi = key_range(pid_m, start, Tq, Tk, HAS_START, BLOCK_M, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in tl.range(full_lo, full_hi, BLOCK_N):
        dq = _add_dq(
            dq, q, do, lse2, delta, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin, stride_kt, stride_vt,
            Tq, Tk, scale2, threshold, keep_scale, D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, False,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in tl.range(0, masked_tiles(lo, full_lo, full_hi, hi, BLOCK_N)):
        begin = masked_tile(i, lo, full_lo, full_hi, BLOCK_N)
        dq = _add_dq(
            dq, q, do, lse2, delta, k_ptr, v_ptr, start, seed, pid_bh, offs_m, begin, stride_kt, stride_vt,
            Tq, Tk, scale2, threshold, keep_scale, D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, True,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
    store_rows(
        dq_ptr + pid_b * stride_dqb + pid_h * stride_dqh, dq * scale, offs_m, stride_dqt, Tq, D, BLOCK_D
    )


@triton.jit
def _attention_bwd_delta_kernel(
    out_ptr, do_ptr, start_ptr, delta_ptr, first_ptr, last_ptr, sum_ptr,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot, stride_sb, stride_st,
    H, Tq, Tk, D: tl.constexpr, HAS_START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid_m = tl.program_id(0) % num_m
    pid_bh = (tl.program_id(0) // num_m).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    start = offs_m
    if HAS_START:
        start = load_start(start_ptr + pid_b * stride_sb, offs_m, stride_st, Tq, Tk)
    _row_statistics(
        out_ptr + pid_b * stride_ob + pid_h * stride_oh, do_ptr + pid_b * stride_dob + pid_h * stride_doh,
        delta_ptr,
        start, first_ptr, last_ptr, pid_m, pid_h, pid_bh, num_m, pid_b, offs_m, stride_ot, stride_dot, Tq,
        D, HAS_START, BLOCK_D,
    )  # fmt: skip
    if sum_ptr is not None:
        sums = sum_ptr + pid_bh * Tq * D + offs_d[:, None].to(tl.int64) * Tq + offs_m[None, :]
        tl.store(
            sums,
            tl.zeros([BLOCK_D, BLOCK_M], tl.float32),
            mask=(offs_d < D)[:, None] & (offs_m < Tq)[None, :],
        )


@triton.jit
def _attention_bwd_convert_kernel(
    sum_ptr, dq_ptr, stride_dqb, stride_dqh, stride_dqt, H, Tq, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ in its own dtype from the float32 sums, which are stored (B, H, D, Tq)."""
    num_m = tl.cdiv(Tq, BLOCK_M)
    pid_m = tl.program_id(0) % num_m
    pid_bh = (tl.program_id(0) // num_m).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    sums = sum_ptr + pid_bh * Tq * D + offs_d[:, None].to(tl.int64) * Tq + offs_m[None, :]
    dq = tl.load(sums, mask=(offs_d < D)[:, None] & (offs_m < Tq)[None, :], other=0.0)
    dq_ptr += pid_bh // H * stride_dqb + pid_bh % H * stride_dqh
    store_rows(dq_ptr, tl.trans(dq) * scale, offs_m, stride_dqt, Tq, D, BLOCK_D)


@triton.jit
def _query_range(
    key, first_ptr, last_ptr, num_rows, Tq, Tk,
    HAS_START: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[lo, hi) holds the queries that see a tile of keys; every one of [full_lo, full_hi) sees all of it."""
    lo = tl.maximum(key - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
    hi = Tq
    full_lo = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BLOCK_M
    full_hi = Tq // BLOCK_M * BLOCK_M
    if HAS_START:
        # By tiles of ROWS queries: none after `hi` starts early enough, none before `full_hi` starts too
        # late.
        hi = 0
        for begin in tl.range(0, num_rows, 256):
            offs = begin + tl.arange(0, 256)
            first = tl.load(first_ptr + offs, mask=offs < num_rows, other=key + BLOCK_N)
            last = tl.load(last_ptr + offs, mask=offs < num_rows, other=0)
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
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr, ADD_DQ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK's and dV's share, for the keys from `key`, of one tile of queries, from `begin`.

    S and dP are computed transposed, so that no product has to be.
    """
    offs_m, offs_n = begin + tl.arange(0, BLOCK_M), key + tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr, offs_m, stride_qt, Tq, D, BLOCK_D, MASKED)  # (BLOCK_M, BLOCK_D)
    do = load_rows(do_ptr, offs_m, stride_dot, Tq, D, BLOCK_D, MASKED)
    if MASKED:
        lse2 = tl.load(lse2_ptr + offs_m, mask=offs_m < Tq, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
    else:
        lse2 = tl.load(lse2_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    st = st * scale2 - lse2[None, :]
    if MASKED:
        start = offs_m
        if HAS_START:
            start = load_start(start_ptr, offs_m, stride_st, Tq, Tk)
        visible = is_visible(offs_m[None, :], offs_n[:, None], start[None, :], Tq, Tk, HAS_START)
        st = tl.where(visible, st, float("-inf"))
    pt = tl.exp2(st)
    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)
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
    q_ptr, k_ptr, v_ptr, do_ptr, start_ptr, seed_ptr, lse2_ptr, delta_ptr, first_ptr, last_ptr, dk_ptr,
    dv_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh,
    stride_dvt,
    stride_sb, stride_st,
    H, Tq, Tk, scale, scale2, threshold, keep_scale,
    GROUPS: tl.constexpr, D: tl.constexpr, HAS_START: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr, ADD_DQ: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_n, num_rows = tl.cdiv(Tk, BLOCK_N), tl.cdiv(Tq, ROWS)
    pid = tl.program_id(0)
    pid_n = pid % num_n  # the first keys are seen by the most queries
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
                dk, dv, k, v, q_head, do_head, lse2_head, delta_head, start_ptr, sum_head, seed, pid_bh,
                key, begin,
                stride_qt, stride_dot, stride_st, Tq, Tk, scale2, threshold, keep_scale,
                D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, False, ADD_DQ, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for i in tl.range(0, masked_tiles(lo, full_lo, full_hi, hi, BLOCK_M)):
            begin = masked_tile(i, lo, full_lo, full_hi, BLOCK_M)
            dk, dv = _add_dkdv(
                dk, dv, k, v, q_head, do_head, lse2_head, delta_head, start_ptr, sum_head, seed, pid_bh,
                key, begin,
                stride_qt, stride_dot, stride_st, Tq, Tk, scale2, threshold, keep_scale,
                D, HAS_START, HAS_DROPOUT, QUADS, PRECISION, True, ADD_DQ, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    store_rows(
        dk_ptr + pid_b * stride_dkb + pid_k * stride_dkh, dk * scale, offs_n, stride_dkt, Tk, D, BLOCK_D
    )
    store_rows(dv_ptr + pid_b * stride_dvb + pid_k * stride_dvh, dv, offs_n, stride_dvt, Tk, D, BLOCK_D)


def launch_backward(
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
    """The launches, in order, that fill dq, or dk and dv, or all three. `grad` has a contiguous last
    dimension."""
    b, h, tq, d = q.shape
    five = tiles.five if dq is not None and dk is not None else None
    dq_alone = dq is not None and five is None
    rows = tiles.dq if dq_alone else tiles.delta  # of the kernel that computes delta
    num_rows = cdiv(tq, rows.block_m)
    available = common_arguments(q, k, key_start, seed, scale, dropout_p) | {"scale": scale}
    tensors = {"q": q, "k": k, "v": v, "o": out, "do": grad, "dq": dq, "dk": dk, "dv": dv}
    for name, tensor in tensors.items():
        if tensor is not None:
            available |= {"out_ptr" if name == "o" else f"{name}_ptr": tensor, **strides(name, tensor)}
    available |= {
        "lse2_ptr": lse2,
        "delta_ptr": torch.empty_like(lse2),
        "first_ptr": None if key_start is None else key_start.new_empty(b * num_rows),
        "last_ptr": None if key_start is None else key_start.new_empty(b * num_rows),
        "sum_ptr": None if five is None else lse2.new_empty(b * h * d * tq),
        "ROWS": rows.block_m,
        "ADD_DQ": five is not None,
    }
    by_query = (num_rows * b * h,)
    first = _attention_bwd_dq_kernel if dq_alone else _attention_bwd_delta_kernel
    launches = [Launch.of(first, by_query, available, rows)]
    if dk is not None:
        keys = five or tiles.dkdv
        by_key = (cdiv(k.shape[2], keys.block_n) * b * k.shape[1],)
        launches.append(Launch.of(_attention_bwd_dkdv_kernel, by_key, available, keys))
    if five is not None:
        launches.append(Launch.of(_attention_bwd_convert_kernel, by_query, available, rows))
    return launches
