"""The torch.library ops of the loss, and the loop over chunks of rows that they share.

For "mean" and "sum" forward computes the gradients together with the losses, while a chunk's logits are in
memory, and backward only scales them. For "none" each token has its own factor, so backward recomputes the
logits. Shapes: x (N, C), weight (V, C), targets (N,), bias (V,), losses (N,).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.loss.softmax import cross_entropy, scale_gradient
from kernels.torch_library import ops, refuse, register
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
    """`kernels.linear_cross_entropy`, after its arguments have been checked."""
    rows, flat = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    options = ignore_index, float(label_smoothing), float(z_loss)
    needs = x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad

    if torch.is_grad_enabled() and any(needs) and reduction != "none":
        loss, *_ = ops.linear_cross_entropy_gradients(
            rows, weight, flat, bias, *options, reduction == "mean", *needs
        )
        return loss
    losses = ops.linear_cross_entropy_losses(rows, weight, flat, bias, *options)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() * _reduction_scale(flat, ignore_index, reduction == "mean")


def _reduction_scale(targets: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """What the sum of the losses is multiplied by: 0-d float32 on the device.

    For a mean, 1 / the number of tokens that are not ignored, or 1 where all are; for a sum, 1.
    """
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
    """Losses (N,); fills dx (N, C), and adds to dweight (`_padded_rows`, C) and dbias (V,), both float32.

    options: ignore_index, label_smoothing and z_loss. grad: (N,), the gradients of the losses; None means
    ones. A gradient that is None is not computed.
    """
    (n, c), v = x.shape, weight.shape[0]
    width = -(-v // 64) * 64  # rows of logits start at aligned addresses, whatever the vocabulary
    padded = _padded_rows(
        weight
    )  # columns of logits in the matmuls; the kernel sets the gradients past V to 0
    weight = F.pad(weight, (0, 0, 0, padded - v)) if padded > v else weight
    size = min(n, loss_chunk_rows(x.device, n, c, width))
    losses = x.new_empty(n, dtype=torch.float32)
    buffer = x.new_empty(size, width)
    targets = targets.contiguous()
    if bias is not None:
        bias = F.pad(bias.to(torch.float32), (0, width - v))
    ignore_index, label_smoothing, z_loss = options

    with torch.cuda.device_of(x):
        for start in range(0, n, max(1, size)):
            rows = slice(start, start + size)
            logits = buffer[: min(size, n - start), :padded]
            torch.mm(x[rows], weight.t(), out=logits)
            cross_entropy(
                logits=logits[:, :v],
                targets=targets[rows],
                bias=bias,
                grad=None if grad is None else grad[rows],
                losses=losses[rows],
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                gradient=dx is not None or dweight is not None or dbias is not None,
            ).run()

            # The buffer now holds the gradients of the logits, if any gradient is needed.
            if dx is not None:
                torch.mm(logits, weight, out=dx[rows])
            if dweight is not None:
                _add_matmul(dweight, logits.t(), x[rows])
            if dbias is not None:
                dbias.add_(logits[:, :v].sum(0, dtype=torch.float32))
    return losses


def _padded_rows(weight: Tensor) -> int:
    """Rows of the weight in the matmuls: V, in 16 bits rounded up to a multiple of 64 by rows of zeros.

    In 16 bits, cuBLAS has its fast kernels for sizes that are multiples of 8. The padded weight is a copy,
    which lives as long as the call. A float32 weight stays as it is: its copy would be twice as large, and
    its matmuls do not depend on the alignment as much.
    """
    v = weight.shape[0]
    return v if weight.dtype == torch.float32 else -(-v // 64) * 64


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with total in float32 and a, b in float32 or 16 bits."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _gradient_buffers(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, uninitialised, dweight and dbias zero in `dtype`; each not needed is an empty tensor.

    rows: of dweight; None for the weight's.
    """
    v, c = weight.shape
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        weight.new_zeros((rows or v, c), dtype=dtype) if need_dweight else x.new_empty(0),
        weight.new_zeros(v, dtype=dtype) if need_dbias else x.new_empty(0),
    )


