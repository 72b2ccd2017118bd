"""The keys and values of the tokens so far, which decoding reads instead of computing them again."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels


class KVCache:
    """The keys and values of all layers, in one tensor that the pass over the prompt allocates.

    The counters are on the device, so every decoding step is the same sequence of launches, and a CUDA graph
    can replay it. The tensors stay where they are when another prompt starts.

    Args:
        layers: The number of layers.
        batch: B, the number of sequences.
        size: Tmax, the largest number of tokens.
        padded: Whether the prompts may have padding on the left.
        device: Of the model.
    """

    def __init__(self, layers: int, batch: int, size: int, *, padded: bool, device: torch.device) -> None:
        self.size = size
        # One addition counts for the index, int64, whose upper half stays 0, and for the lengths, int32. They
        # start at a multiple of 16 bytes, as in the kernels that preflight compiles.
        self._counters = torch.zeros(4 + batch, dtype=torch.int32, device=device)
        self._increments = torch.ones_like(self._counters)
        self._increments[1:4] = 0
        self.index = self._counters[:2].view(torch.int64)  # (1,) of the newest token
        self.lengths = self._counters[4:]  # (B,) tokens, the newest included
        self.key_start = torch.zeros(batch, dtype=torch.int32, device=device) if padded else None
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values (B, H, Tmax, D) of each layer
        self._count, self._store, self._has_prompt = layers, torch.empty(0), False

    @property
    def position(self) -> Tensor:
        """int64 (1,) or (B, 1), the position of the newest token."""
        return self.index if self.key_start is None else self.index - self.key_start[:, None]

    def start(self, tokens: int, key_start: Tensor | None) -> None:
        """Empties the cache for a prompt.

        Args:
            tokens: T, the length of the prompt.
            key_start: int32 (B,), the number of padding tokens on the left of each row, or None.
        """
        self.index.fill_(tokens)
        self.lengths.fill_(tokens + 1)
        if self.key_start is not None and key_start is not None:
            self.key_start.copy_(key_start)
        self._store.zero_()  # an old value that is not finite would outlast its probability of zero
        self._has_prompt = False

    def end_prompt(self) -> None:
        """After the pass over the prompt: each pass from now on has one token."""
        self._has_prompt = True

    def advance(self) -> None:
        """Counts one more token."""
        self._counters.add_(self._increments)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Stores the keys and values of qkv (B, T, 3, H, D); returns attention (B, T, H, D) to all stored."""
        if not self.layers:
            self._allocate(qkv)
        new = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, B, H, T, D), keys and values
        if not self._has_prompt:
            self._store[layer, :, :, :, : qkv.shape[1]] = new
            return kernels.causal_attention_qkv(qkv, key_start=self.key_start)

        self._store[layer].index_copy_(3, self.index, new)
        q = qkv[:, :, 0].transpose(1, 2)  # (B, H, 1, D)
        y = kernels.decode_attention(q, *self.layers[layer], self.lengths, key_start=self.key_start)
        return y.transpose(1, 2)

    def _allocate(self, qkv: Tensor) -> None:
        B, _, _, H, D = qkv.shape
        self._store = qkv.new_zeros(self._count, 2, B, H, self.size, D)
        self.layers = [(keys, values) for keys, values in self._store.unbind()]
