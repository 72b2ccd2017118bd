"""The loss: `linear_cross_entropy`, which never holds the logits."""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels import checks
from kernels.dispatch import Choice, Op, autocast
from kernels.loss import reference
from kernels.tuning import slower

_LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", family="loss")


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
    """loss = -(1 - ε) log p_target - ε/V Σ_v log p_v + z lse², with p = softmax(x weightᵀ + bias) and lse =
    log Σ exp.

    Args:
        x: (..., C), any floating-point dtype.
        weight: (V, C) in x's dtype, as the head's `nn.Linear` or the tied embedding holds it.
        targets: int64, x's leading dimensions; values in [0, V) or `ignore_index`.
        bias: (V,) or None.
        ignore_index: The target of tokens that do not count.
        reduction: "mean" over the tokens that count (0 if none does), "sum", or "none".
        label_smoothing: ε in [0, 1].
        z_loss: z >= 0, the weight of the squared log-normaliser.

    Returns:
        float32 (float64 for float64): a scalar, or targets' shape with "none", 0 where ignored.

    Raises:
        TypeError: A tensor of another dtype, or something that is not a tensor or number.
        ValueError: Sizes or devices that do not fit; an unknown reduction; a number outside its range; on a
            CPU, a target outside [0, V).
        RuntimeError: ``use_backend("triton")`` cannot be honoured.

    Numerics:
        Softmax, loss and the gradients of the logits are float32; the weight's gradient accumulates in
        float32. At most one chunk of logits exists at a time, and nothing synchronises with the device. Saved
        for backward: the reference, and the kernel with "none", save x, weight and targets and recompute the
        logits. Otherwise the kernel computes dx and a float32 dweight together with the loss, saves them, and
        scales them in backward. Results are deterministic.

    Backend:
        The reference runs for float64, and wherever `kernels.explain` says that Triton cannot run. On a GPU,
        a target outside [0, V) cannot raise without synchronising: the kernel gives it a loss of NaN.

    Source:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), section 3, for the
        problem; Chowdhery et al., PaLM (2022), section 5, for z-loss.
    """
    options: Any = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    choice, x, weight, bias = _prepare_linear_cross_entropy(x, weight, targets, bias, **options)
    if choice.backend == "triton":
        from kernels.loss import torch_op

        return torch_op.linear_cross_entropy(x, weight, targets, bias, **options)
    return reference.linear_cross_entropy(x, weight, targets, bias, **options)


@_LINEAR_CROSS_ENTROPY.prepares
def _prepare_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Choice, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    op = "linear_cross_entropy"
    x, weight, bias = autocast(x, weight, bias)
    sizes = checks.shapes(
        op, ("bias",), x=(x, ("...", "C")), weight=(weight, ("V", "C")), bias=(bias, ("V",))
    )
    checks.same_dtype(op, x=x, weight=weight, bias=bias)
    checks.shapes(op, x=(x, ("...", "C")), targets=(targets, ("...",)))
    checks.dtype(op, "targets", targets, torch.int64)
    checks.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    checks.integer(op, "ignore_index", ignore_index)
    checks.number(op, "label_smoothing", label_smoothing, 0, 1)
    checks.number(op, "z_loss", z_loss, 0, math.inf, open_high=True)
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(op, targets, ignore_index, sizes["V"])
    limit = "the kernel takes no empty dimension" if 0 in weight.shape else None
    choice = _LINEAR_CROSS_ENTROPY.choose(x, limit=limit, slower=slower(op, x, **sizes))
    return choice, x, weight, bias


def _check_targets(op: str, targets: torch.Tensor, ignore_index: int, vocabulary: int) -> None:
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"{op}: targets has {targets[wrong][0].item()}, expected values in [0, {vocabulary}) or "
            f"ignore_index={ignore_index}"
        )
