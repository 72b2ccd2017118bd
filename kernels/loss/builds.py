"""The ahead-of-time builds of the loss: each kernel at its tile, from tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.loss.softmax import cross_entropy, scale_gradient
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build

_ROWS = 4096


def linear_cross_entropy_builds() -> Iterator[Build]:
    """Losses alone, with gradients, with smoothing, and with every option, at two vocabularies."""
    for dtype in FLOAT_DTYPES:
        for v in (65, 50257):
            gated = dtype == torch.bfloat16 and v == 50257
            label = f"{SHORT_DTYPE[dtype]}-V{v}"
            width = -(-v // 64) * 64
            losses = _empty(torch.float32, _ROWS)
            arguments: dict[str, Any] = {
                "logits": _empty(dtype, _ROWS, width)[:, :v],
                "targets": _empty(torch.int64, _ROWS),
                "bias": None,
                "grad": None,
                "losses": losses,
                "ignore_index": -100,
                "label_smoothing": 0.0,
                "z_loss": 0.0,
            }
            yield cross_entropy(**arguments, gradient=False).build(f"{label}-loss")
            yield cross_entropy(**arguments, gradient=True).build(label, gated=gated)

            arguments |= {"grad": losses, "label_smoothing": 0.1, "z_loss": 1e-4}
            yield cross_entropy(**arguments, gradient=True).build(f"{label}-smoothing", gated=gated)
            arguments["bias"] = _empty(torch.float32, width)
            yield cross_entropy(**arguments, gradient=True).build(f"{label}-options", gated=gated)

        yield scale_gradient(
            gradient=_empty(torch.float32, 50257, 768),
            scale=_empty(torch.float32),
            out=_empty(dtype, 50257, 768),
        ).build(SHORT_DTYPE[dtype])


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
