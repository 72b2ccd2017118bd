"""What the family compiles ahead of time: each kernel at its tiles, for tensors that need not exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.ffn.gelu import launch_backward, launch_forward
from kernels.ffn.gemm import launch_gelu_gemm
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build
from kernels.tuning import Tile

_ROWS, _PROGRAMS = 4096, 64
_GEMM_TILES = {
    80: Tile(128, 128, 8, 3),
    90: Tile(128, 256, 8, 3),
    100: Tile(128, 128, 8, 3),
}  # others: Tile(64, 128, 4, 2)


def gelu_ffn_builds(architecture: int) -> Iterator[Build]:
    """Both forms of GELU, forward and backward, and the product with GELU in its epilogue."""
    for dtype in FLOAT_DTYPES:
        for f in (512, 3072):
            for tanh in (True, False):
                gated = dtype == torch.bfloat16 and f == 3072
                label = f"{SHORT_DTYPE[dtype]}-I{f}-{'tanh' if tanh else 'erf'}"
                h, bias, partial = (
                    _empty(dtype, _ROWS, f),
                    _empty(dtype, f),
                    _empty(torch.float32, _PROGRAMS, f),
                )
                yield launch_forward(h, bias, h, tanh).build(label, gated=gated)
                yield launch_backward(h, h, bias, h, h, partial, tanh, _PROGRAMS).build(label, gated=gated)
        c, f = 768, 3072
        x, w, bias, h = (
            _empty(dtype, _ROWS, c),
            _empty(dtype, f, c),
            _empty(dtype, f),
            _empty(dtype, _ROWS, f),
        )
        tile = (
            _GEMM_TILES.get(architecture, Tile(64, 128, 4, 2)) if dtype.itemsize == 2 else Tile(64, 64, 4, 2)
        )
        gated = dtype == torch.bfloat16
        yield launch_gelu_gemm(x, w, bias, h, h, True, tile).build(
            f"{SHORT_DTYPE[dtype]}-C{c}-I{f}", gated=gated
        )


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
