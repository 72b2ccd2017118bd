"""nanoGPT as a contestant of `bench.train`, from a checkout of https://github.com/karpathy/nanoGPT."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import Batch
from gpt.errors import InputError


def load_nanogpt(folder: str) -> ModuleType:
    """Imports `model.py` from a checkout of nanoGPT.

    Raises:
        InputError: The folder has no model.py, or one without nanoGPT's classes.
    """
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise InputError(
            f"--nanogpt: {folder} has no model.py, expected a checkout of https://github.com/karpathy/nanoGPT"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
        raise InputError(f"--nanogpt: {path} has no GPT and GPTConfig, expected nanoGPT's")
    return module


def nanogpt_step(
    module: ModuleType, config: GPTConfig, train: TrainConfig, batch: Batch, device: torch.device
) -> Callable[[], object]:
    """A training step as in nanoGPT's train.py, always on the same batch.

    On a GPU: bfloat16 autocast, torch.compile, fused AdamW. On a CPU, as in nanoGPT's README: float32, not
    compiled, and the loss is read after each step.
    """
    sizes = {
        n: getattr(config, n)
        for n in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    }
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its parameter count
        model: nn.Module = module.GPT(module.GPTConfig(**sizes)).to(device)
        configure: Any = model.configure_optimizers
        optimizer = configure(
            train.weight_decay, train.learning_rate, (train.beta1, train.beta2), device.type
        )
    forward = torch.compile(model) if on_gpu else model
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)

    def step() -> object:
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            _, loss = forward(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss if on_gpu else loss.item()

    return step
