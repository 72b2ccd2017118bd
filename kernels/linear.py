"""A linear layer that is fast on a CPU for few rows, as in decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8  # up to this many rows, the weight is the left operand of the matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ + bias, as `torch.nn.functional.linear`.

    Without gradients, up to 8 rows of float32 on a CPU are multiplied as weight xᵀ. BLAS distributes the rows
    of the left operand over the cores. With the weight on the left, all cores share the work of reading it,
    which decoding does once per token.

    Args:
        x: (..., C).
        weight: (O, C), as `nn.Linear` stores it.
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    rows = x.numel() // max(1, x.shape[-1])
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_exporting()  # a guard on the number of rows would restrict the export
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or not 0 < rows <= FEW
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)

    columns = x.reshape(rows, -1)
    if rows == 1:
        columns = columns.expand(2, -1).contiguous()  # BLAS runs a matmul with one column on one core
    columns = columns.T  # (C, rows)
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (O, rows)
    return y.T[:rows].reshape(*x.shape[:-1], -1).contiguous()
