"""One training step: accumulation, clipping and precision, against the formulas."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt import Trainer
from gpt.data.dataset import Batch, TokenData
from gpt.training.step import TrainStep
from gpt.weights import checkpoint
from tests.gpt.training.small_runs import CONFIG, make_batches, make_model, run


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


def test_micro_batches_are_held_one_at_a_time(data: TokenData) -> None:
    """A step that needs memory for all its micro-batches at once."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []
    draw = data.batch

    def batch(*args: Any, **kwargs: Any) -> Batch:
        most.append(len(alive))
        drawn = draw(*args, **kwargs)
        alive.add(drawn.inputs)
        return drawn

    data.batch = batch  # type: ignore[method-assign]
    trainer = Trainer(make_model(data), data, replace(CONFIG, grad_accum=6))
    trainer._queue_step([])
    assert len(most) == 12
    assert max(most) <= 1


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("when", ["step", "evaluation", "save"])
def test_no_memory_left(
    when: str, error: type[Exception], data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is lost or half written, or a folder that stays locked, when memory runs out."""
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
    config = replace(CONFIG, max_steps=4, eval_interval=3)

    def fail(*_: object, **__: object) -> None:
        raise error("out of memory")

    with monkeypatch.context() as patch:
        if when == "step":
            steps = iter(range(3))
            accumulate = TrainStep._accumulate
            patch.setattr(
                TrainStep, "_accumulate", lambda *args: accumulate(*args) if next(steps) < 2 else fail()
            )
        elif when == "evaluation":
            patch.setattr(Trainer, "estimate", fail)
        else:
            write, files = checkpoint.write_tensors, iter(range(4))
            patch.setattr(
                checkpoint, "write_tensors", lambda *args: write(*args) if next(files) < 3 else fail()
            )
        with pytest.raises(error):
            run(data, tmp_path, config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert run(data, tmp_path, config, resume=True).step == 4
