"""LayerNorm, residual + dropout + LayerNorm, and dropout, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.philox import seeded_dropout


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; see `kernels.layer_norm`."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):
        return torch.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_bias = None if bias is None else bias.to(wide)
    return torch.layer_norm(x.to(wide), weight.shape, weight.to(wide), wide_bias, eps).to(x.dtype)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """new = residual + dropout(x); (layer_norm(new), new); see `kernels.add_layer_norm`."""
    branch = dropout(x.to(torch.promote_types(x.dtype, residual.dtype)), dropout_p, seed=seed)
    new_residual = (residual + branch).to(residual.dtype)
    if x.dtype == new_residual.dtype:
        return layer_norm(new_residual, weight, bias, eps), new_residual
    wide = torch.promote_types(new_residual.dtype, torch.float32)
    wide_bias = None if bias is None else bias.to(wide)
    y = layer_norm(new_residual.to(wide), weight.to(wide), wide_bias, eps)
    return y.to(x.dtype), new_residual


def dropout(x: torch.Tensor, p: float, *, seed: int | torch.Tensor | None = None) -> torch.Tensor:
    """x * keep / (1 - p); see `kernels.dropout`."""
    if p == 0:
        return x
    if seed is None:
        return F.dropout(x, p)
    return seeded_dropout(x, p, seed)
