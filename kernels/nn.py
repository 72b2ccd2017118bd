"""The ops as modules; each one loads the state_dict of its counterpart in `torch.nn`."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import kernels


class LayerNorm(nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    The state_dict is that of `torch.nn.LayerNorm`.

    Args:
        normalized_shape: C, the size of the last dimension.
        eps: Added to the variance.
        bias: Whether the module has a bias.
        device, dtype: Device and dtype of the parameters.

    Raises:
        ValueError: `normalized_shape` has more than one dimension.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, True, bias, device=device, dtype=dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"LayerNorm: normalized_shape is {self.normalized_shape}, expected one dimension"
            )

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return kernels.layer_norm(input, self.weight, self.bias, self.eps)


class GELUFeedForward(nn.Sequential):
    """y = gelu(x w_upᵀ + b_up) w_downᵀ + b_down.

    The state_dict is that of `nn.Sequential(nn.Linear, nn.GELU, nn.Linear)`. If one of the three is not plain
    (see `kernels.is_plain`), each of them is called.

    Args:
        embed_dim: C, the width of the input and the output.
        hidden_dim: I, the width between the two linear layers; 4 C by default.
        bias: Whether both linear layers have biases.
        approximate: "none" (erf) or "tanh", as in `nn.GELU`; the state_dict does not store it.
        device, dtype: Device and dtype of the parameters.
    """

    fuses: ClassVar = {"0": (nn.Linear,), "1": (nn.GELU,), "2": (nn.Linear,)}

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        bias: bool = True,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        hidden_dim = hidden_dim or 4 * embed_dim
        super().__init__(
            nn.Linear(embed_dim, hidden_dim, bias, device, dtype),
            nn.GELU(approximate),
            nn.Linear(hidden_dim, embed_dim, bias, device, dtype),
        )

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        up, gelu, down = cast(tuple[nn.Linear, nn.GELU, nn.Linear], tuple(self))
        if not (
            kernels.is_plain(up, nn.Linear)
            and kernels.is_plain(gelu, nn.GELU)
            and kernels.is_plain(down, nn.Linear)
        ):
            return super().forward(input)
        return kernels.gelu_ffn(
            input, up.weight, up.bias, down.weight, down.bias, approximate=gelu.approximate
        )


class CausalSelfAttention(nn.Module):
    """y = out_proj(causal_attention(q, k, v)), where q, k, v = x in_projᵀ.

    The state_dict is that of `nn.MultiheadAttention`. The output equals that of
    `nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)` called with (x, x, x) and a causal mask.

    Args:
        embed_dim: C, the width of the input and the output.
        num_heads: H, a divisor of C.
        dropout: Probability of dropping an attention weight in training mode.
        bias: Whether both projections have biases.
        device, dtype: Device and dtype of the parameters.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    in_proj_bias: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"CausalSelfAttention: num_heads is {num_heads}, expected a divisor of embed_dim "
                f"({embed_dim})"
            )
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        bias_vector = nn.Parameter(torch.zeros(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        self.register_parameter("in_proj_bias", bias_vector)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, key_start: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); key_start as in `kernels.causal_attention`."""
        B, T, C = x.shape
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(B, T, 3, self.num_heads, C // self.num_heads)  # (B, T, 3C) -> (B, T, 3, H, D)
        dropout_p = self.dropout if self.training else 0.0
        y = kernels.causal_attention_qkv(qkv, key_start=key_start, dropout_p=dropout_p)
        return self.out_proj(y.flatten(2))  # (B, T, H, D) -> (B, T, C)
