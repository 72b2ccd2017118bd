"""The next token of each row: the settings of generation, the logits processors, and sampling.

The processors have the order and meaning of Hugging Face's: repetition penalty, temperature, top-k, top-p,
min-p.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from gpt.errors import InputError

SMALLEST, LARGEST = 1e-30, 1e30  # temperature and penalty: float32 logits stay finite
SCALES = f"[{SMALLEST}, {LARGEST}]"
drawing = threading.Lock()  # held while the state of a generator, which threads may share, advances


def penalize_repetition(logits: Tensor, penalty: Tensor) -> Tensor:
    """logits / penalty where positive, logits · penalty where negative; `penalty` (B, V) is 1 for new ids."""
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def keep_top_k(logits: Tensor, k: int) -> None:
    """Sets all logits below the k-th largest to -inf, in place."""
    logits.masked_fill_(logits < logits.topk(min(k, logits.shape[-1])).values[..., -1:], -math.inf)


def keep_top_p(logits: Tensor, rest: Tensor | float) -> None:
    """Sets all logits to -inf, in place, but the fewest of the likeliest that have p = 1 - rest or more."""
    ascending, order = logits.sort(-1)
    outside = ascending.softmax(-1).cumsum(-1) <= rest
    outside[..., -1] = False
    logits.masked_fill_(outside.scatter(-1, order, outside), -math.inf)


def keep_min_p(logits: Tensor, p: Tensor | float) -> None:
    """Sets the logits of all tokens to -inf, in place, that are less likely than p times the likeliest."""
    probabilities = logits.softmax(-1)
    logits.masked_fill_(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, V) p / e, where p = softmax(logits) and e ~ Exp(1): the index of the largest is a sample of p.

    `torch.multinomial` gives the same samples, but synchronises with a GPU.
    """
    probabilities = logits.softmax(-1)
    noise = torch.empty_like(probabilities)
    with drawing:
        noise.exponential_(1, generator=generator)
    return probabilities / noise.clamp_(min=torch.finfo(noise.dtype).tiny)


def checked_once(op: str) -> Callable[..., Tensor]:
    """The op; if its first call takes the reference, then the reference itself, which checks no arguments.

    On a CPU, checking the arguments of a block takes as long as some of its matmuls.
    """
    later: list[Callable[..., Tensor]] = []

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if later:
            return later[0](*args, **kwargs)
        backend = kernels.explain(op, *args, **kwargs).backend
        later.append(getattr(kernels.reference if backend == "reference" else kernels, op))
        return getattr(kernels, op)(*args, **kwargs)

    return call


class Form(NamedTuple):
    """What decides which operations choose a token. All other settings are numbers that they read."""

    do_sample: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    penalty: bool
    vocab_size: int | None
    stops: int  # the number of stop tokens


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
        if vocab_size is not None and (not is_int(vocab_size) or vocab_size <= 0):
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

    @property
    def form(self) -> Form:
        """The settings that decide which operations choose a token."""
        return Form(
            do_sample=self.do_sample,
            top_k=self.top_k if self.do_sample else None,
            top_p=self.do_sample and self.top_p is not None,
            min_p=self.do_sample and self.min_p is not None,
            penalty=self.repetition_penalty != 1,
            vocab_size=self.vocab_size,
            stops=len(self.stop_ids),
        )


class Sampler:
    """Chooses the next token of each row, by operations and in tensors that stay the same from step to step.

    So a CUDA graph can replay a choice. A setting that is a number is a tensor, which `start` sets: eager and
    replayed choices compute the same bits.

    Args:
        form: What is decided once and for all.
        batch: B.
        vocab_size: V.
        dtype: Of the logits, at least float32.
        device: Of the logits.
    """

    def __init__(
        self, form: Form, batch: int, vocab_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.form = form
        self.token = zeros(batch, dtype=torch.int64)  # the newest one of each row
        self._chosen = torch.zeros_like(self.token)  # also for a row that has stopped
        self._argmax = checked_once("decode_argmax")
        self._numbers = zeros(4, dtype=dtype).unbind()
        self._penalties = zeros(batch, vocab_size if form.penalty else 0, dtype=dtype)

        self._stop_ids = zeros(form.stops, dtype=torch.int64)
        self._stopped = zeros(batch, dtype=torch.bool)
        self.all_stopped = zeros(dtype=torch.bool)
        self.surplus = zeros(dtype=torch.int64)  # steps since all rows have stopped

    def start(self, settings: Settings, idx: Tensor, key_start: Tensor | None) -> None:
        """Prepares for the tokens after the prompt `idx` (B, T), whose padding is before `key_start`."""
        if self.form.do_sample:
            chosen = settings.temperature, 1 - (settings.top_p or 0), settings.min_p or 0
            for number, value in zip(self._numbers[1:], chosen, strict=True):
                number.fill_(value)

        if self.form.penalty:
            if key_start is not None:  # padding does not count: the last token, which does, takes its place
                index = torch.arange(idx.shape[1], device=idx.device)
                idx = torch.where(index < key_start[:, None], idx[:, -1:], idx)
            self._numbers[0].fill_(settings.repetition_penalty)
            self._penalties.fill_(1)
            self._penalties.scatter_(1, idx, self._numbers[0].expand(idx.shape))

        if self.form.stops:
            self._stop_ids.copy_(torch.tensor(settings.stop_ids))
            for flag in (self._stopped, self.all_stopped, self.surplus):
                flag.zero_()

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> None:
        """Puts the next token of each row into `token`. A row that has stopped repeats its stop token.

        Args:
            logits: (B, V). They may be overwritten.
            generator: None is torch's own.
        """
        form, (penalty, temperature, rest, min_p) = self.form, self._numbers
        if form.vocab_size is not None:
            logits[:, form.vocab_size :] = -math.inf
        if form.penalty or form.do_sample:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if form.penalty:
            logits = penalize_repetition(logits, self._penalties)

        if form.do_sample:
            logits = logits / temperature
            if form.top_k is not None:
                keep_top_k(logits, form.top_k)
            if form.top_p:
                keep_top_p(logits, rest)
            if form.min_p:
                keep_min_p(logits, min_p)
            logits = draw(logits, generator)

        if not form.stops:
            self._argmax(logits, self.token)
        else:
            self.surplus.add_(self.all_stopped)
            self._argmax(logits, self._chosen)
            torch.where(self._stopped, self.token, self._chosen, out=self.token)
            # A stopped row repeats its stop token, so it stays stopped. torch.isin can synchronise.
            torch.any(self.token[:, None] == self._stop_ids, 1, out=self._stopped)
            torch.all(self._stopped, out=self.all_stopped)
        if form.penalty:
            token = self.token[:, None]
            self._penalties.scatter_(1, token, penalty.expand(token.shape))


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if not _is_in(temperature, SMALLEST, LARGEST):
        raise InputError(
            f"generate: temperature is {temperature!r}, expected a number in {SCALES} "
            "(do_sample=False is greedy)"
        )
    if top_k is not None and (not is_int(top_k) or top_k <= 0):
        raise InputError(f"generate: top_k is {top_k!r}, expected an integer > 0 or None")
    if top_p is not None and (not _is_in(top_p, 0, 1) or top_p == 0):
        raise InputError(f"generate: top_p is {top_p!r}, expected a number in (0, 1] or None")
    if min_p is not None and not _is_in(min_p, 0, 1):
        raise InputError(f"generate: min_p is {min_p!r}, expected a number in [0, 1] or None")


def is_int(value: object) -> bool:
    """Whether `value` is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_in(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number from `low` to `high`; NaN is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
