"""Generation, compared with a loop in plain Python that has no cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from gpt import GPT, InputError
from gpt.generate import FIRST_TOKENS
from gpt.kv_cache import KVCache
from gpt.sampler import draw, keep_top_p
from tests.gpt.graphs import fake
from tests.gpt.models import CONFIGS, SMALL, padded, random_model, tokens

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
    """The probabilities of one row after all processors, in their order."""
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


def plain_generate(model: GPT, idx: Tensor, new: int, seed: int | None = None, **settings: Any) -> Tensor:
    """`generate` without a cache, with `processed` and, if there is a seed, `torch.multinomial`."""
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
def test_sampling_equals_a_plain_loop(settings: dict[str, Any]) -> None:
    """A wrong or misplaced logits processor; a nucleus without the token whose probability reaches p."""
    model, idx = random_model().double(), tokens(4, 5)
    for seed in range(4):
        actual = model.generate(idx, 12, generator=torch.Generator().manual_seed(seed), **settings)
        assert torch.equal(actual, plain_generate(model, idx, 12, seed, **settings))


def test_the_nucleus_is_the_smallest() -> None:
    """One token too many where the sum equals p exactly, or none where p rounds to 0."""
    for p, kept in ((1e-9, 1), (0.125, 1), (0.2, 2), (0.5, 4), (0.75, 6), (1.0, 8)):
        even = torch.zeros(1, 8)
        keep_top_p(even, 1 - p)
        assert int(even.isfinite().sum()) == kept


@pytest.mark.parametrize("use_cache", [True, False])
@each_config
def test_greedy_equals_a_plain_loop(fields: dict[str, Any], use_cache: bool) -> None:
    """A cache that changes tokens within the block, when it is full, or past it."""
    model, generated = random_model(**fields), set()
    for length in (1, 5, 11, 12, 13, 30):
        idx = tokens(3, length)
        for penalty in (1.0, 1.5):
            actual = model.generate(idx, 20, do_sample=False, use_cache=use_cache, repetition_penalty=penalty)
            assert torch.equal(actual, plain_generate(model, idx, 20, repetition_penalty=penalty))
            generated |= set(actual[:, length:].flatten().tolist())
    assert len(generated) > 8  # otherwise two wrong loops could agree


def test_greedy_ignores_sampling_settings() -> None:
    """Greedy decoding that applies or refuses sampling settings, or that forgets the penalty."""
    model, idx = random_model(), tokens(3, 5)
    ignored = {"temperature": 0.0, "top_k": -1, "top_p": 7.0, "min_p": -1.0}
    assert torch.equal(model.generate(idx, 9, do_sample=False, **ignored), plain_generate(model, idx, 9))
    penalized = model.generate(idx, 9, do_sample=False, repetition_penalty=2.0, **ignored)
    assert torch.equal(penalized, plain_generate(model, idx, 9, repetition_penalty=2.0))
    assert not torch.equal(penalized, plain_generate(model, idx, 9))


@pytest.mark.parametrize("use_cache", [True, False])
@each_config
def test_uneven_prompts_decode_as_if_alone(fields: dict[str, Any], use_cache: bool) -> None:
    """Padding that is attended to, counted in positions, penalised, or kept in a moved window."""
    model, prompts = random_model(**fields), [tokens(1, length) for length in (2, 7, 1, 15)]
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
                    == plain_generate(model, prompt, 20, **settings)[0, prompt.shape[1] :].tolist()
                )


def test_ids_past_the_vocabulary_are_not_generated() -> None:
    """A padding id of the vocabulary that a penalty or a filter makes possible again (bug 26)."""
    model, idx = random_model(head_bias=True), tokens(4, 5) % 9
    with torch.no_grad():
        model.lm_head.bias[9:] = 50
    for settings in ({"do_sample": False}, *SETTINGS.values()):
        assert int(model.generate(idx, 20, vocab_size=9, **settings).max()) < 9
        assert int(model.generate(idx, 20, vocab_size=V + 5, **settings).max()) >= 9


def test_drawing_equals_multinomial() -> None:
    """Tokens from another distribution, or tokens that were filtered out."""
    logits = torch.randn(3, 50).masked_fill(torch.rand(3, 50) < 0.5, -math.inf)
    for seed in range(50):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        expected = torch.multinomial(logits.softmax(-1), 1, generator=generators[1])[:, 0]
        assert torch.equal(draw(logits, generators[0]).argmax(-1), expected)
    samples = torch.stack([draw(logits[:1], None).argmax(-1) for _ in range(4000)]).flatten()
    counts = samples.bincount(minlength=50) / 4000
    assert (counts - logits[0].softmax(-1)).abs().max() < 0.04


def test_a_seed_determines_the_tokens() -> None:
    """Sampling that depends on more than the generator, or than torch's seed if there is none."""
    model, idx = random_model(), tokens(2, 3)
    draws = [model.generate(idx, 9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 9), draws[0])


