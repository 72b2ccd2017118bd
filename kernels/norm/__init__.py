"""`layer_norm`; `add_layer_norm`, with dropout and the residual addition before it; and `dropout` alone."""

from __future__ import annotations

import torch

from kernels import checks
from kernels.dispatch import Choice, Op, autocast_dtype
from kernels.norm import reference
from kernels.tuning import NORM_COLUMNS, slower

_LAYER_NORM = Op("layer_norm", family="norm")
_ADD_LAYER_NORM = Op("add_layer_norm", family="norm")
_DROPOUT = Op("dropout", family="norm")


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension; var is biased.

    Args:
        x: (..., C), any floating-point dtype.
        weight: (C,), any floating-point dtype.
        bias: (C,) or None.
        eps: Added to the variance, >= 0.

    Returns:
        (..., C) in x's dtype; under autocast in the autocast dtype, with weight and bias left as they are.

    Raises:
        TypeError: A tensor that is not floating point, or something that is not a tensor or number.
        ValueError: Sizes or devices that do not fit; eps negative or not finite.
        RuntimeError: ``use_backend("triton")`` cannot be honoured.

    Numerics:
        Mean, two-pass variance and normalisation in float32; one rounding at the store. The gradients are
        deterministic.

        Saved for backward: x, weight and 8 bytes per row. Where y has fewer bytes than x, as under autocast,
        z = (x - mean(x)) / sqrt(var(x) + eps), rounded to y's dtype, in place of x. Its rounding adds as much
        to the error of dweight as the rounding of dy (rms); to that of dx sqrt(2 / C) times as much if dy is
        independent of z, and as much if it is along z / weight.

    Backend:
        The reference runs for float64, for C > 32,768, and wherever `kernels.explain` says that Triton cannot
        run.

    Source:
        Ba, Kiros, Hinton, "Layer Normalization" (2016), section 3.
    """
    choice, dtype = _prepare_layer_norm(x, weight, bias, eps)
    if choice.backend == "triton":
        from kernels.norm import torch_op

        return torch_op.layer_norm(x=x, weight=weight, bias=bias, eps=eps, dtype=dtype or x.dtype)
    y = reference.layer_norm(x, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


@_LAYER_NORM.prepares
def _prepare_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[Choice, torch.dtype | None]:
    """The choice, and the dtype of y under autocast."""
    op = "layer_norm"
    sizes = checks.shapes(op, ("bias",), x=(x, ("...", "C")), weight=(weight, ("C",)), bias=(bias, ("C",)))
    checks.floating(op, x=x, weight=weight, bias=bias)
    checks.number(op, "eps", eps, 0, torch.finfo(torch.float32).max)
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    limit = _limit(sizes["C"], weight, bias)
    return _LAYER_NORM.choose(x, limit=limit, slower=slower(op, x, **sizes)), dtype


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """new_residual = residual + dropout(x); y = layer_norm(new_residual, weight, bias, eps).

    Args:
        x: (..., C), the branch, any floating-point dtype.
        residual: (..., C), the same shape; its dtype (float32, or x's) is the sum's.
        weight: (C,), any floating-point dtype.
        bias: (C,) or None.
        eps: Added to the variance, >= 0.
        dropout_p: Probability in [0, 1) of dropping an element of x; the kept ones are scaled by 1 / (1 - p).
        seed: None draws the mask from torch's generator. An int or a 0-d int64 tensor on x's device makes it
            the Philox mask of the row-major index in (N, C), the same from kernel and reference.

    Returns:
        y (..., C) in x's dtype (the autocast dtype under autocast), and new_residual (..., C) in residual's
        dtype.

    Raises:
        TypeError, ValueError, RuntimeError: As `layer_norm`; ValueError also for dropout_p outside [0, 1).

    Numerics:
        As `layer_norm`, with new_residual in place of x; the norm reads it after it is rounded to its dtype.
        Backward recomputes the mask, which is never stored.

    Backend:
        As `layer_norm`.

    Source:
        As `layer_norm`; Vaswani et al., "Attention Is All You Need" (2017), section 5.4, for the dropout.
    """
    choice, dtype = _prepare_add_layer_norm(
        x=x, residual=residual, weight=weight, bias=bias, eps=eps, dropout_p=dropout_p, seed=seed
    )
    if choice.backend == "triton":
        from kernels.norm import torch_op

        return torch_op.add_layer_norm(
            x=x,
            residual=residual,
            weight=weight,
            bias=bias,
            eps=eps,
            dropout_p=dropout_p,
            seed=seed,
            dtype=dtype or x.dtype,
        )
    y, new_residual = reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed)
    return (y if dtype is None else y.to(dtype)), new_residual


@_ADD_LAYER_NORM.prepares
def _prepare_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int | torch.Tensor | None,
) -> tuple[Choice, torch.dtype | None]:
    """The choice, and the dtype of y under autocast."""
    op = "add_layer_norm"
    dims = ("...", "C")
    sizes = checks.shapes(
        op, ("bias",), x=(x, dims), residual=(residual, dims), weight=(weight, ("C",)), bias=(bias, ("C",))
    )
    checks.floating(op, x=x, residual=residual, weight=weight, bias=bias)
    checks.number(op, "eps", eps, 0, torch.finfo(torch.float32).max)
    checks.number(op, "dropout_p", dropout_p, 0, 1, open_high=True)
    checks.seed(op, seed, x.device)
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    limit = _limit(sizes["C"], weight, bias, residual)
    return _ADD_LAYER_NORM.choose(x, limit=limit, slower=slower(op, x, **sizes)), dtype


def dropout(x: torch.Tensor, p: float, *, seed: int | torch.Tensor | None = None) -> torch.Tensor:
    """y = x * keep / (1 - p), where keep is 0 with probability p and 1 otherwise.

    Args:
        x: (..., C), any floating-point dtype and strides. With N the product of the leading dimensions, it is
            the matrix (N, C).
        p: Probability in [0, 1) of dropping an element; 0 returns x itself.
        seed: None draws the mask from torch's generator. An int or a 0-d int64 tensor on x's device makes it
            the Philox mask of the row-major index in (N, C): the same bits from kernel and reference, and the
            same mask as `add_layer_norm` applies for this seed and shape.

    Returns:
        (..., C) in x's dtype, also under autocast.

    Raises:
        TypeError: x is not a floating-point tensor; p is not a number; seed has another type.
        ValueError: p outside [0, 1); a seed of more than 64 bits or on another device.
        RuntimeError: ``use_backend("triton")`` cannot be honoured.

    Numerics:
        The kernel multiplies in float32 by 1 / (1 - p) and rounds once, at the store. Saved for backward: the
        seed; backward recomputes the mask. Derivatives of any order are right.

    Backend:
        The reference runs for float64, for C > 32,768, and wherever `kernels.explain` says that Triton cannot
        run.

    Source:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014), section
        4, scaled in training.
    """
    choice = _prepare_dropout(x, p, seed)
    if p == 0:
        return x
    if choice.backend == "triton":
        from kernels.norm import torch_op

        return torch_op.dropout(x, p, seed)
    return reference.dropout(x, p, seed=seed)


@_DROPOUT.prepares
def _prepare_dropout(x: torch.Tensor, p: float, seed: int | torch.Tensor | None) -> Choice:
    op = "dropout"
    sizes = checks.shapes(op, x=(x, ("...", "C")))
    checks.floating(op, x=x)
    checks.number(op, "p", p, 0, 1, open_high=True)
    checks.seed(op, seed, x.device)
    return _DROPOUT.choose(x, limit=_limit(sizes["C"]), slower=slower(op, x, **sizes))


def _limit(c: int, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take rows of `c` elements, or parameters and residual in these dtypes."""
    if not 1 <= c <= NORM_COLUMNS:
        return f"the kernel takes C in [1, {NORM_COLUMNS}], not {c}"
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return "the kernel takes no float64"
    return None
