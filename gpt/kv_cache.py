"""What decoding keeps between tokens: keys and values, the step that adds one, and who has stopped.

All counters live on the device, so that a step is the same work for every token: on a GPU it is captured once
in a CUDA graph and replayed, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

import kernels
from gpt.inputs import positions


class KVCache:
    """Keys and values of every layer, (B, H, Tmax, D) each, allocated by the first pass over the prompt.

    Args:
        size: Tmax, the most tokens that it holds.
        idx: The prompt (B, T).
        key_start: int32 (B,), the padding on the left of each row, or None.
    """

    def __init__(self, size: int, idx: Tensor, key_start: Tensor | None) -> None:
        batch, tokens = idx.shape
        self.size, self.key_start = size, key_start
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device=idx.device)
        self.index = torch.full((1,), tokens, device=idx.device)  # where the next token goes
        self._layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the pass's keys and values (B, H, T, D), and attends to all that are stored."""
        if layer == len(self._layers):
            B, H, T, D = k.shape
            keys, values = k.new_zeros(B, H, self.size, D), v.new_zeros(B, H, self.size, D)
            keys[:, :, :T], values[:, :, :T] = k, v
            self._layers.append((keys, values))
            return kernels.causal_attention(q, k, v, key_start=self.key_start)
        keys, values = self._layers[layer]
        keys.index_copy_(2, self.index, k)
        values.index_copy_(2, self.index, v)
        return kernels.decode_attention(q, keys, values, self.lengths, key_start=self.key_start)


class Decoder:
    """The last token's hidden state, of a prompt and then of one more token at a time.

    Args:
        hidden: `GPT.hidden` of the model, called as hidden(idx, position, key_start, cache=cache).
        idx: The prompt (B, T), T <= size.
        size: The most tokens, prompt included.
        key_start: As `KVCache`.
    """

    def __init__(
        self, hidden: Callable[..., Tensor], idx: Tensor, size: int, key_start: Tensor | None
    ) -> None:
        self.hidden, self.prompt = hidden, idx
        self.cache = KVCache(size, idx, key_start)
        self.token = idx[:, -1:].clone()
        position = positions(idx.shape[1] + 1, key_start, idx.device)
        self._prompt_position, self.position = position[..., :-1], position[..., -1:].clone()
        self._captures, self._warm = captures(idx.device), False
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self) -> Tensor:
        """(B, C) after the prompt."""
        states = self.hidden(self.prompt, self._prompt_position, self.cache.key_start, cache=self.cache)
        self.cache.lengths.add_(1)
        return states[:, -1]

    def step(self, token: Tensor) -> Tensor:
        """(B, C) after one more `token` (B,). On a GPU the result is overwritten by the next step."""
        self.token.copy_(token[:, None])
        if (
            not self._captures or not self._warm
        ):  # the first step compiles kernels and fills the allocator's pools
            self._warm = True
            return self._run()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._result

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A step as a graph, which leaves its result in `_result`. Other threads may use the GPU
        meanwhile."""
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
    """Whether steps on `device` are captured: on a GPU, but for autocast, which keeps casts that a graph
    would not refresh."""
    return device.type == "cuda" and not torch.is_autocast_enabled("cuda")


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one for all captures on `device`: torch's own is on the device of the first capture, whichever that
    was."""
    return torch.cuda.Stream(device)


class Stops:
    """Which rows have met one of the stop tokens, and when all had.

    Args:
        ids: The stop tokens, at least one.
        batch: B.
        device: The tokens'.
        waits: Whether `all` may wait for the device; otherwise it answers with what has arrived, some steps
            late.
    """

    def __init__(self, ids: Sequence[int], batch: int, device: torch.device, *, waits: bool) -> None:
        self.ids = torch.tensor(ids, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._waits = waits
        self._all = torch.zeros((), dtype=torch.bool, pin_memory=not waits)

    def update(self, token: Tensor) -> None:
        """Takes in a step's (B,) tokens."""
        self._steps += ~self.stopped.all()
        self.stopped |= (token[:, None] == self.ids).any(1)  # torch.isin sorts many ids, and waits
        self._all.copy_(
            self.stopped.all(), non_blocking=not self._waits
        )  # only ever becomes True: a late read is a safe one

    def all(self) -> bool:
        """Whether every row has stopped."""
        return bool(self._all)

    def steps(self) -> int:
        """How many steps there were until every row had stopped; waits for the device."""
        return int(self._steps)
