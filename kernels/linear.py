"""The product of few rows with a weight, as a CPU does it fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8  # rows up to which the weight goes first


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ + bias, as `torch.nn.functional.linear`.

    Without gradients, up to 8 rows of float32 on a CPU are multiplied as weight · xᵀ. BLAS shares the rows of
    its left operand among cores, so that all of them read the weight, which decoding does once for each
    token.

    Args:
        x: (..., C).
        weight: (O, C), as `nn.Linear` holds it.
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    rows = x.numel() // max(1, x.shape[-1])
    plain = (
        torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or not 0 < rows <= FEW
    )
    if plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1)
    columns = (
        columns.expand(2, -1).contiguous() if rows == 1 else columns
    ).T  # one column would be a product of one core
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (O, rows)
    return y.T[:rows].reshape(*x.shape[:-1], -1).contiguous()
