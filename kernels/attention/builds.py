"""The ahead-of-time builds of attention: each kernel at its tiles, from tensors on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from kernels import tuning
from kernels.attention.backward import attention_backward
from kernels.attention.decode import attention_decode
from kernels.attention.forward import attention_forward
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build

_HEAD_DIMENSIONS = (16, 32, 64, 96, 128, 256)
_GATED_HEAD_DIMENSIONS = (64, 128)
_WITH_START = {"masked": "key_start is a second comparison for each element"}
_WIDE = {  # the kernels of D 128
    "_attention_bwd_dq_kernel": {
        "spills": "only the masked loop spills; 128 registers let two programs share a multiprocessor"
    },
    "_attention_bwd_dkdv_kernel": dict.fromkeys(
        ("copies", "spills", "masked"), "an H200 is slower with tiles that prefetch in 255 registers"
    ),
}
_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"key_start": True}, {"dropout_p": 0.1}, {"hkv": 2})


def causal_builds(architecture: int) -> Iterator[Build]:
    """Forward and backward at every dtype and head dimension; the variants at the gated head dimensions."""
    for dtype in FLOAT_DTYPES:
        for d in _HEAD_DIMENSIONS:
            for variant in _VARIANTS if d in _GATED_HEAD_DIMENSIONS else _VARIANTS[:1]:
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
    """The kernels of one head dimension `d` and variant."""
    b, h, t = 2, 4, 1024
    options = {"start": key_start, "dropout": dropout_p > 0, "grouped": hkv < h}
    label = "-".join([SHORT_DTYPE[dtype], f"D{d}", *(name for name, used in options.items() if used)])
    gated = dtype != torch.float32 and d in _GATED_HEAD_DIMENSIONS and architecture in (80, 90)
    exceptions = _WITH_START if key_start else {}
    tiles = tuning.attention_tiles(architecture, dtype.itemsize, d, dropout=dropout_p > 0, grouped=hkv < h)

    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    q, out, grad, dq = (torch.empty(b, h, t, d, **meta) for _ in range(4))
    k, v, dk, dv = (torch.empty(b, hkv, t, d, **meta) for _ in range(4))
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "key_start": torch.empty(b, t, device="meta", dtype=torch.int32) if key_start else None,
        "seed": torch.empty((), device="meta", dtype=torch.int64) if dropout_p else None,
        "out": out,
        "lse2": torch.empty(b, h, t, device="meta"),
        "scale": 0.125,
        "dropout_p": dropout_p,
    }
    yield attention_forward(**arguments, tile=tiles.forward).build(label, gated=gated, exceptions=exceptions)

    arguments |= {"grad": grad, "dq": dq, "dk": dk, "dv": dv}
    for launch in attention_backward(**arguments, tiles=tiles._replace(atomic=None)):
        wide = _WIDE.get(launch.kernel.__name__, {}) if d == 128 else {}
        yield launch.build(label, gated=gated, exceptions=exceptions | wide)
    if d in _GATED_HEAD_DIMENSIONS and dtype != torch.float32:
        atomic = tiles._replace(atomic=tiles.atomic or tuning.ATTENTION_ATOMIC[d])
        for launch in attention_backward(**arguments, tiles=atomic):
            yield launch.build(f"{label}-atomic", gated=gated and tiles.atomic is not None)


def decode_builds(architecture: int) -> Iterator[Build]:
    """Decoding at every dtype and head dimension, with a short and a long cache."""
    for dtype, keys in itertools.product(FLOAT_DTYPES, (1024, 4096)):
        for d in _HEAD_DIMENSIONS:
            meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
            q, out = (torch.empty(2, 4, 1, d, **meta) for _ in range(2))
            k, v = (torch.empty(2, 4, keys, d, **meta) for _ in range(2))
            cache_len, key_start = (torch.empty(2, device="meta", dtype=torch.int32) for _ in range(2))
            tile = tuning.attention_decode_tile(architecture, dtype.itemsize, d, keys)
            launch = attention_decode(
                q=q,
                k=k,
                v=v,
                cache_len=cache_len,
                key_start=key_start,
                out=out,
                counter=cache_len,
                scale=0.125,
                splits=16 * tile.num_warps,
                tile=tile,
            )
            yield launch.build(f"{SHORT_DTYPE[dtype]}-D{d}-T{keys}")
