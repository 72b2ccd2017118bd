"""Generation: the processors of logits, and the loop.

The processors have Hugging Face's order and meaning: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt.errors import InputError
from gpt.inputs import check_ids, padding, positions
from gpt.kv_cache import Decoder, Stops

if TYPE_CHECKING:
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


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    stop_tokens: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """`idx` continued by up to `max_new_tokens` tokens, without dropout.

    Args:
        idx: int64 (B, T). The model sees its last block_size tokens.
        max_new_tokens: >= 0.
        do_sample: False takes the likeliest token and ignores temperature, top_k, top_p and min_p.
        temperature: Divides the logits, > 0.
        top_k: Keeps the k likeliest tokens.
        top_p: In (0, 1]: keeps the likeliest tokens up to and including the one at which their probabilities
            reach p.
        min_p: In [0, 1]: keeps the tokens at least p times as likely as the likeliest.
        repetition_penalty: > 0; above 1 makes tokens that a row already has less likely. Padding does not
            count.
        vocab_size: > 0: no id from it up is generated, as where a vocabulary is padded for speed and a
            tokenizer has fewer ids.
        stop_tokens: Ids that end a row, which is filled with the one it met; when all rows have ended, so
            does generation.
        attention_mask: (B, T), 0 for padding on the left, 1 for tokens.
        generator: On the model's device; None is torch's own.
        use_cache: False computes everything anew for each token.
        on_token: Called with each step's (B,) int64.

    Returns:
        (B, T + n), n <= max_new_tokens: the whole of `idx`, then what was generated.

    Raises:
        InputError: A setting outside its range, or an input that the model would refuse.
    """
    check_ids(idx, model.config.vocab_size, model.wte.weight.device)
    stops = _check_settings(model, max_new_tokens, repetition_penalty, vocab_size, stop_tokens, generator)
    if do_sample:
        _check_sampling(temperature, top_k, top_p, min_p)
    key_start = None if attention_mask is None else padding(attention_mask, idx)
    B, T = idx.shape
    ids = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], 1)
    seen = _seen(idx, key_start, model.config.vocab_size) if repetition_penalty != 1 else None
    waits = idx.device.type != "cuda" or on_token is not None
    stop = Stops(stops, B, idx.device, waits=waits) if stops else None
    states = _hidden_states(model, ids, T, key_start, use_cache)
    length = T
    with model.backend():
        while length < T + max_new_tokens:
            logits = model.head(next(states))  # (B, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if vocab_size is not None:
                logits[:, vocab_size:] = -math.inf
            if seen is not None:
                logits = penalize_repetition(logits, seen, repetition_penalty)
            if do_sample:
                logits = logits / temperature
                logits = logits if top_k is None else keep_top_k(logits, top_k)
                logits = logits if top_p is None else keep_top_p(logits, top_p)
                logits = logits if min_p is None else keep_min_p(logits, min_p)
                new = sample(logits, generator)
            else:
                new = logits.argmax(-1)
            token = new if stop is None else torch.where(stop.stopped, ids[:, length - 1], new)
            ids[:, length] = token
            length += 1
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if on_token is not None:
                on_token(token)
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
        decoder = Decoder(model, ids[:, :length], min(block, end), key_start)
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


def _check_settings(
    model: GPT,
    max_new_tokens: int,
    repetition_penalty: float,
    vocab_size: int | None,
    stop_tokens: int | Sequence[int] | None,
    generator: torch.Generator | None,
) -> list[int]:
    """Refuses what is wrong whether sampling or not; the stop tokens as a list."""
    if not _is_int(max_new_tokens) or max_new_tokens < 0:
        raise InputError(f"generate: max_new_tokens is {max_new_tokens!r}, expected an integer >= 0")
    if not _is_number(repetition_penalty) or repetition_penalty <= 0:
        raise InputError(f"generate: repetition_penalty is {repetition_penalty!r}, expected a number > 0")
    if vocab_size is not None and (not _is_int(vocab_size) or vocab_size <= 0):
        raise InputError(f"generate: vocab_size is {vocab_size!r}, expected an integer > 0 or None")
    stops = (
        [] if stop_tokens is None else [stop_tokens] if isinstance(stop_tokens, int) else list(stop_tokens)
    )
    for stop in stops:
        if not _is_int(stop) or not 0 <= stop < model.config.vocab_size:
            raise InputError(
                f"generate: stop_tokens has {stop!r}, expected ids in [0, {model.config.vocab_size})"
            )
    device = model.wte.weight.device
    if generator is not None and generator.device.type != device.type:
        raise InputError(f"generate: generator is on {generator.device}, expected {device} (the model's)")
    return stops


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
