"""What the family compiles ahead of time: each kernel at its tiles, for tensors that need not exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.loss.softmax import launch_cross_entropy, launch_scale
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build

_ROWS = 4096


def linear_cross_entropy_builds() -> Iterator[Build]:
    """Losses alone and with gradients, plain and with every option, for a small and for GPT-2's
    vocabulary."""
    for dtype in FLOAT_DTYPES:
        for v in (65, 50257):
            gated = dtype == torch.bfloat16 and v == 50257
            logits = _empty(dtype, _ROWS, -(-v // 64) * 64)[:, :v]
            targets, losses, bias = (
                _empty(torch.int64, _ROWS),
                _empty(torch.float32, _ROWS),
                _empty(torch.float32, -(-v // 64) * 64),
            )
            label = f"{SHORT_DTYPE[dtype]}-V{v}"
            yield launch_cross_entropy(logits, targets, None, None, losses, -100, 0.0, 0.0, False).build(
                f"{label}-loss"
            )
            yield launch_cross_entropy(logits, targets, None, None, losses, -100, 0.0, 0.0, True).build(
                label, gated=gated
            )
            options = launch_cross_entropy(logits, targets, bias, losses, losses, -100, 0.1, 1e-4, True)
            yield options.build(f"{label}-options", gated=gated)
        yield launch_scale(
            _empty(torch.float32, 50257, 768), _empty(torch.float32), _empty(dtype, 50257, 768)
        ).build(SHORT_DTYPE[dtype])


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
