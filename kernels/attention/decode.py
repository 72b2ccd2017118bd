"""Decoding: few queries against a long cache.

The keys are split into parts, one program per part; the last program to finish joins the parts' outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import block_d, load_rows, strides
from kernels.device_functions import LOG2E
from kernels.launch import Launch, cdiv, precision
from kernels.tuning import Tile, next_power_of_2


@triton.jit
def _join(
    part_ptr,
    lse2_ptr,
    part,
    used,
    offs_d,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The output of a query: the sum of its parts, each weighted by its share of the softmax's sum.

    part: int64, index of the query's first part. used: how many parts, up to BLOCK_S, are stored. All of them
    are read at once. Returns float32 (BLOCK_D,).
    """
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < used
    mask = mask_s[:, None] & (offs_d < D)[None, :]
    offs = (part + offs_s)[:, None] * D + offs_d[None, :]
    lse2 = tl.load(lse2_ptr + part + offs_s, mask=mask_s, other=float("-inf"), cache_modifier=".cg")
    parts = tl.load(part_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")  # (BLOCK_S, BLOCK_D)

    row_max = tl.max(lse2, 0)
    weight = tl.exp2(lse2 - tl.where(row_max == float("-inf"), 0.0, row_max))  # (BLOCK_S,)
    total = tl.sum(weight, 0)
    return tl.sum(parts * weight[:, None], 0) / tl.where(total == 0, 1.0, total)


@triton.jit
def _attention_decode_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H / GROUPS, Tmax, D)
    v_ptr,  # (B, H / GROUPS, Tmax, D)
    len_ptr,  # (B,) int32, valid keys of each batch
    start_ptr,  # (B,) int32, the first key of each batch; None: key 0
    out_ptr,  # out: (B, H, Tq, D)
    part_ptr,  # out: (B, H, Tq, SPLITS, D) float32, contiguous, the output over each part of the keys
    lse2_ptr,  # out: (B, H, Tq, SPLITS) float32, contiguous, log2 of the sum of exp2 of a part's logits
    counter_ptr,  # int32, for each tile of queries: 0 before the launch, then the parts that are stored
    stride_qb, stride_qh, stride_qt,  # q: elements between batches, heads, rows
    stride_kb, stride_kh, stride_kt,  # k: the same
    stride_vb, stride_vh, stride_vt,  # v: the same
    stride_ob, stride_oh, stride_ot,  # out: the same
    stride_lb,  # len: elements between batches
    stride_sb,  # start: elements between batches
    H,  # query heads
    Tq,  # queries per head
    Tmax,  # keys that the caches have space for
    scale2,  # the softmax's scale * log2(e)
    SPLITS: tl.constexpr,  # parts of the keys; with one part, part_ptr, lse2_ptr and counter_ptr are None
    BLOCK_S: tl.constexpr,  # SPLITS, rounded up to a power of two
    GROUPS: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # head dimension
    HAS_START: tl.constexpr,  # start_ptr is not None
    PRECISION: tl.constexpr,  # input_precision of tl.dot
    BLOCK_M: tl.constexpr,  # queries per tile
    BLOCK_N: tl.constexpr,  # keys per tile
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
    PDL: tl.constexpr,  # whether the launch starts before the one ahead of it has ended
):  # fmt: skip
    """One part of the keys for a tile of the (GROUPS * Tq) queries that read the same key head.

    The program that stores the last part of a tile joins the tile's parts. Parts without keys are not stored.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_m = tl.cdiv(GROUPS * Tq, BLOCK_M)
    pid = tl.program_id(0)
    split, pid_m = pid % SPLITS, pid // SPLITS % num_m
    pid_bk = (pid // SPLITS // num_m).to(tl.int64)
    pid_b, pid_k = pid_bk // (H // GROUPS), pid_bk % (H // GROUPS)
    k_ptr += pid_b * stride_kb + pid_k * stride_kh
    v_ptr += pid_b * stride_vb + pid_k * stride_vh

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    pid_h, query = pid_k * GROUPS + offs_m // Tq, offs_m % Tq
    mask_m = offs_m < GROUPS * Tq
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    rows = pid_b * stride_qb + pid_h * stride_qh + query.to(tl.int64) * stride_qt
    q = tl.load(q_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)  # (BLOCK_M, BLOCK_D)

    cache_len = tl.minimum(tl.load(len_ptr + pid_b * stride_lb), Tmax)
    position = cache_len - Tq + query  # (BLOCK_M,)
    first = 0
    if HAS_START:
        first = tl.minimum(tl.maximum(tl.load(start_ptr + pid_b * stride_sb), 0), Tmax)
    begin = first // BLOCK_N * BLOCK_N  # of all keys, then of this part
    tiles = tl.cdiv(tl.maximum(cache_len, begin) - begin, BLOCK_N)
    per_part = tl.maximum(tl.cdiv(tiles, SPLITS), 1)
    used = tl.maximum(tl.cdiv(tiles, per_part), 1)  # parts with keys; without any key, the first
    if split >= used:
        return
    begin += split * per_part * BLOCK_N
    end = tl.minimum(begin + per_part * BLOCK_N, cache_len)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for key in tl.range(begin, end, BLOCK_N):
        offs_n = key + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_kt, end, D, BLOCK_D, True)  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2  # (BLOCK_M, BLOCK_N)
        visible = (offs_n[None, :] <= position[:, None]) & (offs_n[None, :] >= first)
        s = tl.where(visible, s, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # no NaN where no key was seen yet
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr, offs_n, stride_vt, end, D, BLOCK_D, True)  # (BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        row_max = new_max

    empty = row_max == float("-inf")  # (BLOCK_M,) queries that see no key of this part
    out = acc / tl.where(empty, 1.0, row_sum)[:, None]
    if SPLITS == 1:
        out_rows = pid_b * stride_ob + pid_h * stride_oh + query.to(tl.int64) * stride_ot
        tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = ((pid_b * H + pid_h) * Tq + query) * SPLITS  # (BLOCK_M,)
        lse2 = row_max + tl.log2(tl.where(empty, 1.0, row_sum))
        tl.store(lse2_ptr + part + split, lse2, mask=mask_m)
        tl.store(part_ptr + (part + split)[:, None] * D + offs_d[None, :], out, mask=mask)
        # The barrier puts the stores of all threads before the release, which one thread does.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + pid // SPLITS, 1, sem="acq_rel") == used - 1:
            for row in tl.range(pid_m * BLOCK_M, tl.minimum((pid_m + 1) * BLOCK_M, GROUPS * Tq)):
                row_h, row_t = pid_k * GROUPS + row // Tq, row % Tq
                row_part = ((pid_b * H + row_h) * Tq + row_t) * SPLITS
                joined = _join(part_ptr, lse2_ptr, row_part, used, offs_d, D, BLOCK_S)
                out_row = out_ptr + pid_b * stride_ob + row_h * stride_oh + row_t.to(tl.int64) * stride_ot
                tl.store(out_row + offs_d, joined.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def query_tiles(h: int, hkv: int, tq: int, tile: Tile) -> int:
    """The tiles of a sequence's queries, each of which has a counter."""
    return cdiv(h // hkv * tq, tile.block_m) * hkv


def attention_decode(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_len: Tensor,
    key_start: Tensor | None,
    out: Tensor,
    counter: Tensor | None,
    scale: float,
    splits: int,
    tile: Tile,
) -> Launch:
    """The launch that fills `out`, with the keys split into `splits` parts.

    q, out: (B, H, Tq, D). k, v: caches (B, Hkv, Tmax, D). The last dimensions are contiguous. cache_len,
    key_start: int32 (B,), the valid keys and the first key of each batch. counter: B * query_tiles(...) int32
    zeros, which the launch changes; None with one part.
    """
    b, h, tq, d = q.shape
    kv_heads, groups = k.shape[1], h // k.shape[1]
    parts = (b, h, tq, splits)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "len_ptr": cache_len,
        "start_ptr": key_start,
        "out_ptr": out,
        "part_ptr": q.new_empty((*parts, d), dtype=torch.float32) if splits > 1 else None,
        "lse2_ptr": q.new_empty(parts, dtype=torch.float32) if splits > 1 else None,
        "counter_ptr": counter,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", out),
        "stride_lb": cache_len.stride(0),
        "stride_sb": 0 if key_start is None else key_start.stride(0),
        "H": h,
        "Tq": tq,
        "Tmax": k.shape[2],
        "scale2": scale * LOG2E.value,
        "SPLITS": splits,
        "BLOCK_S": next_power_of_2(splits),
        "GROUPS": groups,
        "D": d,
        "HAS_START": key_start is not None,
        "PRECISION": precision(q.dtype),
        "BLOCK_D": block_d(d),
    }
    grid = (splits * b * query_tiles(h, kv_heads, tq, tile),)
    return Launch.of(_attention_decode_kernel, grid, arguments, tile)
