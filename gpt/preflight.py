"""The fused ops that a model calls, as cases for `kernels.preflight`."""

from __future__ import annotations

from typing import Any

import torch

import kernels
from gpt.block import fuses_decoding
from gpt.config import GPTConfig


def preflight(
    config: GPTConfig,
    device: torch.device,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    parameters: torch.dtype,
    *,
    prefer: str = "triton",
    use_cache: bool = True,
) -> kernels.Report:
    """Compares each op of a model with its reference, forward and backward, at the shapes of one pass.

    Args:
        config: The config of the model.
        device: The device of the model.
        batch_size: Sequences per micro-batch.
        seq_len: Tokens per sequence.
        dtype: The dtype that the ops compute in: that of autocast, or that of the parameters.
        parameters: The dtype of the parameters and of the residual stream.
        prefer, use_cache: As in `kernels.preflight`.
    """
    return kernels.preflight(
        cases(config, batch_size, seq_len, parameters), device, dtype, prefer=prefer, use_cache=use_cache
    )


def cases(
    config: GPTConfig, batch_size: int, seq_len: int, parameters: torch.dtype
) -> list[tuple[str, kernels.Case]]:
    """(op, case) for each op that the model calls, with the options and layouts of the call."""
    n, c = batch_size * seq_len, config.n_embd
    heads = {"B": batch_size, "H": config.n_head, "D": config.head_size}
    dropout = {"dropout_p": config.dropout, "seed": 1} if config.dropout else {}
    norm = {"parameters": parameters, "bias": config.bias}
    calls: list[tuple[str, dict[str, int], dict[str, Any]]] = [
        ("causal_attention_qkv", {**heads, "T": seq_len}, dropout),
        ("decode_attention", {**heads, "Tq": 1, "Tmax": config.block_size}, {}),
        ("decode_argmax", {"B": batch_size, "V": config.vocab_size}, {}),
        ("linear_cross_entropy", {"N": n, "C": c, "V": config.vocab_size}, {"bias": config.head_bias}),
    ]
    if config.dropout:
        calls.append(("dropout", {"N": n, "C": c}, {"p": config.dropout, "seed": 1}))
    if config.residual:
        calls.append(("add_layer_norm", {"N": n, "C": c}, {**norm, "residual": parameters, **dropout}))
    if not config.residual or config.norm == "pre" or config.final_norm:
        calls.append(("layer_norm", {"N": n, "C": c}, norm))
    ffn = {"bias": config.bias, "approximate": "tanh" if config.activation == "gelu_tanh" else "none"}
    if config.activation != "relu":
        calls.append(("gelu_ffn", {"N": n, "C": c, "I": config.inner_size}, ffn))
    if fuses_decoding(config):
        row = {"B": min(batch_size, kernels.DECODE_BATCH), "C": c}
        sizes = {"H": config.n_head, "Tmax": config.block_size, "D": config.head_size, "I": config.inner_size}
        calls += [
            ("decode_embedding", {**row, "V": config.vocab_size, "P": config.block_size}, {}),
            ("decode_block", {**row, **sizes}, ffn),
            ("decode_head", {**row, "V": config.vocab_size}, {"bias": config.head_bias}),
        ]
    return [(op, kernels.Case(sizes, options)) for op, sizes, options in calls]
