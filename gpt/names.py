"""The names that other packages give our parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How a package names our parameters."""

    package: str
    blocks: str
    modules: Mapping[str, tuple[str, ...]]  # ours -> theirs; several are stacked into one of ours
    transposed: bool = False  # the blocks' matrices are (in, out)
    kinds: dict[str, str] = field(default_factory=dict)  # of a norm's parameters: ours -> theirs
    assumed: dict[str, Any] = field(
        default_factory=dict
    )  # what the package's models are and its files do not say

    def names(self, name: str) -> list[str]:
        """Their names of our parameter `name`."""
        module, _, kind = name.rpartition(".")
        block = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            block = f"{self.blocks}.{layer}."
        kind = self.kinds.get(kind, kind) if module.startswith("ln_") else kind
        return [f"{block}{theirs}.{kind}" for theirs in self.modules[module]]

    def is_transposed(self, name: str) -> bool:
        return (
            self.transposed and name.startswith("blocks.") and name.endswith("weight") and ".ln_" not in name
        )


_GPT2_MODULES = {
    "wte": ("wte",),
    "wpe": ("wpe",),
    "ln_1": ("ln_1",),
    "attn.qkv": ("attn.c_attn",),
    "attn.proj": ("attn.c_proj",),
    "ln_2": ("ln_2",),
    "ffn.up": ("mlp.c_fc",),
    "ffn.down": ("mlp.c_proj",),
    "ln_f": ("ln_f",),
    "lm_head": ("lm_head",),
}
HUGGING_FACE = Layout("Hugging Face", "h", _GPT2_MODULES, transposed=True)
NANOGPT = Layout("nanoGPT", "h", _GPT2_MODULES, assumed={"activation": "gelu"})
BOOK = Layout(
    "LLMs-from-scratch",
    "trf_blocks",
    {
        "wte": ("tok_emb",),
        "wpe": ("pos_emb",),
        "ln_1": ("norm1",),
        "attn.qkv": ("att.W_query", "att.W_key", "att.W_value"),
        "attn.proj": ("att.out_proj",),
        "ln_2": ("norm2",),
        "ffn.up": ("ff.layers.0",),
        "ffn.down": ("ff.layers.2",),
        "ln_f": ("final_norm",),
        "lm_head": ("out_head",),
    },
    kinds={"weight": "scale", "bias": "shift"},
)
