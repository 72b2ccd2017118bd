"""Captured steps of training and evaluation against eager ones, with CUDA graphs simulated on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import GPT, TrainConfig
from gpt.data.dataset import Batch, TokenData
from gpt.errors import NonFiniteError
from gpt.training.distributed import Ranks
from gpt.training.optim import learning_rate
from gpt.training.step import StepResult, TrainStep
from tests.gpt.graphs import Recording, fake
from tests.gpt.training.small_runs import CONFIG, make_batches, make_model

COUNTS = ((32, 5), (20, 0), (32, 32), (7, 9), (32, 1), (16, 16))  # targets of two micro-batches, by step
Between = Callable[[int, GPT, TrainStep], object]


def draw(i: int, *, packed: bool = False) -> list[Batch]:
    """The micro-batches of step i; if packed, the second document of each row starts at another token."""
    batches = make_batches(*COUNTS[i])
    if not packed:
        return batches
    start = torch.arange(16, dtype=torch.int32).ge(i + 3).int() * (i + 3)
    return [batch._replace(document_start=start.expand(2, 16).contiguous()) for batch in batches]


def train(
    data: TokenData, config: TrainConfig, between: Between = lambda *_: None, *, packed: bool = False
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """The results of a few steps with a changing rate, and everything that they change."""
    model = make_model(data)
    step = TrainStep(model, config)
    torch.manual_seed(3)
    results = []
    for i in range(len(COUNTS)):
        results.append(step(draw(i, packed=packed), learning_rate(i, config)))
        between(i, model, step)
    state = {name: p.detach() for name, p in model.named_parameters()} | step.tensors()
    state |= {"random": torch.get_rng_state(), "scale": torch.tensor(list(step.scaler.state_dict().values()))}
    return results, state


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    monkeypatch.setattr("gpt.training.step.captures", lambda device: True)
    return fake(monkeypatch)


def assert_equal(actual: Any, expected: Any) -> None:
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(actual[1][name], tensor), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_captured_steps_equal_eager_ones(
    optimizer: str, dtype: str, data: TokenData, graphs: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay with a stale rate, batch, count of targets, dropout mask, loss scale or step count."""
    monkeypatch.setattr("gpt.training.step.autocast_dtype", lambda name, device: getattr(torch, dtype))
    config = replace(CONFIG, optimizer=optimizer, grad_clip=0.5)
    captured = train(data, config)
    # The first of the six steps is eager.
    assert [graph.replays for graph in graphs] == [5]
    assert_equal(captured, train(data, replace(config, no_capture=True)))
    assert len(graphs) == 1
    assert len({result.loss for result in captured[0]}) == len(COUNTS)
    assert any(result.gradient_norm > 0.5 for result in captured[0][1:])


def change_parameters(i: int, model: GPT, step: TrainStep) -> None:
    """Changes parameters and the loss scale in place, as loading a checkpoint does."""
    with torch.no_grad():
        model.wpe.weight.mul_(1 + i)


def load_state(i: int, model: GPT, step: TrainStep) -> None:
    """Replaces the optimizers' tensors after the third step."""
    if i == 2:
        step.load_tensors({name: t * 0.5 for name, t in step.tensors().items()}, Path("a checkpoint"))


def evaluate_and_sample(i: int, model: GPT, step: TrainStep) -> None:
    """Uses the model as an evaluation does."""
    model.eval()
    step.evaluate(make_batches(16)[0])
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 3)
    model.train()


def other_shapes(i: int, model: GPT, step: TrainStep) -> None:
    """Takes a step of one micro-batch instead of two, as at the end of an epoch."""
    if i in (1, 3):
        step(make_batches(8), 1e-3)


