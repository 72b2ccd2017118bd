"""Decoding steps that a model keeps, with CUDA graphs simulated on a CPU."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from gpt import GPT
from gpt.decoding import Decoder, Logits, captures, decoding_step
from gpt.sampler import Settings, draw
from tests.gpt.graphs import Recording, fake
from tests.gpt.models import SMALL, padded, random_model, tokens

V, BLOCK = SMALL.vocab_size, SMALL.block_size
Result = list[tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    monkeypatch.setattr("gpt.decoding.captures", lambda device: True)
    return fake(monkeypatch)


def random_form(draw: random.Random) -> dict[str, Any]:
    """Settings of `generate` with random values."""
    settings: dict[str, Any] = {"do_sample": draw.random() < 0.7, "temperature": draw.uniform(0.5, 3)}
    options = {
        "top_k": draw.randint(1, 20),
        "top_p": draw.uniform(0.1, 1),
        "min_p": draw.uniform(0, 0.3),
        "repetition_penalty": draw.uniform(0.5, 2),
        "vocab_size": draw.randint(20, V + 5),
        "stop_tokens": [draw.randrange(V) for _ in range(draw.randint(1, 6))],
        "use_cache": False,
    }
    for name, value in options.items():
        if draw.random() < (0.1 if name == "use_cache" else 0.35):
            settings[name] = value
    return settings


def change(model: GPT, kind: str) -> None:
    """What may happen to a model between two calls of `generate`."""
    with torch.no_grad():
        if kind == "train":
            for parameter in model.parameters():
                parameter.mul_(1.2)
        elif kind == "dtype":
            model.to(torch.float64 if model.dtype == torch.float32 else torch.float32)
        elif kind == "assign":
            state = {name: value * 0.9 for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        elif kind == "data":
            model.blocks[0].ffn.up.weight.data = model.blocks[0].ffn.up.weight * 0.8
        elif kind == "backend":
            model.use_triton = "auto" if model.use_triton is False else False
        elif kind == "mode":
            model.train(not model.training)


def story(seed: int, **fields: Any) -> Result:
    """Several random calls of `generate`, and changes in between: the ids, the stream, the random state."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = random_model(n_layer=1, norm=draw.choice(["pre", "pre", "post"]), **fields)
    batch, form, results = draw.choice([1, 1, 2, 3, 9]), random_form(draw), []
    for _ in range(3):
        if draw.random() < 0.3:
            form = random_form(draw)
        new, streamed = draw.randint(1, 14), []
        settings = form | {"temperature": draw.uniform(0.5, 3)}
        idx = tokens(batch, draw.randint(1, BLOCK + 1))
        if draw.random() < 0.4:
            idx, settings["attention_mask"] = padded([tokens(1, draw.randint(1, 6)) for _ in range(batch)])
        if draw.random() < 0.4:
            settings["on_token"] = streamed.append
        generator = torch.Generator().manual_seed(draw.randrange(99)) if draw.random() < 0.5 else None
        ids = model.generate(idx, new, generator=generator, **settings)

        stream = torch.stack(streamed) if streamed else torch.empty(0)
        state = torch.get_rng_state() if generator is None else generator.get_state()
        results.append((ids, stream, state))
        change(model, draw.choice(["train", "train", "dtype", "assign", "data", "backend", "mode", ""]))
    return results


