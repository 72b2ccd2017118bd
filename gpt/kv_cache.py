"""The state of decoding: cached keys and values, the step for one more token, and the rows that have stopped.

All counters are on the device, so every step is the same sequence of launches. On a GPU the step is captured
once as a CUDA graph and replayed, and the host does not synchronise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

import kernels
from gpt.inputs import positions


class KVCache:
    """The keys and values of every layer, (B, H, Tmax, D) each, allocated by the pass over the prompt.

    Args:
        size: Tmax, the largest number of tokens.
        idx: The prompt (B, T).
        key_start: int32 (B,), the number of padding tokens on the left of each row, or None.
    """

    def __init__(self, size: int, idx: Tensor, key_start: Tensor | None) -> None:
        batch, tokens = idx.shape
        self.size, self.key_start = size, key_start
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device=idx.device)
        self.index = torch.full((1,), tokens, device=idx.device)  # of the next token
        self._layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Stores the keys and values of qkv (B, T, 3, H, D); returns attention (B, T, H, D) to all stored."""
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, D) each
        if layer == len(self._layers):
            B, H, T, D = k.shape
            keys, values = k.new_zeros(B, H, self.size, D), v.new_zeros(B, H, self.size, D)
            keys[:, :, :T], values[:, :, :T] = k, v
            self._layers.append((keys, values))
            return kernels.causal_attention_qkv(qkv, key_start=self.key_start)

        keys, values = self._layers[layer]
        keys.index_copy_(2, self.index, k)
        values.index_copy_(2, self.index, v)
        y = kernels.decode_attention(q, keys, values, self.lengths, key_start=self.key_start)
        return y.transpose(1, 2)


class Decoder:
    """Computes the last token's hidden state: of a prompt, then of one more token at a time.

    Args:
        hidden: `GPT.hidden` of the model, called as hidden(idx, position, key_start, cache=cache).
        idx: The prompt (B, T), T <= size.
        size: The largest number of tokens, prompt included.
        key_start: As in `KVCache`.
        capture: Whether steps on a GPU may be captured: not if the model has hooks.
    """

    def __init__(
        self,
        hidden: Callable[..., Tensor],
        idx: Tensor,
        size: int,
        key_start: Tensor | None,
        *,
        capture: bool = True,
    ) -> None:
        self.hidden, self.prompt = hidden, idx
        self.cache = KVCache(size, idx, key_start)
        self.token = idx[:, -1:].clone()  # (B, 1)
        position = positions(idx.shape[1] + 1, key_start, idx.device)
        self._prompt_position, self.position = position[..., :-1], position[..., -1:].clone()
        self._captures, self._warm = capture and captures(idx.device), False
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self) -> Tensor:
        """The hidden state (B, C) after the prompt."""
        states = self.hidden(self.prompt, self._prompt_position, self.cache.key_start, cache=self.cache)
        self.cache.lengths.add_(1)
        return states[:, -1]

    def step(self, token: Tensor) -> Tensor:
        """The hidden state (B, C) after one more `token` (B,). On a GPU, the next step overwrites it."""
        self.token.copy_(token[:, None])
        if not self._captures or not self._warm:
            self._warm = True  # the first step compiles kernels and fills the allocator's pools
            return self._run()

        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._result

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A step as a CUDA graph that writes to `_result`. Other threads may use the GPU during capture."""
        graph, device = torch.cuda.CUDAGraph(), self.token.device
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
        ):
            self._result = self._run()
        return graph

    def _run(self) -> Tensor:
        states = self.hidden(self.token, self.position, None, cache=self.cache)
        for counter in (self.position, self.cache.index, self.cache.lengths):
            counter.add_(1)
        return states[:, -1]


def captures(device: torch.device) -> bool:
    """Whether steps on `device` are captured: on a GPU without autocast.

    Autocast caches casted weights, which the replay of a graph would not update.
    """
    return device.type == "cuda" and not torch.is_autocast_enabled("cuda")


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on `device`; torch's default is on the device of the first capture."""
    return torch.cuda.Stream(device)


class Stops:
    """The rows that have met a stop token, and the step at which the last one did.

    Args:
        ids: The stop tokens, at least one.
        batch: B.
        device: The device of the tokens.
        synchronise: Whether `all` may synchronise with the device. If not, its answer may be some steps old.
    """

    def __init__(self, ids: Sequence[int], batch: int, device: torch.device, *, synchronise: bool) -> None:
        self.ids = torch.tensor(ids, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._synchronise = synchronise
        self._all = torch.zeros((), dtype=torch.bool, pin_memory=not synchronise)

    def update(self, token: Tensor) -> None:
        """Notes the tokens (B,) of a step."""
        self._steps += ~self.stopped.all()
        self.stopped |= (token[:, None] == self.ids).any(1)  # torch.isin can synchronise
        self._all.copy_(self.stopped.all(), non_blocking=not self._synchronise)

    def all(self) -> bool:
        """Whether every row has stopped. A late answer is safe: it can only change from False to True."""
        return bool(self._all)

    def steps(self) -> int:
        """The number of steps until every row had stopped; synchronises with the device."""
        return int(self._steps)
