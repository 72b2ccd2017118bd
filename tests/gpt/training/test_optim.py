"""Optimizers and the learning-rate schedule, against their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpt import TrainConfig
from gpt.data.dataset import TokenData
from gpt.training.optim import COEFFICIENTS, learning_rate, orthogonalize
from gpt.training.step import TrainStep
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, make_batches, make_model


def test_one_step_of_adamw() -> None:
    """Decay of biases or norms, no decay of matrices, a wrong rate or moment, or the slow unfused form."""
    model = make_model(TokenData.from_text(TEXT), dropout=0.0, bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = replace(CONFIG, weight_decay=0.5, beta1=0.8, beta2=0.9, grad_clip=0.0)
    step = TrainStep(model, config)
    assert [optimizer.defaults["fused"] for optimizer in step.optimizers] == [True]

    step(make_batches(32), rate=3e-3)
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 3e-3 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(
            p.detach(), decayed - 3e-3 * p.grad / (p.grad.abs() + 1e-8), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("hardware", [True, False], ids=["bfloat16", "float32"])
def test_orthogonalize(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values far from 1, rotated vectors, a tall matrix treated as wide, or NaN from zeros."""
    monkeypatch.setattr("gpt.training.optim.multiplies_bfloat16", lambda device: hardware)
    for m, n in ((8, 8), (12, 5), (5, 12)):
        u, _, v = torch.linalg.svd(torch.randn(3, m, n), full_matrices=False)
        s = torch.linspace(0.2, 3, min(m, n))
        actual = orthogonalize(u @ torch.diag(s) @ v)
        assert actual.dtype == torch.float32
        assert torch.linalg.svdvals(actual).sub(0.95).abs().max() < 0.35
        expected = torch.eye(len(s)).expand(3, -1, -1)
        torch.testing.assert_close(u.mT @ actual @ v.mT, expected, atol=0.4, rtol=0)
    assert (orthogonalize(torch.zeros(2, 3, 4)) == 0).all()


def test_orthogonalize_takes_the_fast_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 matmuls on a CPU that emulates them, which takes longer than float32."""
    matrices = torch.randn(3, 8, 12)
    monkeypatch.setattr("gpt.training.optim.multiplies_bfloat16", lambda device: False)
    exact = (orthogonalize(matrices) - newton_schulz(matrices)).abs().max()
    monkeypatch.setattr("gpt.training.optim.multiplies_bfloat16", lambda device: True)
    rounded = (orthogonalize(matrices) - newton_schulz(matrices)).abs().max()
    assert exact < 1e-5 < rounded


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`orthogonalize` in float64, where rounding does not depend on how many matrices are stacked."""
    a, b, c = COEFFICIENTS
    x = matrices.double()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(matrices.dtype)


def test_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong momentum, decay or scale; q, k and v orthogonalised as one; a parameter meant for AdamW."""
    monkeypatch.setattr("gpt.training.optim.orthogonalize", newton_schulz)
    model = make_model(TokenData.from_text(TEXT), dropout=0.0, n_embd=32, n_layer=2)
    parameters = dict(model.named_parameters())
    step = TrainStep(model, replace(CONFIG, optimizer="muon", weight_decay=0.5, grad_clip=0.0))
    velocity: dict[str, torch.Tensor] = {}

    for batch in make_batches(32, 32):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        step([batch], rate=1e-2)
        muon = {
            name.removesuffix("/momentum_buffer")
            for name in step.tensors()
            if name.endswith("momentum_buffer")
        }
        assert muon == {name for name in before if name.startswith("blocks.") and before[name].dim() == 2}

        for name in muon:
            g = parameters[name].grad
            velocity[name] = 0.95 * velocity.get(name, 0) + g
            parts = (g + 0.95 * velocity[name]).chunk(3 if "qkv" in name else 1)
            update = torch.cat(
                [0.2 * max(part.shape) ** 0.5 * newton_schulz(part[None])[0] for part in parts]
            )
            expected = before[name] * (1 - 1e-2 * 0.5) - 1e-2 * update
            torch.testing.assert_close(parameters[name].detach(), expected, atol=1e-6, rtol=0)


def test_schedule() -> None:
    """A first step with rate 0, a cosine that ends at another step, or a rate that rises again."""
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(130)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, rel=0.01)
    assert rates[100:] == [0.1] * 30
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(60, replace(config, decay_steps=50)) == 0.1
    assert learning_rate(0, replace(config, warmup_steps=0)) == 1.0
    assert learning_rate(3, replace(config, warmup_steps=5, decay_steps=5)) == 0.8
