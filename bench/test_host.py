"""Benchmarks of the CPU work around the kernels: `pytest bench --benchmark-only`, on any machine.

With TRITON_INTERPRET=1, also that of the kernels' calls.
To compare two commits, pass `--benchmark-save NAME` at the first and `--benchmark-compare` at the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gpt
import kernels
from gpt.data.dataset import TokenData
from gpt.weights.checkpoint import load_model, save_model
from kernels import checks, dispatch
from kernels.launch import Launch
from kernels.registry import SPECS

TEXT = Path(checks.__file__).read_text("utf-8") * 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> TokenData:
    return TokenData.from_text(TEXT)


@pytest.fixture(scope="module")
def model() -> gpt.GPT:
    return gpt.GPT("char-cpu")


@pytest.mark.parametrize("op", SPECS)
def test_choice(op: str, benchmark: Any) -> None:
    """The argument checks and the choice of backend of a call."""
    spec = SPECS[op]
    inputs = spec.make_inputs(spec.tagged("small")[0], torch.float32, CPU, torch.Generator().manual_seed(0))
    with kernels.use_backend("reference"):
        assert benchmark(kernels.explain, op, **inputs).backend == "reference"


@pytest.mark.parametrize("op", SPECS)
def test_overhead(op: str, benchmark: Any) -> None:
    """A whole call on tiny inputs, where the computation itself costs almost nothing."""
    spec = SPECS[op]
    inputs = spec.make_inputs(spec.tagged("small")[0], torch.float32, CPU, torch.Generator().manual_seed(0))
    with torch.no_grad():
        benchmark(spec.function, **inputs)


CALLS = [(op, backward) for op in SPECS for backward in (False, True) if SPECS[op].gradients or not backward]


@pytest.mark.skipif(not dispatch.interpreting, reason="on a CPU, a kernel is called under TRITON_INTERPRET=1")
@pytest.mark.parametrize(("op", "backward"), CALLS)
def test_call(op: str, backward: bool, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of a kernel without gradients, or with its backward pass. Launches do nothing."""
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    spec = SPECS[op]
    inputs = spec.make_inputs(spec.tagged("small")[0], torch.float32, CPU, torch.Generator().manual_seed(0))
    leaves = [inputs[name].requires_grad_() for name in spec.gradients if inputs[name] is not None]

    def call() -> None:
        result = spec.function(**inputs)
        if backward:
            outputs = result if isinstance(result, tuple) else (result,)
            torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])

    with torch.set_grad_enabled(backward), kernels.use_backend("triton"):
        benchmark(call)


def test_use_backend(benchmark: Any) -> None:
    """Entering and leaving the context manager."""

    def enter() -> None:
        with kernels.use_backend(attention="reference"):
            pass

    benchmark(enter)


def test_batch(benchmark: Any, data: TokenData) -> None:
    """Sampling one batch of training data."""
    batch = benchmark(data.batch, "train", 12, 64, seed=0, step=0, micro_step=0)
    assert batch.inputs.shape == (12, 64)


def test_encode(benchmark: Any, data: TokenData) -> None:
    """Encoding text with the character tokenizer."""
    assert benchmark(data.tokenizer.encode, TEXT)


def test_decode(benchmark: Any, data: TokenData) -> None:
    """Decoding text with the character tokenizer."""
    ids = data.tokenizer.encode(TEXT)
    assert benchmark(data.tokenizer.decode, ids) == TEXT


def test_save(benchmark: Any, model: gpt.GPT, tmp_path: Path) -> None:
    """Saving a model with its hashes."""
    benchmark(save_model, model, tmp_path / "model")


def test_load(benchmark: Any, model: gpt.GPT, tmp_path: Path) -> None:
    """Loading a model and checking its hashes."""
    save_model(model, tmp_path / "model")
    assert benchmark(load_model, tmp_path / "model").config == model.config
