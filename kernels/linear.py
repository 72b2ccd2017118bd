"""A linear layer that is fast on a CPU for few rows, as in decoding."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import FEW, PackedWeight

SMALL = 2**18  # elements; a smaller weight stays in the cache of a core
PARTS = 8  # for each thread


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ + bias, as `torch.nn.functional.linear`.

    Without gradients, up to 8 rows on a CPU take a form in which all cores share the work of reading the
    weight, which decoding does once per token: BLAS reads it on one core for one row. A float32 weight is
    divided into parts, which a batched matmul distributes over the cores. A `PackedWeight` has its own form.

    Args:
        x: (..., C).
        weight: (O, C), as `nn.Linear` stores it.
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    if isinstance(weight, PackedWeight):
        return weight.linear(x, bias) if x.ndim == 2 else _of_rows(x, weight, bias)
    outputs, columns = weight.shape
    rows = x.numel() // max(1, columns)
    if (
        weight.numel() < SMALL
        or x.dtype != torch.float32
        or x.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_exporting()  # a guard on the number of rows would restrict the export
        or torch.is_autocast_enabled("cpu")
        or not 0 < rows <= FEW
        or not (parts := _parts(outputs, torch.get_num_threads()))
    ):
        return F.linear(x, weight, bias)
    batch = x.reshape(rows, columns).expand(parts, rows, columns)
    weights = weight.view(parts, outputs // parts, columns).transpose(1, 2)  # (parts, C, O / parts)
    if bias is None:
        y = torch.bmm(batch, weights)  # (parts, rows, O / parts)
    else:
        y = torch.baddbmm(bias.view(parts, 1, -1), batch, weights)
    return y.transpose(0, 1).reshape(*x.shape[:-1], outputs)


def _of_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`weight.linear` for x (..., C)."""
    return weight.linear(x.reshape(-1, weight.columns), bias).view(*x.shape[:-1], weight.outputs)


@lru_cache
def _parts(outputs: int, threads: int) -> int:
    """How many equal parts `outputs` are divided into: the fewest from 8 to 32 a thread; 0 if none fits."""
    least = PARTS * threads
    return next((parts for parts in range(least, 4 * least + 1) if outputs % parts == 0), 0)
