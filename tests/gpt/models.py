"""Small models for the tests of gpt."""

from __future__ import annotations

from typing import Any

import torch

from gpt import GPT, BPETokenizer, GPTConfig

SMALL = GPTConfig(vocab_size=37, block_size=12, n_layer=2, n_head=2, n_embd=16)

BOOK: dict[str, Any] = {  # GPT-2, with the field names of LLMs-from-scratch
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}

CONFIGS = {
    "gpt2": {},
    "post": {"norm": "post"},
    "post-bare": {"norm": "post", "final_norm": False, "activation": "gelu"},
    "no-shortcuts": {"residual": False, "final_norm": False},
    "post-no-shortcuts": {"residual": False, "norm": "post"},
    "untied": {"tie_weights": False, "head_bias": True, "final_norm": False},
    "no-bias": {"bias": False, "qkv_bias": True, "n_inner": 24, "eps": 0.1},
    "relu-wide-heads": {"activation": "relu", "head_dim": 12, "head_bias": True, "qkv_bias": False},
}

BYTES = BPETokenizer({bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257})


def random_byte_model() -> GPT:
    """A GPT for the tokens of BYTES, with block_size 8 and fixed random parameters, in evaluation mode."""
    torch.manual_seed(1)
    sizes = {"vocab_size": BYTES.vocab_size, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 16}
    model = GPT(sizes, device="cpu").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def random_model(**fields: Any) -> GPT:
    """A small GPT with large random parameters: each one affects the logits, and greedy tokens vary."""
    model = GPT(SMALL, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1 if "ln" in name and name.endswith("weight") else 0
            parameter.normal_(centre, 0.8 if parameter.ndim == 2 and name != "wte.weight" else 0.3)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch, length))


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (1, T) of different lengths as one batch with padding on the left, and its attention mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    idx = torch.cat(
        [torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0), value=1) for prompt in prompts]
    )
    mask = torch.cat(
        [(torch.arange(longest) >= longest - prompt.shape[1]).long()[None] for prompt in prompts]
    )
    return idx, mask
