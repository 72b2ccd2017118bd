"""One decoded token per sequence: `decode_embedding`, `decode_block` for each layer, then `decode_head`.

`decode_argmax` chooses the next token. The ops are inference-only. The kernels of the first three read each
weight once, for up to `DECODE_BATCH` sequences.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kernels import checks
from kernels.checks import Dims
from kernels.decode import reference
from kernels.dispatch import Choice, Op, autocast_dtype
from kernels.tuning import ARGMAX_COLUMNS, DECODE_COLUMNS, slower

_EMBEDDING = Op("decode_embedding", family="decode")
_BLOCK = Op("decode_block", family="decode")
_HEAD = Op("decode_head", family="decode")
_ARGMAX = Op("decode_argmax", family="decode")
DECODE_BATCH = 8  # the most sequences that the kernels take
CACHE: Dims = ("B", "Hkv", "Tmax", "D")
PARAMETERS: dict[str, Dims] = {  # of decode_block; R = (H + 2 Hkv) D, HD = H D
    "norm_1_weight": ("C",),
    "norm_1_bias": ("C",),
    "qkv_weight": ("R", "C"),
    "qkv_bias": ("R",),
    "proj_weight": ("C", "HD"),
    "proj_bias": ("C",),
    "norm_2_weight": ("C",),
    "norm_2_bias": ("C",),
    "up_weight": ("I", "C"),
    "up_bias": ("I",),
    "down_weight": ("C", "I"),
    "down_bias": ("C",),
}


def decode_embedding(
    token: torch.Tensor,
    cache_len: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    *,
    key_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """x = token_weight[token] + position_weight[cache_len - 1 - key_start].

    Args:
        token: int64 (B,), the newest token of each sequence, in [0, V).
        cache_len: int32 (B,): tokens of each sequence, the newest and the padding included.
        token_weight: (V, C), float16, bfloat16, float32 or float64, with a contiguous last dimension.
        position_weight: (P, C) of the same dtype. Positions are clamped to [0, P).
        key_start: int32 (B,), the padding on the left of each sequence, or None.

    Returns:
        (B, C) in the weights' dtype, also under autocast. Inference only: there is no backward.

    Raises:
        TypeError: A tensor of another dtype, or something that is not a tensor.
        ValueError: Ranks, sizes, devices or strides that do not fit.
        RuntimeError: Gradients are asked for, or ``use_backend("triton")`` cannot be honoured.

    Numerics:
        One addition in float32 and one rounding. The kernel clamps a token outside [0, V), where the
        reference raises an error.

    Backend:
        The reference runs for float64, for B > 8, for C > 16,384, and wherever `kernels.explain` says that
        Triton cannot run.

    Source:
        Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019), section 2.3.
    """
    choice = _prepare_decode_embedding(token, cache_len, token_weight, position_weight, key_start)
    if choice.backend == "triton":
        from kernels.decode import torch_op

        return torch_op.decode_embedding(token, cache_len, token_weight, position_weight, key_start)
    return reference.decode_embedding(token, cache_len, token_weight, position_weight, key_start=key_start)


@_EMBEDDING.prepares
def _prepare_decode_embedding(
    token: torch.Tensor,
    cache_len: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    key_start: torch.Tensor | None,
) -> Choice:
    op = "decode_embedding"
    sizes = checks.shapes(
        op,
        ("key_start",),
        token=(token, ("B",)),
        cache_len=(cache_len, ("B",)),
        token_weight=(token_weight, ("V", "C")),
        position_weight=(position_weight, ("P", "C")),
        key_start=(key_start, ("B",)),
    )
    checks.dtype(op, "token", token, torch.int64)
    _check_lengths(op, cache_len, key_start)
    _check_floats(op, token_weight=token_weight, position_weight=position_weight)
    return _choose(_EMBEDDING, token_weight, sizes)


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
    """h = x + proj(attention(qkv(norm_1(x)))); y = h + down(gelu(up(norm_2(h)))).

    It also writes the caches: the token's key and value become the last of the valid ones.

    Args:
        x: (B, C), the residual stream at the newest token; float16, bfloat16, float32 or float64. It and all
            other floating-point tensors have a contiguous last dimension, and x's dtype.
        k_cache: (B, Hkv, Tmax, D), written at index cache_len - 1 of the third dimension.
        v_cache: Like k_cache.
        cache_len: int32 (B,) on the device: valid keys, this token's own included. It is read on the device,
            so that a CUDA graph can be replayed as the cache grows. The index is clamped to [0, Tmax), the
            number of valid keys to [0, Tmax].
        norm_1_weight: (C,).
        norm_1_bias: (C,) or None.
        qkv_weight: ((H + 2 Hkv) D, C): the rows of all queries, then of all keys, then of all values.
        qkv_bias: ((H + 2 Hkv) D,) or None.
        proj_weight: (C, H D); Hkv divides H, and query head h reads key head h // (H / Hkv).
        proj_bias: (C,) or None.
        norm_2_weight: (C,).
        norm_2_bias: (C,) or None.
        up_weight: (I, C).
        up_bias: (I,) or None.
        down_weight: (C, I).
        down_bias: (C,) or None.
        key_start: int32 (B,): the first key that each sequence may see (left padding).
        scale: Positive factor of the logits, default 1 / sqrt(D).
        eps: Added to the variance of both norms, >= 0.
        approximate: GELU by "tanh", or by erf with "none", as in `gelu_ffn`.

    Returns:
        (B, C) in x's dtype, also under autocast. Inference only: there is no backward.

    Raises:
        TypeError: A tensor of another dtype, or something that is not a tensor or number.
        ValueError: Ranks, sizes, devices or strides that do not fit; a scale that is not positive and finite;
            eps negative or not finite; an unknown approximation.
        RuntimeError: Gradients are asked for, or ``use_backend("triton")`` cannot be honoured.

    Numerics:
        Statistics, sums, softmax and GELU are float32. The kernels round to x's dtype only what they store:
        q, the caches, attention's output, h, GELU's output and y. Sums have a fixed order.

    Backend:
        The reference runs for float64, for B > 8, for D > 256, for C, H D or I > 16,384, and wherever
        `kernels.explain` says that Triton cannot run. From sm_90 on, the kernels read parameters before the
        launch ahead has ended: another launch, such as the one that writes x, must come between a write to a
        parameter and this op.

    Source:
        Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019), section 2.3; Dao
        et al., "Flash-Decoding for long-context inference" (2023).
    """
    arguments: Any = {
        "x": x,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_len": cache_len,
        "norm_1_weight": norm_1_weight,
        "norm_1_bias": norm_1_bias,
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm_2_weight": norm_2_weight,
        "norm_2_bias": norm_2_bias,
        "up_weight": up_weight,
        "up_bias": up_bias,
        "down_weight": down_weight,
        "down_bias": down_bias,
        "key_start": key_start,
        "scale": scale,
        "eps": eps,
        "approximate": approximate,
    }
    choice = _prepare_decode_block(**arguments)
    if choice.backend == "triton":
        from kernels.decode import torch_op

        return torch_op.decode_block(**arguments)
    with _without_autocast(x):
        return reference.decode_block(**arguments)


@_BLOCK.prepares
def _prepare_decode_block(
    x: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    key_start: torch.Tensor | None,
    scale: float | None,
    eps: float,
    approximate: str,
    **parameters: torch.Tensor | None,
) -> Choice:
    op = "decode_block"
    dims = {"x": ("B", "C"), "k_cache": CACHE, "v_cache": CACHE} | PARAMETERS
    tensors = {"x": x, "k_cache": k_cache, "v_cache": v_cache} | parameters
    sizes = checks.shapes(
        op,
        ("key_start", *(name for name in PARAMETERS if name.endswith("bias"))),
        **{name: (tensors[name], dims[name]) for name in dims},
        cache_len=(cache_len, ("B",)),
        key_start=(key_start, ("B",)),
    )
    _check_lengths(op, cache_len, key_start)
    _check_floats(op, **tensors)
    _check_heads(op, sizes)
    checks.scale(op, scale)
    checks.number(op, "eps", eps, 0, torch.finfo(torch.float32).max)
    checks.one_of(op, "approximate", approximate, ("tanh", "none"))
    return _choose(_BLOCK, x, sizes)


def decode_head(
    x: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """logits = layer_norm(x, norm_weight, norm_bias) head_weightᵀ + head_bias, in float32.

    Args:
        x: (B, C), the residual stream after the last block; float16, bfloat16, float32 or float64. It and the
            parameters have a contiguous last dimension, and x's dtype.
        norm_weight: (C,).
        norm_bias: (C,) or None.
        head_weight: (V, C).
        head_bias: (V,) or None.
        eps: Added to the variance, >= 0.

    Returns:
        (B, V) in float32, or float64 for float64, also under autocast. Inference only: there is no backward.

    Raises:
        TypeError, ValueError, RuntimeError: As `decode_block`.

    Numerics:
        The kernel accumulates and stores float32. The reference rounds the logits of 16-bit inputs to x's
        dtype first.

    Backend:
        The reference runs for float64, for B > 8, for C > 16,384, and wherever `kernels.explain` says that
        Triton cannot run. Parameters are read early, as in `decode_block`.

    Source:
        As `decode_block`.
    """
    arguments: Any = {
        "x": x,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "eps": eps,
    }
    choice = _prepare_decode_head(**arguments)
    if choice.backend == "triton":
        from kernels.decode import torch_op

        return torch_op.decode_head(**arguments)
    with _without_autocast(x):
        return reference.decode_head(**arguments)


@_HEAD.prepares
def _prepare_decode_head(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    eps: float,
) -> Choice:
    op = "decode_head"
    sizes = checks.shapes(
        op,
        ("norm_bias", "head_bias"),
        x=(x, ("B", "C")),
        norm_weight=(norm_weight, ("C",)),
        norm_bias=(norm_bias, ("C",)),
        head_weight=(head_weight, ("V", "C")),
        head_bias=(head_bias, ("V",)),
    )
    _check_floats(
        op,
        x=x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        head_weight=head_weight,
        head_bias=head_bias,
    )
    checks.number(op, "eps", eps, 0, torch.finfo(torch.float32).max)
    return _choose(_HEAD, x, sizes)


def decode_argmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = argmax(logits) of each sequence: the first index of the largest logit.

    It writes `out`, so that a CUDA graph finds the token where it left it.

    Args:
        logits: (B, V), float16, bfloat16, float32 or float64. The kernel reads a copy of them unless the last
            dimension is contiguous.
        out: int64 (B,), overwritten.

    Returns:
        `out`.

    Raises:
        TypeError: A tensor of another dtype, or something that is not a tensor.
        ValueError: Ranks, sizes or devices that do not fit.
        RuntimeError: Gradients are asked for, or ``use_backend("triton")`` cannot be honoured.

    Numerics:
        Exactly `torch.argmax`: NaN is the largest, 0.0 and -0.0 are equal.

    Backend:
        The reference runs for float64, for V > 2³⁰, and wherever `kernels.explain` says that Triton cannot
        run. The kernel takes any B.

    Source:
        `torch.argmax`.
    """
    choice = _prepare_decode_argmax(logits, out)
    if choice.backend == "triton":
        from kernels.decode import torch_op

        return torch_op.decode_argmax(logits, out)
    return reference.decode_argmax(logits, out)


