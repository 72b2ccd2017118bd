"""The family's ops as torch.library sees them: forward and backward of causal attention, and decoding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.attention.backward import launch_backward
from kernels.attention.decode import launch_decode
from kernels.attention.forward import launch_forward
from kernels.philox import dropout_seed
from kernels.torch_library import refuse, register
from kernels.tuning import (
    AttentionTiles,
    architecture,
    attention_decode_splits,
    attention_decode_tile,
    attention_tiles,
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    scale: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    deterministic: bool | None,
) -> Tensor:
    """`kernels.causal_attention` for arguments that were checked."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    seed = dropout_seed(dropout_p, seed, q.device)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out, _ = torch.ops.fused_gpt.attention_forward(
        q, k, v, key_start, seed, scale, float(dropout_p), deterministic
    )
    return out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_len: Tensor,
    key_start: Tensor | None,
    scale: float | None,
) -> Tensor:
    """`kernels.decode_attention` for arguments that were checked."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return torch.ops.fused_gpt.attention_decode(q, k_cache, v_cache, cache_len, key_start, scale)


def _dense_like(x: Tensor) -> Tensor:
    """Uninitialised, in x's order of dimensions, with a contiguous last one."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiles(q: Tensor, k: Tensor, seed: Tensor | None) -> AttentionTiles:
    grouped = q.shape[1] != k.shape[1]
    return attention_tiles(
        architecture(q.device), q.element_size(), q.shape[3], dropout=seed is not None, grouped=grouped
    )


def _forward_outputs(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _dense_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    out, lse2 = _forward_outputs(q)
    tile = _tiles(q, k, seed).forward
    with torch.cuda.device_of(q):
        launch_forward(q, k, v, key_start, seed, out, lse2, scale, dropout_p, tile).run()
    return out, lse2


def _backward_outputs(
    q: Tensor, k: Tensor, v: Tensor, need_dq: bool, need_dkdv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = q.new_empty(0)
    dk, dv = (_dense_like(k), _dense_like(v)) if need_dkdv else (nothing, nothing.clone())
    return _dense_like(q) if need_dq else nothing.clone(), dk, dv


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse2: Tensor,
    key_start: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    deterministic: bool,
    need_dq: bool,
    need_dkdv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward_outputs(q, k, v, need_dq, need_dkdv)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    tiles = _tiles(q, k, seed)
    if deterministic:
        tiles = tiles._replace(five=None)
    wanted = (dq if need_dq else None, dk if need_dkdv else None, dv if need_dkdv else None)
    with torch.cuda.device_of(q):
        for launch in launch_backward(
            grad, q, k, v, out, lse2, key_start, seed, *wanted, scale, dropout_p, tiles
        ):
            launch.run()
    return dq, dk, dv


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(q, k, v, *args[-2:])


def _decode_output(q: Tensor, *args: Any) -> Tensor:
    return _dense_like(q)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor, key_start: Tensor | None, scale: float
) -> Tensor:
    out = _dense_like(q)
    tile = attention_decode_tile(architecture(q.device), q.element_size(), q.shape[3])
    splits = attention_decode_splits(q.device, q.shape[0] * k_cache.shape[1], k_cache.shape[2], tile.block_n)
    with torch.cuda.device_of(q):
        for launch in launch_decode(q, k_cache, v_cache, cache_len, key_start, out, scale, splits, tile):
            launch.run()
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_start, seed, *ctx.options = inputs
    out, lse2 = output
    ctx.set_materialize_grads(False)  # no zeros for lse2
    ctx.mark_non_differentiable(lse2)
    ctx.save_for_backward(q, k, v, out, lse2, key_start, seed)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    dq, dk, dv = torch.ops.fused_gpt.attention_backward(
        grad, *ctx.saved_tensors, *ctx.options, need_q, need_k or need_v
    )
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        None,
        None,
        None,
        None,
        None,
    )


register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_start, Tensor? seed, float scale, float "
    "dropout_p,"
    " bool deterministic) -> (Tensor out, Tensor lse2)",
    _forward,
    _forward_outputs,
    _differentiate,
    _save,
)
register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse2, Tensor? "
    "key_start, Tensor? seed,"
    " float scale, float dropout_p, bool deterministic, bool need_dq, bool need_dkdv) -> (Tensor dq, Tensor "
    "dk, Tensor dv)",
    _backward,
    _backward_fake,
    refuse("causal_attention"),
)
register(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_len, Tensor? key_start, float "
    "scale) -> Tensor",
    _decode,
    _decode_output,
)