def test_stop_tokens_end_a_row() -> None:
    """A row that continues after its stop token or is filled with another, or an output too wide."""
    model, idx = random_model(), tokens(4, 3)

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
    absent = next(i for i in range(SMALL.vocab_size) if i not in free[:, 3:])
    assert torch.equal(run(stop_tokens=absent), free)


def test_on_token_gets_every_step() -> None:
    """A stream that misses or repeats tokens, or that has tokens after a stop."""
    model, idx, steps = random_model(), tokens(2, 3), []
    ids = model.generate(idx, 15, stop_tokens=range(5), on_token=steps.append)
    assert all(step.shape == (2,) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.stack(steps, 1), ids[:, 3:])


def test_generation_allocates_as_it_grows() -> None:
    """Memory for all of max_new_tokens before the first of them."""

    def stop(token: torch.Tensor) -> None:
        raise StopIteration

    idx = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(StopIteration):
        random_model().generate(idx, 10**12, on_token=stop)


def test_tokens_past_the_first_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is lost, repeated or written into the prompt where the buffer grows."""
    model = random_model()
    idx = torch.arange(6).view(2, 3)
    expected = model.generate(idx, 40, do_sample=False)
    assert FIRST_TOKENS >= 40
    for size in (0, 1, 7):
        monkeypatch.setattr("gpt.generate.FIRST_TOKENS", size)
        for cached in (True, False):
            assert torch.equal(model.generate(idx, 40, do_sample=False, use_cache=cached), expected)
    assert torch.equal(idx, torch.arange(6).view(2, 3))


def test_generate_changes_no_state() -> None:
    """Dropout, a mode that is not restored, a prompt that is written to, or a gradient."""
    model = random_model(dropout=0.5)
    model.blocks[0].eval()
    modes, idx = [m.training for m in model.modules()], tokens(2, 5)
    before = idx.clone()
    ids = model.generate(idx, 15, do_sample=False)
    assert torch.equal(ids, model.generate(idx, 15, do_sample=False))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(idx, before)
    assert not ids.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError):
        model.generate(idx, 3, on_token=lambda token: 1 // 0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.generate(idx, 0), idx)


def test_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is filled but not used, or that is larger than the tokens need."""
    passes: list[tuple[int, int | None]] = []
    hidden: Callable[..., Tensor] = GPT.hidden
    decode_block: Callable[..., Tensor] = kernels.reference.decode_block

    def count_hidden(self: GPT, window: Tensor, *args: Any, cache: KVCache | None = None) -> Tensor:
        passes.append((window.shape[1], None if cache is None else cache.size))
        return hidden(self, window, *args, cache=cache)

    def count_block(x: Tensor, k_cache: Tensor, *args: Any, **options: Any) -> Tensor:
        passes.append((1, k_cache.shape[2]))
        return decode_block(x, k_cache, *args, **options)

    monkeypatch.setattr(GPT, "hidden", count_hidden)
    for reference in (kernels.reference, kernels.decode.reference):  # the first step calls the op
        monkeypatch.setattr(reference, "decode_block", count_block)
    within = [(4, 7), (1, 7), (1, 7)]
    past = [(4, 12), *[(1, 12)] * 8, (12, None)]
    for fields in ({"n_layer": 1}, {"norm": "post"}):  # by the fused ops, and by the modules
        model, idx = random_model(**fields), tokens(2, 4)
        passes.clear()
        model.generate(idx, 3)
        model.generate(idx, 10)
        model.generate(idx, 2, use_cache=False)
        assert passes == [*within, *past, (4, None), (5, None)]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gpt2", "post-bare"])
