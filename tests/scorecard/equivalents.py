"""Mutants of kernels and references that no check can kill, each with the reason."""

# ruff: noqa: E501 (lines of the kernels, as they are)

from __future__ import annotations

GPU = "runs on a GPU only"
MASKED = "fewer tiles count as whole, or more are visited: a mask hides the rest, so only the speed changes"
SPEED = "affects the speed alone"
AXIS = "the only axis of a vector"

# Mutant.key, or its beginning where no change of the line matters -> why the mutant computes the same.
EQUIVALENT: dict[str, str] = {
    "attention/backward.py: full_lo = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BLOCK_M | 1 -> 0": MASKED,
    "attention/backward.py: late = (last > key) & ((offs + 1) * ROWS > full_lo) | (last > key) & ((offs + 1) * ROWS > full_lo) -> ((offs + 1) * ROWS > full_lo)": MASKED,
    "attention/forward.py: lo = tl.min(start, 0) // BLOCK_N * BLOCK_N | 0 -> -1": AXIS,
    'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]):': GPU,
    'ffn/gemm.py: "GROUP_M": 8, | 8 -> 7': "the order of the programs: affects the speed alone",
    'ffn/gemm.py: "GROUP_M": 8, | 8 -> 9': "the order of the programs: affects the speed alone",
    "norm/backward.py: if STAGES > 1:  # a pipelined loop would copy it to shared memory for each block | 1 -> 0": SPEED,
    "norm/backward.py: if STAGES > 1:  # a pipelined loop would copy it to shared memory for each block | STAGES > 1 -> ((STAGES) >= (1))": SPEED,
    "philox.py: if p == 0: | 0 -> -1": "at p = 0 the mask keeps every element too",
}
