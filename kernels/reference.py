"""Every op in plain torch, under its public name and signature."""

from kernels.attention.reference import causal_attention, causal_attention_qkv, decode_attention
from kernels.decode.reference import decode_argmax, decode_block, decode_embedding, decode_head
from kernels.ffn.reference import gelu_ffn
from kernels.loss.reference import linear_cross_entropy
from kernels.norm.reference import add_layer_norm, dropout, layer_norm

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "causal_attention_qkv",
    "decode_argmax",
    "decode_attention",
    "decode_block",
    "decode_embedding",
    "decode_head",
    "dropout",
    "gelu_ffn",
    "layer_norm",
    "linear_cross_entropy",
]
