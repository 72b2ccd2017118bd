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
def unfused_multiply(a, b):
    """a b, float32, for a `tl.sum` whose result is the same bits in all threads.

    Each of two threads adds the other's value to its own. The addition may be fused with the thread's own
    multiplication, so that each rounds the other's value only. The threads then store different bits to one
    address of shared memory, a race. 16-bit numbers need no such care: what they multiply to is exact.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def load_columns(ptr, offs_m, cols, mask):
    """The elements `cols` of a vector (C,), once per row: float32 (BLOCK_M, BLOCK_C).

    offs_m: (BLOCK_M,). cols: (BLOCK_C,). mask: (BLOCK_M, BLOCK_C).
    """
    # Pointers that depend on the row make each warp load its own copy. A vector that the warps share would go
    # through shared memory.
    return tl.load(ptr + tl.zeros_like(offs_m)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decay_and_sigmoid(h):
    """exp(-2 u) and sigmoid(2 u), float32 of h's shape, with u = sqrt(2 / pi) (h + 0.044715 h^3).

    The sigmoid is the square of 1 / sqrt(1 + exp(-2 u)): two instructions, where a division takes five. Its
    relative error is at most 2^-21.3 + 2^-22 (1 + 2 |u|) (1 - sigmoid), from 2 ulp of ex2.approx and 2^-22.9
    of rsqrt.approx (NVIDIA, PTX ISA 9.1, sections 9.7.3.21 and 9.7.3.16), and float32's roundings.
    """
    exponent = h * (-2.302208198144325 - 0.1029432395800235 * (h * h))  # -2 u log2(e)
    decay = tl.exp2(tl.minimum(exponent, 126.0))  # finite; the derivative is 0, not NaN, at h = -6e4
    root = tl.rsqrt(1 + decay)
    return decay, root * root


@triton.jit
def gelu(h, TANH: tl.constexpr):
    """GELU of a float32 tile of any shape, float32 of the same shape.

    TANH: h sigmoid(2 u) with u = sqrt(2 / pi) (h + 0.044715 h^3); else h (1 + erf(h / sqrt(2))) / 2. The
    error of the first is at most 2^-20.7 of the value for h > 0, and 2^-22.6 for h < 0. `tanh.approx` takes a
    tenth fewer instructions, but its error of 2^-11 breaks the rule of kernels/tolerance.py.
    """
    if TANH:
        _, sigmoid = _decay_and_sigmoid(h)
        value = h * sigmoid
    else:
        value = 0.5 * h * (1 + tl.erf(0.7071067811865476 * h))
    return value


@triton.jit
def gelu_derivative(h, TANH: tl.constexpr):
    """The derivative of `gelu` at a float32 tile of any shape, float32 of the same shape.

    TANH: the error is at most 2^-19.9 for |h| < 1e10. Below -7e10 it grows with the cube of h, which the
    clamp of the exponent does not outweigh any more: 2^-8.7 at -1e12.
    """
    if TANH:
        decay, sigmoid = _decay_and_sigmoid(h)
        slope = 1.5957691216057308 + 0.21406444881780076 * (h * h)  # 2 du / dh
        value = sigmoid + (decay * sigmoid) * (h * sigmoid) * slope
    else:
        density = 0.3989422804014327 * tl.exp2(h * h * (-0.5 * LOG2E))
        value = 0.5 * (1 + tl.erf(0.7071067811865476 * h)) + h * density
    return value
