"""Generation: the logits processors, sampling, and the loop over tokens.

The processors have the order and meaning of Hugging Face's: repetition penalty, temperature, top-k, top-p,
min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from gpt.errors import InputError
from gpt.inputs import padding, positions, token_ids
from gpt.kv_cache import Decoder, Stops
from gpt.model import GPT

FIRST_TOKENS = 1024  # new tokens for which there is space at first
SMALLEST, LARGEST = 1e-30, 1e30  # temperature and penalty: float32 logits stay finite
SCALES = f"[{SMALLEST}, {LARGEST}]"


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Where `seen` (B, V) is True: logits / penalty if positive, logits · penalty if negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all logits below the k-th largest to -inf."""
    return logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[..., -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all logits to -inf but the fewest of the likeliest whose probabilities sum to p or more."""
    ascending, order = logits.sort(-1)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[..., -1] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Sets the logits of all tokens to -inf that are less likely than p times the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) int64 samples of p = softmax(logits), as argmax p / e with e ~ Exp(1).

    `torch.multinomial` gives the same samples, but synchronises with a GPU.
    """
    probabilities = logits.softmax(-1)
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return (probabilities / noise.clamp_(min=torch.finfo(noise.dtype).tiny)).argmax(-1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keyword arguments of `GPT.generate`, where they are documented and have their defaults."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    vocab_size: int | None
    stop_tokens: int | Sequence[int] | None
    attention_mask: Tensor | None
    generator: torch.Generator | None
    use_cache: bool
    on_token: Callable[[Tensor], object] | None

    def __post_init__(self) -> None:
        penalty, vocab_size = self.repetition_penalty, self.vocab_size
        if not _is_in(penalty, SMALLEST, LARGEST):
            raise InputError(f"generate: repetition_penalty is {penalty!r}, expected a number in {SCALES}")
        if vocab_size is not None and (not _is_int(vocab_size) or vocab_size <= 0):
            raise InputError(f"generate: vocab_size is {vocab_size!r}, expected an integer > 0 or None")
        if not isinstance(self.do_sample, bool):
            raise InputError(
                f"generate: do_sample is {self.do_sample!r}, expected True or False, as in generate(idx, 50, "
                "True, 0.8) or generate(idx, 50, temperature=0.8)"
            )
        if self.do_sample:
            _check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def stop_ids(self) -> list[int]:
        """The stop tokens as a list."""
        if self.stop_tokens is None:
            return []
        return [self.stop_tokens] if isinstance(self.stop_tokens, int) else list(self.stop_tokens)

    def next_token(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """(B,) int64 ids chosen from logits (B, V); `seen` (B, V) marks the ids that a row already has."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.vocab_size is not None:
            logits[:, self.vocab_size :] = -math.inf
        if seen is not None:
            logits = penalize_repetition(logits, seen, self.repetition_penalty)
        if not self.do_sample:
            return logits.argmax(-1)

        logits = logits / self.temperature
        logits = logits if self.top_k is None else keep_top_k(logits, self.top_k)
        logits = logits if self.top_p is None else keep_top_p(logits, self.top_p)
        logits = logits if self.min_p is None else keep_min_p(logits, self.min_p)
        return sample(logits, self.generator)


@torch.no_grad()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, settings: Settings) -> Tensor:
    """(B, T + n): `idx` (B, T) and the n <= max_new_tokens tokens that follow it. See `GPT.generate`.

    Raises:
        InputError: max_new_tokens, stop_tokens, the generator or an input does not fit the model.
    """
    idx = token_ids(idx, model.config.vocab_size, model.device)
    _check_fit(model, max_new_tokens, settings)
    key_start = None if settings.attention_mask is None else padding(settings.attention_mask, idx)

    B, T = idx.shape
    tokens = _Tokens(idx, max_new_tokens)
    seen = _seen(idx, key_start, model.config.vocab_size) if settings.repetition_penalty != 1 else None
    synchronise = idx.device.type != "cuda" or settings.on_token is not None
    stop = Stops(settings.stop_ids, B, idx.device, synchronise=synchronise) if settings.stop_ids else None
    states = _hidden_states(model, tokens, T + max_new_tokens, key_start, settings.use_cache)

    with model.backend():
        while tokens.length < T + max_new_tokens:
            new = settings.next_token(model.head(next(states)), seen)  # (B, C) -> (B, V) -> (B,)
            token = new if stop is None else torch.where(stop.stopped, tokens.last, new)
            tokens.append(token)

            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if settings.on_token is not None:
                settings.on_token(token)
            if stop is not None:
                stop.update(token)
                if stop.all():
                    break
    return tokens.window(0, tokens.length if stop is None else T + stop.steps())


class _Tokens:
    """Token ids (B, length) in a buffer that doubles when it is full: memory follows what is generated.

    Args:
        idx: The prompt (B, T); it is copied.
        new: The most tokens that will be appended.
    """

    def __init__(self, idx: Tensor, new: int) -> None:
        self.length = idx.shape[1]
        self._buffer = torch.cat([idx, idx.new_zeros(len(idx), min(new, FIRST_TOKENS))], 1)

    @property
    def last(self) -> Tensor:
        """The newest token of each row, (B,)."""
        return self._buffer[:, self.length - 1]

    def window(self, begin: int, end: int) -> Tensor:
        """The ids (B, end - begin) from `begin` up to `end`, which is at most `length`."""
        return self._buffer[:, begin:end]

    def append(self, token: Tensor) -> None:
        """Adds one token (B,) to each row."""
        if self.length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)], 1)
        self._buffer[:, self.length] = token
        self.length += 1


def _hidden_states(
    model: GPT, tokens: _Tokens, end: int, key_start: Tensor | None, use_cache: bool
) -> Iterator[Tensor]:
    """Yields the last token's hidden state (B, C): for the prompt, then for each token after it, up to `end`.

    The caller appends the next token before it asks for the next state. The cache is used while the tokens
    fit into block_size. After that, and without a cache, each step recomputes the last block_size tokens.
    """
    block = model.config.block_size
    if use_cache and tokens.length <= block:
        size = min(block, end)
        prompt = tokens.window(0, tokens.length)
        decoder = Decoder(model.hidden, prompt, size, key_start, capture=not kernels.has_hooks(model))
        yield decoder.start()
        while tokens.length <= size:
            yield decoder.step(tokens.last)

    while True:
        begin = max(0, tokens.length - block)
        start = None if key_start is None else (key_start - begin).clamp(min=0)
        window = tokens.window(begin, tokens.length)
        yield model.hidden(window, positions(window.shape[1], start, window.device), start)[:, -1]


def _seen(idx: Tensor, key_start: Tensor | None, vocab_size: int) -> Tensor:
    """Bool (B, V): whether a row has an id, padding excluded."""
    real = torch.ones_like(idx)
    if key_start is not None:
        real = (torch.arange(idx.shape[1], device=idx.device) >= key_start[:, None]).long()
    return idx.new_zeros(idx.shape[0], vocab_size).scatter_add_(1, idx, real) > 0


def _check_fit(model: GPT, max_new_tokens: int, settings: Settings) -> None:
    """Refuses a length, stop tokens or a generator that do not fit the model."""
    if not _is_int(max_new_tokens) or max_new_tokens < 0:
        raise InputError(f"generate: max_new_tokens is {max_new_tokens!r}, expected an integer >= 0")
    vocab_size, device = model.config.vocab_size, model.device
    for stop in settings.stop_ids:
        if not _is_int(stop) or not 0 <= stop < vocab_size:
            raise InputError(f"generate: stop_tokens has {stop!r}, expected ids in [0, {vocab_size})")
    generator = settings.generator
    if generator is not None and generator.device.type != device.type:
        raise InputError(f"generate: generator is on {generator.device}, expected {device} (the model's)")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if not _is_in(temperature, SMALLEST, LARGEST):
        raise InputError(
            f"generate: temperature is {temperature!r}, expected a number in {SCALES} "
            "(do_sample=False is greedy)"
        )
    if top_k is not None and (not _is_int(top_k) or top_k <= 0):
        raise InputError(f"generate: top_k is {top_k!r}, expected an integer > 0 or None")
    if top_p is not None and (not _is_in(top_p, 0, 1) or top_p == 0):
        raise InputError(f"generate: top_p is {top_p!r}, expected a number in (0, 1] or None")
    if min_p is not None and not _is_in(min_p, 0, 1):
        raise InputError(f"generate: min_p is {min_p!r}, expected a number in [0, 1] or None")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_in(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number from `low` to `high`; NaN is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
