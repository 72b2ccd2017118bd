"""The ahead-of-time builds of the feed-forward: each kernel at its tile, from tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.ffn.gelu import bias_gelu_backward, bias_gelu_forward
from kernels.ffn.gemm import gelu_gemm_forward
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build
from kernels.tuning import Tile, gelu_backward_tile

_ROWS, _PROGRAMS = 4096, 64
# The 16-bit tile of the matmul with GELU, where `bench.tune` starts; the tuning table has none. A wider tile
# takes all 255 registers on sm_90, and then each HGMMA of Triton 3.6 waits for the one before.
GEMM_TILE = Tile(128, 128, 8, 3)


def gelu_ffn_builds() -> Iterator[Build]:
    """Both forms of GELU, forward and backward, and the matmul with GELU in its epilogue."""
    for dtype in FLOAT_DTYPES:
        for f in (512, 3072):
            for tanh in (True, False):
                gated = dtype == torch.bfloat16 and f == 3072
                label = f"{SHORT_DTYPE[dtype]}-I{f}-{'tanh' if tanh else 'erf'}"
                h, bias = _empty(dtype, _ROWS, f), _empty(dtype, f)
                yield bias_gelu_forward(h=h, bias=bias, a=h, tanh=tanh).build(label, gated=gated)
                yield bias_gelu_backward(
                    da=h,
                    h=h,
                    bias=bias,
                    dh=h,
                    a=h,
                    partial_dbias=_empty(torch.float32, _PROGRAMS, f),
                    tanh=tanh,
                    programs=_PROGRAMS,
                    tile=gelu_backward_tile(f, dtype.itemsize),
                ).build(label, gated=gated)

        c, f = 768, 3072
        h = _empty(dtype, _ROWS, f)
        yield gelu_gemm_forward(
            x=_empty(dtype, _ROWS, c),
            w=_empty(dtype, f, c),
            bias=_empty(dtype, f),
            h=h,
            a=h,
            tanh=True,
            tile=GEMM_TILE if dtype.itemsize == 2 else Tile(64, 64, 4, 2),
        ).build(f"{SHORT_DTYPE[dtype]}-C{c}-I{f}", gated=dtype == torch.bfloat16)


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
