"""Blocks that the backward pass runs again: the same gradients and random numbers, in less memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from gpt import GPT
from gpt.block import Block
from gpt.training.step import TrainStep
from tests.gpt.training.small_runs import CONFIG, make_batches

SHAPE = {"vocab_size": 40, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "device": "cpu"}


def results(
    model: GPT, *, checkpoint: bool, seed: int | None = None, backend: str | None = None
) -> list[Tensor]:
    """The loss, the gradients, and what torch's generator draws after them."""
    model.checkpoint_activations, model.dropout_seed = checkpoint, seed
    model.zero_grad()
    torch.manual_seed(3)
    ids = torch.arange(32).view(2, 16)
    with kernels.use_backend(backend) if backend else nullcontext():
        loss = model(ids, ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), torch.rand(2)]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("use_triton", [False, True])
def test_gradients_are_equal_bit_by_bit(use_triton: bool, seed: int | None) -> None:
    """Other dropout masks in the backward pass, another backend there, or a generator that moves on."""
    model = GPT(**SHAPE, dropout=0.2, use_triton=use_triton)
    expected = results(model, checkpoint=False, seed=seed)
    assert all(map(torch.equal, results(model, checkpoint=True, seed=seed), expected))


def test_the_dropout_of_an_adapter_is_repeated() -> None:
    """A module with dropout of its own, in a model without any, that draws another mask the second time."""
    model = GPT(**SHAPE)
    ffn = model.blocks[0].ffn
    ffn.up = torch.nn.Sequential(ffn.up, torch.nn.Dropout(0.5))
    expected = results(model, checkpoint=False)
    assert all(map(torch.equal, results(model, checkpoint=True), expected))


@pytest.mark.parametrize(("use_triton", "backend"), [(True, "reference"), (False, "triton")])
def test_the_backward_pass_keeps_the_callers_backend(use_triton: bool, backend: str) -> None:
    """A `use_backend` that ends before the backward pass, which then recomputes with another backend."""
    model = GPT(**SHAPE, norm="post", use_triton=use_triton)
    expected = results(model, checkpoint=False, backend=backend)
    assert all(map(torch.equal, results(model, checkpoint=True, backend=backend), expected))


def test_blocks_run_again_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that the training step ignores, or one that slows down evaluation."""
    model = GPT(**SHAPE, use_triton=False)
    step = TrainStep(model, replace(CONFIG, checkpoint_activations=True))
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(1) or forward(*args))
    step(make_batches(32), rate=0.0)
    assert len(calls) == 2 * model.config.n_layer
    model.eval()
    step.loss(make_batches(32)[0])
    assert len(calls) == 3 * model.config.n_layer


@pytest.mark.slow
def test_a_compiled_model_recomputes() -> None:
    """A context in the recomputed part that torch.compile cannot trace, or other gradients there."""
    model = GPT(**SHAPE, use_triton=False)
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.arange(32).view(2, 16)
    gradients = []
    for checkpoint in (False, True):
        model.checkpoint_activations = checkpoint
        model.zero_grad()
        compiled(ids, ids).backward()
        gradients.append([p.grad for p in model.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
