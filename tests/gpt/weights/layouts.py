"""GPTs in plain torch with the parameter names of nanoGPT and of the book; their logits are the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

V, T, C, H, L = 53, 10, 24, 3, 2


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, T, C) tensors in H heads, written out."""
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


class NanoBlock(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias), "c_proj": nn.Linear(C, C, bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias), "c_proj": nn.Linear(4 * C, C, bias)})
        self.attn.register_buffer("bias", torch.ones(1, 1, T, T).tril())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["c_proj"](attend(*self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's layout: one qkv matrix, exact GELU, optional biases, tied head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, C),
                "wpe": nn.Embedding(T, C),
                "h": nn.ModuleList(NanoBlock(bias) for _ in range(L)),
                "ln_f": nn.LayerNorm(C, bias=bias),
            }
        )
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.arguments = {
            "n_layer": L,
            "n_head": H,
            "n_embd": C,
            "block_size": T,
            "bias": bias,
            "vocab_size": V,
            "dropout": 0.2,
        }

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"].weight[: idx.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class BookNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.scale * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) + self.shift


class BookBlock(nn.Module):
    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        self.att = nn.ModuleDict(
            {name: nn.Linear(C, C, qkv_bias) for name in ("W_query", "W_key", "W_value")}
        )
        self.att["out_proj"] = nn.Linear(C, C)
        self.att.register_buffer("mask", torch.ones(T, T).triu(1))
        self.ff = nn.ModuleDict(
            {"layers": nn.Sequential(nn.Linear(C, 4 * C), nn.GELU("tanh"), nn.Linear(4 * C, C))}
        )
        self.norm1, self.norm2 = BookNorm(), BookNorm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.att["out_proj"](attend(*(self.att[name](y) for name in ("W_query", "W_key", "W_value"))))
        return x + self.ff["layers"](self.norm2(x))


class BookGPT(nn.Module):
    """The book's layout (LLMs-from-scratch): separate q, k and v, scale and shift, untied head."""

    def __init__(self, qkv_bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Embedding(T, C)
        self.trf_blocks = nn.Sequential(*(BookBlock(qkv_bias) for _ in range(L)))
        self.final_norm = BookNorm()
        self.out_head = nn.Linear(C, V, bias=False)
        if tied:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.trf_blocks(self.tok_emb(idx) + self.pos_emb.weight[: idx.shape[1]])
        return self.out_head(self.final_norm(x))


def randomise(model: nn.Module) -> nn.Module:
    """`model` with random parameters, biases and norms included, so that each one affects the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("scale") or ("ln_" in name and name.endswith("weight"))
            parameter.normal_(float(gain), 0.3)
    return model
