"""The specification of `gelu_ffn`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from kernels.ffn import gelu_ffn, reference
from kernels.spec import Build, Case, ChoiceArgument, OpSpec, TensorArgument, randn


def _case(n: int, c: int, i: int, *tags: str, **options: Any) -> Case:
    return Case({"N": n, "C": c, "I": i}, options, frozenset(tags or ("small",)))


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    n, c, i = case["N"], case["C"], case["I"]
    bias = case.options.get("bias", True)
    return {
        "x": randn((n, c), dtype, device, generator) * case.options.get("magnitude", 1),
        "w_up": randn((i, c), dtype, device, generator) / math.sqrt(c),
        "b_up": randn((i,), dtype, device, generator) if bias else None,
        "w_down": randn((c, i), dtype, device, generator) / math.sqrt(i),
        "b_down": randn((c,), dtype, device, generator) if bias else None,
        "approximate": case.options.get("approximate", "tanh"),
    }


def _flops(case: Case, direction: str) -> int:
    return (4 if direction == "forward" else 8) * case["N"] * case["C"] * case["I"]


def _bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    n, c, i = case["N"], case["C"], case["I"]
    forward = 2 * n * c + 2 * c * i + n * i
    return (forward if direction == "forward" else 3 * n * c + 4 * c * i + n * i) * dtype.itemsize


def _builds(architecture: int) -> Iterator[Build]:
    from kernels.ffn.builds import gelu_ffn_builds

    return gelu_ffn_builds()


GELU_FFN = OpSpec(
    name="gelu_ffn",
    family="ffn",
    function=gelu_ffn,
    reference=reference.gelu_ffn,
    arguments={
        "x": TensorArgument(("...", "C")),
        "w_up": TensorArgument(("I", "C")),
        "b_up": TensorArgument(("I",), optional=True),
        "w_down": TensorArgument(("Cout", "I")),
        "b_down": TensorArgument(("Cout",), optional=True),
        "approximate": ChoiceArgument(("tanh", "none")),
    },
    make_inputs=_inputs,
    gradients=("x", "w_up", "b_up", "w_down", "b_down"),
    cases=(
        _case(5, 16, 64),
        _case(3, 17, 33, approximate="none"),
        _case(7, 32, 48, bias=False),
        _case(4, 16, 32, magnitude=3000),
        _case(4, 16, 32, magnitude=3000, approximate="none"),
        *(_case(13, c, i, "edge") for c, i in ((1, 4), (17, 68), (64, 255), (65, 1023))),
        _case(67, 48, 600, "edge", approximate="none"),
        *(
            _case(n, c, i, "slow", approximate=approximate, bias=bias)
            for n in (1, 129)
            for c, i in ((17, 33), (64, 256), (255, 1020), (768, 1000))
            for approximate in ("tanh", "none")
            for bias in (True, False)
        ),
        _case(65536, 768, 3072, "bench"),
        *(_case(n, c, 4 * c, "bench", "gpu") for n, c in ((32768, 768), (16384, 1600))),
    ),
    flops=_flops,
    bytes=_bytes,
    builds=_builds,
)

SPECS = (GELU_FFN,)
