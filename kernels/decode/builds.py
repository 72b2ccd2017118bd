"""The ahead-of-time builds of decoding, at the shapes of GPT-2 124M and xl."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.decode import PARAMETERS
from kernels.decode.argmax import decode_argmax_forward
from kernels.decode.block import decode_block_forward
from kernels.decode.embedding import decode_embedding_forward
from kernels.decode.linear import decode_linear
from kernels.spec import FLOAT_DTYPES, SHORT_DTYPE, Build
from kernels.tuning import decode_argmax_tile, decode_embedding_tile, decode_linear_tile

_HEADS = {768: 12, 1600: 25}  # columns of the residual stream -> heads of 64
_NAMES = ("qkv", "attention", "proj", "up", "down")


def embedding_builds(architecture: int) -> Iterator[Build]:
    """The embedding in every dtype."""
    for dtype in FLOAT_DTYPES:
        x, lengths = _empty(dtype, 1024, 768), _empty(torch.int32, 8)
        yield decode_embedding_forward(
            token=_empty(torch.int64, 8),
            cache_len=lengths,
            token_weight=x,
            position_weight=x,
            key_start=lengths,
            out=x[:8],
            tile=decode_embedding_tile(architecture, 768),
        ).build(f"{SHORT_DTYPE[dtype]}-C768")


def block_builds(architecture: int) -> Iterator[Build]:
    """The five launches of a block, for one sequence and for eight."""
    for dtype in FLOAT_DTYPES:
        for c, heads in _HEADS.items():
            for b in (1, 8):
                sizes = {"C": c, "R": 3 * c, "HD": c, "I": 4 * c}
                cache, lengths = _empty(dtype, b, heads, 1024, 64), _empty(torch.int32, b)
                x = _empty(dtype, b, c)
                parameters: dict[str, Any] = {
                    name: _empty(dtype, *(sizes[dim] for dim in dims)) for name, dims in PARAMETERS.items()
                }
                launches = decode_block_forward(
                    x=x,
                    k_cache=cache,
                    v_cache=cache,
                    cache_len=lengths,
                    **parameters,
                    key_start=lengths,
                    scale=0.125,
                    eps=1e-5,
                    approximate="tanh",
                    out=x,
                    architecture=architecture,
                    splits=16,
                )
                for name, launch in zip(_NAMES, launches, strict=True):
                    label = f"{SHORT_DTYPE[dtype]}-C{c}-B{b}-{name}"
                    gated = _gated(dtype, c, b, architecture) and name != "attention"
                    yield launch.build(label, gated=gated)


def head_builds(architecture: int) -> Iterator[Build]:
    """The head at GPT-2's vocabulary, for one sequence and for eight."""
    for dtype in FLOAT_DTYPES:
        for c in _HEADS:
            for b in (1, 8):
                x, norm, weight = _empty(dtype, b, c), _empty(dtype, c), _empty(dtype, 50257, c)
                launch = decode_linear(
                    x=x,
                    weight=weight,
                    bias=None,
                    out=_empty(torch.float32, b, 50257),
                    tile=decode_linear_tile(architecture, dtype.itemsize, *weight.shape, b),
                    norm=(norm, norm),
                    eps=1e-5,
                )
                gated = _gated(dtype, c, b, architecture)
                yield launch.build(f"{SHORT_DTYPE[dtype]}-C{c}-B{b}", gated=gated)


def argmax_builds(architecture: int) -> Iterator[Build]:
    """The argmax at GPT-2's vocabulary in every dtype, for one sequence and for eight."""
    for dtype in FLOAT_DTYPES:
        tile = decode_argmax_tile(architecture, dtype.itemsize, 50257)
        for b in (1, 8):
            launch = decode_argmax_forward(
                logits=_empty(dtype, b, 50257), out=_empty(torch.int64, b), tile=tile
            )
            yield launch.build(f"{SHORT_DTYPE[dtype]}-B{b}", gated=dtype == torch.float32)


def _gated(dtype: torch.dtype, c: int, b: int, architecture: int) -> bool:
    """Eight rows of xl spill a few registers."""
    return dtype == torch.bfloat16 and (c == 768 or b == 1) and architecture in (80, 90)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
