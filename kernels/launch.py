"""A kernel launch as data: run it, or compile it ahead of time for a GPU that is not there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kernels.spec import Build
from kernels.tuning import Tile

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` unwraps constexprs first, which costs a launch more than the
    division."""
    return -(-a // b)


def options(tile: Tile) -> dict[str, Any]:
    """What Triton is told beside a kernel's arguments; fused multiply-adds are named since their default is
    to change."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name, and the tile that gives warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], available: dict[str, Any], tile: Tile) -> Launch:
        """A launch with those of the `available` arguments that the kernel takes, and the tile's block
        sizes."""
        available = available | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        return cls(kernel, grid, {name: available[name] for name in kernel.arg_names}, tile)

    def run(self) -> None:
        """Launches on the current device; an empty grid launches nothing."""
        if self.grid[0] > 0:
            self.kernel[self.grid](**self.arguments, **options(self.tile))

    def build(self, label: str, *, gated: bool = False) -> Build:
        """What Triton would compile for this launch; its tensors may be on the meta device."""
        constexpr = {p.name for p in self.kernel.params if p.is_constexpr}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible = set()
        for name, value in self.arguments.items():
            if name in constexpr or value is None or (type(value) is int and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                divisible.add(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.add(name)
        return Build(self.kernel, signature, constants, self.tile, label, gated, frozenset(divisible))


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: float32 stays float32 unless torch's own products may use tf32."""
    return (
        "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    )
