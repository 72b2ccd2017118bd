"""The embedding of one decoded token of each sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, cdiv
from kernels.tuning import Tile


@triton.jit
def _decode_embedding_kernel(
    token_ptr,  # (B,) int64
    len_ptr,  # (B,) int32, tokens of each sequence, this one and the padding included
    start_ptr,  # (B,) int32, padding of each sequence; None: no padding
    token_weight_ptr,  # (V, C)
    position_weight_ptr,  # (P, C)
    out_ptr,  # out: (B, C), contiguous
    stride_tb,  # token: elements between sequences
    stride_lb,  # len: the same
    stride_sb,  # start: the same
    stride_tv,  # token_weight: elements between rows
    stride_pp,  # position_weight: the same
    V,  # rows of token_weight
    P,  # rows of position_weight
    C,  # columns
    BLOCK_N: tl.constexpr,  # columns per program
    PDL: tl.constexpr,  # whether the launch starts before the one ahead of it has ended
):
    """One program adds BLOCK_N columns of a token's embedding and of its position's."""
    if PDL:
        # In this order, the kernels after this one read their weights once all work ahead of it has ended,
        # an update of the weights included.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_n = tl.cdiv(C, BLOCK_N)
    pid_b = (tl.program_id(0) // num_n).to(tl.int64)
    cols = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)

    token = tl.load(token_ptr + pid_b * stride_tb)
    position = tl.load(len_ptr + pid_b * stride_lb).to(tl.int64) - 1
    if start_ptr is not None:
        position -= tl.load(start_ptr + pid_b * stride_sb)
    token, position = tl.minimum(tl.maximum(token, 0), V - 1), tl.minimum(tl.maximum(position, 0), P - 1)

    mask = cols < C
    x = tl.load(token_weight_ptr + token * stride_tv + cols, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(position_weight_ptr + position * stride_pp + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + pid_b * C + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


def decode_embedding_forward(
    *,
    token: Tensor,
    cache_len: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    key_start: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> Launch:
    """The launch that fills out[b] = token_weight[token[b]] + position_weight[position[b]].

    token: int64 (B,). cache_len, key_start: int32 (B,). token_weight: (V, C), position_weight: (P, C), with a
    contiguous last dimension. out: (B, C), contiguous.
    """
    b, c = out.shape
    arguments = {
        "token_ptr": token,
        "len_ptr": cache_len,
        "start_ptr": key_start,
        "token_weight_ptr": token_weight,
        "position_weight_ptr": position_weight,
        "out_ptr": out,
        "stride_tb": token.stride(0),
        "stride_lb": cache_len.stride(0),
        "stride_sb": 0 if key_start is None else key_start.stride(0),
        "stride_tv": token_weight.stride(0),
        "stride_pp": position_weight.stride(0),
        "V": token_weight.shape[0],
        "P": position_weight.shape[0],
        "C": c,
    }
    return Launch.of(_decode_embedding_kernel, (b * cdiv(c, tile.block_n),), arguments, tile)
