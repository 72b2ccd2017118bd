"""The family's ops as torch.library sees them, and the loop over chunks of rows that all of them share.

For "mean" and "sum" the gradients are computed beside the losses, while a chunk's logits are there, and
backward only scales them. For "none" each token has its own factor, so that backward draws the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.loss.softmax import launch_cross_entropy, launch_scale
from kernels.torch_library import refuse, register
from kernels.tuning import loss_chunk_rows


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """`kernels.linear_cross_entropy` for arguments that were checked."""
    rows, flat = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    options = ignore_index, float(label_smoothing), float(z_loss)
    needs = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if needs and reduction != "none":
        need_bias = bias is not None and bias.requires_grad
        return torch.ops.fused_gpt.linear_cross_entropy_gradients(
            rows,
            weight,
            flat,
            bias,
            *options,
            reduction == "mean",
            x.requires_grad,
            weight.requires_grad,
            need_bias,
        )[0]
    losses = torch.ops.fused_gpt.linear_cross_entropy_losses(rows, weight, flat, bias, *options)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() * _reduction_scale(flat, ignore_index, reduction == "mean")


def _reduction_scale(targets: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """1 / the number of tokens that count (at least one), or 1 for a sum: float32, on the device."""
    if not mean:
        return torch.ones((), dtype=torch.float32, device=targets.device)
    return (targets != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal()


def _run_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: tuple[int, float, float],
    grad: Tensor | None = None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Tensor:
    """Losses (N,); fills dx and adds to the float32 dweight and dbias, the gradients of the sum of grad *
    losses."""
    (n, _), v = x.shape, weight.shape[0]
    width = -(-v // 64) * 64  # rows start at aligned addresses, whatever the vocabulary
    size = min(n, loss_chunk_rows(x.device, v))
    losses = x.new_empty(n, dtype=torch.float32)
    buffer = x.new_empty(size, width)
    targets = targets.contiguous()
    if bias is not None:
        bias = F.pad(bias.to(torch.float32), (0, width - v))
    gradient = dx is not None or dweight is not None or dbias is not None
    with torch.cuda.device_of(x):
        for start in range(0, n, max(1, size)):
            rows = slice(start, start + size)
            logits = buffer[: min(size, n - start), :v]
            torch.mm(x[rows], weight.t(), out=logits)
            factor = None if grad is None else grad[rows]
            launch_cross_entropy(logits, targets[rows], bias, factor, losses[rows], *options, gradient).run()
            if dx is not None:
                torch.mm(logits, weight, out=dx[rows])
            if dweight is not None:
                _add_product(dweight, logits.t(), x[rows])
            if dbias is not None:
                dbias.add_(logits.sum(0, dtype=torch.float32))
    return losses


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32, from 16-bit operands too."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _gradient_buffers(
    x: Tensor, weight: Tensor, dtype: torch.dtype, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias zero in `dtype`; an empty tensor stands for each that is not needed."""
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        weight.new_zeros(weight.shape, dtype=dtype) if need_dweight else x.new_empty(0),
        weight.new_zeros(weight.shape[0], dtype=dtype) if need_dbias else x.new_empty(0),
    )


def _wanted(gradients: tuple[Tensor, Tensor, Tensor], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def _losses(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _run_chunks(x, weight, targets, bias, options)


def _losses_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options, needs = args[:3], args[3:]
    dx, dweight, dbias = found = _gradient_buffers(x, weight, torch.float32, *needs)
    _run_chunks(x, weight, targets, bias, options, grad, *_wanted(found, needs))
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient_buffers(x, weight, weight.dtype, *args[-3:])


def _gradients(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options, mean, needs = args[:3], args[3], args[4:]
    found = _gradient_buffers(x, weight, torch.float32, *needs)
    losses = _run_chunks(x, weight, targets, bias, options, None, *_wanted(found, needs))
    scale = _reduction_scale(targets, options[0], mean)
    return losses.sum() * scale, scale, *found


def _gradients_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *_gradient_buffers(x, weight, torch.float32, *args[-3:])


def _scale(
    grad: Tensor, scale: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _scale_fake(grad, scale, dx, dweight, dbias, dtype)
    factor = grad * scale
    with torch.cuda.device_of(dx):
        for gradient, output in zip((dx, dweight, dbias), outputs, strict=True):
            launch_scale(gradient, factor, output).run()
    return outputs


def _scale_fake(
    grad: Tensor, scale: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dweight, dtype=dtype), torch.empty_like(dbias, dtype=dtype)


def _save_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ignore_index, label_smoothing, z_loss = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = ignore_index, label_smoothing, z_loss


def _differentiate_losses(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    needs = need_x, need_weight, need_bias
    found = torch.ops.fused_gpt.linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    dx, dweight, dbias = _wanted(found, needs)
    return dx, dweight, None, dbias, None, None, None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *rest = output
    ctx.set_materialize_grads(False)  # no zeros for the gradients
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*rest)
    ctx.dtype, ctx.needs = inputs[1].dtype, inputs[-3:]


def _differentiate_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    found = torch.ops.fused_gpt.linear_cross_entropy_scale(grad, *ctx.saved_tensors, ctx.dtype)
    dx, dweight, dbias = _wanted(found, ctx.needs)
    return dx, dweight, None, dbias, *(None,) * 7


_INPUTS = (
    "Tensor x, Tensor weight, Tensor targets, Tensor? "
    "bias, int ignore_index, float label_smoothing, float z_loss"
)
_NEEDS = "bool need_dx, bool need_dweight, bool need_dbias"
_GRADIENTS = "Tensor dx, Tensor dweight, Tensor dbias"
_refuse = refuse("linear_cross_entropy")

register(
    f"linear_cross_entropy_losses({_INPUTS}) -> Tensor",
    _losses,
    _losses_fake,
    _differentiate_losses,
    _save_losses,
)
register(
    f"linear_cross_entropy_backward(Tensor grad, {_INPUTS}, {_NEEDS}) -> ({_GRADIENTS})",
    _backward,
    _backward_fake,
    _refuse,
)
register(
    f"linear_cross_entropy_gradients({_INPUTS}, bool mean, {_NEEDS}) -> (Tensor loss, Tensor scale, "
    f"{_GRADIENTS})",
    _gradients,
    _gradients_fake,
    _differentiate_gradients,
    _save_gradients,
)
register(
    f"linear_cross_entropy_scale(Tensor grad, Tensor scale, {_GRADIENTS}, ScalarType dtype) -> "
    f"({_GRADIENTS})",
    _scale,
    _scale_fake,
    _refuse,
)
