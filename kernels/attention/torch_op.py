"""The torch.library ops of attention: causal attention, forward and backward, and decoding.

They allocate the outputs and run the launches. Shapes: q, out (B, H, Tq, D); k, v (B, Hkv, Tk, D); lse2
(B, H, Tq) float32, log2 of the softmax's denominators. The ops of a packed projection run the same kernels on
views of it: qkv, dqkv (B, T, 3, H, D); out, grad (B, T, H, D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.attention.backward import attention_backward
from kernels.attention.decode import attention_decode, query_tiles
from kernels.attention.forward import attention_forward
from kernels.philox import dropout_seed
from kernels.torch_library import ops, refuse, register
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
    """`kernels.causal_attention`, after its arguments have been checked."""
    options = _options(q, scale, dropout_p, seed, deterministic)
    out, _ = ops.attention_forward(q, k, v, key_start, *options)
    return out


def causal_attention_qkv(
    qkv: Tensor,
    key_start: Tensor | None,
    scale: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    deterministic: bool | None,
) -> Tensor:
    """`kernels.causal_attention_qkv`, after its arguments have been checked."""
    options = _options(qkv, scale, dropout_p, seed, deterministic)
    out, _ = ops.attention_qkv_forward(qkv, key_start, *options)
    return out


def _options(
    x: Tensor, scale: float | None, dropout_p: float, seed: int | Tensor | None, deterministic: bool | None
) -> tuple[Tensor | None, float, float, bool]:
    """seed, scale, dropout_p and deterministic as the ops take them; x: q or qkv."""
    scale = 1 / math.sqrt(x.shape[-1]) if scale is None else float(scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return dropout_seed(dropout_p, seed, x.device), scale, float(dropout_p), deterministic


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_len: Tensor,
    key_start: Tensor | None,
    scale: float | None,
) -> Tensor:
    """`kernels.decode_attention`, after its arguments have been checked."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return ops.attention_decode(q, k_cache, v_cache, cache_len, key_start, scale)


def _dense_like(x: Tensor) -> Tensor:
    """An uninitialised tensor with x's shape and order of dimensions, and a contiguous last dimension."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiles(q: Tensor, k: Tensor, seed: Tensor | None) -> AttentionTiles:
    """The tuning table's row for a call."""
    return attention_tiles(
        architecture(q.device),
        q.element_size(),
        q.shape[3],
        dropout=seed is not None,
        grouped=q.shape[1] != k.shape[1],
    )


