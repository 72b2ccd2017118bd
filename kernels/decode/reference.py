"""One decoded token per sequence in plain torch, composed of the references of the other families."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.attention.reference import decode_attention, host_lengths
from kernels.ffn.reference import gelu_ffn
from kernels.linear import linear
from kernels.norm.reference import layer_norm


def decode_embedding(
    token: torch.Tensor,
    cache_len: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """token_weight[token] + position_weight[position]; see `kernels.decode_embedding`."""
    position = cache_len - 1 if key_start is None else cache_len - 1 - key_start
    position = position.clamp(0, position_weight.shape[0] - 1)
    return F.embedding(token, token_weight) + F.embedding(position, position_weight)


def decode_block(
    x: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    norm_1_weight: torch.Tensor,
    norm_1_bias: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    norm_2_weight: torch.Tensor,
    norm_2_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    key_start: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
    approximate: str = "tanh",
) -> torch.Tensor:
    """A pre-norm block for the newest token; see `kernels.decode_block`."""
    b, hkv, tmax, d = k_cache.shape
    width = proj_weight.shape[1]  # of the queries of all heads
    qkv = linear(layer_norm(x, norm_1_weight, norm_1_bias, eps), qkv_weight, qkv_bias)
    q, k, v = torch.split_with_sizes(qkv, (width, hkv * d, hkv * d), 1)

    k, v = k.view(b, hkv, d), v.view(b, hkv, d)
    lengths = host_lengths(cache_len)
    if lengths and min(lengths) == max(lengths):  # two copies instead of two scatters
        index = min(max(lengths[0], 1), tmax) - 1
        k_cache[:, :, index], v_cache[:, :, index] = k, v
    else:
        rows, indices = torch.arange(b, device=x.device), cache_len.clamp(1, tmax) - 1
        k_cache[rows, :, indices], v_cache[rows, :, indices] = k, v
    y = decode_attention(
        q.view(b, width // d, 1, d), k_cache, v_cache, cache_len, key_start=key_start, scale=scale
    )

    h = x + linear(y.reshape(b, width), proj_weight, proj_bias)
    y = layer_norm(h, norm_2_weight, norm_2_bias, eps)
    return h + gelu_ffn(y, up_weight, up_bias, down_weight, down_bias, approximate=approximate)


def decode_head(
    x: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """layer_norm(x) head_weightᵀ + head_bias in float32; see `kernels.decode_head`."""
    logits = linear(layer_norm(x, norm_weight, norm_bias, eps), head_weight, head_bias)
    return logits.to(torch.promote_types(x.dtype, torch.float32))


def decode_argmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = argmax(logits) of each sequence; see `kernels.decode_argmax`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a CPU's argmax in 16 bits is slower
    return torch.argmax(wide, -1, out=out)
