"""Generation: against a loop without cache that processes logits token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt import GPT, InputError
from gpt.generate import keep_top_p, sample
from gpt.kv_cache import KVCache
from tests.gpt.graphs import fake
from tests.gpt.models import CONFIGS, SMALL, lively, padded, tokens

V = SMALL.vocab_size
each_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 3, "temperature": 4.0},
    "top-k-all": {"top_k": 1000},
    "top-p": {"top_p": 0.6, "temperature": 3.0},
    "top-p-tiny": {"top_p": 1e-6},
    "top-p-one": {"top_p": 1},
    "top-p-then-min-p": {"top_p": 0.8, "min_p": 0.3, "temperature": 3.0},
    "min-p": {"min_p": 0.2, "temperature": 3.0},
    "min-p-one": {"min_p": 1},
    "penalty": {"repetition_penalty": 3.0},
    "reward": {"repetition_penalty": 0.5, "temperature": 2.0},
    "all": {"repetition_penalty": 1.7, "temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
}


def processed(
    logits: list[float],
    seen: set[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> list[float]:
    """Probabilities of one row after all processors, in their order."""
    z = list(logits)
    for i in seen:
        z[i] = z[i] * repetition_penalty if z[i] < 0 else z[i] / repetition_penalty
    z = [x / temperature for x in z]
    if top_k is not None:
        kth = sorted(z, reverse=True)[min(top_k, len(z)) - 1]
        z = [x if x >= kth else -math.inf for x in z]
    if top_p is not None:
        p, mass, kept = softmax(z), 0.0, set()
        for i in sorted(range(len(z)), key=lambda i: -p[i]):
            kept.add(i)
            mass += p[i]
            if mass >= top_p:
                break
        z = [x if i in kept else -math.inf for i, x in enumerate(z)]
    if min_p is not None:
        p = softmax(z)
        z = [x if p[i] >= min_p * max(p) else -math.inf for i, x in enumerate(z)]
    return softmax(z)


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def by_hand(model: GPT, idx: Tensor, new: int, seed: int | None = None, **settings: Any) -> Tensor:
    """`generate` without a cache, with `processed` and, for a seed, `torch.multinomial`."""
    generator = torch.Generator().manual_seed(seed or 0)
    for _ in range(new):
        logits = model(idx[:, -SMALL.block_size :])[:, -1].tolist()
        rows = [processed(z, set(row), **settings) for z, row in zip(logits, idx.tolist(), strict=True)]
        p = torch.tensor(rows)
        new_tokens = (
            p.argmax(-1, keepdim=True) if seed is None else torch.multinomial(p, 1, generator=generator)
        )
        idx = torch.cat([idx, new_tokens], 1)
    return idx


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_sampling_by_hand(settings: dict[str, Any]) -> None:
    """A processor that is wrong, or in another place than Hugging Face's; a nucleus without the token that
    crosses it."""
    model, idx = lively().double(), tokens(4, 5)
    for seed in range(4):
        found = model.generate(idx, 12, generator=torch.Generator().manual_seed(seed), **settings)
        assert torch.equal(found, by_hand(model, idx, 12, seed, **settings))


def test_the_smallest_nucleus() -> None:
    """A nucleus of one token too many where the sum meets p exactly, or of none where p rounds away."""
    even = torch.zeros(1, 8)
    assert [int(keep_top_p(even, p).isfinite().sum()) for p in (1e-9, 0.125, 0.2, 0.5, 0.75, 1.0)] == [
        1,
        1,
        2,
        4,
        6,
        8,
    ]


@pytest.mark.parametrize("use_cache", [True, False])
@each_config
def test_greedy_by_hand(fields: dict[str, Any], use_cache: bool) -> None:
    """A cache that gives other tokens than no cache: within the block, when it is full, and past it; prompts
    of any length."""
    model, generated = lively(**fields), set()
    for length in (1, 5, 11, 12, 13, 30):
        idx = tokens(3, length)
        for penalty in (1.0, 1.5):
            found = model.generate(idx, 20, do_sample=False, use_cache=use_cache, repetition_penalty=penalty)
            assert torch.equal(found, by_hand(model, idx, 20, repetition_penalty=penalty))
            generated |= set(found[:, length:].flatten().tolist())
    assert len(generated) > 8  # else any two loops agree


def test_greedy_ignores_what_samples() -> None:
    """Greedy decoding that warms up, filters or refuses, or that forgets the penalty."""
    model, idx = lively(), tokens(3, 5)
    ignored = {"temperature": 0.0, "top_k": -1, "top_p": 7.0, "min_p": -1.0}
    assert torch.equal(model.generate(idx, 9, do_sample=False, **ignored), by_hand(model, idx, 9))
    penalized = model.generate(idx, 9, do_sample=False, repetition_penalty=2.0, **ignored)
    assert torch.equal(penalized, by_hand(model, idx, 9, repetition_penalty=2.0))
    assert not torch.equal(penalized, by_hand(model, idx, 9))


@pytest.mark.parametrize("use_cache", [True, False])
@each_config
def test_uneven_prompts_decode_as_alone(fields: dict[str, Any], use_cache: bool) -> None:
    """Padding that is attended to, counted in positions, penalised, or kept when the window moves past the
    block."""
    model, prompts = lively(**fields), [tokens(1, length) for length in (2, 7, 1, 15)]
    for batch in (prompts[:3], prompts):
        idx, mask = padded(batch)
        for settings in ({}, {"repetition_penalty": 1.5}):
            together = model.generate(
                idx, 20, do_sample=False, attention_mask=mask, use_cache=use_cache, **settings
            )
            assert torch.equal(together[:, : idx.shape[1]], idx)
            for row, prompt in zip(together, batch, strict=True):
                assert (
                    row[idx.shape[1] :].tolist()
                    == by_hand(model, prompt, 20, **settings)[0, prompt.shape[1] :].tolist()
                )


def test_ids_of_no_token_are_barred() -> None:
    """A padded vocabulary whose meaningless ids are likely, reached because a penalty or a filter puts them
    back (bug 26)."""
    model, idx = lively(head_bias=True), tokens(4, 5) % 9
    with torch.no_grad():
        model.lm_head.bias[9:] = 50
    for settings in ({"do_sample": False}, *SETTINGS.values()):
        assert int(model.generate(idx, 20, vocab_size=9, **settings).max()) < 9
        assert int(model.generate(idx, 20, vocab_size=V + 5, **settings).max()) >= 9


def test_drawing_is_multinomial() -> None:
    """Tokens drawn from another distribution, or ones that were filtered out."""
    logits = torch.randn(3, 50).masked_fill(torch.rand(3, 50) < 0.5, -math.inf)
    for seed in range(50):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        expected = torch.multinomial(logits.softmax(-1), 1, generator=generators[1])[:, 0]
        assert torch.equal(sample(logits, generators[0]), expected)
    counts = (
        torch.stack([sample(logits[:1], None) for _ in range(4000)]).flatten().bincount(minlength=50) / 4000
    )
    assert (counts - logits[0].softmax(-1)).abs().max() < 0.04


def test_a_seed_repeats_itself() -> None:
    """Sampling that a generator, or torch's seed without one, does not decide."""
    model, idx = lively(), tokens(2, 3)
    draws = [model.generate(idx, 9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 9), draws[0])


