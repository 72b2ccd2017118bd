"""The torch.library ops of one decoded token: they allocate the outputs and run the launches.

Shapes as in `kernels.decode`. decode_block writes the caches, decode_argmax its `out`, as their schemas say.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.decode.argmax import decode_argmax_forward
from kernels.decode.block import decode_block_forward
from kernels.decode.embedding import decode_embedding_forward
from kernels.decode.linear import decode_linear
from kernels.torch_library import ops, register
from kernels.tuning import (
    architecture,
    attention_decode_splits,
    attention_decode_tile,
    decode_argmax_tile,
    decode_embedding_tile,
    decode_linear_tile,
)


def decode_embedding(
    token: Tensor,
    cache_len: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    key_start: Tensor | None,
) -> Tensor:
    """`kernels.decode_embedding`, after its arguments have been checked."""
    return ops.decode_embedding(token, cache_len, token_weight, position_weight, key_start)


def decode_block(*, scale: float | None, **arguments: Any) -> Tensor:
    """`kernels.decode_block`, after its arguments have been checked."""
    scale = 1 / math.sqrt(arguments["k_cache"].shape[-1]) if scale is None else float(scale)
    return ops.decode_block(**arguments, scale=scale)


def decode_head(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """`kernels.decode_head`, after its arguments have been checked."""
    return ops.decode_head(x, norm_weight, norm_bias, head_weight, head_bias, eps)


def decode_argmax(logits: Tensor, out: Tensor) -> Tensor:
    """`kernels.decode_argmax`, after its arguments have been checked."""
    ops.decode_argmax(logits, out)
    return out


def _embedding_output(
    token: Tensor,
    cache_len: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    key_start: Tensor | None,
) -> Tensor:
    """x, uninitialised; also the fake of decode_embedding."""
    return token_weight.new_empty(token.shape[0], token_weight.shape[1])


def _embedding(
    token: Tensor,
    cache_len: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    key_start: Tensor | None,
) -> Tensor:
    """x of decode_embedding."""
    out = _embedding_output(token, cache_len, token_weight, position_weight, key_start)
    with torch.cuda.device_of(out):
        decode_embedding_forward(
            token=token,
            cache_len=cache_len,
            token_weight=token_weight,
            position_weight=position_weight,
            key_start=key_start,
            out=out,
            tile=decode_embedding_tile(architecture(out.device), out.shape[1]),
        ).run()
    return out


def _block_output(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """y, uninitialised; also the fake of decode_block."""
    return x.new_empty(x.shape)


def _block(x: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor, **options: Any) -> Tensor:
    """y of decode_block; it also writes the caches."""
    out = _block_output(x)
    b, hkv, tmax, d = k_cache.shape
    device = x.device
    tile = attention_decode_tile(architecture(device), x.element_size(), d, tmax)
    launches = decode_block_forward(
        x=x,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_len=cache_len,
        **options,
        out=out,
        architecture=architecture(device),
        splits=attention_decode_splits(device, b * hkv, tmax, tile),
    )
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.run()
    return out


def _head_output(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """logits, uninitialised; also the fake of decode_head."""
    return x.new_empty((x.shape[0], head_weight.shape[0]), dtype=torch.float32)


def _head(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """logits of decode_head."""
    out = _head_output(x, norm_weight, norm_bias, head_weight, head_bias, eps)
    with torch.cuda.device_of(x):
        decode_linear(
            x=x,
            weight=head_weight,
            bias=head_bias,
            out=out,
            tile=decode_linear_tile(architecture(x.device), x.element_size(), *head_weight.shape, x.shape[0]),
            norm=(norm_weight, norm_bias),
            eps=eps,
        ).run()
    return out


def _argmax(logits: Tensor, out: Tensor) -> None:
    """Writes `out` of decode_argmax."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tile = decode_argmax_tile(architecture(logits.device), logits.element_size(), logits.shape[1])
    with torch.cuda.device_of(logits):
        decode_argmax_forward(logits=logits, out=out, tile=tile).run()


register(
    "decode_embedding(Tensor token, Tensor cache_len, Tensor token_weight, Tensor position_weight,"
    " Tensor? key_start) -> Tensor",
    kernel=_embedding,
    fake=_embedding_output,
)
register(
    "decode_block(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_len, *,"
    " Tensor norm_1_weight, Tensor? norm_1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight,"
    " Tensor? proj_bias, Tensor norm_2_weight, Tensor? norm_2_bias, Tensor up_weight, Tensor? up_bias,"
    " Tensor down_weight, Tensor? down_bias, Tensor? key_start, float scale, float eps, str approximate)"
    " -> Tensor",
    kernel=_block,
    fake=_block_output,
)
register(
    "decode_head(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor head_weight, Tensor? head_bias,"
    " float eps) -> Tensor",
    kernel=_head,
    fake=_head_output,
)
register("decode_argmax(Tensor logits, Tensor(a!) out) -> ()", kernel=_argmax, fake=lambda logits, out: None)
