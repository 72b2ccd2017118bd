"""Fused Triton kernels for causal attention, LayerNorm, GELU feed-forward and linear + cross-entropy.

Each op has a plain PyTorch reference, which defines it and runs wherever Triton cannot; `explain` says which
of the two a call takes, and why.
"""

from kernels import reference
from kernels.attention import causal_attention, causal_attention_qkv, decode_attention
from kernels.decode import DECODE_BATCH, decode_argmax, decode_block, decode_embedding, decode_head
from kernels.dispatch import (
    Choice,
    FallbackWarning,
    backend_settings,
    explain,
    model_backend,
    same_backend,
    use_backend,
    warn_if_unavailable,
)
from kernels.ffn import gelu_ffn
from kernels.linear import linear
from kernels.loss import linear_cross_entropy
from kernels.norm import add_layer_norm, dropout, layer_norm
from kernels.packed import PackedWeight, pack
from kernels.plain import has_hooks, is_plain
from kernels.preflight import Report, preflight
from kernels.registry import Work, work
from kernels.spec import Case
from kernels.version import __version__

__all__ = [
    "DECODE_BATCH",
    "Case",
    "Choice",
    "FallbackWarning",
    "PackedWeight",
    "Report",
    "Work",
    "__version__",
    "add_layer_norm",
    "backend_settings",
    "causal_attention",
    "causal_attention_qkv",
    "decode_argmax",
    "decode_attention",
    "decode_block",
    "decode_embedding",
    "decode_head",
    "dropout",
    "explain",
    "gelu_ffn",
    "has_hooks",
    "is_plain",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "model_backend",
    "pack",
    "preflight",
    "reference",
    "same_backend",
    "use_backend",
    "warn_if_unavailable",
    "work",
]
