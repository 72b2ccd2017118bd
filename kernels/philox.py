"""Philox4x32-10 in torch: counter-based random words, and the dropout masks made of them.

Element ``i`` of a row-major tensor takes word ``i % 4`` of counter ``i // 4``; the 64-bit seed is the key.
The kernels compute the same bits with `triton.language.randint4x`.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(seed: int | Tensor, counter: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """The four 32-bit words of each 64-bit counter.

    Args:
        seed: The key: an int of 64 bits, or a 0-d int64 tensor on the counter's device.
        counter: int64, any shape.
        rounds: 10 in the paper.

    Returns:
        Four int64 tensors of the counter's shape with values in [0, 2**32).
    """
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(rounds):
        # Multiplying two 32-bit words overflows int64, but wraps around to the same 64 bits as the unsigned
        # multiplication, so that masking gives both halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int | Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """One 32-bit word per element of a row-major tensor of `shape`, as int64 in [0, 2**32)."""
    count = math.prod(shape)
    counter = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    return torch.stack(philox(seed, counter), dim=-1).reshape(-1)[:count].reshape(tuple(shape))


def threshold(p: float) -> int:
    """floor(p * 2**32): dropout keeps an element if its word is at least this, with probability 1 - p."""
    return math.floor(p * 2**32)


def keep_mask(seed: int | Tensor, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """The dropout mask of a row-major tensor of `shape`: True where an element is kept."""
    return random_words(seed, shape, device) >= threshold(p)


def seeded_dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """x / (1 - p) where `keep_mask` keeps an element, else 0."""
    return torch.where(keep_mask(seed, x.shape, p, x.device), x / (1 - p), 0)


def dropout_seed(p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The seed that kernels take for a public op's (p, seed): a 0-d int64 tensor, or None if p is 0.

    Below the public functions, this alone says that dropout is on: a seed tensor exists exactly if p > 0. A
    seed of None is drawn from torch's generator, without synchronising with the device.
    """
    if p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)
