"""Causal attention in plain torch: the definition, the tests' oracle, and the backend on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from kernels.philox import seeded_dropout


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """softmax(scale q kᵀ + causal mask) v; see `kernels.causal_attention`."""
    del deterministic  # torch's own kernels follow torch's own flag
    q, k, v = (_aligned(x) for x in (q, k, v))
    tq, tk = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if seed is not None and dropout_p > 0:
        allowed, empty = _mask(tq, tk, key_start, q.device)
        return _attention_with_mask(q, k, v, allowed, empty, scale, dropout_p, seed)
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": grouped}
    if key_start is None and tq == tk:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if key_start is None and tq == 1:  # the newest query sees every key
        return F.scaled_dot_product_attention(q, k, v, **options)
    allowed, empty = _mask(tq, tk, key_start, q.device)
    # A row without keys is NaN in some of torch's kernels: it sees all keys here, then is set to zero.
    out = F.scaled_dot_product_attention(q, k, v, allowed | empty, **options)
    return out.masked_fill(empty, 0)


def causal_attention_qkv(
    qkv: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """`causal_attention` of the three parts of a projection; see `kernels.causal_attention_qkv`."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D) each
    out = causal_attention(
        q,
        k,
        v,
        key_start=key_start,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
    )
    return out.transpose(1, 2).contiguous()  # torch's attention returns either layout


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy on a GPU if rows are not aligned to the 16-byte loads of torch's kernels."""
    if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]):
        return x
    return x.contiguous()


def _mask(
    tq: int, tk: int, key_start: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B or 1, 1, Tq, Tk), True for keys that a query sees; (B or 1, 1, Tq, 1), True if it sees none."""
    keys = torch.arange(tk, device=device)
    position = torch.arange(tk - tq, tk, device=device)
    allowed = (keys <= position[:, None])[None]  # (1, Tq, Tk)
    if key_start is not None:
        start = key_start[:, None] if key_start.ndim == 1 else key_start  # (B, 1) or (B, Tq)
        allowed = allowed & (keys >= start[:, :, None])
    allowed = allowed[:, None]
    return allowed, ~allowed.any(-1, keepdim=True)


def _attention_with_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    empty: torch.Tensor,
    scale: float | None,
    dropout_p: float,
    seed: int | torch.Tensor,
) -> torch.Tensor:
    """The formula written out, because torch's fused kernels accept no dropout mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    working = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(working) @ k.to(working).mT) * scale  # (B, H, Tq, Tk)
    p = torch.softmax(logits.masked_fill(~(allowed | empty), -math.inf), -1)
    p = seeded_dropout(p, dropout_p, seed)
    return (p @ v.to(working)).masked_fill(empty, 0).to(q.dtype)


def host_lengths(cache_len: torch.Tensor) -> list[int] | None:
    """The lengths of the sequences, at least one, if the host can read them without synchronising."""
    if cache_len.device.type != "cpu" or cache_len.numel() == 0 or torch.compiler.is_compiling():
        return None
    return cache_len.tolist()


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the newest queries against a cache; see `kernels.decode_attention`."""
    q, k_cache, v_cache = (_aligned(x) for x in (q, k_cache, v_cache))
    tq, tmax = q.shape[2], k_cache.shape[2]
    grouped = q.shape[1] != k_cache.shape[1]
    if lengths := host_lengths(cache_len):
        tmax = min(max(*lengths, tq), tmax)
        k_cache, v_cache = k_cache[:, :, :tmax], v_cache[:, :, :tmax]
        if tq == 1 <= min(lengths) == max(lengths) and key_start is None:
            # torch's attention of one query takes two to three times as long in bfloat16.
            wide = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
            query, keys, values = q.to(wide), k_cache.to(wide), v_cache.to(wide)
            out = F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=grouped)
            return out.to(q.dtype)
    keys = torch.arange(tmax, device=q.device)
    position = cache_len.clamp(max=tmax)[:, None] - tq + torch.arange(tq, device=q.device)  # (B, Tq)
    allowed = keys <= position[:, :, None]  # (B, Tq, Tmax)
    if key_start is not None:
        allowed = allowed & (keys >= key_start[:, None, None])
    allowed = allowed[:, None]
    empty = ~allowed.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        q, k_cache, v_cache, allowed | empty, scale=scale, enable_gqa=grouped
    )
    return out.masked_fill(empty, 0)
