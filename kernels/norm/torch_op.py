"""The family's ops as torch.library sees them: one forward and one backward, which serve both public
functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.norm.backward import launch_backward, launch_sum
from kernels.norm.dropout_kernel import launch_dropout
from kernels.norm.forward import launch_forward
from kernels.philox import dropout_seed
from kernels.torch_library import refuse, register
from kernels.tuning import norm_programs


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """`kernels.layer_norm` in `dtype`, for arguments that were checked."""
    y, _ = torch.ops.fused_gpt.layer_norm_forward(x, weight, bias, float(eps), dtype)
    return y


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`kernels.add_layer_norm` with y in `dtype`, for arguments that were checked."""
    seed = dropout_seed(dropout_p, seed, x.device)
    y, new_residual, _ = torch.ops.fused_gpt.add_layer_norm_forward(
        x, residual, weight, bias, seed, float(eps), float(dropout_p), dtype
    )
    return y, new_residual


def _rows(x: Tensor) -> Tensor:
    """(N, C) with a contiguous last dimension; a view where strides allow it."""
    c = x.shape[-1]
    x = x.reshape(x.numel() // c, c)
    return x if x.stride(1) == 1 else x.contiguous()


def _forward_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    stats = x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), stats


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, stats = _forward_outputs(x, weight, bias, eps, dtype)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        launch_forward(_rows(x), None, weight.contiguous(), bias, None, y, None, stats, eps, 0.0).run()
    return y, stats


def _add_forward_outputs(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=args[-1]), residual.new_empty(x.shape), stats


def _add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, new_residual, stats = _add_forward_outputs(x, residual, dtype)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        launch_forward(
            _rows(x), _rows(residual), weight.contiguous(), bias, seed, y, new_residual, stats, eps, dropout_p
        ).run()  # fmt: skip
    return y, new_residual, stats


def _backward_outputs(
    h: Tensor,
    weight: Tensor,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    need_dweight: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to fill; an empty tensor stands for each that is not needed."""

    def like(shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        return h.new_empty(0) if dtype is None else h.new_empty(shape, dtype=dtype)

    return (
        like(h.shape, dx_dtype),
        like(h.shape, dresidual_dtype),
        like(weight.shape, weight.dtype if need_dweight else None),
        like(weight.shape, dbias_dtype),
    )


def _backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    h: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    need_dweight: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _backward_outputs(h, weight, dx_dtype, dresidual_dtype, need_dweight, dbias_dtype)
    needed = (dx_dtype is not None, dresidual_dtype is not None, need_dweight, dbias_dtype is not None)
    dx, dresidual, dweight, dbias = (grad if need else None for grad, need in zip(found, needed, strict=True))
    programs = norm_programs(h.device, stats.shape[1], h.shape[-1])
    partial_dweight, partial_dbias = (
        None if grad is None else h.new_empty((programs, h.shape[-1]), dtype=torch.float32)
        for grad in (dweight, dbias)
    )
    dnew_residual = None if dnew_residual is None else _rows(dnew_residual)
    with torch.cuda.device_of(h):
        launch_backward(
            _rows(dy), dnew_residual, _rows(h), weight.contiguous(), seed, stats, dx, dresidual,
            partial_dweight, partial_dbias,
            dropout_p, programs,
        ).run()  # fmt: skip
        if dweight is not None or dbias is not None:
            launch_sum(partial_dweight, partial_dbias, dweight, dbias).run()
    return found


def _backward_fake(
    dy: Tensor, dnew_residual: Tensor | None, h: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(h, weight, *args[-4:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for the statistics
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx, _, dweight, dbias = torch.ops.fused_gpt.layer_norm_backward(
        dy,
        None,
        x,
        weight,
        None,
        stats,
        0.0,
        x.dtype if need_x else None,
        None,
        need_weight,
        ctx.bias_dtype if need_bias else None,
    )
    return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, None, None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, seed, _, ctx.dropout_p, _ = inputs
    _, new_residual, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(new_residual, weight, seed, stats)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _add_differentiate(
    ctx: Any, dy: Tensor | None, dnew_residual: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    new_residual, weight, seed, stats = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    if dy is None:
        dy = torch.zeros_like(new_residual)
    # Without dropout the two gradients are one, and one tensor serves for both where their dtypes agree.
    shared = need_x and need_residual and seed is None and ctx.x_dtype == new_residual.dtype
    dx, dresidual, dweight, dbias = torch.ops.fused_gpt.layer_norm_backward(
        dy,
        dnew_residual,
        new_residual,
        weight,
        seed,
        stats,
        ctx.dropout_p,
        ctx.x_dtype if need_x and not shared else None,
        new_residual.dtype if need_residual else None,
        need_weight,
        ctx.bias_dtype if need_bias else None,
    )
    if shared:
        dx = dresidual
    needed = zip(
        (dx, dresidual, dweight, dbias), (need_x, need_residual, need_weight, need_bias), strict=True
    )
    return *(grad if need else None for grad, need in needed), None, None, None, None


register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor y, "
    "Tensor stats)",
    _forward,
    _forward_outputs,
    _differentiate,
    _save,
)
register(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, float "
    "eps, float dropout_p,"
    " ScalarType dtype) -> (Tensor y, Tensor new_residual, Tensor stats)",
    _add_forward,
    _add_forward_outputs,
    _add_differentiate,
    _add_save,
)
register(
    "layer_norm_backward(Tensor dy, Tensor? dnew_residual, Tensor h, Tensor weight, Tensor? seed, Tensor "
    "stats, float dropout_p,"
    " ScalarType? dx_dtype, ScalarType? dresidual_dtype, bool need_dweight, ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
    refuse("layer_norm"),
)


def dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """`kernels.dropout` for p > 0 and arguments that were checked."""
    return torch.ops.fused_gpt.dropout(x, dropout_seed(p, seed, x.device), float(p))


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    y = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        launch_dropout(_rows(x), seed, y, p).run()
    return y


def _dropout_save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.fused_gpt.dropout(dy, seed, ctx.p), None, None


register(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    _dropout,
    lambda x, seed, p: x.new_empty(x.shape),
    _dropout_differentiate,
    _dropout_save,
)
