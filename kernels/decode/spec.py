"""The specification of `decode_embedding`, `decode_block`, `decode_head` and `decode_argmax`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from kernels.decode import (
    CACHE,
    PARAMETERS,
    decode_argmax,
    decode_block,
    decode_embedding,
    decode_head,
    reference,
)
from kernels.spec import Build, Case, ChoiceArgument, NumberArgument, OpSpec, TensorArgument, randn

_LENGTHS = {
    "cache_len": TensorArgument(("B",), torch.int32),
    "key_start": TensorArgument(("B",), torch.int32, optional=True),
}
_EPS = NumberArgument(0, torch.finfo(torch.float32).max)


def _float(*dims: str, optional: bool = False) -> TensorArgument:
    return TensorArgument(dims, optional=optional, last_contiguous=True)


def _lengths(case: Case, limit: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """cache_len and key_start. Options: cache_len "short" goes down to 0, "long" beyond `limit`."""
    b, kind = case["B"], case.options.get("cache_len")
    most, least = limit + 3 if kind == "long" else limit, 0 if kind == "short" else 1
    lengths = torch.linspace(most, least, b, device=device).to(torch.int32)
    padded = case.options.get("key_start") == "padding"
    return {"cache_len": lengths, "key_start": lengths // 3 if padded else None}


def _weight(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """A vector of standard normal values, or a matrix that maps such vectors to values of about 1."""
    values = randn(shape, torch.float32, device, generator)
    return (values / math.sqrt(shape[1]) if len(shape) == 2 else values).to(dtype)


def _embedding_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    b, c, v, p = (case[n] for n in ("B", "C", "V", "P"))
    token = torch.randint(v, (b,), device=generator.device, generator=generator)
    return {
        "token": token.to(device),
        "token_weight": randn((v, c), dtype, device, generator),
        "position_weight": randn((p, c), dtype, device, generator),
        **_lengths(case, p, device),
    }


def _block_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    sizes = _sizes(case)
    has_bias = case.options.get("bias", True)
    parameters = {
        name: _weight(tuple(sizes[dim] for dim in dims), dtype, device, generator)
        if has_bias or not name.endswith("bias")
        else None
        for name, dims in PARAMETERS.items()
    }
    cache = tuple(sizes[dim] for dim in CACHE)
    return {
        "x": randn((sizes["B"], sizes["C"]), dtype, device, generator),
        "k_cache": randn(cache, dtype, device, generator),
        "v_cache": randn(cache, dtype, device, generator),
        **parameters,
        **_lengths(case, sizes["Tmax"], device),
        **{name: case.options[name] for name in ("scale", "eps", "approximate") if name in case.options},
    }


def _sizes(case: Case) -> dict[str, int]:
    """The case's sizes, with those that follow from them."""
    hkv = case.sizes.get("Hkv", case["H"])
    rows = (case["H"] + 2 * hkv) * case["D"]
    return {**case.sizes, "Hkv": hkv, "HD": case["H"] * case["D"], "R": rows}


def _head_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    b, c, v = (case[n] for n in ("B", "C", "V"))
    has_bias = case.options.get("bias", True)
    return {
        "x": randn((b, c), dtype, device, generator),
        "norm_weight": _weight((c,), dtype, device, generator),
        "norm_bias": _weight((c,), dtype, device, generator) if has_bias else None,
        "head_weight": _weight((v, c), dtype, device, generator),
        "head_bias": _weight((v,), dtype, device, generator) if has_bias else None,
        **{name: case.options[name] for name in ("eps",) if name in case.options},
    }


def _argmax_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """Logits with many equal values; `out` does not hold an index yet."""
    b, v = case["B"], case["V"]
    logits = (2 * randn((b, v), torch.float32, device, generator)).round().to(dtype)
    return {"logits": logits, "out": torch.full((b,), -1, device=device)}


def _weights(case: Case) -> int:
    """Elements of a block's four weight matrices."""
    sizes = _sizes(case)
    return case["C"] * (sizes["R"] + sizes["HD"] + 2 * case["I"])


