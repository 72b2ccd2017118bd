"""One step of training, against the formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt import TrainConfig
from gpt.data.dataset import IGNORED, Batch, TokenData
from gpt.training.optim import COEFFICIENTS, orthogonalize
from gpt.training.step import TrainStep, autocast_dtype, learning_rate
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, make_model


@pytest.fixture
def data() -> TokenData:
    return TokenData.from_text(TEXT)


def batches(*counts: int) -> list[Batch]:
    """Micro-batches of 2 rows of 16 with so many targets each."""
    made = []
    for count in counts:
        targets = torch.randint(5, (32,))
        targets[count:] = IGNORED
        made.append(Batch(torch.randint(5, (2, 16)), targets.view(2, 16)))
    return made


def test_accumulation_weighs_tokens(data: TokenData) -> None:
    """Micro-batches that count the same, however few targets they have (bug 23)."""
    model = make_model(data, dropout=0.0)
    parts = batches(32, 5, 0, 1)
    step = TrainStep(model, replace(CONFIG, grad_clip=0.0))
    result = step(parts, rate=0.0)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    inputs, targets = torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_clipping(data: TokenData) -> None:
    """A limit that is not kept, or a norm that is logged after clipping."""
    norms = {}
    for limit in (0.0, 0.1, 1e6):
        torch.manual_seed(3)
        model = make_model(data, dropout=0.0)
        norm = TrainStep(model, replace(CONFIG, grad_clip=limit))(batches(32), rate=0.0).gradient_norm
        after = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        norms[limit] = norm
        assert after == pytest.approx(min(norm, limit or norm), rel=1e-4)
    assert norms[0.0] == norms[0.1] == norms[1e6] > 0.1


def test_one_step_of_adamw(data: TokenData) -> None:
    """Biases and norms that decay, matrices that do not, another rate or moment than asked for, or a slow
    form."""
    model = make_model(data, dropout=0.0, bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = replace(CONFIG, weight_decay=0.5, beta1=0.8, beta2=0.9, grad_clip=0.0)
    step = TrainStep(model, config)
    assert [optimizer.defaults["fused"] for optimizer in step.optimizers] == [True]
    step(batches(32), rate=3e-3)
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 3e-3 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(
            p.detach(), decayed - 3e-3 * p.grad / (p.grad.abs() + 1e-8), rtol=1e-4, atol=1e-6
        )


def test_orthogonalize() -> None:
    """Singular values far from 1, singular vectors that turn, a tall matrix treated as wide, or NaN from
    zeros."""
    for m, n in ((8, 8), (12, 5), (5, 12)):
        u, _, v = torch.linalg.svd(torch.randn(3, m, n), full_matrices=False)
        s = torch.linspace(0.2, 3, min(m, n))
        found = orthogonalize(u @ torch.diag(s) @ v)
        assert found.dtype == torch.float32
        assert torch.linalg.svdvals(found).sub(0.95).abs().max() < 0.35
        torch.testing.assert_close(u.mT @ found @ v.mT, torch.eye(len(s)).expand(3, -1, -1), atol=0.4, rtol=0)
    assert (orthogonalize(torch.zeros(2, 3, 4)) == 0).all()


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`orthogonalize` in float64: its rounding no longer depends on how many matrices are stacked."""
    a, b, c = COEFFICIENTS
    x = matrices.double()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(matrices.dtype)


def test_muon(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum, decay or size other than the formula's, q, k and v made orthogonal as one, or a parameter of
    AdamW's taken."""
    monkeypatch.setattr("gpt.training.optim.orthogonalize", newton_schulz)
    model = make_model(data, dropout=0.0, n_embd=32, n_layer=2)
    parameters = dict(model.named_parameters())
    step = TrainStep(model, replace(CONFIG, optimizer="muon", weight_decay=0.5, grad_clip=0.0))
    velocity: dict[str, torch.Tensor] = {}
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        step(batches(32), rate=1e-2)
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
    """A warm-up from zero that wastes a step, a cosine that ends elsewhere, or a rate that rises again."""
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


def test_float16(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are left scaled, an overflow that ends the run or reaches the parameters, or a scale
    that stays."""
    monkeypatch.setattr(
        "gpt.training.step.autocast_dtype", lambda name, device: torch.float16
    )  # a CPU refuses it
    model = make_model(data, dropout=0.0)
    step = TrainStep(model, replace(CONFIG, grad_clip=0.0))
    parts = batches(32)
    step(parts, rate=0.0)
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(parts[0].inputs).flatten(0, 1), parts[0].targets.flatten()).backward()
    for gradient, p in zip(ours, model.parameters(), strict=True):
        assert (gradient - p.grad).norm() < 0.02 * p.grad.norm()
    before, scale = (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        step.scaler.get_scale(),
    )
    overflow = model.wpe.weight.register_hook(lambda g: g * math.inf)
    assert math.isinf(step(parts, rate=1.0).gradient_norm)
    assert step.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    overflow.remove()
    assert math.isfinite(step(parts, rate=1e-3).gradient_norm)
    assert not torch.equal(model.wpe.weight, before["wpe.weight"])


@pytest.mark.parametrize(
    ("capabilities", "dtype"), [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)]
)
def test_auto_dtype(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that emulates bfloat16, slower than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert autocast_dtype("auto", torch.device("cpu")) == dtype
