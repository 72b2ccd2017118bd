"""What the family compiles ahead of time: each kernel at its tiles, for tensors that need not exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.norm.backward import launch_backward, launch_sum
from kernels.norm.dropout_kernel import launch_dropout
from kernels.norm.forward import launch_forward
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build

_ROWS, _PROGRAMS = 4096, 512


def layer_norm_builds() -> Iterator[Build]:
    """Forward, backward and the sum of its partial sums, from one narrow tile to rows of sixteen thousand."""
    for dtype in FLOAT_DTYPES:
        for c in (64, 384, 768, 1024, 1600, 4096, 16384):
            gated = dtype == torch.bfloat16 and c in (768, 1600, 4096)
            label = f"{SHORT_DTYPE[dtype]}-C{c}"
            x, weight, stats = (
                _empty(dtype, _ROWS, c),
                _empty(torch.float32, c),
                _empty(torch.float32, 2, _ROWS),
            )
            partial = _empty(torch.float32, _PROGRAMS, c)
            yield launch_forward(x, None, weight, weight, None, x, None, stats, 1e-5, 0.0).build(
                label, gated=gated
            )
            backward = launch_backward(
                x, None, x, weight, None, stats, x, None, partial, partial, 0.0, _PROGRAMS
            )
            yield backward.build(label, gated=gated)
            yield launch_sum(partial, partial, weight, weight).build(label)


def add_layer_norm_builds() -> Iterator[Build]:
    """Forward and backward, with and without dropout, the residual in x's dtype and in float32."""
    pairs = (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
    for dtype, residual_dtype in pairs:
        for c in (384, 768, 1600, 4096):
            for dropout_p in (0.0, 0.1):
                yield from _add_layer_norm(dtype, residual_dtype, c, dropout_p)


def _add_layer_norm(
    dtype: torch.dtype, residual_dtype: torch.dtype, c: int, dropout_p: float
) -> Iterator[Build]:
    gated = residual_dtype == torch.bfloat16 and c == 768
    label = f"{SHORT_DTYPE[dtype]}+{SHORT_DTYPE[residual_dtype]}-C{c}" + ("-dropout" if dropout_p else "")
    x, residual, weight = _empty(dtype, _ROWS, c), _empty(residual_dtype, _ROWS, c), _empty(torch.float32, c)
    stats, partial = _empty(torch.float32, 2, _ROWS), _empty(torch.float32, _PROGRAMS, c)
    seed = _empty(torch.int64) if dropout_p else None
    yield launch_forward(x, residual, weight, weight, seed, x, residual, stats, 1e-5, dropout_p).build(
        label, gated=gated
    )
    dx = x if dropout_p or dtype != residual_dtype else None
    gradients = dx, residual, partial, partial
    yield launch_backward(x, residual, residual, weight, seed, stats, *gradients, dropout_p, _PROGRAMS).build(
        label, gated=gated
    )


def dropout_builds() -> Iterator[Build]:
    """Dropout alone, from one narrow tile to rows of four thousand."""
    for dtype in FLOAT_DTYPES:
        for c in (64, 384, 768, 1600, 4096):
            x = _empty(dtype, _ROWS, c)
            gated = dtype == torch.bfloat16 and c == 768
            yield launch_dropout(x, _empty(torch.int64), x, 0.1).build(
                f"{SHORT_DTYPE[dtype]}-C{c}", gated=gated
            )


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
