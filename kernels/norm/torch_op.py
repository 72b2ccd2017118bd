"""The torch.library ops of LayerNorm, with and without a residual, their common backward, and dropout.

They allocate the outputs and run the launches. The kernels see x (..., C) as N rows; stats (2, N) float32
holds the mean and 1 / standard deviation of each row. With h what forward normalises, x or new_residual,
z = (h - mean) / standard deviation is kept for backward in place of h where it takes fewer bytes: in y's
dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.norm.backward import layer_norm_backward, layer_norm_backward_sum
from kernels.norm.dropout_kernel import dropout_forward
from kernels.norm.forward import layer_norm_forward
from kernels.philox import dropout_seed
from kernels.torch_library import needs_gradient, ops, refuse, register
from kernels.tuning import architecture, norm_backward_tile, norm_programs


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """`kernels.layer_norm` with y in `dtype`, after its arguments have been checked."""
    keep_z = _keeps_z(x.dtype, dtype, x, weight, bias)
    y, _, _ = ops.layer_norm_forward(x, weight, bias, float(eps), dtype, keep_z)
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
    """`kernels.add_layer_norm` with y in `dtype`, after its arguments have been checked."""
    seed = dropout_seed(dropout_p, seed, x.device)
    keep_z = _keeps_z(residual.dtype, dtype, x, residual, weight, bias)
    y, new_residual, _, _ = ops.add_layer_norm_forward(
        x, residual, weight, bias, seed, float(eps), float(dropout_p), dtype, keep_z
    )
    return y, new_residual


def dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """`kernels.dropout` for p > 0, after its arguments have been checked."""
    return ops.dropout(x, dropout_seed(p, seed, x.device), float(p))


def _keeps_z(h_dtype: torch.dtype, y_dtype: torch.dtype, *inputs: Tensor | None) -> bool:
    """Whether forward stores z: y is narrower than what is normalised, and an input needs a gradient."""
    return y_dtype.itemsize < h_dtype.itemsize and needs_gradient(*inputs)


def _rows(x: Tensor) -> Tensor:
    """x as (N, C) with a contiguous last dimension; a view where the strides allow it."""
    c = x.shape[-1]
    x = x.reshape(x.numel() // c, c)
    return x if x.stride(1) == 1 else x.contiguous()


def _forward_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, keep_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, stats and z, uninitialised; z is empty unless kept. Also the fake of layer_norm_forward."""
    stats = x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)
    z = x.new_empty(x.shape if keep_z else 0, dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), stats, z


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, keep_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, stats and z of layer_norm_forward."""
    y, stats, z = _forward_outputs(x, weight, bias, eps, dtype, keep_z)
    launch = layer_norm_forward(
        x=_rows(x),
        residual=None,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        seed=None,
        y=y,
        new_residual=None,
        stats=stats,
        z=z if keep_z else None,
        eps=eps,
        dropout_p=0.0,
    )
    with torch.cuda.device_of(x):
        launch.run()
    return y, stats, z


def _add_forward_outputs(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, new_residual, stats and z, as `_forward_outputs`; the last two arguments are dtype and keep_z."""
    y, stats, z = _forward_outputs(x, residual, None, 0.0, *args[-2:])
    return y, residual.new_empty(x.shape), stats, z


