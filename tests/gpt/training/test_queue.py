"""Steps whose results are read late: no synchronisation, and no effect after a step that is not finite."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import TrainConfig, Trainer
from gpt.data.dataset import Batch, TokenData
from gpt.errors import NonFiniteError
from gpt.files import read_json
from gpt.training.loss_scale import LossScale
from gpt.training.step import PendingStep, StepResult, TrainStep
from gpt.weights.tensors import read_tensors
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, make_batches, make_model, read_log, stop_at, without_times

# Nothing but the last of the eight steps needs its result at once.
RARE = replace(CONFIG, decay_steps=8, log_interval=100, eval_interval=100, checkpoint_interval=100)
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)


class Forbidden(TorchDispatchMode):
    """Raises at an operation that would synchronise with a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where the block reads a value of a tensor."""

    def fail(*args: object) -> None:
        raise AssertionError("a tensor's value is read")

    with monkeypatch.context() as patch, Forbidden():
        # These read ids on a CPU only.
        patch.setattr("gpt.inputs._readable", lambda tensor: False)
        patch.setattr("kernels.loss._check_targets", lambda *args: None)
        for name in READS:
            patch.setattr(torch.Tensor, name, fail)
        yield


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_does_not_synchronise(
    optimizer: str, dtype: str, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that reads the loss, the norm, a count of targets or a scale before it queues the update."""
    monkeypatch.setattr("gpt.training.step.autocast_dtype", lambda name, device: getattr(torch, dtype))
    step = TrainStep(make_model(data), replace(CONFIG, optimizer=optimizer))
    pending = []
    for _ in range(2):  # the first one creates the optimizers' state
        with no_synchronisation(monkeypatch):
            pending.append(step.enqueue(make_batches(32, 5), 1e-2))
    assert pending[1].result().loss < pending[0].result().loss
    with pytest.raises(AssertionError, match="value is read"), no_synchronisation(monkeypatch):
        pending[0].result()


def poisoned(data: TokenData, config: TrainConfig, what: str, out: Path | None = None) -> Trainer:
    """A trainer that reads results one step late, and whose fourth step alone has a NaN."""
    torch.manual_seed(11)
    trainer = Trainer(make_model(data), data, config, out=out)
    trainer._ahead = 1
    factors = {"loss": torch.ones(()), "gradient norm": torch.ones(())}
    draw, model = data.batch, trainer.model

    def batch(stream: Any, *args: Any, **kwargs: Any) -> Batch:
        if stream == "train":
            factors[what].fill_(math.nan if kwargs["step"] == 3 else 1)
        return draw(stream, *args, **kwargs)

    data.batch = batch  # type: ignore[method-assign]
    trainer._step._forward = lambda *args, **kwargs: model(*args, **kwargs) * factors["loss"]
    model.wpe.weight.register_hook(lambda gradient: gradient * factors["gradient norm"])
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of everything that a step may change, but the random state."""
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    optimizers = {name: t.clone() for name, t in trainer._step.tensors().items()}
    return parameters | optimizers | {"scale": trainer._step.scaler.value.clone()}


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize(
    ("optimizer", "dtype", "grad_accum"),
    [("adamw", "float32", 2), ("muon", "float32", 1), ("adamw", "float16", 1), ("muon", "float16", 2)],
)
def test_nothing_changes_after_a_step_that_is_not_finite(
    what: str,
    optimizer: str,
    dtype: str,
    grad_accum: int,
    data: TokenData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A later step that updates before the host knows of the NaN, or an error that names the later step."""
    monkeypatch.setattr("gpt.training.step.autocast_dtype", lambda name, device: getattr(torch, dtype))
    config = replace(RARE, optimizer=optimizer, grad_accum=grad_accum)
    trainer = poisoned(data, config, what, tmp_path)
    straight = poisoned(TokenData.from_text(TEXT), config, what)
    for t in (trainer, straight):
        t._step.scaler.load_state_dict({"scale": 1.0, "_growth_tracker": 0})  # which cannot be lowered
    torch.manual_seed(12)
    straight.model.train()
    for _ in range(3):
        straight._queue_step([])
        straight._finish_step()

    torch.manual_seed(12)
    queued = []
    enqueue = trainer._step.enqueue
    monkeypatch.setattr(trainer._step, "enqueue", lambda *args: queued.append(enqueue(*args)) or queued[-1])
    with pytest.raises(NonFiniteError, match=rf"^step 4: the {what} is nan; stopped before it changed"):
        trainer.run()
    assert len(queued) == 5
    assert trainer.step == 3
    actual, expected = state(trainer), state(straight)
    assert actual.keys() == expected.keys()
    assert {int(t) for name, t in actual.items() if name.endswith("/step")} == {3}
    assert [name for name, t in expected.items() if not torch.equal(actual[name], t)] == []

    kept = read_tensors(tmp_path / "non-finite-step-4.safetensors")
    batch = TokenData.from_text(TEXT).batch("train", 2, 16, seed=CONFIG.seed, step=3, micro_step=0)
    assert torch.equal(kept["0/inputs"], batch.inputs)
    assert [record["step"] for record in read_log(tmp_path)] == [1]
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_late_results_change_nothing(data: TokenData, tmp_path: Path) -> None:
    """A log record, evaluation, checkpoint or stop that belongs to another step when results are late."""
    config = replace(CONFIG, log_interval=4, max_steps=11)
    outs = tmp_path / "at-once", tmp_path / "late"
    results = []
    for ahead, out in enumerate(outs):
        torch.manual_seed(11)
        trainer = Trainer(make_model(data), data, config, out=out)
        trainer._ahead = ahead
        results.append(replace(trainer.run(), checkpoint=None))
    assert results[0] == results[1]
    at_once, late = (without_times(read_log(out)) for out in outs)
    assert at_once == late
    assert [record["step"] for record in late] == [1, 3, 4, 6, 8, 9, 11]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        for step in ("step-8", "step-10", "step-11"):
            files = [out / "checkpoints" / step / name for out in outs]
            if name == "state.json":
                states = [{k: v for k, v in read_json(f).items() if k != "seconds"} for f in files]
                assert states[0] == states[1]
            else:
                assert files[0].read_bytes() == files[1].read_bytes()


