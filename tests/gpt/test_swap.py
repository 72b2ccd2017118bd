"""One model on kernels (interpreted here) and on references, as a whole and op by op."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from gpt import GPT, GPTConfig
from kernels.registry import SPECS
from kernels.tolerance import compare

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=32)

pytestmark = pytest.mark.kernels


def make(config: GPTConfig = CONFIG, *, use_triton: bool | str = True, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, use_triton=use_triton)


def tokens(step: int = 0, batch: int = 2, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(
        CONFIG.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(step)
    )
    return drawn[:, :-1], drawn[:, 1:]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(*tokens())
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def curve(use_triton: bool, steps: int) -> list[float]:
    model = make(use_triton=use_triton)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        idx, _ = tokens(step % 4, batch=1)
        loss = model(idx, idx.roll(1, 1))  # to copy the previous token can be learned, so the loss falls
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.interpreter
def test_training_curves_agree() -> None:
    """A wrong gradient in the model although each op alone is correct."""
    triton, reference = curve(True, 25), curve(False, 25)
    assert reference[-1] < 0.8 * reference[0]
    assert max(abs(a - b) for a, b in zip(triton, reference, strict=True)) < 1e-3


@pytest.mark.parametrize("op", [*SPECS, "all"])
def test_swapping_an_op_changes_nothing(op: str) -> None:
    """A swap that uses other random numbers or parameters, or that breaks the tolerance rule."""
    model = make(use_triton=False)
    reference = gradients(model)
    exact = gradients(make(use_triton=False).double())
    setting = kernels.use_backend("triton") if op == "all" else kernels.use_backend(**{op: "triton"})
    with setting:
        swapped = gradients(model)
    for name, value in exact.items():
        verdict = compare(name, swapped[name], reference[name], value, dtype=torch.float32, scale=1.0)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("residual", [True, False])
def test_both_backends_draw_the_same_dropout_masks(residual: bool) -> None:
    """Masks that differ between kernel and reference, or forward and backward, under dropout_seed."""
    config = GPTConfig.from_dict(CONFIG.to_dict() | {"dropout": 0.3, "residual": residual, "n_layer": 1})
    results = []
    for use_triton in (True, False):
        model = make(config, use_triton=use_triton)
        model.dropout_seed = 5
        results.append(gradients(model))
    model.dropout_seed = 6
    assert (gradients(model)["loss"] - results[1]["loss"]).abs() > 1e-4
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_triton", [True, False])
def test_logits_do_not_depend_on_later_tokens(use_triton: bool) -> None:
    """A causal mask that is off by one in the kernels."""
    model, (idx, _) = make(use_triton=use_triton).eval(), tokens()
    with torch.no_grad():
        before = model(idx)
        for t in (1, 12, 23):
            changed = idx.clone()
            changed[:, t] = (changed[:, t] + 1) % CONFIG.vocab_size
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("use_triton", [True, False])
def test_uneven_prompts_decode_as_if_alone(use_triton: bool) -> None:
    """Padding that leaks into a shorter prompt, or a cache that is read one key too far."""
    model = make(use_triton=use_triton)
    prompts = [tokens(i, 1, length)[0] for i, length in enumerate((3, 9, 6))]
    longest = max(p.shape[1] for p in prompts)
    idx = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.arange(longest)[None] >= longest - p.shape[1] for p in prompts]).long()
    together = model.generate(idx, 8, do_sample=False, attention_mask=mask)[:, longest:]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, 8, do_sample=False)[0, prompt.shape[1] :]
        assert torch.equal(row, alone)


def test_both_backends_have_the_same_parameters() -> None:
    """A checkpoint that only one backend can load."""
    triton, reference = make(use_triton=True), make(use_triton=False)
    assert list(triton.state_dict()) == list(reference.state_dict())
    for a, b in zip(triton.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_gpu_it_warns_once_and_trains() -> None:
    """GPT(use_triton=True) without a GPU: an error, no warning, or a warning for each call."""
    program = """
import warnings, torch, gpt
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = gpt.GPT(vocab_size=17, block_size=8, n_layer=1, n_head=1, n_embd=8, use_triton=True)
    idx = torch.randint(17, (2, 8))
    for _ in range(3):
        model(idx, idx).backward()
print([w.category.__name__ for w in caught], str(caught[0].message))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        "['FallbackWarning'] use_triton=True: tensors on cpu need TRITON_INTERPRET=1; the reference runs for"
    )
