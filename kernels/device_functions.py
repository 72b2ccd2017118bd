"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dropout_keep(seed, index, threshold):
    """True where the element at row-major int64 `index` is kept: word index % 4 of Philox counter index // 4
    is >= threshold.

    `threshold` is uint32 floor(p * 2**32); the same bits as `kernels.philox.keep_mask`.
    """
    word0, word1, word2, word3 = tl.randint4x(seed, index // 4)
    lane = index % 4
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return word >= tl.cast(threshold, tl.uint32)


@triton.jit
def dropout_keep_quads(seed, counter, threshold):
    """As `dropout_keep` for the four elements of each int64 Philox `counter` (M, K), side by side: a mask (M,
    4 K)."""
    word0, word1, word2, word3 = tl.randint4x(seed, counter)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def gelu(h, TANH: tl.constexpr):
    """GELU of float32 `h`: by tanh, as h sigmoid(2u) with u = sqrt(2/pi) (h + 0.044715 h^3), or by erf."""
    if TANH:
        z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)
        decay = tl.exp2(-tl.abs(z) * LOG2E)  # at most 1, so that nothing overflows
        value = h * (tl.where(z >= 0, 1.0, decay) / (1 + decay))
    else:
        value = 0.5 * h * (1 + tl.erf(0.7071067811865476 * h))
    return value


@triton.jit
def gelu_derivative(h, TANH: tl.constexpr):
    """The derivative of `gelu`."""
    if TANH:
        z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)
        decay = tl.exp2(-tl.abs(z) * LOG2E)
        slope = 1.5957691216057308 * (1 + 0.134145 * h * h)
        value = (tl.where(z >= 0, 1.0, decay) + h * slope * (decay / (1 + decay))) / (1 + decay)
    else:
        density = 0.3989422804014327 * tl.exp2(h * h * (-0.5 * LOG2E))
        value = 0.5 * (1 + tl.erf(0.7071067811865476 * h)) + h * density
    return value
