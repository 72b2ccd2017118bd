"""The five launches of a transformer block for one decoded token.

With `Tile.pdl`, a launch starts before the one ahead of it has ended. Every program of it waits (`gdc_wait`)
until the launch ahead has ended and its writes are visible. Before that it reads parameters and nothing else,
and it writes nothing. The launch ahead has waited in the same way before it ended, so after the wait all
earlier launches have ended: no kernel reads what is not written yet, and none writes what an earlier one may
still read, such as the counters, a cache, or memory that the allocator gives out again. A launch without the
attribute, by torch for example, starts when all launches ahead of it have ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.decode import attention_decode, query_tiles
from kernels.decode.linear import decode_linear
from kernels.launch import Launch
from kernels.tuning import Tile, attention_decode_tile, decode_linear_tile


def decode_block_forward(
    *,
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_len: Tensor,
    norm_1_weight: Tensor,
    norm_1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_2_weight: Tensor,
    norm_2_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    key_start: Tensor | None,
    scale: float,
    eps: float,
    approximate: str,
    out: Tensor,
    architecture: int,
    splits: int,
) -> list[Launch]:
    """The launches, in order, that fill `out` and write the caches; the keys are split into `splits` parts.

    Each launch reads what the one before it has written. Shapes as in `kernels.decode_block`.
    """
    b, hkv, tmax, d = k_cache.shape
    width = proj_weight.shape[1]  # of the queries of all heads
    q, attended = x.new_empty(b, width), x.new_empty(b, width)
    h, inner = x.new_empty(x.shape), x.new_empty(b, up_weight.shape[0])
    attention_tile = attention_decode_tile(architecture, x.element_size(), d, tmax)
    counters = b * query_tiles(width // d, hkv, 1, attention_tile)
    counter = x.new_empty(counters, dtype=torch.int32) if splits > 1 else None

    def tile(weight: Tensor) -> Tile:
        return decode_linear_tile(architecture, x.element_size(), *weight.shape, b)

    return [
        decode_linear(
            x=x,
            weight=qkv_weight,
            bias=qkv_bias,
            out=q,
            tile=tile(qkv_weight),
            norm=(norm_1_weight, norm_1_bias),
            eps=eps,
            caches=(k_cache, v_cache),
            cache_len=cache_len,
            counter=counter,
        ),
        attention_decode(
            q=q.view(b, -1, 1, d),
            k=k_cache,
            v=v_cache,
            cache_len=cache_len,
            key_start=key_start,
            out=attended.view(b, -1, 1, d),
            counter=counter,
            scale=scale,
            splits=splits,
            tile=attention_tile,
        ),
        decode_linear(
            x=attended, weight=proj_weight, bias=proj_bias, out=h, tile=tile(proj_weight), residual=x
        ),
        decode_linear(
            x=h,
            weight=up_weight,
            bias=up_bias,
            out=inner,
            tile=tile(up_weight),
            norm=(norm_2_weight, norm_2_bias),
            eps=eps,
            gelu=approximate,
        ),
        decode_linear(
            x=inner, weight=down_weight, bias=down_bias, out=out, tile=tile(down_weight), residual=h
        ),
    ]