def test_a_captured_step_is_right_for_every_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length, position or token that the host reads, which a graph would replay unchanged."""
    model, (idx, mask) = random_model(**CONFIGS[name], use_triton=True), padded([tokens(1, 4), tokens(1, 2)])
    settings = {"do_sample": False, "repetition_penalty": 1.5, "attention_mask": mask}
    plain = model.generate(idx, 7, use_cache=False, **settings)
    graphs = fake(monkeypatch)
    monkeypatch.setattr("gpt.decoding.captures", lambda device: True)
    assert torch.equal(model.generate(idx, 7, **settings), plain)
    # 7 tokens: the prompt gives the first, and the first step runs without a capture.
    assert [graph.replays for graph in graphs] == [5]
    assert len(plain[:, 4:].unique()) > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """A cache in another dtype than the model, or processors that overflow in half precision."""
    model, idx = random_model(dtype=dtype), tokens(2, 3)
    assert model.generate(idx, 20, **SETTINGS["all"]).shape == (2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        assert random_model().generate(idx, 20, **SETTINGS["all"]).shape == (2, 23)


def test_calls_of_other_packages() -> None:
    """generate(x=...), input_ids=..., or settings by position that are refused or taken for other ones."""
    model, idx = random_model().eval(), tokens(2, 3)
    greedy = model.generate(idx, 5, do_sample=False)
    assert torch.equal(model.generate(x=idx, max_new_tokens=5, do_sample=False), greedy)
    assert torch.equal(model.generate(input_ids=idx, max_new_tokens=5, do_sample=False), greedy)
    assert torch.equal(model.generate(idx, 5, False), greedy)
    drawn = []
    for call in (
        lambda: model.generate(idx, 9, True, 0.8, 20, 0.9),
        lambda: model.generate(idx, 9, temperature=0.8, top_k=20, top_p=0.9),
    ):
        torch.manual_seed(2)
        drawn.append(call())
    assert torch.equal(*drawn)
    with pytest.raises(InputError, match="generate: x and idx are both given, expected one"):
        model.generate(idx=idx, x=idx, max_new_tokens=1)
    with pytest.raises(InputError, match=r"do_sample is 0\.8, expected True or False, as in generate"):
        model.generate(idx, 9, 0.8, 200)  # nanoGPT's order: temperature, top_k


IDX = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer >= 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        *[
            ({"temperature": t}, "temperature is ")
            for t in (0, 0.0, -1, 1e-320, 1e308, 10**400, math.inf, math.nan, "1")
        ],
        *[({"do_sample": v}, "do_sample is ") for v in (0.8, 1, None)],
        *[({"top_k": k}, "top_k is ") for k in (0, -3, 2.0, True)],
        *[({"top_p": p}, "top_p is ") for p in (0, -0.1, 1.1, math.nan)],
        *[({"min_p": p}, "min_p is ") for p in (-0.1, 1.1, math.nan)],
        *[({"repetition_penalty": r}, "repetition_penalty is ") for r in (0, -1, 1e-320, 1e308, math.inf)],
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
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """A setting that is ignored or clamped, or an error from inside torch after some tokens."""
    arguments = {"idx": IDX, "max_new_tokens": 3, **settings}
    with pytest.raises(InputError) as caught:
        random_model().generate(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
