"""Philox in torch, compared with an implementation in Python integers and with a known answer."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.philox import keep_mask, philox, random_words

CPU = torch.device("cpu")
KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # the authors' test vector for counter 0 and key 0


def python_philox(counter: int, seed: int) -> tuple[int, ...]:
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    keys = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32) ^ words[1] ^ keys[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ words[3] ^ keys[1],
            first & 0xFFFFFFFF,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(words)


def test_known_answer() -> None:
    """Wrong constants, word order or number of rounds."""
    assert tuple(word.item() for word in philox(0, torch.tensor(0))) == KNOWN


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 12345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
def test_same_bits_as_python_integers(seed: int, counter: int) -> None:
    """A multiplication that loses its high half in int64, or a dropped upper word of seed or counter."""
    assert tuple(w.item() for w in philox(seed, torch.tensor(counter))) == python_philox(
        counter, seed & (2**64 - 1)
    )
    as_tensor = torch.tensor(seed, dtype=torch.int64)
    assert tuple(w.item() for w in philox(as_tensor, torch.tensor(counter))) == python_philox(
        counter, seed & (2**64 - 1)
    )


def test_each_element_gets_its_word() -> None:
    """A wrong word for an element: the counter is index // 4, the word is index % 4."""
    words = random_words(9, (3, 5), CPU)
    assert words.shape == (3, 5)
    for index, word in enumerate(words.flatten().tolist()):
        assert word == python_philox(index // 4, 9)[index % 4]


def test_keep_mask_keeps_the_right_share() -> None:
    """A threshold that is inverted, or wrong by more than chance (5 standard deviations) allows."""
    for p in (0.0, 0.1, 0.5, 0.9):
        kept = keep_mask(3, (1000, 100), p, CPU).double().mean().item()
        assert abs(kept - (1 - p)) <= 5 * (p * (1 - p) / 1e5) ** 0.5
    assert keep_mask(3, (0, 4), 0.5, CPU).shape == (0, 4)


@pytest.mark.kernels
@pytest.mark.parametrize("size", [12, 14], ids=["by fours", "one by one"])
@pytest.mark.parametrize("op", ["attention", "norm", "dropout"])
def test_an_element_at_the_threshold_is_kept(op: str, size: int) -> None:
    """A kernel that drops the element at the threshold, rounds the threshold or compares signed words."""
    shape, row = ((1, 1, size, size), (0, 0, size - 1)) if op == "attention" else ((3, size), (1,))
    words = random_words(5, shape, CPU)
    for word in sorted(words[row].tolist())[1::3]:
        for share, threshold in ((word, word), (word + 0.5, word), (word + 1, word + 1)):
            p = share / 2**32
            with kernels.use_backend("triton"):
                if op == "attention":  # v = identity and equal logits: the output is the mask
                    q, v = torch.zeros(1, 1, size, 16), torch.eye(size, 16)[None, None]
                    actual = kernels.causal_attention(q, q, v, dropout_p=p, seed=5)[..., :size]
                elif op == "dropout":
                    actual = kernels.dropout(torch.ones(3, size), p, seed=5)
                else:
                    x = torch.ones(3, size)
                    _, actual = kernels.add_layer_norm(
                        x, torch.zeros_like(x), torch.ones(size), dropout_p=p, seed=5
                    )
            expected = words >= threshold
            assert torch.equal(actual[row] != 0, expected[row])
            assert torch.equal(keep_mask(5, words.shape, p, CPU), expected)
