"""What the family compiles ahead of time: each kernel at its tiles, for tensors that need not exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels import tuning
from kernels.attention.backward import launch_backward
from kernels.attention.decode import launch_decode
from kernels.attention.forward import launch_forward
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build

_SIZES = (16, 32, 64, 96, 128, 256)
_GATED = (64, 128)
_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"key_start": True}, {"dropout_p": 0.1}, {"hkv": 2})


def causal_builds(architecture: int) -> Iterator[Build]:
    """Forward and backward at every head dimension and dtype; key_start, dropout and grouped heads where it
    is gated."""
    for dtype in FLOAT_DTYPES:
        for d in _SIZES:
            for variant in _VARIANTS if d in _GATED else _VARIANTS[:1]:
                yield from _causal(architecture, dtype, d, **variant)


def _causal(
    architecture: int,
    dtype: torch.dtype,
    d: int,
    *,
    key_start: bool = False,
    dropout_p: float = 0.0,
    hkv: int = 4,
) -> Iterator[Build]:
    b, h, t = 2, 4, 1024
    options = {"start": key_start, "dropout": dropout_p > 0, "grouped": hkv < h}
    label = "-".join([SHORT_DTYPE[dtype], f"D{d}", *(name for name, used in options.items() if used)])
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    q, out, grad, dq = (torch.empty(b, h, t, d, **meta) for _ in range(4))
    k, v, dk, dv = (torch.empty(b, hkv, t, d, **meta) for _ in range(4))
    lse2 = torch.empty(b, h, t, device="meta")
    start = torch.empty(b, t, device="meta", dtype=torch.int32) if key_start else None
    seed = torch.empty((), device="meta", dtype=torch.int64) if dropout_p else None
    gated = dtype != torch.float32 and d in _GATED and architecture in (80, 90)

    tiles = tuning.attention_tiles(architecture, dtype.itemsize, d, dropout=dropout_p > 0, grouped=hkv < h)
    yield launch_forward(q, k, v, start, seed, out, lse2, 0.125, dropout_p, tiles.forward).build(
        label, gated=gated
    )
    inputs = (grad, q, k, v, out, lse2, start, seed)
    for launch in launch_backward(*inputs, dq, dk, dv, 0.125, dropout_p, tiles._replace(five=None)):
        yield launch.build(label, gated=gated)
    if d in _GATED and dtype != torch.float32:
        five = tiles._replace(five=tiles.five or tuning.ATTENTION_FIVE[d])
        for launch in launch_backward(*inputs, dq, dk, dv, 0.125, dropout_p, five):
            yield launch.build(f"{label}-five", gated=gated and tiles.five is not None)


def decode_builds(architecture: int) -> Iterator[Build]:
    """Decoding at every head dimension and dtype."""
    for dtype in FLOAT_DTYPES:
        for d in _SIZES:
            meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
            q, out = (torch.empty(2, 4, 1, d, **meta) for _ in range(2))
            k, v = (torch.empty(2, 4, 1024, d, **meta) for _ in range(2))
            cache_len, start = (torch.empty(2, device="meta", dtype=torch.int32) for _ in range(2))
            tile = tuning.attention_decode_tile(architecture, dtype.itemsize, d)
            for launch in launch_decode(q, k, v, cache_len, start, out, 0.125, 8, tile):
                yield launch.build(f"{SHORT_DTYPE[dtype]}-D{d}")
