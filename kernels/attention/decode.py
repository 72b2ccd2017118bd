"""Decoding: few queries against a long cache.

The keys are split into parts, one program per part; a second kernel joins the parts' outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import block_d, load_rows, strides
from kernels.device_functions import LOG2E
from kernels.launch import Launch, cdiv, precision
from kernels.tuning import Tile


@triton.jit
def _attention_decode_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H / GROUPS, Tmax, D)
    v_ptr,  # (B, H / GROUPS, Tmax, D)
    len_ptr,  # (B,) int32, valid keys of each batch
    start_ptr,  # (B,) int32, the first key of each batch; None: key 0
    part_ptr,  # out: (B, H, Tq, SPLITS, D) float32, contiguous, the output over each part of the keys
    lse2_ptr,  # out: (B, H, Tq, SPLITS) float32, contiguous, log2 of the sum of exp2 of a part's logits
    stride_qb, stride_qh, stride_qt,  # q: elements between batches, heads, rows
    stride_kb, stride_kh, stride_kt,  # k: the same
    stride_vb, stride_vh, stride_vt,  # v: the same
    stride_lb,  # len: elements between batches
    stride_sb,  # start: elements between batches
    H,  # query heads
    Tq,  # queries per head
    Tmax,  # keys that the caches have space for
    scale2,  # the softmax's scale * log2(e)
    SPLITS: tl.constexpr,  # parts of the keys
    GROUPS: tl.constexpr,  # query heads per key head
    D: tl.constexpr,  # head dimension
    HAS_START: tl.constexpr,  # start_ptr is not None
    PRECISION: tl.constexpr,  # input_precision of tl.dot
    BLOCK_M: tl.constexpr,  # queries per tile
    BLOCK_N: tl.constexpr,  # keys per tile
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
):  # fmt: skip
    """One part of the keys for a tile of the (GROUPS * Tq) queries that read the same key head."""
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
    per_split = tl.cdiv(tl.cdiv(tl.maximum(cache_len - begin, 0), BLOCK_N), SPLITS) * BLOCK_N
    begin += split * per_split
    end = tl.minimum(begin + per_split, cache_len)

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
    row_sum = tl.where(empty, 1.0, row_sum)
    part = ((pid_b * H + pid_h) * Tq + query) * SPLITS + split  # (BLOCK_M,)
    tl.store(lse2_ptr + part, row_max + tl.log2(row_sum), mask=mask_m)
    tl.store(part_ptr + part[:, None] * D + offs_d[None, :], acc / row_sum[:, None], mask=mask)


@triton.jit
def _attention_join_kernel(
    part_ptr,  # (B, H, Tq, SPLITS, D) float32, contiguous
    lse2_ptr,  # (B, H, Tq, SPLITS) float32, contiguous
    out_ptr,  # out: (B, H, Tq, D)
    stride_ob, stride_oh, stride_ot,  # out: elements between batches, heads, rows
    H,  # query heads
    Tq,  # queries per head
    SPLITS: tl.constexpr,  # parts of the keys
    D: tl.constexpr,  # head dimension
    BLOCK_D: tl.constexpr,  # columns per tile, at least D
):  # fmt: skip
    """The output of one query: the sum of its parts, each weighted by its share of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    pid_b, pid_h, query = row // Tq // H, row // Tq % H, row % Tq
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D

    row_max = float("-inf")
    for split in tl.range(SPLITS):
        row_max = tl.maximum(row_max, tl.load(lse2_ptr + row * SPLITS + split))
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)

    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for split in tl.range(SPLITS):
        part = tl.load(part_ptr + (row * SPLITS + split) * D + offs_d, mask=mask, other=0.0)
        weight = tl.exp2(tl.load(lse2_ptr + row * SPLITS + split) - shift)
        acc += part * weight
        total += weight

    out = acc / tl.where(total == 0, 1.0, total)
    out_ptr += pid_b * stride_ob + pid_h * stride_oh + query * stride_ot
    tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask)


def attention_decode(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_len: Tensor,
    key_start: Tensor | None,
    out: Tensor,
    scale: float,
    splits: int,
    tile: Tile,
) -> list[Launch]:
    """The launches, in order, that fill `out`, with the keys split into `splits` parts.

    q, out: (B, H, Tq, D). k, v: caches (B, Hkv, Tmax, D). The last dimensions are contiguous. cache_len,
    key_start: int32 (B,), the valid keys and the first key of each batch.
    """
    b, h, tq, d = q.shape
    kv_heads, groups = k.shape[1], h // k.shape[1]
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "len_ptr": cache_len,
        "start_ptr": key_start,
        "out_ptr": out,
        "part_ptr": q.new_empty((b, h, tq, splits, d), dtype=torch.float32),
        "lse2_ptr": q.new_empty((b, h, tq, splits), dtype=torch.float32),
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
        "GROUPS": groups,
        "D": d,
        "HAS_START": key_start is not None,
        "PRECISION": precision(q.dtype),
        "BLOCK_D": block_d(d),
    }
    grid = (splits * cdiv(groups * tq, tile.block_m) * b * kv_heads,)
    return [
        Launch.of(_attention_decode_kernel, grid, arguments, tile),
        Launch.of(_attention_join_kernel, (b * h * tq,), arguments, Tile(1, 1, 1, 1)),
    ]
