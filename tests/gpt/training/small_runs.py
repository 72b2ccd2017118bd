"""A small model and settings for the tests that train."""

from __future__ import annotations

from typing import Any

import torch

from gpt import GPT, GPTConfig, TokenData, TrainConfig

CONFIG = TrainConfig(
    max_steps=8,
    batch_size=2,
    grad_accum=2,
    learning_rate=1e-2,
    min_lr=1e-3,
    warmup_steps=2,
    eval_interval=3,
    eval_batches=2,
    checkpoint_interval=2,
    log_interval=1,
    dtype="float32",
    device="cpu",
)

FLAGS = (
    "--n_layer 1 --n-head 2 --n_embd 16 --block_size=16 "
    "--batch_size 4 --eval_batches 1 --device cpu --warmup_steps 2"
)
TINY = FLAGS.split()  # a small run of gpt.train


def make_model(data: TokenData, **fields: Any) -> GPT:
    torch.manual_seed(7)
    shape = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.2}
    return GPT(GPTConfig(**{"vocab_size": data.tokenizer.vocab_size, **shape, **fields}), device="cpu")
