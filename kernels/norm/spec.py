"""What `layer_norm` and `add_layer_norm` say about themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.norm import add_layer_norm, layer_norm, reference
from kernels.spec import Argument, Build, Case, NumberArgument, OpSpec, SeedArgument, TensorArgument, randn


def _case(n: int, c: int, *tags: str, **options: Any) -> Case:
    return Case({"N": n, "C": c}, options, frozenset(tags or ("small",)))


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    n, c = case["N"], case["C"]
    parameter_dtype = case.options.get("parameters", dtype)
    x = randn((n, c), torch.float32, device, generator)
    if "magnitude" in case.options:  # all of float16's range, and nothing beyond
        x = x.tanh() * case.options["magnitude"]
    x = (x + case.options.get("mean", 0)).to(dtype)
    bias = randn((c,), parameter_dtype, device, generator) if case.options.get("bias", True) else None
    return {
        "x": x,
        "weight": randn((c,), parameter_dtype, device, generator),
        "bias": bias,
    }


def _add_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    inputs = _inputs(case, dtype, device, generator)
    inputs["residual"] = randn((case["N"], case["C"]), case.options.get("residual", dtype), device, generator)
    return inputs | {n: case.options[n] for n in ("dropout_p", "seed") if n in case.options}


def _flops(case: Case, direction: str) -> int:
    return (8 if direction == "forward" else 14) * case["N"] * case["C"]


def _bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    return (2 if direction == "forward" else 3) * case["N"] * case["C"] * dtype.itemsize


def _add_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    residual = case.options.get("residual", dtype).itemsize
    elements = case["N"] * case["C"]
    return elements * (2 * dtype.itemsize + (2 if direction == "forward" else 3) * residual)


_COLUMNS = (1, 17, 64, 255, 256, 768, 1023, 1600, 4096)
_BENCH = tuple(
    _case(n, c, "bench", "gpu") for n, c in ((65536, 768), (32768, 768), (16384, 1600), (8192, 4096))
)
_PARAMETERS: dict[str, Argument] = {
    "weight": TensorArgument(("C",), any_float=True),
    "bias": TensorArgument(("C",), optional=True, any_float=True),
    "eps": NumberArgument(0, torch.finfo(torch.float32).max),
}


def _builds(architecture: int) -> Iterator[Build]:
    from kernels.norm.builds import layer_norm_builds

    return layer_norm_builds()


def _add_builds(architecture: int) -> Iterator[Build]:
    from kernels.norm.builds import add_layer_norm_builds

    return add_layer_norm_builds()


LAYER_NORM = OpSpec(
    name="layer_norm",
    family="norm",
    function=layer_norm,
    reference=reference.layer_norm,
    arguments={"x": TensorArgument(("...", "C")), **_PARAMETERS},
    make_inputs=_inputs,
    gradients=("x", "weight", "bias"),
    cases=(
        _case(5, 17),
        _case(3, 768),
        _case(7, 64, bias=False),
        _case(4, 256, mean=1000),
        _case(6, 1),
        _case(5, 96, parameters=torch.float32),
        *(_case(13, c, "edge") for c in _COLUMNS),
        _case(67, 384, "edge"),
        _case(3, 16384, "edge"),
        _case(5, 768, "edge", mean=1000, parameters=torch.float32),
        _case(3, 768, "edge", magnitude=60000),
        *(
            _case(n, c, "slow", bias=bias)
            for n in (1, 129, 301)
            for c in (*_COLUMNS, 5120, 32768)
            for bias in (True, False)
        ),
        *_BENCH,
    ),
    flops=_flops,
    bytes=_bytes,
    builds=_builds,
)

ADD_LAYER_NORM = OpSpec(
    name="add_layer_norm",
    family="norm",
    function=add_layer_norm,
    reference=reference.add_layer_norm,
    arguments={
        "x": TensorArgument(("...", "C")),
        "residual": TensorArgument(("...", "C"), any_float=True),
        **_PARAMETERS,
        "dropout_p": NumberArgument(0, 1, open_high=True),
        "seed": SeedArgument(),
    },
    make_inputs=_add_inputs,
    gradients=("x", "residual", "weight", "bias"),
    cases=(
        _case(5, 17),
        _case(3, 768),
        _case(7, 64, bias=False),
        _case(5, 96, residual=torch.float32, parameters=torch.float32),
        _case(6, 40, dropout_p=0.4, seed=11),
        *(_case(11, c, "edge", dropout_p=0.1, seed=3) for c in _COLUMNS),
        _case(67, 384, "edge", residual=torch.float32),
        _case(5, 768, "edge", mean=1000, residual=torch.float32, parameters=torch.float32),
        *(
            _case(n, c, "slow", residual=residual, dropout_p=p, seed=2**40 + 1)
            for n in (1, 129)
            for c in _COLUMNS
            for residual in (torch.float32, torch.bfloat16)
            for p in (0.0, 0.5)
        ),
        *_BENCH,
    ),
    flops=_flops,
    bytes=_add_bytes,
    builds=_add_builds,
)

SPECS = (LAYER_NORM, ADD_LAYER_NORM)