def _block_flops(case: Case, direction: str) -> int:
    attention = 4 * case["B"] * case["H"] * case["Tmax"] * case["D"]
    return attention + 2 * case["B"] * _weights(case) if direction == "forward" else 0


def _block_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    cache = 2 * case["B"] * _sizes(case)["Hkv"] * case["Tmax"] * case["D"]
    elements = _weights(case) + cache + 2 * case["B"] * case["C"]
    return elements * dtype.itemsize if direction == "forward" else 0


def _embedding_builds(architecture: int) -> Iterator[Build]:
    from kernels.decode.builds import embedding_builds

    return embedding_builds(architecture)


def _block_builds(architecture: int) -> Iterator[Build]:
    from kernels.decode.builds import block_builds

    return block_builds(architecture)


def _head_builds(architecture: int) -> Iterator[Build]:
    from kernels.decode.builds import head_builds

    return head_builds(architecture)


def _argmax_builds(architecture: int) -> Iterator[Build]:
    from kernels.decode.builds import argmax_builds

    return argmax_builds(architecture)


def _block(sizes: str, *tags: str, **options: Any) -> Case:
    """sizes: B C H Hkv Tmax D I."""
    names = ("B", "C", "H", "Hkv", "Tmax", "D", "I")
    return Case(
        dict(zip(names, map(int, sizes.split()), strict=True)), options, frozenset(tags or ("small",))
    )


def _case(tags: str, options: dict[str, Any] | None = None, **sizes: int) -> Case:
    return Case(sizes, options or {}, frozenset(tags.split()))


DECODE_EMBEDDING = OpSpec(
    name="decode_embedding",
    family="decode",
    function=decode_embedding,
    reference=reference.decode_embedding,
    arguments={
        "token": TensorArgument(("B",), torch.int64),
        "cache_len": _LENGTHS["cache_len"],
        "token_weight": _float("V", "C"),
        "position_weight": _float("P", "C"),
        "key_start": _LENGTHS["key_start"],
    },
    make_inputs=_embedding_inputs,
    gradients=(),
    cases=(
        _case("small", B=3, C=40, V=19, P=12),
        _case("small", {"key_start": "padding"}, B=2, C=17, V=5, P=9),
        _case("edge", {"cache_len": "short"}, B=8, C=1, V=1, P=1),
        _case("edge", {"cache_len": "long", "key_start": "padding"}, B=5, C=300, V=7, P=4),
        *(_case("gpu", {"key_start": "padding"}, B=b, C=1600, V=50257, P=1024) for b in (1, 8)),
        *(_case("bench", B=b, C=768, V=50257, P=1024) for b in (1, 8)),
    ),
    flops=lambda case, direction: case["B"] * case["C"] if direction == "forward" else 0,
    bytes=lambda case, dtype, direction: (
        3 * case["B"] * case["C"] * dtype.itemsize if direction == "forward" else 0
    ),
    builds=_embedding_builds,
    follows_autocast=False,
)