@pytest.mark.parametrize(
    ("between", "replays"),
    [(change_parameters, [5]), (load_state, [2, 2]), (evaluate_and_sample, [5, 5]), (other_shapes, [5])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_happens_between_steps_is_seen(
    between: Between, replays: list[int], data: TokenData, graphs: list[Recording]
) -> None:
    """A graph that keeps old weights or old optimizer tensors, or that another use of the model breaks."""
    captured = train(data, CONFIG, between)
    assert [graph.replays for graph in graphs] == replays
    assert_equal(captured, train(data, replace(CONFIG, no_capture=True), between))


def test_captured_evaluations_equal_eager_ones(data: TokenData, graphs: list[Recording]) -> None:
    """An evaluation with old weights or an old batch, with dropout, or that builds a graph of gradients."""

    def losses(config: TrainConfig) -> list[float]:
        evaluated = []

        def evaluate(i: int, model: GPT, step: TrainStep) -> None:
            model.eval()
            for batch in draw(i, packed=i > 2):
                loss = step.evaluate(batch)
                assert not loss.requires_grad
                evaluated.append(loss.item())
            model.train()

        train(data, config, evaluate)
        return evaluated

    captured = losses(CONFIG)
    # The twelve evaluations: the first of those without and of those with documents is eager.
    assert [graph.replays for graph in graphs] == [5, 5, 5]
    assert captured == losses(replace(CONFIG, no_capture=True))
    assert len(set(captured)) == len(captured)


def test_an_evaluation_sees_the_mode_and_the_backend(data: TokenData, graphs: list[Recording]) -> None:
    """A replay of the graph of another mode: with dropout, or with kernels instead of references."""
    model = make_model(data)
    step, batch = TrainStep(model, CONFIG), make_batches(16)[0]
    for change in (model.eval, model.train, model.eval):
        change()
        for _ in range(3):
            step.evaluate(batch)
    model.use_triton = False
    step.evaluate(batch)
    assert [graph.replays for graph in graphs] == [2, 2, 2]


def test_captured_steps_read_document_starts(data: TokenData, graphs: list[Recording]) -> None:
    """A replay that keeps the documents of the batch that was captured."""
    captured = train(data, CONFIG, packed=True)
    assert [graph.replays for graph in graphs] == [5]
    assert_equal(captured, train(data, replace(CONFIG, no_capture=True), packed=True))
    assert captured[0] != train(data, CONFIG)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_captured_step_that_is_not_finite_changes_nothing(
    optimizer: str, data: TokenData, graphs: list[Recording]
) -> None:
    """A replay that updates with a NaN, or an error that later replays cannot raise or cannot leave."""
    model = make_model(data)
    step = TrainStep(model, replace(CONFIG, optimizer=optimizer))
    factor = torch.ones(())
    model.wpe.weight.register_hook(lambda gradient: gradient * factor)
    for i in range(3):
        step(draw(i), 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    before |= {name: t.clone() for name, t in step.tensors().items()}

    factor.fill_(math.nan)
    failing = step.enqueue(draw(3), 1e-2)
    factor.fill_(1)
    step.enqueue(draw(4), 1e-2)
    with pytest.raises(NonFiniteError, match=r"^the gradient norm is nan$"):
        failing.result()
    after = dict(model.named_parameters()) | step.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [graph.replays for graph in graphs] == [4]
    assert math.isfinite(step(draw(5), 1e-2).loss)
    assert not torch.equal(model.wte.weight, before["wte.weight"])


def test_a_graph_keeps_no_gradients(data: TokenData, graphs: list[Recording]) -> None:
    """Memory of a graph that stays in use when the graph is freed, or eager gradients beside the graph's."""
    model = make_model(data)
    step = TrainStep(model, CONFIG)
    for i in range(3):
        step(draw(i), 1e-2)
    assert [graph.replays for graph in graphs] == [2]
    assert all(p.grad is None for p in model.parameters())


def test_a_capture_that_fails_is_reported_once(
    data: TokenData, graphs: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed capture that ends the run, that is tried at each step, or that nobody is told of."""

    def refuse(self: Recording, *args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Recording, "__torch_dispatch__", refuse)
    with pytest.warns(UserWarning, match="CUDA graph") as warned:
        captured = train(data, CONFIG)
    assert [str(w.message) for w in warned] == [
        "training steps run without a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert len(graphs) == 1
    assert_equal(captured, train(data, replace(CONFIG, no_capture=True)))


def test_only_safe_steps_are_captured(
    data: TokenData, graphs: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of large steps, of a compiled model, of several processes, or of a seed that can change.

    An evaluation takes the model itself, also where training takes a compiled one.
    """
    model = make_model(data)
    seeded = make_model(data)
    seeded.dropout_seed = 3
    steps = [
        TrainStep(model, replace(CONFIG, no_capture=True)),
        TrainStep(model, CONFIG, forward=model),
        TrainStep(seeded, CONFIG),
    ]
    for step in steps:
        for i in range(3):
            step(draw(i), 1e-2)
    monkeypatch.setattr("gpt.training.step.TOKENS", 63)
    train(data, CONFIG)
    assert graphs == []
    alone, compiled, several = (
        TrainStep(model, CONFIG, **options) for options in ({}, {"forward": model}, {"ranks": Ranks(size=2)})
    )
    assert (compiled._graph, several._graph, several._evaluation) == (None, None, None)
    assert None not in (alone._graph, alone._evaluation, compiled._evaluation)
    monkeypatch.setattr("gpt.training.step.TOKENS", 64)
    train(data, CONFIG)
    assert len(graphs) == 1
    monkeypatch.undo()
    assert TrainStep(model, CONFIG)._graph is None
