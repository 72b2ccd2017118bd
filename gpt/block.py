"""A block of the GPT: attention and a feed-forward network, each added to the residual stream.

Shapes: B sequences, T tokens, N = B T rows, C = n_embd, H heads of D = head_size. Activations are rows
(N, C), which a linear layer takes as they are; it would view any other shape as rows, and its output back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from gpt.config import GPTConfig
from gpt.kv_cache import KVCache

Seed = int | Tensor | None
SITES = 3  # dropout masks of a block: one in attention and one for each of the two branches


class Pass(NamedTuple):
    """The arguments of one forward pass that all blocks share."""

    shape: torch.Size  # (B, T)
    key_start: Tensor | None  # int32 (B,) or (B, T)
    dropout_p: float
    seeds: Sequence[Seed]  # one for each dropout mask of the model
    cache: KVCache | None


class Linear(nn.Linear):
    """A linear layer that computes with `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm, alone or fused with the residual addition before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, branch: Tensor, residual: Tensor, dropout_p: float, seed: Seed) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum), where sum = residual + dropout(branch)."""
        return kernels.add_layer_norm(
            branch, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p, seed=seed
        )


class Attention(nn.Module):
    """proj(causal_attention(q, k, v)), where one projection computes q, k and v."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        self.width = config.n_head * config.head_size
        self.qkv = Linear(config.n_embd, 3 * self.width, bias=config.has_qkv_bias)
        self.proj = Linear(self.width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        qkv = self.qkv(x).view(*run.shape, 3, self.n_head, self.head_size)  # (N, 3HD) -> (B, T, 3, H, D)
        if run.cache is None:
            seed = run.seeds[SITES * self.layer]
            y = kernels.causal_attention_qkv(qkv, key_start=run.key_start, dropout_p=run.dropout_p, seed=seed)
        else:
            y = run.cache.attend(self.layer, qkv)
        return self.proj(y.reshape(len(x), self.width))  # (B, T, H, D) -> (N, HD) -> (N, C)


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
    """Two branches, attention and feed-forward, each added to the residual stream.

    With norm="pre" (GPT-2) a norm precedes each branch: x + branch(norm(x)). With norm="post" (GPT-1) a norm
    follows each addition: norm(x + branch(x)).

    `Norm.add` fuses an addition with the norm after it. In a pre-norm model, the norm after a block's last
    addition belongs to the next block, so the block returns its last branch without adding it.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.post = layer, config.norm == "post"
        self.ln_1 = Norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = Norm(config)
        self.ffn = FeedForward(config)

    def forward(self, branch: Tensor | None, x: Tensor, run: Pass) -> tuple[Tensor | None, Tensor]:
        """(branch, x) after this block, from (branch, x) before it.

        Args:
            branch: (N, C), to be added to x; None if there is nothing to add.
            x: (N, C), the residual stream.
            run: The arguments of the forward pass.
        """
        p, (_, seed_1, seed_2) = run.dropout_p, run.seeds[SITES * self.layer : SITES * (self.layer + 1)]
        if self.post:
            x, _ = self.ln_1.add(self.attn(x, run), x, p, seed_1)
            x, _ = self.ln_2.add(self.ffn(x), x, p, seed_2)
            return None, x

        y, x = (self.ln_1(x), x) if branch is None else self.ln_1.add(branch, x, p, seed_1)
        y, x = self.ln_2.add(self.attn(y, run), x, p, seed_2)
        return self.ffn(y), x


def checkpointed(
    block: nn.Module, branch: Tensor | None, x: Tensor, run: Pass
) -> tuple[Tensor | None, Tensor]:
    """block(branch, x, run), of which only the arguments are kept: the backward pass runs the block again."""
    # Backward is outside the caller's contexts; torch.compile chooses both passes' backends at once.
    backend = nullcontext() if torch.compiler.is_compiling() else kernels.same_backend()

    def forward(branch: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
        with backend:
            return block(branch, x, run)

    # The dropout masks are drawn again from the same state of torch's generators.
    return checkpoint(forward, branch, x, use_reentrant=False, preserve_rng_state=run.dropout_p > 0)
