"""Causal softmax attention.

`causal_attention` takes q, k and v; `causal_attention_qkv` takes a fused projection of all three;
`decode_attention` takes a key-value cache.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels import checks
from kernels.attention import reference
from kernels.checks import Dims
from kernels.dispatch import Choice, Op, autocast
from kernels.tuning import slower

_CAUSAL = Op("causal_attention", family="attention")
_PACKED = Op("causal_attention_qkv", family="attention")
_DECODE = Op("decode_attention", family="attention")
QUERIES: Dims = ("B", "H", "Tq", "D")
PACKED: Dims = ("B", "T", "3", "H", "D")
# Up to this many keys, float32 attention with its casts is faster than bfloat16 on a CPU: bench/README.md.
SHORT = 128


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
    """out_i = Σ_j softmax_j(scale q_i·k_j) v_j over keys j in [key_start_i, Tk - Tq + i].

    Args:
        q: (B, H, Tq, D), float16, bfloat16, float32 or float64; any strides with a contiguous last dimension.
        k: (B, Hkv, Tk, D) of the same dtype, Tk >= Tq; Hkv divides H, and query head h reads key head h // (H
            / Hkv).
        v: Like k.
        key_start: int32, (B,) or (B, Tq): the first key that each query may see. It serves left padding,
            packed documents and sliding windows. Values are clamped to [0, Tk]; an empty range gives a zero
            row and zero gradients.
        scale: Positive factor of the logits, default 1 / sqrt(D).
        dropout_p: Probability in [0, 1) of dropping a weight after the softmax; the kept ones are scaled by 1
            / (1 - p).
        seed: None draws the mask from torch's generator. An int or a 0-d int64 tensor on q's device makes it
            the Philox mask of the row-major index in (B, H, Tq, Tk), the same from kernel and reference.
        deterministic: Whether gradients must be the same bits every time; None follows
            `torch.are_deterministic_algorithms_enabled()`.

    Returns:
        (B, H, Tq, D) in q's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: A tensor of another dtype, or something that is not a tensor or number.
        ValueError: Ranks, sizes, devices or strides that do not fit; dropout_p outside [0, 1); a scale that
            is not positive and finite.
        RuntimeError: ``use_backend("triton")`` cannot be honoured.

    Numerics:
        Logits, softmax and sums are float32, in base 2; one rounding at the store. Saved for backward: q, k,
        v, out and 4 BHTq bytes of log-sum-exp. Backward reads the rounded out, so a gradient that is exactly
        zero in theory may contain that rounding error. Sums have a fixed order, unless the tuning table
        selects a faster backward with atomic additions; `deterministic` rules it out.

    Backend:
        The reference runs for float64, for D > 256, and wherever `kernels.explain` says that Triton cannot
        run. On a CPU, the reference computes bfloat16 with up to 128 keys in float32, which is faster.

    Source:
        Dao, "FlashAttention-2" (2023), section 3; Vaswani et al., "Attention Is All You Need" (2017), section
        3.2.1.
    """
    options: Any = {
        "key_start": key_start,
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": seed,
        "deterministic": deterministic,
    }
    choice, q, k, v = _prepare_causal_attention(q, k, v, **options)
    if choice.backend == "triton":
        from kernels.attention import torch_op

        return torch_op.causal_attention(q, k, v, **options)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= SHORT:
        with torch.autocast("cpu", enabled=False):
            return reference.causal_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return reference.causal_attention(q, k, v, **options)


@_CAUSAL.prepares
def _prepare_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor | None,
    scale: float | None,
    dropout_p: float,
    seed: int | torch.Tensor | None,
    deterministic: bool | None,
) -> tuple[Choice, torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "causal_attention"
    q, k, v = autocast(q, k, v)
    key_dims = ("B", "Hkv", "Tk", "D")
    sizes = checks.shapes(op, q=(q, QUERIES), k=(k, key_dims), v=(v, key_dims))
    checks.same_dtype(op, q=q, k=k, v=v)
    checks.last_contiguous(op, q=q, k=k, v=v)
    if sizes["Tq"] > sizes["Tk"]:
        raise ValueError(f"{op}: q has Tq={sizes['Tq']}, expected at most {sizes['Tk']} (k's Tk)")
    _check_heads(op, "k", sizes)
    _check_key_start(op, key_start, "Tq", q=(q, QUERIES))
    _check_options(op, q.device, scale, dropout_p, seed, deterministic)
    # The table holds for plain calls: PyTorch with a mask, dropout or shared key heads was not measured.
    square, own_heads = sizes["Tq"] == sizes["Tk"], sizes["H"] == sizes["Hkv"]
    plain = key_start is None and dropout_p == 0 and square and own_heads
    faster = slower(op, q, **sizes) if plain else None
    choice = _CAUSAL.choose(q, limit=_limit(sizes["D"]), slower=faster)
    return choice, q, k, v


def causal_attention_qkv(
    qkv: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """out = causal_attention(q, k, v), where q, k and v are qkv[:, :, 0], qkv[:, :, 1] and qkv[:, :, 2].

    The input and the output have the layout of the projections around attention: a fused projection (B, T,
    3HD) is viewed as (B, T, 3, H, D), and the output as (B, T, HD), without a copy.

    Args:
        qkv: (B, T, 3, H, D), float16, bfloat16, float32 or float64; any strides with a contiguous last
            dimension. Queries and keys have the same heads: `causal_attention` takes fewer key heads.
        key_start: int32, (B,) or (B, T): as in `causal_attention`, like every other option.
        scale: Positive factor of the logits, default 1 / sqrt(D).
        dropout_p: Probability in [0, 1) of dropping a weight after the softmax.
        seed: None, an int or a 0-d int64 tensor on qkv's device. The mask is that of `causal_attention`.
        deterministic: Whether gradients must be the same bits every time.

    Returns:
        (B, T, H, D) in qkv's dtype (the autocast dtype under autocast), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: As `causal_attention`.

    Numerics:
        Outputs and gradients are the same bits as those of `causal_attention` on the three views. Saved for
        backward: qkv, out and 4 BHT bytes of log-sum-exp. The kernels of backward write dq, dk and dv into
        the gradient of qkv. With `causal_attention`, autograd would stack the three: 6 BTHD elements more to
        read and write.

    Backend:
        As `causal_attention`. The reference's backward stacks the gradients that torch's attention returns.

    Source:
        As `causal_attention`.
    """
    options: Any = {
        "key_start": key_start,
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": seed,
        "deterministic": deterministic,
    }
    choice, qkv = _prepare_causal_attention_qkv(qkv, **options)
    if choice.backend == "triton":
        from kernels.attention import torch_op

        return torch_op.causal_attention_qkv(qkv, **options)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[1] <= SHORT:
        with torch.autocast("cpu", enabled=False):
            return reference.causal_attention_qkv(qkv.float(), **options).to(qkv.dtype)
    return reference.causal_attention_qkv(qkv, **options)


@_PACKED.prepares
def _prepare_causal_attention_qkv(
    qkv: torch.Tensor,
    key_start: torch.Tensor | None,
    scale: float | None,
    dropout_p: float,
    seed: int | torch.Tensor | None,
    deterministic: bool | None,
) -> tuple[Choice, torch.Tensor]:
    op = "causal_attention_qkv"
    (qkv,) = autocast(qkv)
    sizes = checks.shapes(op, qkv=(qkv, PACKED))
    if sizes["H"] == 0:
        raise ValueError(f"{op}: qkv has H=0, expected at least 1")
    checks.floating(op, qkv=qkv)
    checks.last_contiguous(op, qkv=qkv)
    _check_key_start(op, key_start, "T", qkv=(qkv, PACKED))
    _check_options(op, qkv.device, scale, dropout_p, seed, deterministic)
    choice = _PACKED.choose(qkv, limit=_limit(sizes["D"]), slower=slower(op, qkv, **sizes))
    return choice, qkv


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """out_i = Σ_j softmax_j(scale q_i·k_j) v_j over cached keys j in [key_start, cache_len - Tq + i].

    Args:
        q: (B, H, Tq, D) with Tq small: the newest queries, whose keys and values are already in the caches.
        k_cache: (B, Hkv, Tmax, D) of q's dtype; Hkv divides H.
        v_cache: Like k_cache.
        cache_len: int32 (B,) on the device: valid keys, those of these queries included. It is read on the
            device, so that a CUDA graph can be replayed as the cache grows. Values are clamped to [0, Tmax].
        key_start: int32 (B,): the first key that each sequence may see (left padding).
        scale: Positive factor of the logits, default 1 / sqrt(D).

    Returns:
        (B, H, Tq, D) in q's dtype. Inference only: there is no backward.

    Raises:
        TypeError, ValueError, RuntimeError: As `causal_attention`; RuntimeError also where gradients are
            asked for.

    Numerics:
        As `causal_attention`; a query without keys gives a zero row.

    Backend:
        As `causal_attention`.

    Source:
        Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    choice, q, k_cache, v_cache = _prepare_decode_attention(
        q=q, k_cache=k_cache, v_cache=v_cache, cache_len=cache_len, key_start=key_start, scale=scale
    )
    if choice.backend == "triton":
        from kernels.attention import torch_op

        return torch_op.decode_attention(
            q=q, k_cache=k_cache, v_cache=v_cache, cache_len=cache_len, key_start=key_start, scale=scale
        )
    return reference.decode_attention(q, k_cache, v_cache, cache_len, key_start=key_start, scale=scale)


