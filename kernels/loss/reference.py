"""Linear + cross-entropy in plain torch, a chunk of rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kernels.linear import linear

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """cross_entropy(x weightᵀ + bias, targets) + z_loss lse²; see `kernels.linear_cross_entropy`."""
    options = Options(ignore_index, label_smoothing, z_loss)
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if rows.shape[0] * weight.shape[0] <= CHUNK_ELEMENTS:
        losses = token_losses(rows, weight, flat, bias, options)
    else:
        losses = _Chunked.apply(rows, weight, flat, bias, options)
    if reduction == "none":
        return losses.reshape(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (flat != ignore_index).sum().clamp(min=1)


def token_losses(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """The definition: (N,) losses in float32 (float64 for float64) of x (N, C); 0 where the target is
    ignored."""
    logits = linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits,
        targets,
        ignore_index=options.ignore_index,
        reduction="none",
        label_smoothing=options.label_smoothing,
    )
    if options.z_loss:
        square = torch.logsumexp(logits, -1).square()
        losses = losses + options.z_loss * square.masked_fill(targets == options.ignore_index, 0)
    return losses


class _Chunked(torch.autograd.Function):
    """`token_losses` over chunks of rows; backward recomputes the logits of each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        options: Options,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, targets, bias)
        ctx.options = options
        size = _rows_per_chunk(weight)
        return torch.cat(
            [
                token_losses(xs, weight, ts, bias, options)
                for xs, ts in zip(x.split(size), targets.split(size), strict=True)
            ]
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, targets, bias = ctx.saved_tensors
        options, size = ctx.options, _rows_per_chunk(weight)
        need_x, need_weight, _, need_bias, _ = ctx.needs_input_grad
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        for start in range(0, x.shape[0], size):
            rows = slice(start, start + size)
            dlogits = _dlogits(x[rows], weight, targets[rows], bias, grad[rows], options)
            if dbias is not None:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(x.dtype)
            if dx is not None:
                dx[rows] = dlogits @ weight
            if dweight is not None:
                if dweight.dtype == x.dtype:
                    dweight.addmm_(dlogits.mT, x[rows])
                else:
                    dweight += dlogits.mT @ x[rows]
        return (
            dx,
            None if dweight is None else dweight.to(weight.dtype),
            None,
            None if dbias is None else dbias.to(weight.dtype),
            None,
        )


def _dlogits(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    grad: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """grad ((1 + 2 z lse) softmax(logits) - (1 - ε) onehot - ε / V), 0 for ignored rows; one (rows, V) buffer
    throughout."""
    logits = linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(logits, -1, keepdim=True)
    ignored = targets == options.ignore_index
    grad = grad.masked_fill(ignored, 0)[:, None]
    p = logits.sub_(lse).exp_().mul_(grad * (1 + 2 * options.z_loss * lse))
    if options.label_smoothing:
        p.sub_(grad * (options.label_smoothing / weight.shape[0]))
    index = targets.masked_fill(ignored, 0)[:, None]
    return p.scatter_add_(1, index, -grad * (1 - options.label_smoothing))


def _rows_per_chunk(weight: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[0])
