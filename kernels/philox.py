"""Philox4x32-10 in torch: counter-based random words, the same bits as Triton's.

Word ``i % 4`` of counter ``i // 4`` belongs to element ``i`` of a row-major tensor; the 64-bit seed is the
key.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(seed: int | torch.Tensor, counter: torch.Tensor, rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of each 64-bit counter.

    Args:
        seed: The key: an int of 64 bits, or a 0-d int64 tensor on the counter's device.
        counter: int64, any shape.
        rounds: 10 by the paper.

    Returns:
        Four int64 tensors of the counter's shape with values in [0, 2**32).
    """
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(rounds):
        # A product of two 32-bit words wraps in int64 to the bits of the unsigned product, whose halves
        # masking recovers.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int | torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """One 32-bit word per element of a row-major tensor of `shape`, as int64 in [0, 2**32)."""
    count = math.prod(shape)
    counter = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    return torch.stack(philox(seed, counter), dim=-1).reshape(-1)[:count].reshape(tuple(shape))


def keep_mask(seed: int | torch.Tensor, shape: Sequence[int], p: float, device: torch.device) -> torch.Tensor:
    """Dropout's mask: True where the element's word is at least ``floor(p * 2**32)``, so it is kept with
    probability 1 - p."""
    return random_words(seed, shape, device) >= math.floor(p * 2**32)
