"""The ahead-of-time builds of LayerNorm: each kernel at its tile, from tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.launch import Launch
from kernels.norm.backward import layer_norm_backward, layer_norm_backward_sum
from kernels.norm.dropout_kernel import dropout_forward
from kernels.norm.forward import layer_norm_forward
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build
from kernels.tuning import norm_backward_tile

_ROWS, _PROGRAMS = 4096, 512


def layer_norm_builds(architecture: int) -> Iterator[Build]:
    """Forward, backward and its second kernel, from rows of one tile to rows of 16,384 columns.

    Those with z are of float32 rows under autocast, at GPT-2's width.
    """
    for dtype in FLOAT_DTYPES:
        for c in (64, 384, 768, 1024, 1600, 4096, 16384):
            gated = dtype == torch.bfloat16 and c in (768, 1600, 4096)
            label = f"{SHORT_DTYPE[dtype]}-C{c}"
            x = _empty(dtype, _ROWS, c)
            yield from _forward_and_backward(x, None, x, x, 0.0, label, gated, architecture)
            if dtype == torch.float32 and c == 768:
                y = _empty(torch.bfloat16, _ROWS, c)
                yield from _forward_and_backward(x, None, y, x, 0.0, f"{label}-z", True, architecture)

            weight, partial = _empty(torch.float32, c), _empty(torch.float32, _PROGRAMS, c)
            yield layer_norm_backward_sum(
                partial_dweight=partial, partial_dbias=partial, dweight=weight, dbias=weight
            ).build(label)


def add_layer_norm_builds(architecture: int) -> Iterator[Build]:
    """Forward and backward, with and without dropout, the residual in x's dtype and in float32.

    With z where x is narrower than the residual; forward also without it, as where no gradient is needed.
    """
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
                if dtype != residual_dtype:
                    yield _forward(x, residual, x, None, dropout_p).build(label, gated=gated)
                    label += "-z"
                yield from _forward_and_backward(x, residual, x, dx, dropout_p, label, gated, architecture)


def _forward(x: Tensor, residual: Tensor | None, y: Tensor, z: Tensor | None, dropout_p: float) -> Launch:
    """The forward pass, with the residual and dropout as `layer_norm_forward` takes them."""
    n, c = x.shape
    weight = _empty(torch.float32, c)
    return layer_norm_forward(
        x=x,
        residual=residual,
        weight=weight,
        bias=weight,
        seed=_empty(torch.int64) if dropout_p else None,
        y=y,
        new_residual=residual,
        stats=_empty(torch.float32, 2, n),
        z=z,
        eps=1e-5,
        dropout_p=dropout_p,
    )


def _forward_and_backward(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    dx: Tensor | None,
    dropout_p: float,
    label: str,
    gated: bool,
    architecture: int,
) -> Iterator[Build]:
    """The two builds of one width, with z if y is narrower; `residual` and `dx` as backward takes them."""
    n, c = x.shape
    partial = _empty(torch.float32, _PROGRAMS, c)
    h = x if residual is None else residual
    keep_z = y.element_size() < h.element_size()
    yield _forward(x, residual, y, y if keep_z else None, dropout_p).build(label, gated=gated)
    yield layer_norm_backward(
        dy=y,
        dnew_residual=residual,
        h=y if keep_z else h,
        holds_z=keep_z,
        weight=_empty(torch.float32, c),
        seed=_empty(torch.int64) if dropout_p else None,
        stats=_empty(torch.float32, 2, n),
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
