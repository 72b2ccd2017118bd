"""A block of the GPT: attention and feed-forward, and the fused ops of `kernels` in them.

Shapes: B sequences, T tokens, C = n_embd, H heads of D = head_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from gpt.config import GPTConfig
from gpt.kv_cache import KVCache

Seed = int | Tensor | None
SITES = 3  # dropout masks of a block: attention's and the two branches'


class Pass(NamedTuple):
    """What the blocks share in one forward pass."""

    key_start: Tensor | None  # int32 (B,) or (B, T)
    dropout_p: float
    seeds: Sequence[Seed]  # one for each mask
    cache: KVCache | None


class Linear(nn.Linear):
    """`kernels.linear` with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm, alone or fused with the addition before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, branch: Tensor, residual: Tensor, dropout_p: float, seed: Seed) -> tuple[Tensor, Tensor]:
        """(the norm of the sum, the sum) of residual and dropout(branch)."""
        return kernels.add_layer_norm(
            branch, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p, seed=seed
        )


class Attention(nn.Module):
    """proj(causal_attention(q, k, v)), with q, k and v views of one projection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        width = config.n_head * config.head_size
        self.qkv = Linear(config.n_embd, 3 * width, bias=config.has_qkv_bias)
        self.proj = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, self.head_size)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, D), strided
        if run.cache is None:
            seed = run.seeds[SITES * self.layer]
            y = kernels.causal_attention(q, k, v, key_start=run.key_start, dropout_p=run.dropout_p, seed=seed)
        else:
            y = run.cache.attend(self.layer, q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, H, T, D) -> (B, T, HD) -> (B, T, C)


class FeedForward(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.n_embd, config.inner_size, bias=config.bias)
        self.down = Linear(config.inner_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return kernels.gelu_ffn(
            x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, approximate=approximate
        )


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream before (norm="pre") or behind which (norm="post")
    a norm stands.

    A pre-norm block hands its last branch on unadded, because the norm that fuses the addition is the next
    block's.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.post = layer, config.norm == "post"
        self.ln_1 = Norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = Norm(config)
        self.ffn = FeedForward(config)

    def forward(self, branch: Tensor | None, x: Tensor, run: Pass) -> tuple[Tensor | None, Tensor]:
        p, (_, seed_1, seed_2) = run.dropout_p, run.seeds[SITES * self.layer : SITES * (self.layer + 1)]
        if self.post:
            x, _ = self.ln_1.add(self.attn(x, run), x, p, seed_1)
            x, _ = self.ln_2.add(self.ffn(x), x, p, seed_2)
            return None, x
        y, x = (self.ln_1(x), x) if branch is None else self.ln_1.add(branch, x, p, seed_1)
        y, x = self.ln_2.add(self.attn(y, run), x, p, seed_2)
        return self.ffn(y), x