def test_a_signal_stops_a_queue(data: TokenData, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A stop that drops a queued step, or that queues further steps."""
    trainer = Trainer(make_model(data), stop_at(data, 4, 1), RARE, out=tmp_path)
    trainer._ahead = 1
    result = trainer.run()
    assert (result.step, result.signal) == (5, signal.SIGINT)
    assert read_json(tmp_path / "checkpoints/step-5/state.json")["step"] == 5
    assert "\nstopping: finishing step 5, then saving; " in capfd.readouterr().err


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_signal_names_the_last_step(
    ahead: int, data: TokenData, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A line that names another step than the last one, if the signal comes while a result is read."""
    trainer = Trainer(make_model(data), data, RARE)
    trainer._ahead = ahead
    read, shown = PendingStep.result, []

    def result(self: PendingStep) -> StepResult:
        if trainer.step == 3 and not shown:
            signal.raise_signal(signal.SIGTERM)
            shown.append(capfd.readouterr().err)
        return read(self)

    monkeypatch.setattr(PendingStep, "result", result)
    step = trainer.run().step
    assert step == 5 + ahead
    assert f"\nstopping: finishing step {step}, then saving; " in shown[0]


def test_the_loss_scale_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that grows or shrinks at another step than GradScaler's, or that a failed step changes."""
    monkeypatch.setattr("gpt.training.loss_scale.INTERVAL", 3)
    ours = LossScale(torch.device("cpu"), enabled=True)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    theirs.scale(torch.ones(()))
    ours.value.fill_(2.0**126)
    theirs._scale.fill_(2.0**126)
    for overflows in (0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0):
        found_inf = torch.tensor(float(overflows))
        torch._amp_update_scale_(theirs._scale, theirs._growth_tracker, found_inf, 2.0, 0.5, 3)
        ours.update(found_inf == 1, torch.tensor(False))
        assert ours.state_dict() == theirs.state_dict()
    before = ours.state_dict()
    ours.update(torch.tensor(True), torch.tensor(True))
    assert ours.state_dict() == before
    assert LossScale(torch.device("cpu"), enabled=False).state_dict() == {}
