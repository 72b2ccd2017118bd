"""Generation: the processors of logits, and the loop.

The processors have Hugging Face's order and meaning: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.errors import InputError
from gpt.inputs import check_ids, padding, positions
from gpt.kv_cache import Decoder, Stops
from gpt.model import GPT


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits / penalty where `seen` (B, V) and positive, logits · penalty where seen and negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all that are smaller than the k-th largest."""
    return logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[..., -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus: the fewest of the likeliest tokens whose probabilities sum to p or more."""
    ascending, order = logits.sort(-1)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[..., -1] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all that are less likely than p times the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) int64 from p = softmax(logits): argmax p / e, e ~ Exp(1). `torch.multinomial` draws the same, but
    waits for a GPU."""
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
        if not _is_number(penalty) or penalty <= 0:
            raise InputError(f"generate: repetition_penalty is {penalty!r}, expected a number > 0")
        if vocab_size is not None and (not _is_int(vocab_size) or vocab_size <= 0):
            raise InputError(f"generate: vocab_size is {vocab_size!r}, expected an integer > 0 or None")
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
    check_ids(idx, model.config.vocab_size, model.wte.weight.device)
    _check_fit(model, max_new_tokens, settings)
    key_start = None if settings.attention_mask is None else padding(settings.attention_mask, idx)

    B, T = idx.shape
    ids = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], 1)  # (B, T + max_new_tokens)
    seen = _seen(idx, key_start, model.config.vocab_size) if settings.repetition_penalty != 1 else None
    waits = idx.device.type != "cuda" or settings.on_token is not None
    stop = Stops(settings.stop_ids, B, idx.device, waits=waits) if settings.stop_ids else None
    states = _hidden_states(model, ids, T, key_start, settings.use_cache)

    length = T
    with model.backend():
        while length < T + max_new_tokens:
            new = settings.next_token(model.head(next(states)), seen)  # (B, C) -> (B, V) -> (B,)
            token = new if stop is None else torch.where(stop.stopped, ids[:, length - 1], new)
            ids[:, length] = token
            length += 1

            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if settings.on_token is not None:
                settings.on_token(token)
            if stop is not None:
                stop.update(token)
                if stop.all():
                    break
    return ids[:, :length] if stop is None else ids[:, : T + stop.steps()]


def _hidden_states(
    model: GPT, ids: Tensor, length: int, key_start: Tensor | None, use_cache: bool
) -> Iterator[Tensor]:
    """(B, C) of the last of ids[:, :length], then of each token that the caller writes behind it.

    The cache serves while the tokens fit the block; past it, and without it, the last block_size tokens are
    computed anew.
    """
    block, end = model.config.block_size, ids.shape[1]
    if use_cache and length <= block:
        decoder = Decoder(model.hidden, ids[:, :length], min(block, end), key_start)
        yield decoder.start()
        while length < min(block, end):
            yield decoder.step(ids[:, length])
            length += 1
        length += 1
    for stop in range(length, end + 1):
        begin = max(0, stop - block)
        start = None if key_start is None else (key_start - begin).clamp(min=0)
        window = ids[:, begin:stop]
        yield model.hidden(window, positions(window.shape[1], start, ids.device), start)[:, -1]


def _seen(idx: Tensor, key_start: Tensor | None, vocab_size: int) -> Tensor:
    """Bool (B, V): the ids in each row, not counting padding."""
    real = torch.ones_like(idx)
    if key_start is not None:
        real = (torch.arange(idx.shape[1], device=idx.device) >= key_start[:, None]).long()
    return idx.new_zeros(idx.shape[0], vocab_size).scatter_add_(1, idx, real) > 0


def _check_fit(model: GPT, max_new_tokens: int, settings: Settings) -> None:
    """Refuses a length, stop tokens or a generator that do not fit the model."""
    if not _is_int(max_new_tokens) or max_new_tokens < 0:
        raise InputError(f"generate: max_new_tokens is {max_new_tokens!r}, expected an integer >= 0")
    vocab_size, device = model.config.vocab_size, model.wte.weight.device
    for stop in settings.stop_ids:
        if not _is_int(stop) or not 0 <= stop < vocab_size:
            raise InputError(f"generate: stop_tokens has {stop!r}, expected ids in [0, {vocab_size})")
    generator = settings.generator
    if generator is not None and generator.device.type != device.type:
        raise InputError(f"generate: generator is on {generator.device}, expected {device} (the model's)")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if not _is_number(temperature) or temperature <= 0:
        raise InputError(
            f"generate: temperature is {temperature!r}, expected a number > 0 (do_sample=False is greedy)"
        )
    if top_k is not None and (not _is_int(top_k) or top_k <= 0):
        raise InputError(f"generate: top_k is {top_k!r}, expected an integer > 0 or None")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise InputError(f"generate: top_p is {top_p!r}, expected a number in (0, 1] or None")
    if min_p is not None and (not _is_number(min_p) or not 0 <= min_p <= 1):
        raise InputError(f"generate: min_p is {min_p!r}, expected a number in [0, 1] or None")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
