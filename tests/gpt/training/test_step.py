"""One training step: accumulation, clipping and precision, against the formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt.data.dataset import TokenData
from gpt.training.step import TrainStep
from tests.gpt.training.small_runs import CONFIG, make_batches, make_model


def test_accumulation_weighs_tokens(data: TokenData) -> None:
    """Micro-batches with equal weight although they have different numbers of targets (bug 23)."""
    model = make_model(data, dropout=0.0)
    parts = make_batches(32, 5, 0, 1)
    step = TrainStep(model, replace(CONFIG, grad_clip=0.0))
    result = step(parts, rate=0.0)
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    inputs, targets = torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for actual, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(actual, p.grad, rtol=1e-4, atol=1e-6)


def test_clipping(data: TokenData) -> None:
    """A gradient norm above the limit, or a reported norm that is taken after clipping."""
    norms = {}
    for limit in (0.0, 0.1, 1e6):
        model = make_model(data, dropout=0.0)
        norm = TrainStep(model, replace(CONFIG, grad_clip=limit))(make_batches(32), rate=0.0).gradient_norm
        after = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        norms[limit] = norm
        assert after == pytest.approx(min(norm, limit or norm), rel=1e-4)
    assert norms[0.0] == norms[0.1] == norms[1e6] > 0.1


def test_float16(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients left scaled, an overflow that ends the run or reaches the parameters, or a constant scale."""
    # A CPU refuses float16.
    monkeypatch.setattr("gpt.training.step.autocast_dtype", lambda name, device: torch.float16)
    model = make_model(data, dropout=0.0)
    step = TrainStep(model, replace(CONFIG, grad_clip=0.0))
    parts = make_batches(32)
    step(parts, rate=0.0)
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    F.cross_entropy(model(parts[0].inputs).flatten(0, 1), parts[0].targets.flatten()).backward()
    for actual, p in zip(gradients, model.parameters(), strict=True):
        assert (actual - p.grad).norm() < 0.02 * p.grad.norm()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = step.scaler.get_scale()
    overflow = model.wpe.weight.register_hook(lambda g: g * math.inf)
    assert math.isinf(step(parts, rate=1.0).gradient_norm)
    assert step.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    overflow.remove()
    assert math.isfinite(step(parts, rate=1e-3).gradient_norm)
    assert not torch.equal(model.wpe.weight, before["wpe.weight"])
