"""The specification of an op, from which tests, benches, preflight and the ahead-of-time report are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.tuning import Tile

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHORT_DTYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    """One call of an op: sizes, options and tags.

    Args:
        sizes: Dimension name -> size, e.g. ``{"B": 2, "H": 3, "T": 63, "D": 64}``.
        options: Settings that differ from the op's defaults; the op's `make_inputs` interprets them.
        tags: "small" and "edge" cases run in every test run, "slow" ones form the long grid, "bench" ones are
            timed, and "gpu" ones need a GPU's memory or speed.
    """

    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset({"small"})

    @property
    def id(self) -> str:
        """``B2-H3-T63-D64``, then each option as ``name=value``."""
        return "-".join(
            [f"{k}{v}" for k, v in self.sizes.items()] + [f"{k}={v}" for k, v in self.options.items()]
        )

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class TensorArgument:
    """A tensor parameter; `dims` are dimension names or fixed sizes, as in `checks.shapes`."""

    dims: tuple[str, ...]
    dtype: torch.dtype | None = None  # None: the dtype that the op computes in
    optional: bool = False
    last_contiguous: bool = False
    any_float: bool = False  # the dtype may differ from that of the other floating-point tensors


@dataclass(frozen=True)
class NumberArgument:
    """A finite number in [low, high], or in [low, high) with `open_high`; an int with `integer`."""

    low: float = float("-inf")
    high: float = float("inf")
    open_high: bool = False
    optional: bool = False
    integer: bool = False


@dataclass(frozen=True)
class ChoiceArgument:
    """One of a fixed set of values: strings, booleans or None."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class SeedArgument:
    """A seed: None, an int of 64 bits, or a 0-d int64 tensor on the op's device."""


Argument = TensorArgument | NumberArgument | ChoiceArgument | SeedArgument


@dataclass(frozen=True)
class Build:
    """One ahead-of-time compilation: a kernel specialised for dtypes, constants and a tile.

    Args:
        kernel: The ``@triton.jit`` function.
        signature: Run-time argument -> Triton type, e.g. ``{"q_ptr": "*bf16", "T": "i32"}``.
        constants: ``tl.constexpr`` argument -> value.
        tile: The number of warps and stages.
        label: The build's name in the report, e.g. ``bf16-D64``.
        gated: Whether the report fails if the build breaks a gate of `bench.gates`.
        divisible: Arguments that are multiples of 16 (aligned pointers and strides).
        exceptions: Gate that the build may break -> the reason.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    tile: Tile
    label: str
    gated: bool = False
    divisible: frozenset[str] = frozenset()
    exceptions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """An op, keyed by its public name.

    Args:
        name: The public name.
        family: The op family, which names a folder of this package and a bench.
        function: The public function.
        reference: The op's definition in plain torch, with the same signature.
        arguments: Every parameter of the function; the tests generate bad arguments from it.
        make_inputs: ``(case, dtype, device, generator) -> keyword arguments``.
        gradients: The inputs that take gradients; empty for an inference-only op.
        cases: The calls to test and to time.
        flops: ``(case, "forward" | "backward") -> floating-point operations``.
        bytes: ``(case, dtype, "forward" | "backward") -> bytes that must be moved at least``.
        builds: ``(architecture) -> Builds``, where 90 means sm_90; imports Triton when called. None if the op
            has no kernel of its own.
        dtypes: The dtypes that the kernels support; float64 runs on the reference only.
        follows_autocast: Whether the first output has the autocast dtype under autocast.
        writes: The inputs that the op writes, such as caches.
        terms: ``(inputs) -> the number of values that an element of a gradient sums one after another``. None
            if they are few, or if partial sums are added.
    """

    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Mapping[str, Argument]
    make_inputs: Callable[[Case, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    gradients: tuple[str, ...]
    cases: tuple[Case, ...]
    flops: Callable[[Case, str], int]
    bytes: Callable[[Case, torch.dtype, str], int]
    builds: Callable[[int], Iterable[Build]] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    follows_autocast: bool = True
    writes: tuple[str, ...] = ()
    terms: Callable[[Mapping[str, Any]], int] | None = None

    def tagged(self, *tags: str) -> tuple[Case, ...]:
        """The cases that carry any of `tags`."""
        return tuple(case for case in self.cases if case.tags & set(tags))


def randn(
    shape: Iterable[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Standard normal values, drawn in float32 and then rounded, so that all dtypes get the same values."""
    values = torch.randn(tuple(shape), dtype=torch.float32, device=generator.device, generator=generator)
    return values.to(device=device, dtype=dtype)
