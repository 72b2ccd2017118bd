"""Generation: the loop over tokens."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from gpt.decoding import Decoder, decoding_step, lend
from gpt.errors import InputError
from gpt.inputs import padding, positions, token_ids
from gpt.model import GPT
from gpt.sampler import Sampler, Settings, is_int

FIRST_TOKENS = 1024  # new tokens for which there is space at first


@torch.no_grad()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, settings: Settings) -> Tensor:
    """(B, T + n): `idx` (B, T) and the n <= max_new_tokens tokens that follow it. See `GPT.generate`.

    The cache is used while the tokens fit into block_size. After that, and without a cache, each step
    recomputes the last block_size tokens.

    Raises:
        InputError: max_new_tokens, stop_tokens, the generator or an input does not fit the model.
    """
    idx = token_ids(idx, model.config.vocab_size, model.device)
    _check_fit(model, max_new_tokens, settings)
    key_start = None if settings.attention_mask is None else padding(settings.attention_mask, idx)
    if max_new_tokens == 0:
        return idx.clone()

    (B, T), form, padded = idx.shape, settings.form, key_start is not None
    end, cached = T + max_new_tokens, settings.use_cache and model.config.block_size >= T
    with model.backend(), lend(model, form, B, end, padded=padded, use_cache=cached) as decoder:
        decoder.sampler.start(settings, idx, key_start)
        progress = _Progress(settings, decoder.sampler)
        ids = _continue_cached(model, decoder, idx, key_start, end, progress) if cached else idx
        ids = _continue(model, decoder.sampler, ids, key_start, end, progress)
        return ids[:, : ids.shape[1] - progress.surplus()]


class _Progress:
    """Passes the tokens on to the caller of `generate`, and knows whether all rows have stopped."""

    def __init__(self, settings: Settings, sampler: Sampler) -> None:
        self.stopped = False
        self.generator = settings.generator
        self._on_token, self._sampler, self._stops = settings.on_token, sampler, sampler.form.stops > 0
        self._synchronise = sampler.token.device.type != "cuda" or settings.on_token is not None
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=self._stops and not self._synchronise)

    def update(self) -> None:
        """Call it after each choice of tokens.

        If it may not synchronise with the device, it learns some steps late that all rows have stopped.
        """
        if self._on_token is not None:
            self._on_token(self._sampler.token.clone())
        if self._stops:
            self._flag.copy_(self._sampler.all_stopped, non_blocking=not self._synchronise)
            self.stopped = bool(self._flag)

    def surplus(self) -> int:
        """How many steps were too many; synchronises with the device if there are stop tokens."""
        return int(self._sampler.surplus) if self._stops else 0


def _continue_cached(
    model: GPT, decoder: Decoder, idx: Tensor, key_start: Tensor | None, end: int, progress: _Progress
) -> Tensor:
    """`idx` and the tokens after it, up to `end` or to the end of the cache."""
    decoder.start(model, idx, key_start, progress.generator)
    progress.update()
    logits, end = cache(partial(decoding_step, model, len(idx))), min(end, decoder.cache.size + 1)
    while decoder.length < end and not progress.stopped:
        decoder.step(logits, progress.generator)
        progress.update()
    return decoder.ids


def _continue(
    model: GPT, sampler: Sampler, ids: Tensor, key_start: Tensor | None, end: int, progress: _Progress
) -> Tensor:
    """`ids` and the tokens after it, up to `end`, each computed from the block_size tokens before it."""
    tokens = _Tokens(ids, end - ids.shape[1])
    while tokens.length < end and not progress.stopped:
        begin = max(0, tokens.length - model.config.block_size)
        window = tokens.window(begin, tokens.length)
        start = None if key_start is None else (key_start - begin).clamp(min=0)
        states = model.hidden(window, positions(window.shape[1], start, window.device), start)
        sampler.choose(model.head(states[:, -1]), progress.generator)
        tokens.append(sampler.token)
        progress.update()
    return tokens.window(0, tokens.length)


class _Tokens:
    """Token ids (B, length) in a buffer that doubles when it is full: memory follows what is generated.

    Args:
        idx: The prompt (B, T); it is copied.
        new: The most tokens that will be appended.
    """

    def __init__(self, idx: Tensor, new: int) -> None:
        self.length = idx.shape[1]
        self._buffer = torch.cat([idx, idx.new_zeros(len(idx), min(new, FIRST_TOKENS))], 1)

    def window(self, begin: int, end: int) -> Tensor:
        """The ids (B, end - begin) from `begin` up to `end`, which is at most `length`."""
        return self._buffer[:, begin:end]

    def append(self, token: Tensor) -> None:
        """Adds one token (B,) to each row."""
        if self.length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)], 1)
        self._buffer[:, self.length] = token
        self.length += 1


def _check_fit(model: GPT, max_new_tokens: int, settings: Settings) -> None:
    """Refuses a length, stop tokens or a generator that do not fit the model."""
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise InputError(f"generate: max_new_tokens is {max_new_tokens!r}, expected an integer >= 0")
    vocab_size, device = model.config.vocab_size, model.device
    for stop in settings.stop_ids:
        if not is_int(stop) or not 0 <= stop < vocab_size:
            raise InputError(f"generate: stop_tokens has {stop!r}, expected ids in [0, {vocab_size})")
    generator = settings.generator
    if generator is not None and generator.device.type != device.type:
        raise InputError(f"generate: generator is on {generator.device}, expected {device} (the model's)")