@_DECODE.prepares
def _prepare_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    key_start: torch.Tensor | None,
    scale: float | None,
) -> tuple[Choice, torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "decode_attention"
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    cache_dims = ("B", "Hkv", "Tmax", "D")
    sizes = checks.shapes(
        op,
        q=(q, QUERIES),
        k_cache=(k_cache, cache_dims),
        v_cache=(v_cache, cache_dims),
        cache_len=(cache_len, ("B",)),
    )
    checks.same_dtype(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.last_contiguous(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.dtype(op, "cache_len", cache_len, torch.int32)
    if sizes["Tq"] > sizes["Tmax"]:
        raise ValueError(f"{op}: q has Tq={sizes['Tq']}, expected at most {sizes['Tmax']} (k_cache's Tmax)")
    _check_heads(op, "k_cache", sizes)
    _check_key_start(op, key_start, None, q=(q, QUERIES))
    checks.scale(op, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise RuntimeError(
            f"{op}: an input requires a gradient, expected inference (torch.no_grad) or causal_attention"
        )
    choice = _DECODE.choose(q, limit=_limit(sizes["D"]), slower=slower(op, q, **sizes))
    return choice, q, k_cache, v_cache


def _limit(d: int) -> str | None:
    """The reason why the kernels cannot take head dimension `d`; None if they can."""
    return f"the kernel takes head dimensions up to 256, not {d}" if d > 256 else None


def _check_options(
    op: str,
    device: torch.device,
    scale: float | None,
    dropout_p: float,
    seed: int | torch.Tensor | None,
    deterministic: bool | None,
) -> None:
    checks.scale(op, scale)
    checks.number(op, "dropout_p", dropout_p, 0, 1, open_high=True)
    checks.seed(op, seed, device)
    checks.boolean(op, "deterministic", deterministic)


def _check_heads(op: str, name: str, sizes: dict[str, int]) -> None:
    if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"] != 0:
        raise ValueError(f"{op}: {name} has Hkv={sizes['Hkv']}, expected a divisor of {sizes['H']} (q's H)")


def _check_key_start(
    op: str, key_start: torch.Tensor | None, per_query: str | None, /, **queries: tuple[torch.Tensor, Dims]
) -> None:
    """Checks key_start: int32 (B,) or, if `per_query` names a dimension of the queries, (B, that one)."""
    if key_start is None:
        return
    matrix = isinstance(key_start, torch.Tensor) and key_start.ndim == 2
    dims = ("B", per_query) if per_query is not None and matrix else ("B",)
    checks.shapes(op, **queries, key_start=(key_start, dims))
    checks.dtype(op, "key_start", key_start, torch.int32)