def compare_stories(seeds: range, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[int, int]:
    """Asserts that captured stories equal eager ones; returns the captures and the replays."""
    graphs = fake(monkeypatch)
    for seed in seeds:
        monkeypatch.setattr("gpt.decoding.captures", lambda device: False)
        eager = story(seed, **fields)
        monkeypatch.setattr("gpt.decoding.captures", lambda device: True)
        for number, (actual, expected) in enumerate(zip(story(seed, **fields), eager, strict=True)):
            for part, reference in zip(actual, expected, strict=True):
                assert torch.equal(part, reference), f"story {seed}, call {number}"
    return len(graphs), sum(graph.replays for graph in graphs)


def test_captured_generation_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, a setting, a counter or a random state that is stale in a graph; old weights or tokens."""
    captured, replayed = compare_stories(range(50), monkeypatch)
    assert captured > 40
    assert replayed > 4 * captured


@pytest.mark.slow
def test_more_captured_generation_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, in settings that are rarer."""
    compare_stories(range(50, 200), monkeypatch)


@pytest.mark.slow
@pytest.mark.interpreter
def test_captured_kernels_equal_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes from the host what a graph would replay unchanged."""
    compare_stories(range(4), monkeypatch, use_triton=True)


def test_a_second_generation_captures_nothing(graphs: list[Recording]) -> None:
    """A capture for each call, for another prompt, another length or another value of a setting."""
    model, settings = (
        random_model(n_layer=1),
        {"top_p": 0.9, "repetition_penalty": 1.2, "stop_tokens": [3, 4]},
    )
    model.generate(tokens(1, 3), 6, **settings)
    assert [graph.replays for graph in graphs] == [4]  # the prompt, an eager step, four replays
    settings |= {"top_p": 0.8, "repetition_penalty": 0.9, "stop_tokens": [5, 6], "temperature": 2.0}
    model.generate(tokens(1, 7), 4, **settings, generator=torch.Generator())
    model.train().generate(tokens(1, 1), 30, **settings)
    with torch.no_grad():
        model.wte.weight.add_(0.1)
    model.generate(tokens(1, 5), 3, **settings)
    assert len(graphs) == 1


def test_only_new_steps_are_prepared(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a step's parameters for the first token alone, or for steps that are replayed."""
    prepared: list[int] = []

    def prepare(model: GPT, batch: int) -> Logits:
        prepared.append(batch)
        return decoding_step(model, batch)

    monkeypatch.setattr(sys.modules["gpt.generate"], "decoding_step", prepare)
    model, counts = random_model(n_layer=1), []
    for new in (1, 6, 6):
        model.generate(tokens(1, 3), new)
        counts.append(len(prepared))
    assert counts == [0, 1, 1]
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"do_sample": False},
        {"top_k": 4},
        {"top_k": 5, "vocab_size": 30},
        {"top_k": 5, "top_p": 0.9},
        {"top_k": 5, "min_p": 0.1},
        {"top_k": 5, "repetition_penalty": 2.0},
        {"top_k": 5, "stop_tokens": 3},
        {"top_k": 5, "attention_mask": torch.ones(1, 3)},
    ],
    ids=str,
)
def test_other_launches_are_another_graph(other: dict[str, Any], graphs: list[Recording]) -> None:
    """A graph that is replayed although this call runs other operations."""
    model, idx = random_model(n_layer=1), tokens(1, 3)
    for settings in ({"top_k": 5}, other, {"top_k": 5}, other):
        model.generate(idx, 4, **settings)
    assert len(graphs) == 2


