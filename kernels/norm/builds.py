"""The ahead-of-time builds of LayerNorm: each kernel at its tile, from tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.norm.backward import layer_norm_backward, layer_norm_backward_sum
from kernels.norm.dropout_kernel import dropout_forward
from kernels.norm.forward import layer_norm_forward
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build
from kernels.tuning import norm_backward_tile

_ROWS, _PROGRAMS = 4096, 512


def layer_norm_builds(architecture: int) -> Iterator[Build]:
    """Forward, backward and its second kernel, from rows of one tile to rows of 16,384 columns."""
    for dtype in FLOAT_DTYPES:
        for c in (64, 384, 768, 1024, 1600, 4096, 16384):
            gated = dtype == torch.bfloat16 and c in (768, 1600, 4096)
            label = f"{SHORT_DTYPE[dtype]}-C{c}"
            x = _empty(dtype, _ROWS, c)
            yield from _forward_and_backward(x, None, x, 0.0, label, gated, architecture)

            weight, partial = _empty(torch.float32, c), _empty(torch.float32, _PROGRAMS, c)
            yield layer_norm_backward_sum(
                partial_dweight=partial, partial_dbias=partial, dweight=weight, dbias=weight
            ).build(label)


def add_layer_norm_builds(architecture: int) -> Iterator[Build]:
    """Forward and backward, with and without dropout, the residual in x's dtype and in float32."""
    pairs = (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
    for dtype, residual_dtype in pairs:
        for c in (384, 768, 1600, 4096):
            for dropout_p in (0.0, 0.1):
                gated = dtype == torch.bfloat16 and c == 768
                label = f"{SHORT_DTYPE[dtype]}+{SHORT_DTYPE[residual_dtype]}-C{c}"
                x, residual = _empty(dtype, _ROWS, c), _empty(residual_dtype, _ROWS, c)
                # Without dropout dx equals dresidual, and is computed only where the dtypes differ.
                dx = x if dropout_p or dtype != residual_dtype else None
                label += "-dropout" if dropout_p else ""
                yield from _forward_and_backward(x, residual, dx, dropout_p, label, gated, architecture)


def _forward_and_backward(
    x: Tensor,
    residual: Tensor | None,
    dx: Tensor | None,
    dropout_p: float,
    label: str,
    gated: bool,
    architecture: int,
) -> Iterator[Build]:
    """The two builds of one dtype and width; `residual` and `dx` as backward takes them."""
    n, c = x.shape
    weight, stats = _empty(torch.float32, c), _empty(torch.float32, 2, n)
    partial = _empty(torch.float32, _PROGRAMS, c)
    seed = _empty(torch.int64) if dropout_p else None
    h = x if residual is None else residual
    yield layer_norm_forward(
        x=x,
        residual=residual,
        weight=weight,
        bias=weight,
        seed=seed,
        y=x,
        new_residual=residual,
        stats=stats,
        eps=1e-5,
        dropout_p=dropout_p,
    ).build(label, gated=gated)
    yield layer_norm_backward(
        dy=x,
        dnew_residual=residual,
        h=h,
        weight=weight,
        seed=seed,
        stats=stats,
        dx=dx,
        dresidual=residual,
        partial_dweight=partial,
        partial_dbias=partial,
        dropout_p=dropout_p,
        programs=_PROGRAMS,
        tile=norm_backward_tile(architecture, c, h.element_size(), dropout=dropout_p > 0),
    ).build(label, gated=gated)


def dropout_builds() -> Iterator[Build]:
    """Dropout alone, from rows of one tile to rows of 4,096 columns."""
    for dtype in FLOAT_DTYPES:
        for c in (64, 384, 768, 1600, 4096):
            x = _empty(dtype, _ROWS, c)
            gated = dtype == torch.bfloat16 and c == 768
            launch = dropout_forward(x=x, seed=_empty(torch.int64), y=x, dropout_p=0.1)
            yield launch.build(f"{SHORT_DTYPE[dtype]}-C{c}", gated=gated)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
