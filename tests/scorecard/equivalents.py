"""Mutants of kernels and references that no check can kill, each with the reason."""

from __future__ import annotations

GPU = "runs on a GPU only"
MASKED = "fewer tiles count as whole, or more are visited: a mask hides the rest, so only the speed changes"
SPEED = "affects the speed alone"
AXIS = "the only axis of a vector"

# Mutant.key -> why the mutant computes the same.
EQUIVALENT: dict[str, str] = {
    (
        "attention/backward.py: full_lo = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BL"
        "OCK_M | 1 -> 0"
    ): MASKED,
    (
        "attention/backward.py: late = (last > key) & ((offs + 1) * ROWS > full_lo) | (last > key) & ((offs +"
        " 1) * ROWS > full_lo) -> ((offs + 1) * ROWS > full_lo)"
    ): MASKED,
    "attention/forward.py: lo = tl.min(start, 0) // BLOCK_N * BLOCK_N | 0 -> -1": AXIS,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | -1 -> (1)"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | 0 -> -1"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | 0 -> 1"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | 1 -> 0"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | 1 -> 2"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | 16 -> 15"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | 16 -> 17"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | stride * x.element_size() % 16 -> ((stride * x.element_size()) // (16))"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | stride * x.element_size() % 16 == 0 -> ((stride * x.element_size() % 16)"
        " != (0))"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | stride * x.element_size() -> ((stride) / (x.element_size()))"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        "ride in x.stride()[:-1]): | stride * x.element_size() -> (stride)"
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        'ride in x.stride()[:-1]): | x.device.type != "cuda" -> ((x.device.type) == ("cuda"))'
    ): GPU,
    (
        'attention/reference.py: if x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for st'
        'ride in x.stride()[:-1]): | x.device.type != "cuda" or all(stride * x.element_size() % 16 == 0 for s'
        'tride in x.stride()[:-1]) -> (not (x.device.type != "cuda" or all(stride * x.element_size() % 16 == '
        "0 for stride in x.stride()[:-1])))"
    ): GPU,
    'ffn/gemm.py: "GROUP_M": 8, | 8 -> 7': "the order of the programs: affects the speed alone",
    'ffn/gemm.py: "GROUP_M": 8, | 8 -> 9': "the order of the programs: affects the speed alone",
    (
        "norm/backward.py: if STAGES > 1:  # a pipelined loop would copy it to shared memory for each block |"
        " 1 -> 0"
    ): SPEED,
    (
        "norm/backward.py: if STAGES > 1:  # a pipelined loop would copy it to shared memory for each block |"
        " STAGES > 1 -> ((STAGES) >= (1))"
    ): SPEED,
    "philox.py: if p == 0: | 0 -> -1": "at p = 0 the mask keeps every element too",
}