def test_other_modes_are_another_graph(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of another backend, precision, batch or stream; tensors of inference mode outside of it."""
    model, idx = random_model(n_layer=1), tokens(1, 3)

    def captured(idx: Tensor = idx) -> int:
        before = len(graphs)
        for _ in range(2):
            model.generate(idx, 4, do_sample=False)
        return len(graphs) - before

    assert captured() == 1
    assert captured(tokens(2, 3)) == 1
    with kernels.use_backend(norm="reference"):
        assert captured() == 1
    with torch.inference_mode():
        assert captured() == 1
    assert captured() == 0
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.use_deterministic_algorithms(True)
        assert captured() == 1
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert captured() == 1
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.fp32_precision = precision
    monkeypatch.setattr("kernels.dispatch._distrusted", {"decode_block": "wrong"})
    assert captured() == 1
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "another")
    assert captured() == 1


def keep_decoder(model: GPT, idx: Tensor) -> Tensor:
    """Generates twice, so that the model has a graph; returns the tokens."""
    model.generate(idx, 8, do_sample=False)
    return model.generate(idx, 8, do_sample=False)


def scale(model: GPT) -> None:
    with torch.no_grad():
        model.blocks[0].ffn.up.weight.mul_(-2)


def replace_data(model: GPT) -> None:
    model.blocks[0].ffn.up.weight.data = -2 * model.blocks[0].ffn.up.weight.data


def assign(model: GPT) -> None:
    model.load_state_dict({name: -2 * value for name, value in model.state_dict().items()}, assign=True)


def transpose(model: GPT) -> None:
    model.blocks[0].attn.proj.weight.data = model.blocks[0].attn.proj.weight.data.T


def hook(model: GPT) -> None:
    model.blocks[0].ffn.up.register_forward_hook(lambda module, inputs, output: -2 * output)


def adapt(model: GPT) -> None:
    model.blocks[0].ffn.up = nn.Sequential(model.blocks[0].ffn.up, nn.Linear(64, 64))


def untie(model: GPT) -> None:
    """A head of its own, whose parameters come last as before."""
    model.lm_head = nn.Linear(16, V)


def change_eps(model: GPT) -> None:
    model.blocks[0].ln_2.eps = 3.0


def change_activation(model: GPT) -> None:
    model.blocks[0].ffn.activation = "relu"


@pytest.mark.parametrize(
    "alter",
    [scale, replace_data, assign, transpose, hook, adapt, untie, change_eps, change_activation],
    ids=lambda value: value.__name__,
)
def test_what_happens_to_the_model_is_seen(alter: Callable[[GPT], None], graphs: list[Recording]) -> None:
    """A kept graph that replays old weights, settings or modules, or that skips a hook or an adapter."""
    model, idx = random_model(n_layer=1), tokens(2, 3)
    before = keep_decoder(model, idx)
    alter(model)
    actual = model.generate(idx, 8, do_sample=False)
    assert torch.equal(actual, model.generate(idx, 8, do_sample=False, use_cache=False))
    assert not torch.equal(actual, before)


def test_moved_parameters_free_the_graphs(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches in GPU memory that a model on a CPU still keeps."""
    model, decoders, start = random_model(n_layer=1), [], Decoder.start

    def note(decoder: Decoder, *arguments: Any) -> None:
        decoders.append(weakref.ref(decoder))
        start(decoder, *arguments)

    monkeypatch.setattr(Decoder, "start", note)
    for alter in (model.double, lambda: model.to("cpu"), model.clear_cache):
        decoders.clear()
        keep_decoder(model, tokens(1, 3))
        assert decoders[0]() is decoders[1]() is not None
        alter()
        assert decoders[0]() is None


def test_a_model_is_freed_with_its_graphs(graphs: list[Recording]) -> None:
    """A decoder that keeps the model alive, or that outlives it."""
    model = random_model(n_layer=1)
    keep_decoder(model, tokens(1, 3))
    graph, model = weakref.ref(model), None
    gc.collect()
    assert graph() is None


def test_copies_share_nothing(graphs: list[Recording]) -> None:
    """A graph in a copy, in a pickle or in a state_dict, or one that reads the original's weights."""
    model, idx = random_model(n_layer=1), tokens(1, 3)
    before = pickle.dumps(model)
    tokens_before = keep_decoder(model, idx)
    assert pickle.dumps(model) == before
    copied = copy.deepcopy(model)
    scale(copied)
    expected = copied.generate(idx, 8, do_sample=False, use_cache=False)
    assert torch.equal(keep_decoder(copied, idx), expected)
    assert not torch.equal(expected, tokens_before)
    assert torch.equal(keep_decoder(model, idx), tokens_before)
    assert len(graphs) == 2


def test_a_callback_may_raise(graphs: list[Recording]) -> None:
    """A graph that is lost when a callback ends a generation, or a generator that is not where tokens end."""
    model, idx, generator = random_model(n_layer=1), tokens(1, 3), torch.Generator().manual_seed(3)
    steps: list[Tensor] = []

    def fail(token: Tensor) -> None:
        steps.append(token)
        if len(steps) == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate(idx, 8, generator=generator, on_token=fail)
    alone = torch.Generator().manual_seed(3)
    assert torch.equal(model.generate(idx, 5, generator=alone)[0, 3:], torch.stack(steps)[:, 0])
    assert torch.equal(alone.get_state(), generator.get_state())
    assert len(graphs) == 1


def test_a_failed_step_leaves_nothing(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that is kept although its graph or its step failed."""
    model, idx = random_model(n_layer=1), tokens(1, 3)
    expected = keep_decoder(model, idx)
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "replay", lambda graph: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(idx, 8, do_sample=False)
    assert torch.equal(keep_decoder(model, idx), expected)
    assert len(graphs) == 2


def test_callbacks_may_draw_and_generate(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback's use of the same generator or the same model that changes the tokens of a graph."""
    model, idx = random_model(n_layer=1), tokens(1, 3)

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(3)

        def use(token: Tensor) -> None:
            token.fill_(V)
            torch.rand(1, generator=generator)
            model.generate(idx, 4)

        return model.generate(idx, 8, generator=generator, on_token=use)

    captured = run()
    monkeypatch.setattr("gpt.decoding.captures", lambda device: False)
    assert torch.equal(captured, run())


def test_threads_do_not_draw_the_same_noise(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that sets a shared generator back to where another thread has drawn from it."""
    model, generator, logits = random_model(n_layer=1), torch.Generator().manual_seed(3), torch.zeros(1, V)
    threads, replay = [], Recording.replay

    def draw_meanwhile(graph: Recording) -> None:
        threads.append(threading.Thread(target=draw, args=(logits, generator)))
        threads[-1].start()
        threads[-1].join(0.01)
        assert threads[-1].is_alive()
        replay(graph)

    monkeypatch.setattr(Recording, "replay", draw_meanwhile)
    model.generate(tokens(1, 3), 4, generator=generator)
    for thread in threads:
        thread.join()
    alone = torch.Generator().manual_seed(3)
    for _ in range(4 + len(threads)):
        draw(logits, alone)
    assert len(threads) == 2
    assert torch.equal(generator.get_state(), alone.get_state())


def test_results_are_copies(graphs: list[Recording]) -> None:
    """Ids that the next generation overwrites."""
    model, idx = random_model(n_layer=1), tokens(1, 3)
    first = keep_decoder(model, idx)
    expected = first.clone()
    keep_decoder(model, tokens(1, 5))
    assert torch.equal(first, expected)


def test_threads_have_decoders_of_their_own(graphs: list[Recording]) -> None:
    """Two threads that write to one cache, or a decoder that is lost after it was used."""
    model, prompts = random_model(n_layer=1), [tokens(1, 3), tokens(1, 5)]
    expected = [model.generate(idx, 7, do_sample=False, use_cache=False) for idx in prompts]
    barrier, results = threading.Barrier(2), {}

    def run(number: int) -> None:
        for _ in range(2):
            results[number] = model.generate(
                prompts[number], 7, do_sample=False, on_token=lambda token: barrier.wait(20)
            )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], expected[number]) for number in range(2))
    assert len(graphs) == 2
    keep_decoder(model, tokens(1, 4))
    assert len(graphs) == 2


def test_the_number_of_decoders_is_limited(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that grows with every form of sampling, or the form in use that is dropped."""
    monkeypatch.setattr("gpt.kept.MOST", 2)
    model, idx = random_model(n_layer=1), tokens(1, 3)
    counts = []
    for top_k in (1, 2, 1, 3, 1, 2):  # 2 is the least recently used when 3 comes
        model.generate(idx, 4, top_k=top_k)
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 3, 3, 4]


def test_the_memory_of_decoders_is_limited(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large caches that stay allocated, or a cache of block_size that no call needed."""
    nbytes = 2 * 16 * BLOCK * 4  # of one row in float32
    monkeypatch.setattr("gpt.kept.MOST_BYTES", 3 * nbytes)
    model, sizes = random_model(n_layer=1), []
    start = Decoder.start
    monkeypatch.setattr(Decoder, "start", lambda self, *a: (sizes.append(self.cache.size), start(self, *a)))

    def captured(batch: int) -> int:
        before = len(graphs)
        model.generate(tokens(batch, 3), 4)
        return len(graphs) - before

    assert [captured(batch) for batch in (1, 2, 2, 1, 3, 1, 4, 4)] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert sizes == [BLOCK] * 6 + [7, 7]


def test_old_values_do_not_spread(graphs: list[Recording]) -> None:
    """NaN in the cache after a failed training step, times a probability of zero."""
    model, idx = random_model(n_layer=1), tokens(1, 3)
    expected = keep_decoder(model, idx)
    weight = model.wte.weight.detach().clone()
    with torch.no_grad():
        model.wte.weight.fill_(torch.nan)
        model.generate(idx, 8, do_sample=False)
        model.wte.weight.copy_(weight)
    assert torch.equal(model.generate(idx, 8, do_sample=False), expected)
    assert len(graphs) == 1


def test_what_is_not_plain_is_captured_for_one_call(graphs: list[Recording]) -> None:
    """A graph of a third-party module, which may keep other state than parameters."""
    model, idx = random_model(n_layer=1), tokens(1, 3)
    model.blocks[0].ffn.up = nn.Linear(16, 64)
    keep_decoder(model, idx)
    assert [graph.replays for graph in graphs] == [6, 6]


def test_autocast_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of casted weights, which a change in place would not reach."""
    assert captures(torch.device("cuda"))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert not captures(torch.device("cuda"))
    assert not captures(torch.device("cpu"))


def test_the_form_has_every_setting() -> None:
    """A new setting of `generate` that a kept graph would ignore."""
    numbers = {"temperature", "top_p", "min_p", "repetition_penalty", "stop_tokens"}  # read on the device
    decided = {"do_sample", "top_k", "vocab_size", "attention_mask", "use_cache"}  # part of the key
    host = {"generator", "on_token"}
    assert set(Settings.__dataclass_fields__) == numbers | decided | host