def test_stop_tokens_end_a_row() -> None:
    """A row that goes on after its stop token, is filled with another, or holds up the rest; an output that
    is too wide."""
    model, idx = lively(), tokens(4, 3)

    def run(**settings: Any) -> Tensor:
        return model.generate(
            idx, 20, temperature=3.0, generator=torch.Generator().manual_seed(5), **settings
        )

    free = run()
    stops = [int(free[row, 3 + step]) for row, step in enumerate((7, 11, 5, 14))]
    expected, ends = free.clone(), []
    for row in expected:
        ends.append(next(i for i in range(3, 23) if row[i] in stops))
        row[ends[-1] :] = row[ends[-1]]
    assert len(set(ends)) > 1
    assert torch.equal(run(stop_tokens=stops), expected[:, : max(ends) + 1])
    assert torch.equal(run(stop_tokens=[]), free)
    unheard = next(i for i in range(SMALL.vocab_size) if i not in free[:, 3:])
    assert torch.equal(run(stop_tokens=unheard), free)


def test_each_step_is_told() -> None:
    """A stream that misses tokens, repeats them, or shows what comes after a stop."""
    model, idx, told = lively(), tokens(2, 3), []
    found = model.generate(idx, 15, stop_tokens=range(5), on_token=told.append)
    assert all(step.shape == (2,) and step.dtype == torch.int64 for step in told)
    assert torch.equal(torch.stack(told, 1), found[:, 3:])