def _forward_outputs(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """out and lse2, uninitialised; also the fake of attention_forward."""
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
    """out and lse2. `deterministic` is an argument for backward's sake."""
    out, lse2 = _forward_outputs(q)
    _run_forward(
        q=q,
        k=k,
        v=v,
        key_start=key_start,
        seed=seed,
        out=out,
        lse2=lse2,
        scale=scale,
        dropout_p=dropout_p,
    )
    return out, lse2


def _run_forward(*, q: Tensor, k: Tensor, seed: Tensor | None, **arguments: Any) -> None:
    """Runs the launch of `attention_forward` with the tuning table's tile."""
    launch = attention_forward(q=q, k=k, seed=seed, **arguments, tile=_tiles(q, k, seed).forward)
    with torch.cuda.device_of(q):
        launch.run()


def _backward_outputs(
    q: Tensor, k: Tensor, v: Tensor, need_dq: bool, need_dkdv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, uninitialised; an empty tensor takes the place of a gradient that is not needed."""
    empty = q.new_empty(0)  # an op may not return one tensor twice, hence the clones
    dk, dv = (_dense_like(k), _dense_like(v)) if need_dkdv else (empty, empty.clone())
    return _dense_like(q) if need_dq else empty.clone(), dk, dv


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
    """dq, dk and dv for `grad`, the gradient of out, of any strides."""
    dq, dk, dv = _backward_outputs(q, k, v, need_dq, need_dkdv)
    _run_backward(
        grad=grad,
        q=q,
        k=k,
        v=v,
        out=out,
        lse2=lse2,
        key_start=key_start,
        seed=seed,
        dq=dq if need_dq else None,
        dk=dk if need_dkdv else None,
        dv=dv if need_dkdv else None,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    return dq, dk, dv


def _run_backward(
    *, grad: Tensor, q: Tensor, k: Tensor, seed: Tensor | None, deterministic: bool, **arguments: Any
) -> None:
    """Runs the launches of `attention_backward` with the tuning table's tiles; grad has any strides."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    tiles = _tiles(q, k, seed)
    if deterministic:
        tiles = tiles._replace(atomic=None)
    with torch.cuda.device_of(q):
        for launch in attention_backward(grad=grad, q=q, k=k, seed=seed, **arguments, tiles=tiles):
            launch.run()


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The fake of attention_backward; the last two arguments are need_dq and need_dkdv."""
    return _backward_outputs(q, k, v, *args[-2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what backward needs of a call of attention_forward."""
    q, k, v, key_start, seed, *ctx.options = inputs
    out, lse2 = output
    ctx.set_materialize_grads(False)  # no tensor of zeros for the gradient of lse2
    ctx.mark_non_differentiable(lse2)
    ctx.save_for_backward(q, k, v, out, lse2, key_start, seed)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """From the gradient of out to the gradients of attention_forward's eight arguments."""
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    dq, dk, dv = ops.attention_backward(grad, *ctx.saved_tensors, *ctx.options, need_q, need_k or need_v)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, *(None,) * 5


def _parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, H, T, D), views of qkv (B, T, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _packed_outputs(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """out and lse2, uninitialised; also the fake of attention_qkv_forward."""
    b, t, _, h, d = qkv.shape
    return qkv.new_empty(b, t, h, d), qkv.new_empty(b, h, t, dtype=torch.float32)


def _packed_forward(
    qkv: Tensor,
    key_start: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse2. `deterministic` is an argument for backward's sake."""
    out, lse2 = _packed_outputs(qkv)
    q, k, v = _parts(qkv)
    _run_forward(
        q=q,
        k=k,
        v=v,
        key_start=key_start,
        seed=seed,
        out=out.transpose(1, 2),
        lse2=lse2,
        scale=scale,
        dropout_p=dropout_p,
    )
    return out, lse2


def _packed_gradient(grad: Tensor, qkv: Tensor, *args: Any) -> Tensor:
    """dqkv, uninitialised and contiguous; also the fake of attention_qkv_backward."""
    return qkv.new_empty(qkv.shape)


def _packed_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse2: Tensor,
    key_start: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    deterministic: bool,
) -> Tensor:
    """dqkv for `grad`, the gradient of out, of any strides."""
    dqkv = _packed_gradient(grad, qkv)
    (q, k, v), (dq, dk, dv) = _parts(qkv), _parts(dqkv)
    _run_backward(
        grad=grad.transpose(1, 2),
        q=q,
        k=k,
        v=v,
        out=out.transpose(1, 2),
        lse2=lse2,
        key_start=key_start,
        seed=seed,
        dq=dq,
        dk=dk,
        dv=dv,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    return dqkv


def _packed_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what backward needs of a call of attention_qkv_forward."""
    qkv, key_start, seed, *ctx.options = inputs
    out, lse2 = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse2)
    ctx.save_for_backward(qkv, out, lse2, key_start, seed)


def _packed_differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """From the gradient of out to the gradients of attention_qkv_forward's six arguments."""
    return ops.attention_qkv_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _decode_output(q: Tensor, *args: Any) -> Tensor:
    """out, uninitialised; also the fake of attention_decode."""
    return _dense_like(q)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor, key_start: Tensor | None, scale: float
) -> Tensor:
    """out of attention_decode."""
    out = _decode_output(q)
    b, h, tq, d = q.shape
    hkv, tmax = k_cache.shape[1:3]
    tile = attention_decode_tile(architecture(q.device), q.element_size(), d, tmax)
    splits = attention_decode_splits(q.device, b * hkv, tmax, tile)
    tiles = b * query_tiles(h, hkv, tq, tile)
    counter = q.new_zeros(tiles, dtype=torch.int32) if splits > 1 else None

    with torch.cuda.device_of(q):
        attention_decode(
            q=q,
            k=k_cache,
            v=v_cache,
            cache_len=cache_len,
            key_start=key_start,
            out=out,
            counter=counter,
            scale=scale,
            splits=splits,
            tile=tile,
        ).run()
    return out


register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_start, Tensor? seed, float scale,"
    " float dropout_p, bool deterministic) -> (Tensor out, Tensor lse2)",
    kernel=_forward,
    fake=_forward_outputs,
    differentiate=_differentiate,
    save=_save,
)
register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse2,"
    " Tensor? key_start, Tensor? seed, float scale, float dropout_p, bool deterministic, bool need_dq,"
    " bool need_dkdv) -> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_backward,
    fake=_backward_fake,
    differentiate=refuse("causal_attention"),
)
register(
    "attention_qkv_forward(Tensor qkv, Tensor? key_start, Tensor? seed, float scale, float dropout_p,"
    " bool deterministic) -> (Tensor out, Tensor lse2)",
    kernel=_packed_forward,
    fake=_packed_outputs,
    differentiate=_packed_differentiate,
    save=_packed_save,
)
register(
    "attention_qkv_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse2, Tensor? key_start,"
    " Tensor? seed, float scale, float dropout_p, bool deterministic) -> Tensor dqkv",
    kernel=_packed_backward,
    fake=_packed_gradient,
    differentiate=refuse("causal_attention_qkv"),
)
register(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_len, Tensor? key_start,"
    " float scale) -> Tensor",
    kernel=_decode,
    fake=_decode_output,
)
