"""Device functions (`@triton.jit` helpers) that kernels of several op families share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dropout_keep(seed, index, threshold):
    """The dropout mask of the elements at `index`: True where an element is kept.

    seed: int64 scalar. index: int64 tile of any shape, row-major element indices. threshold: uint32 scalar,
    floor(p * 2**32). Returns a bool tile of index's shape: word index % 4 of Philox counter index // 4 is >=
    threshold. The bits are those of `kernels.philox.keep_mask`.
    """
    word0, word1, word2, word3 = tl.randint4x(seed, index // 4)
    lane = index % 4
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return word >= tl.cast(threshold, tl.uint32)


@triton.jit
def dropout_keep_quads(seed, counter, threshold):
    """The dropout mask of whole groups of four neighbouring elements, at a quarter of the Philox calls.

    seed: int64 scalar. counter: (M, K) int64, Philox counters. threshold: as in `dropout_keep`. Returns bool
    (M, 4 K): columns 4 k to 4 k + 3 are the elements 4 counter[:, k] to 4 counter[:, k] + 3.
    """
    word0, word1, word2, word3 = tl.randint4x(seed, counter)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def gelu(h, TANH: tl.constexpr):
    """GELU of a float32 tile of any shape, float32 of the same shape.

    TANH: h sigmoid(2 u) with u = sqrt(2 / pi) (h + 0.044715 h^3); else h (1 + erf(h / sqrt(2))) / 2.
    """
    if TANH:
        z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)  # 2 u
        decay = tl.exp2(-tl.abs(z) * LOG2E)  # at most 1, so nothing overflows
        value = h * (tl.where(z >= 0, 1.0, decay) / (1 + decay))
    else:
        value = 0.5 * h * (1 + tl.erf(0.7071067811865476 * h))
    return value


@triton.jit
def gelu_derivative(h, TANH: tl.constexpr):
    """The derivative of `gelu` at a float32 tile of any shape, float32 of the same shape."""
    if TANH:
        z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)
        decay = tl.exp2(-tl.abs(z) * LOG2E)
        slope = 1.5957691216057308 * (1 + 0.134145 * h * h)  # dz / dh
        value = (tl.where(z >= 0, 1.0, decay) + h * slope * (decay / (1 + decay))) / (1 + decay)
    else:
        density = 0.3989422804014327 * tl.exp2(h * h * (-0.5 * LOG2E))
        value = 0.5 * (1 + tl.erf(0.7071067811865476 * h)) + h * density
    return value
