"""The GELU feed-forward in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.linear import linear


def gelu_ffn(
    x: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor | None,
    w_down: torch.Tensor,
    b_down: torch.Tensor | None,
    *,
    approximate: str = "tanh",
) -> torch.Tensor:
    """gelu(x w_upᵀ + b_up) w_downᵀ + b_down; see `kernels.gelu_ffn`."""
    return linear(F.gelu(linear(x, w_up, b_up), approximate=approximate), w_down, b_down)
