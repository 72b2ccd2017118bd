"""A block of the GPT: attention and a feed-forward network, each added to the residual stream.

Shapes: B sequences, T tokens, N = B T rows, C = n_embd, H heads of D = head_size. Activations are rows
(N, C), which a linear layer takes as they are; it would view any other shape as rows, and its output back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from gpt.config import GPTConfig
from gpt.kv_cache import KVCache

Seed = int | Tensor | None
SITES = 3  # dropout masks of a block: one in attention and one for each of the two branches
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / φ as int64: its multiples are far apart


class Pass(NamedTuple):
    """The arguments of one forward pass that all blocks share."""

    shape: torch.Size  # (B, T)
    key_start: Tensor | None  # int32 (B,) or (B, T)
    residual: bool  # False: without shortcuts, a branch replaces the residual stream
    dropout_p: float
    seeds: Sequence[Seed]  # one for each dropout mask of the model
    cache: KVCache | None


def site_seeds(seed: Seed, layers: int) -> Sequence[Seed]:
    """seed · GOLDEN + i for dropout mask i of a model, in wrapping int64; an int and a tensor give the same.

    The last two are for the embedding and for the final norm.
    """
    count = SITES * layers + 2
    if seed is None:
        return [None] * count
    if isinstance(seed, Tensor):
        return (seed * GOLDEN + torch.arange(count, device=seed.device)).unbind()
    return [(seed * GOLDEN + i + 2**63) % 2**64 - 2**63 for i in range(count)]


def fuses_decoding(config: GPTConfig) -> bool:
    """Whether `kernels.decode_block` and its kin compute this architecture: GPT-2's."""
    pre = config.norm == "pre" and config.final_norm and config.residual
    return pre and config.activation != "relu"


def dropout(x: Tensor, p: float, seed: Seed) -> Tensor:
    """dropout(x). Without a seed it is torch's own, so that every backend draws the same mask."""
    if p == 0:
        return x
    return F.dropout(x, p) if seed is None else kernels.dropout(x, p, seed=seed)


class Linear(nn.Linear):
    """A linear layer that computes with `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


def add(x: Tensor, branch: Tensor, run: Pass, seed: Seed) -> Tensor:
    """x + dropout(branch), or dropout(branch) without shortcuts."""
    branch = dropout(branch, run.dropout_p, seed)
    return x + branch if run.residual else branch


def add_norm(norm: Norm, x: Tensor, branch: Tensor, run: Pass, seed: Seed) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum), where sum = add(x, branch), in one op if `norm` is plain."""
    if run.residual and kernels.is_plain(norm, Norm):
        return kernels.add_layer_norm(
            branch, x, norm.weight, norm.bias, norm.eps, dropout_p=run.dropout_p, seed=seed
        )
    x = add(x, branch, run, seed)
    return norm(x), x


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
        return self.proj(y.reshape(x.shape[0], self.width))  # (B, T, H, D) -> (N, HD) -> (N, C)

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, head_size={self.head_size}"


class FeedForward(nn.Module):
    """down(activation(up(x))), in one op if the activation is GELU, and `up` and `down` are plain."""

    fuses: ClassVar = {"up": (Linear,), "down": (Linear,)}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.n_embd, config.inner_size, bias=config.bias)
        self.down = Linear(config.inner_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        if self.activation == "relu":
            return down(F.relu(up(x)))
        if kernels.is_plain(up, Linear) and kernels.is_plain(down, Linear):
            return kernels.gelu_ffn(
                x, up.weight, up.bias, down.weight, down.bias, approximate=self.approximate
            )
        return down(F.gelu(up(x), approximate=self.approximate))

    @property
    def approximate(self) -> str:
        """The approximation of GELU."""
        return "tanh" if self.activation == "gelu_tanh" else "none"

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class Block(nn.Module):
    """Two branches, attention and feed-forward, each added to the residual stream.

    With norm="pre" (GPT-2) a norm precedes each branch: x + branch(norm(x)). With norm="post" (GPT-1) a norm
    follows each addition: norm(x + branch(x)). With residual=False, the branch alone takes the place of the
    sum: branch(norm(x)), or norm(branch(x)).

    `add_norm` fuses an addition with the norm after it. In a pre-norm model, the norm after a block's last
    addition belongs to the next block, so the block returns its last branch without adding it.
    """

    fuses: ClassVar = {"ln_1": (Norm,), "ln_2": (Norm,)}

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
        _, seed_1, seed_2 = run.seeds[SITES * self.layer : SITES * (self.layer + 1)]
        if self.post:
            x, _ = add_norm(self.ln_1, x, self.attn(x, run), run, seed_1)
            x, _ = add_norm(self.ln_2, x, self.ffn(x), run, seed_2)
            return None, x

        y, x = (self.ln_1(x), x) if branch is None else add_norm(self.ln_1, x, branch, run, seed_1)
        y, x = add_norm(self.ln_2, x, self.attn(y, run), run, seed_2)
        return self.ffn(y), x

    def decoding_arguments(self) -> dict[str, Any]:
        """The arguments of `kernels.decode_block`, which computes a plain pre-norm block for one token."""
        parts = {
            "norm_1": self.ln_1,
            "qkv": self.attn.qkv,
            "proj": self.attn.proj,
            "norm_2": self.ln_2,
            "up": self.ffn.up,
            "down": self.ffn.down,
        }
        arguments: dict[str, Any] = {"eps": self.ln_1.eps, "approximate": self.ffn.approximate}
        for name, part in parts.items():
            arguments |= {f"{name}_weight": part.weight, f"{name}_bias": part.bias}
        return arguments

    def extra_repr(self) -> str:
        return f"norm={'post' if self.post else 'pre'!r}"


def checkpointed(
    block: nn.Module, branch: Tensor | None, x: Tensor, run: Pass
) -> tuple[Tensor | None, Tensor]:
    """block(branch, x, run), of which only the arguments are kept: the backward pass runs the block again."""
    # Backward is outside the caller's contexts; torch.compile chooses both passes' backends at once.
    backend = nullcontext() if torch.compiler.is_compiling() else kernels.same_backend()

    def forward(branch: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
        with backend:
            return block(branch, x, run)

    # The masks of dropout, an adapter's too, are drawn again from the same state of torch's generators.
    return checkpoint(forward, branch, x, use_reentrant=False)
