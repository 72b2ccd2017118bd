"""The specifications of `layer_norm`, `add_layer_norm` and `dropout`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.norm import add_layer_norm, dropout, layer_norm, reference
from kernels.spec import Argument, Build, Case, NumberArgument, OpSpec, SeedArgument, TensorArgument, randn


def _case(n: int, c: int, *tags: str, **options: Any) -> Case:
    return Case({"N": n, "C": c}, options, frozenset(tags or ("small",)))


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    n, c = case["N"], case["C"]
    parameter_dtype = case.options.get("parameters", dtype)
    x = randn((n, c), torch.float32, device, generator)
    if "magnitude" in case.options:  # bounds the values by a magnitude that fits float16
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


def _dropout_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    x = randn((case["N"], case["C"]), torch.float32, device, generator)
    if "magnitude" in case.options:
        x = x.tanh() * case.options["magnitude"]
    return {"x": x.to(dtype), "p": case.options["p"], "seed": case.options["seed"]}


def _flops(case: Case, direction: str) -> int:
    return (8 if direction == "forward" else 14) * case["N"] * case["C"]


def _bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    return (2 if direction == "forward" else 3) * case["N"] * case["C"] * dtype.itemsize


def _add_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    y, residual = dtype.itemsize, case.options.get("residual", dtype).itemsize
    # Backward reads z in place of new_residual where y is narrower; then forward stores it.
    z = min(y, residual) if direction == "backward" or y < residual else 0
    return case["N"] * case["C"] * (2 * y + 2 * residual + z)


def _dropout_flops(case: Case, direction: str) -> int:
    return case["N"] * case["C"]


def _dropout_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    return 2 * case["N"] * case["C"] * dtype.itemsize


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

    return layer_norm_builds(architecture)


def _add_builds(architecture: int) -> Iterator[Build]:
    from kernels.norm.builds import add_layer_norm_builds

    return add_layer_norm_builds(architecture)


def _dropout_builds(architecture: int) -> Iterator[Build]:
    from kernels.norm.builds import dropout_builds

    return dropout_builds()


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
        _case(5, 96, residual=torch.float32, parameters=torch.float32),
        _case(3, 768),
        _case(7, 64, bias=False),
        _case(6, 40, dropout_p=0.4, seed=11),
        *(_case(11, c, "edge", dropout_p=0.1, seed=3) for c in _COLUMNS),
        _case(67, 384, "edge", residual=torch.float32),
        *(
            _case(5, c, "edge", residual=torch.float32, parameters=torch.float32, dropout_p=0.1, seed=3)
            for c in (17, 255, 1600)
        ),
        _case(7, 64, "edge", bias=False, residual=torch.float32),
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

DROPOUT = OpSpec(
    name="dropout",
    family="norm",
    function=dropout,
    reference=reference.dropout,
    arguments={
        "x": TensorArgument(("...", "C")),
        "p": NumberArgument(0, 1, open_high=True),
        "seed": SeedArgument(),
    },
    make_inputs=_dropout_inputs,
    gradients=("x",),
    cases=(
        _case(5, 17, p=0.1, seed=1),
        _case(3, 768, p=0.5, seed=-1),
        _case(7, 64, p=0.3, seed=2),
        _case(6, 1, p=0.9, seed=2**40),
        *(_case(13, c, "edge", p=0.1, seed=3) for c in _COLUMNS),
        _case(5, 64, "edge", p=0.0, seed=2),
        _case(67, 384, "edge", p=0.25, seed=-(2**63)),
        _case(3, 768, "edge", p=0.1, seed=4, magnitude=50000),
        *(
            _case(n, c, "slow", p=p, seed=2**63 - 1)
            for n in (1, 129, 301)
            for c in _COLUMNS
            for p in (0.2, 0.7)
        ),
        *(_case(n, c, "bench", "gpu", p=0.1, seed=5) for n, c in ((16384, 768), (8192, 1600))),
    ),
    flops=_dropout_flops,
    bytes=_dropout_bytes,
    builds=_dropout_builds,
    follows_autocast=False,
)

SPECS = (LAYER_NORM, ADD_LAYER_NORM, DROPOUT)
