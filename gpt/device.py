"""What a model costs: operations, memory, and the most that a GPU can do."""

from __future__ import annotations

import os

import torch

from gpt.config import GPTConfig, TrainConfig
from gpt.errors import InputError

PEAK_TFLOPS = {
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "4090": 165.2,
}


def flops_per_token(config: GPTConfig) -> int:
    """6 N + 12 n_layer n_head D T for forward and backward at full context; N leaves out embeddings that are
    only looked up.

    Source: nanoGPT's `estimate_mfu`, after PaLM (arXiv 2204.02311), appendix B.
    """
    counts = config.parameter_counts()
    n = (
        counts["total"]
        - counts["position_embedding"]
        - (0 if config.tie_weights else counts["token_embedding"])
    )
    return 6 * n + 12 * config.n_layer * config.n_head * config.head_size * config.block_size


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of dense bfloat16 products as the vendor states them; None where unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tera for part, tera in PEAK_TFLOPS.items() if part in name), None)


def training_bytes(config: GPTConfig, batch_size: int) -> int:
    """16 bytes for each parameter, and 4 · n_layer · (6 C + 4 H D + 2 I) for each token of a micro-batch.

    The first are float32 weights, gradients and AdamW's two averages. The second is what a block's backward
    needs, in float32: what its norms and additions take and give, q, k, v and attention's output, and the
    feed-forward around its activation.
    """
    width = 6 * config.n_embd + 4 * config.n_head * config.head_size + 2 * config.inner_size
    return (
        16 * config.parameter_counts()["total"] + 4 * config.n_layer * width * batch_size * config.block_size
    )


def check_memory(config: GPTConfig, train: TrainConfig, device: torch.device) -> None:
    """Raises InputError where training needs more memory than `device` has in all."""
    needed = training_bytes(config, train.batch_size)
    total = _total_memory(device)
    if total is not None and needed > total:
        raise InputError(
            f"model: training {config.parameter_counts()['total']:,} parameters with batch_size "
            f"{train.batch_size} takes about "
            f"{needed / 2**30:,.0f} GiB, expected at most the {total / 2**30:,.0f} GiB of {device}"
        )


def _total_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