def _needed(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """dx, dweight and dbias, None in place of each that is not needed."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def _losses(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Losses (N,) of linear_cross_entropy_losses."""
    return _run_chunks(x, weight, targets, bias, options)


def _losses_fake(x: Tensor, *args: Any) -> Tensor:
    """The fake of linear_cross_entropy_losses."""
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias for grad (N,), the gradients of the losses; args: three options, three needs."""
    options, needs = args[:3], args[3:]
    gradients = _gradient_buffers(x, weight, torch.float32, *needs, rows=_padded_rows(weight))
    _run_chunks(x, weight, targets, bias, options, grad, *_needed(gradients, needs))
    dx, dweight, dbias = gradients
    return dx, dweight[: weight.shape[0]].to(weight.dtype), dbias.to(weight.dtype)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The fake of linear_cross_entropy_backward."""
    return _gradient_buffers(x, weight, weight.dtype, *args[-3:])


def _gradients(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss, its scale, and the gradients of the unscaled sum of the losses.

    args: three options, whether the reduction is a mean, three needs. Backward scales the gradients, in
    float32: divided by the number of tokens here, a 16-bit dx could underflow before a loss scaler's factor
    reaches it.
    """
    options, mean, needs = args[:3], args[3], args[4:]
    gradients = _gradient_buffers(x, weight, torch.float32, *needs, rows=_padded_rows(weight))
    losses = _run_chunks(x, weight, targets, bias, options, None, *_needed(gradients, needs))
    scale = _reduction_scale(targets, options[0], mean)
    dx, dweight, dbias = gradients
    return losses.sum() * scale, scale, dx, dweight[: weight.shape[0]], dbias


def _gradients_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fake of linear_cross_entropy_gradients."""
    loss = x.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *_gradient_buffers(x, weight, torch.float32, *args[-3:])


def _scale(
    grad: Tensor, scale: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times grad * scale, dweight and dbias in `dtype`."""
    outputs = _scale_fake(grad, scale, dx, dweight, dbias, dtype)
    factor = grad * scale
    with torch.cuda.device_of(dx):
        for gradient, output in zip((dx, dweight, dbias), outputs, strict=True):
            scale_gradient(gradient=gradient, scale=factor, out=output).run()
    return outputs


def _scale_fake(
    grad: Tensor, scale: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of linear_cross_entropy_scale, uninitialised; also its fake."""
    return torch.empty_like(dx), torch.empty_like(dweight, dtype=dtype), torch.empty_like(dbias, dtype=dtype)


def _save_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what backward needs of a call of linear_cross_entropy_losses."""
    *tensors, ignore_index, label_smoothing, z_loss = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = ignore_index, label_smoothing, z_loss


def _differentiate_losses(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """From the gradients of the losses to those of linear_cross_entropy_losses' seven arguments."""
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    needs = need_x, need_weight, need_bias
    gradients = ops.linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    dx, dweight, dbias = _needed(gradients, needs)
    return dx, dweight, None, dbias, None, None, None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps the scale and the gradients that linear_cross_entropy_gradients returned."""
    _, *rest = output
    ctx.set_materialize_grads(False)  # no tensors of zeros for the gradients of these gradients
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*rest)
    ctx.dtype, ctx.needs = inputs[1].dtype, inputs[-3:]


def _differentiate_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """From the gradient of the loss to those of linear_cross_entropy_gradients' eleven arguments."""
    gradients = ops.linear_cross_entropy_scale(grad, *ctx.saved_tensors, ctx.dtype)
    dx, dweight, dbias = _needed(gradients, ctx.needs)
    return dx, dweight, None, dbias, *(None,) * 7


_INPUTS = (
    "Tensor x, Tensor weight, Tensor targets, Tensor? bias,"
    " int ignore_index, float label_smoothing, float z_loss"
)
_NEEDS = "bool need_dx, bool need_dweight, bool need_dbias"
_GRADIENTS = "Tensor dx, Tensor dweight, Tensor dbias"
_refuse = refuse("linear_cross_entropy")

register(
    f"linear_cross_entropy_losses({_INPUTS}) -> Tensor",
    kernel=_losses,
    fake=_losses_fake,
    differentiate=_differentiate_losses,
    save=_save_losses,
)
register(
    f"linear_cross_entropy_backward(Tensor grad, {_INPUTS}, {_NEEDS}) -> ({_GRADIENTS})",
    kernel=_backward,
    fake=_backward_fake,
    differentiate=_refuse,
)
register(
    f"linear_cross_entropy_gradients({_INPUTS}, bool mean, {_NEEDS})"
    f" -> (Tensor loss, Tensor scale, {_GRADIENTS})",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiate=_differentiate_gradients,
    save=_save_gradients,
)
register(
    f"linear_cross_entropy_scale(Tensor grad, Tensor scale, {_GRADIENTS}, ScalarType dtype)"
    f" -> ({_GRADIENTS})",
    kernel=_scale,
    fake=_scale_fake,
    differentiate=_refuse,
)