def test_nothing_is_left_behind() -> None:
    """Dropout in generation, a mode that is not restored, a prompt that is written to, a gradient, 0 tokens
    that are 1."""
    model = lively(dropout=0.5)
    model.blocks[0].eval()
    modes, idx = [m.training for m in model.modules()], tokens(2, 5)
    before = idx.clone()
    found = model.generate(idx, 15, do_sample=False)
    assert torch.equal(found, model.generate(idx, 15, do_sample=False))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(idx, before)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError):
        model.generate(idx, 3, on_token=lambda token: 1 // 0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.generate(idx, 0), idx)


def test_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is filled, and everything computed anew all the same; or one that is larger than what is
    asked for."""
    model, idx, passes = lively(), tokens(2, 4), []
    hidden: Callable[..., Tensor] = GPT.hidden

    def counting(self: GPT, window: Tensor, *args: Any, cache: KVCache | None = None) -> Tensor:
        passes.append((window.shape[1], None if cache is None else cache.size))
        return hidden(self, window, *args, cache=cache)

    monkeypatch.setattr(GPT, "hidden", counting)
    model.generate(idx, 3)
    model.generate(idx, 10)
    model.generate(idx, 2, use_cache=False)
    within = [(4, 7), (1, 7), (1, 7)]
    past = [(4, 12), *[(1, 12)] * 8, (12, None)]
    assert passes == [*within, *past, (4, None), (5, None)]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gpt2", "post-bare"])
def test_a_captured_step_serves_every_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length, position, place or token that the host knows and a graph would repeat, or a capture that
    counts as a step."""
    model, (idx, mask) = lively(**CONFIGS[name], use_triton=True), padded([tokens(1, 4), tokens(1, 2)])
    settings = {"do_sample": False, "repetition_penalty": 1.5, "attention_mask": mask}
    plain = model.generate(idx, 7, use_cache=False, **settings)
    graphs = fake(monkeypatch)
    monkeypatch.setattr("gpt.kv_cache.captures", lambda device: True)
    assert torch.equal(model.generate(idx, 7, **settings), plain)
    assert [graph.replays for graph in graphs] == [
        5
    ]  # the prompt gives a token, and the first step is not captured
    assert len(plain[:, 4:].unique()) > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """A cache of another dtype than the model's, or processors that overflow in half precision."""
    model, idx = lively(dtype=dtype), tokens(2, 3)
    assert model.generate(idx, 20, **SETTINGS["all"]).shape == (2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        assert lively().generate(idx, 20, **SETTINGS["all"]).shape == (2, 23)


IDX = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer >= 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        *[({"temperature": t}, "temperature is ") for t in (0, 0.0, -1, math.inf, math.nan, "1")],
        *[({"top_k": k}, "top_k is ") for k in (0, -3, 2.0, True)],
        *[({"top_p": p}, "top_p is ") for p in (0, -0.1, 1.1, math.nan)],
        *[({"min_p": p}, "min_p is ") for p in (-0.1, 1.1, math.nan)],
        *[({"repetition_penalty": r}, "repetition_penalty is ") for r in (0, -1, math.inf)],
        *[({"repetition_penalty": r, "do_sample": False}, "repetition_penalty is ") for r in (0, math.nan)],
        *[({"vocab_size": v}, "vocab_size is ") for v in (0, -1, 3.0, True)],
        ({"stop_tokens": [1, 37]}, "stop_tokens has 37, expected ids in [0, 37)"),
        ({"stop_tokens": -1}, "stop_tokens has -1"),
        ({"stop_tokens": ["a"]}, "stop_tokens has 'a'"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask is float32 (2, 3)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)}, "attention_mask has 0 after a 1"),
        ({"idx": IDX + 37}, "idx has 37"),
        ({"idx": IDX[:, :0]}, "at least one token"),
    ],
)
def test_what_cannot_be_generated(settings: dict[str, Any], said: str) -> None:
    """A setting that is ignored or clamped, or an error from inside torch after some tokens."""
    arguments = {"idx": IDX, "max_new_tokens": 3, **settings}
    with pytest.raises(InputError) as caught:
        lively().generate(**arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