DECODE_BLOCK = OpSpec(
    name="decode_block",
    family="decode",
    function=decode_block,
    reference=reference.decode_block,
    arguments={
        "x": _float("B", "C"),
        "k_cache": _float(*CACHE),
        "v_cache": _float(*CACHE),
        "cache_len": _LENGTHS["cache_len"],
        **{name: _float(*dims, optional=name.endswith("bias")) for name, dims in PARAMETERS.items()},
        "key_start": _LENGTHS["key_start"],
        "scale": NumberArgument(0, optional=True),
        "eps": _EPS,
        "approximate": ChoiceArgument(("tanh", "none")),
    },
    make_inputs=_block_inputs,
    gradients=(),
    cases=(
        _block("2 24 3 3 20 16 40"),
        _block("1 33 4 2 35 8 50", key_start="padding", bias=False, approximate="none"),
        _block("3 20 2 1 17 10 7", cache_len="short", scale=0.5),
        _block("8 9 2 2 1 4 37", "edge", cache_len="short"),
        _block("4 130 5 1 40 24 70", "slow", cache_len="long", key_start="padding", eps=0.1),
        _block("1 16 1 1 40 256 1", "slow", approximate="none"),
        _block("2 1 1 1 3 1 260", "edge", bias=False),
        *(
            _block(f"{b} 96 {h} {hkv} 130 {d} 200", "slow", key_start="padding", approximate=approximate)
            for b, approximate in ((1, "tanh"), (4, "none"), (7, "tanh"))
            for h, hkv, d in ((6, 6, 16), (6, 2, 40), (5, 1, 72), (3, 3, 128))
        ),
        *(_block(f"{b} 768 12 12 1024 64 3072", "gpu", key_start="padding") for b in (1, 3, 8)),
        *(_block(f"{b} 1600 25 25 1024 64 6400", "gpu") for b in (1, 8)),
        _block("4 2048 16 4 2048 128 8192", "gpu", bias=False, approximate="none"),
        *(
            _block(sizes, "bench")
            for sizes in (
                "1 768 12 12 1024 64 3072",
                "8 768 12 12 1024 64 3072",
                "1 1600 25 25 1024 64 6400",
                "8 1600 25 25 1024 64 6400",
            )
        ),
    ),
    flops=_block_flops,
    bytes=_block_bytes,
    builds=_block_builds,
    follows_autocast=False,
    writes=("k_cache", "v_cache"),
)

DECODE_HEAD = OpSpec(
    name="decode_head",
    family="decode",
    function=decode_head,
    reference=reference.decode_head,
    arguments={
        "x": _float("B", "C"),
        "norm_weight": _float("C"),
        "norm_bias": _float("C", optional=True),
        "head_weight": _float("V", "C"),
        "head_bias": _float("V", optional=True),
        "eps": _EPS,
    },
    make_inputs=_head_inputs,
    gradients=(),
    cases=(
        _case("small", B=2, C=48, V=67),
        _case("small", {"bias": False}, B=1, C=33, V=40),
        _case("edge", B=8, C=1, V=1),
        _case("edge", {"bias": False, "eps": 0.1}, B=3, C=600, V=35),
        *(_case("slow", B=b, C=c, V=130) for b in (1, 3, 8) for c in (7, 256, 257, 1100)),
        *(_case("gpu", B=b, C=c, V=50257) for b in (1, 8) for c in (768, 1600)),
        *(_case("bench", {"bias": False}, B=b, C=768, V=50257) for b in (1, 8)),
    ),
    flops=lambda case, direction: 2 * case["B"] * case["C"] * case["V"] if direction == "forward" else 0,
    bytes=lambda case, dtype, direction: (
        (case["B"] + case["V"]) * case["C"] * dtype.itemsize + 4 * case["B"] * case["V"]
        if direction == "forward"
        else 0
    ),
    builds=_head_builds,
    follows_autocast=False,
)

DECODE_ARGMAX = OpSpec(
    name="decode_argmax",
    family="decode",
    function=decode_argmax,
    reference=reference.decode_argmax,
    arguments={"logits": TensorArgument(("B", "V")), "out": TensorArgument(("B",), torch.int64)},
    make_inputs=_argmax_inputs,
    gradients=(),
    cases=(
        _case("small", B=3, V=67),
        _case("small", B=1, V=32),
        _case("edge", B=8, V=1),
        _case("edge", B=2, V=300),
        *(_case("gpu", B=b, V=v) for b in (1, 8, 64) for v in (4096, 50257, 50304, 200019)),
        *(_case("bench", B=b, V=50257) for b in (1, 8)),
    ),
    flops=lambda case, direction: case["B"] * case["V"] if direction == "forward" else 0,
    bytes=lambda case, dtype, direction: (
        case["B"] * (case["V"] * dtype.itemsize + 8) if direction == "forward" else 0
    ),
    builds=_argmax_builds,
    follows_autocast=False,
    writes=("out",),
)

SPECS = (DECODE_EMBEDDING, DECODE_BLOCK, DECODE_HEAD, DECODE_ARGMAX)