@_ARGMAX.prepares
def _prepare_decode_argmax(logits: torch.Tensor, out: torch.Tensor) -> Choice:
    op = "decode_argmax"
    sizes = checks.shapes(op, logits=(logits, ("B", "V")), out=(out, ("B",)))
    checks.dtype(op, "out", out, torch.int64)
    checks.floating(op, logits=logits)
    _check_gradients(op, logits=logits)
    v = sizes["V"]
    limit = f"the kernel takes V in [1, {ARGMAX_COLUMNS}], not {v}" if not 1 <= v <= ARGMAX_COLUMNS else None
    return _ARGMAX.choose(logits, limit=limit, slower=slower(op, logits, **sizes))


def _check_lengths(op: str, cache_len: torch.Tensor, key_start: torch.Tensor | None) -> None:
    checks.dtype(op, "cache_len", cache_len, torch.int32)
    checks.dtype(op, "key_start", key_start, torch.int32)


def _check_floats(op: str, /, **tensors: torch.Tensor | None) -> None:
    """Dtypes, strides, and that no gradient is asked for."""
    checks.same_dtype(op, **tensors)
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    checks.last_contiguous(op, **present)
    _check_gradients(op, **present)


def _check_gradients(op: str, /, **tensors: torch.Tensor) -> None:
    """No gradient is asked for."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise RuntimeError(f"{op}: {name} requires a gradient, expected inference (torch.no_grad)")


def _check_heads(op: str, sizes: dict[str, int]) -> None:
    """qkv_weight has rows for H query heads and Hkv key heads; adds H to `sizes`."""
    d, hkv = sizes["D"], sizes["Hkv"]
    if d == 0 or sizes["HD"] % d != 0:
        raise ValueError(f"{op}: proj_weight has HD={sizes['HD']}, expected a multiple of {d} (k_cache's D)")
    h = sizes["H"] = sizes["HD"] // d
    if hkv == 0 or h % hkv != 0:
        raise ValueError(f"{op}: k_cache has Hkv={hkv}, expected a divisor of {h} (proj_weight's HD / D)")
    if sizes["R"] != (h + 2 * hkv) * d:
        raise ValueError(f"{op}: qkv_weight has R={sizes['R']}, expected {(h + 2 * hkv) * d} ((H + 2 Hkv) D)")


def _choose(op: Op, tensor: torch.Tensor, sizes: dict[str, int]) -> Choice:
    """The backend of a call whose tensors have been checked."""
    return op.choose(tensor, limit=_limit(sizes), slower=slower(op.name, tensor, **sizes))


def _limit(sizes: dict[str, int]) -> str | None:
    """The reason why the kernels cannot take a call of these sizes; None if they can."""
    if sizes["B"] > DECODE_BATCH:
        return f"the kernel takes up to {DECODE_BATCH} sequences, not {sizes['B']}"
    if sizes.get("D", 0) > 256:
        return f"the kernel takes head dimensions up to 256, not {sizes['D']}"
    for name in ("C", "HD", "I"):
        if not 1 <= sizes.get(name, 1) <= DECODE_COLUMNS:
            return f"the kernel takes {name} in [1, {DECODE_COLUMNS}], not {sizes[name]}"
    return None


def _without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Autocast would compute in another dtype than the caches' and the residual stream's."""
    if autocast_dtype(x.device) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
