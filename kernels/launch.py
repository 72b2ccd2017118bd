"""A kernel launch as data: it can run on the current device, or be compiled ahead of time without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from kernels.philox import threshold
from kernels.spec import Build
from kernels.tuning import Tile

_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}

_collected: list[Launch] | None = None  # where `Launch.run` puts launches instead of running them


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    # Not `triton.cdiv`: it unwraps constexprs first, which costs a launch more time than the division.
    return -(-a // b)


def options(tile: Tile) -> dict[str, Any]:
    """The compiler options of a launch with this tile."""
    # Triton is about to change its default for fused multiply-adds, so the option is explicit.
    chosen: dict[str, Any] = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    if tile.maxnreg is not None:
        chosen["maxnreg"] = tile.maxnreg
    if tile.pdl:
        chosen["launch_pdl"] = True
    return chosen


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name, and the tile that gives warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], available: dict[str, Any], tile: Tile) -> Launch:
        """Picks the kernel's arguments by name from `available` and the tile."""
        available = available | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PDL": tile.pdl}
        return cls(kernel, grid, {name: available[name] for name in kernel.arg_names}, tile)

    def run(self) -> None:
        """Launches on the current device, or is collected; an empty grid launches nothing."""
        if self.grid[0] <= 0:
            return
        if _collected is None:
            self.kernel[self.grid](**self.arguments, **options(self.tile))
        elif (launch := self._replace(arguments=_without_data(self.arguments))) not in _collected:
            _collected.append(launch)

    def compile(self) -> None:
        """Compiles the kernel and loads it on the current device, so that `run` has nothing left to compile.

        Triton releases Python's global lock for most of that time: threads compile in parallel.
        """
        arguments = _without_data(self.arguments)
        ordered = [arguments[name] for name in self.kernel.arg_names]
        compiled = self.kernel.warmup(*ordered, grid=self.grid, **options(self.tile))
        _ = compiled.run  # a property, which loads the kernel

    def build(self, label: str, *, gated: bool = False, exceptions: Mapping[str, str] | None = None) -> Build:
        """What Triton would compile for this launch. The tensors may be on the meta device."""
        constexpr = {p.name for p in self.kernel.params if p.is_constexpr}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible = set()

        for name, value in self.arguments.items():
            if name in constexpr or value is None or (type(value) is int and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{_TRITON_TYPES[value.dtype]}"
                divisible.add(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.add(name)

        return Build(
            kernel=self.kernel,
            signature=signature,
            constants=constants,
            tile=self.tile,
            label=label,
            gated=gated,
            divisible=frozenset(divisible),
            exceptions=exceptions or {},
        )


def _without_data(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with a dtype in place of each tensor, which to Triton is a tensor at an aligned address."""
    return {name: a.dtype if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


@contextmanager
def collect() -> Iterator[list[Launch]]:
    """Context manager: inside, in all threads, launches do not run, and results stay uninitialised.

    Gives the list of the different launches, with dtypes in place of their tensors.
    """
    global _collected
    launches: list[Launch] = []
    _collected = launches
    try:
        yield launches
    finally:
        _collected = None


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: float32 matmuls use tf32 only where torch's own matmuls may."""
    allows_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allows_tf32 else "ieee"


def dropout_arguments(seed: torch.Tensor | None, dropout_p: float) -> dict[str, Any]:
    """The kernel arguments of dropout. It is on where there is a seed: a 0-d int64 tensor on the device."""
    return {
        "seed_ptr": seed,
        "threshold": threshold(dropout_p),
        "keep_scale": 1 / (1 - dropout_p),
    }