def _add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, new_residual, stats and z of add_layer_norm_forward."""
    y, new_residual, stats, z = _add_forward_outputs(x, residual, dtype, keep_z)
    launch = layer_norm_forward(
        x=_rows(x),
        residual=_rows(residual),
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        seed=seed,
        y=y,
        new_residual=new_residual,
        stats=stats,
        z=z if keep_z else None,
        eps=eps,
        dropout_p=dropout_p,
    )
    with torch.cuda.device_of(x):
        launch.run()
    return y, new_residual, stats, z


def _backward_outputs(
    h: Tensor,
    weight: Tensor,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    need_dweight: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight and dbias, uninitialised; each that is not needed is an empty tensor."""

    def buffer(shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        return h.new_empty(0) if dtype is None else h.new_empty(shape, dtype=dtype)

    return (
        buffer(h.shape, dx_dtype),
        buffer(h.shape, dresidual_dtype),
        buffer(weight.shape, weight.dtype if need_dweight else None),
        buffer(weight.shape, dbias_dtype),
    )


def _backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    h: Tensor,
    holds_z: bool,
    weight: Tensor,
    seed: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    need_dweight: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight and dbias; one without a dtype or need is an empty tensor.

    h is what forward normalised: new_residual, or x without a residual; with holds_z it is z.
    """
    outputs = _backward_outputs(h, weight, dx_dtype, dresidual_dtype, need_dweight, dbias_dtype)
    needed = (dx_dtype is not None, dresidual_dtype is not None, need_dweight, dbias_dtype is not None)
    dx, dresidual, dweight, dbias = (
        output if need else None for output, need in zip(outputs, needed, strict=True)
    )
    c = h.shape[-1]
    itemsize = 4 if holds_z else h.element_size()  # z stands for float32: dx or dresidual
    tile = norm_backward_tile(architecture(h.device), c, itemsize, dropout=seed is not None)
    programs = norm_programs(h.device, stats.shape[1], c, tile)
    partial_dweight, partial_dbias = (
        None if gradient is None else h.new_empty((programs, c), dtype=torch.float32)
        for gradient in (dweight, dbias)
    )

    launch = layer_norm_backward(
        dy=_rows(dy),
        dnew_residual=None if dnew_residual is None else _rows(dnew_residual),
        h=_rows(h),
        holds_z=holds_z,
        weight=weight.contiguous(),
        seed=seed,
        stats=stats,
        dx=dx,
        dresidual=dresidual,
        partial_dweight=partial_dweight,
        partial_dbias=partial_dbias,
        dropout_p=dropout_p,
        programs=programs,
        tile=tile,
    )
    with torch.cuda.device_of(h):
        launch.run()
        if dweight is not None or dbias is not None:
            layer_norm_backward_sum(
                partial_dweight=partial_dweight, partial_dbias=partial_dbias, dweight=dweight, dbias=dbias
            ).run()
    return outputs


def _backward_fake(
    dy: Tensor, dnew_residual: Tensor | None, h: Tensor, holds_z: bool, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fake of layer_norm_backward; the last four arguments are dtypes and needs."""
    return _backward_outputs(h, weight, *args[-4:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps what backward needs of a call of layer_norm_forward."""
    x, weight, bias, _, _, ctx.keep_z = inputs
    _, stats, z = output
    ctx.set_materialize_grads(False)  # no tensors of zeros for the gradients of stats and z
    ctx.mark_non_differentiable(stats, z)
    ctx.save_for_backward(z if ctx.keep_z else x, weight, stats)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """From the gradient of y to the gradients of layer_norm_forward's six arguments."""
    h, weight, stats = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx, _, dweight, dbias = ops.layer_norm_backward(
        dy=dy,
        dnew_residual=None,
        h=h,
        holds_z=ctx.keep_z,
        weight=weight,
        seed=None,
        stats=stats,
        dropout_p=0.0,
        dx_dtype=ctx.x_dtype if need_x else None,
        dresidual_dtype=None,
        need_dweight=need_weight,
        dbias_dtype=ctx.bias_dtype if need_bias else None,
    )
    gradients = zip((dx, dweight, dbias), ctx.needs_input_grad[:3], strict=True)
    return *(gradient if need else None for gradient, need in gradients), None, None, None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Keeps what backward needs of a call of add_layer_norm_forward."""
    x, residual, weight, bias, seed, _, ctx.dropout_p, _, ctx.keep_z = inputs
    _, new_residual, stats, z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, z)
    ctx.save_for_backward(z if ctx.keep_z else new_residual, weight, seed, stats)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _add_differentiate(
    ctx: Any, dy: Tensor | None, dnew_residual: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    """From the gradients of y and new_residual to those of add_layer_norm_forward's nine arguments."""
    h, weight, seed, stats = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    if dy is None:
        dy = torch.zeros_like(h)
    # Without dropout dx equals dresidual: one tensor serves for both where their dtypes agree.
    shared = need_x and need_residual and seed is None and ctx.x_dtype == ctx.residual_dtype
    dx, dresidual, dweight, dbias = ops.layer_norm_backward(
        dy=dy,
        dnew_residual=dnew_residual,
        h=h,
        holds_z=ctx.keep_z,
        weight=weight,
        seed=seed,
        stats=stats,
        dropout_p=ctx.dropout_p,
        dx_dtype=ctx.x_dtype if need_x and not shared else None,
        dresidual_dtype=ctx.residual_dtype if need_residual else None,
        need_dweight=need_weight,
        dbias_dtype=ctx.bias_dtype if need_bias else None,
    )
    if shared:
        dx = dresidual
    gradients = zip((dx, dresidual, dweight, dbias), ctx.needs_input_grad[:4], strict=True)
    return *(gradient if need else None for gradient, need in gradients), *(None,) * 5


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """y of dropout, contiguous."""
    y = _dropout_fake(x, seed, p)
    launch = dropout_forward(x=_rows(x), seed=seed, y=y, dropout_p=p)
    with torch.cuda.device_of(x):
        launch.run()
    return y


def _dropout_fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """y, uninitialised; also the fake of dropout."""
    return x.new_empty(x.shape)


def _dropout_save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    """Keeps the seed, from which backward recomputes the mask."""
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    """From the gradient of y to the gradient of x: dropout of dy with the same mask."""
    (seed,) = ctx.saved_tensors
    return ops.dropout(dy, seed, ctx.p), None, None


register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype, bool keep_z)"
    " -> (Tensor y, Tensor stats, Tensor z)",
    kernel=_forward,
    fake=_forward_outputs,
    differentiate=_differentiate,
    save=_save,
)
register(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, float eps,"
    " float dropout_p, ScalarType dtype, bool keep_z)"
    " -> (Tensor y, Tensor new_residual, Tensor stats, Tensor z)",
    kernel=_add_forward,
    fake=_add_forward_outputs,
    differentiate=_add_differentiate,
    save=_add_save,
)
register(
    "layer_norm_backward(Tensor dy, Tensor? dnew_residual, Tensor h, bool holds_z, Tensor weight,"
    " Tensor? seed, Tensor stats, float dropout_p, ScalarType? dx_dtype, ScalarType? dresidual_dtype,"
    " bool need_dweight, ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    kernel=_backward,
    fake=_backward_fake,
    differentiate=refuse("layer_norm"),
)
register(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    kernel=_dropout,
    fake=_dropout_fake,
    differentiate=_dropout_differentiate,
    save=_dropout_save,
)
