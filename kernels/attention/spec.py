"""The specification of `causal_attention`, `causal_attention_qkv` and `decode_attention`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from kernels.attention import PACKED, causal_attention, causal_attention_qkv, decode_attention, reference
from kernels.spec import (
    Build,
    Case,
    ChoiceArgument,
    NumberArgument,
    OpSpec,
    SeedArgument,
    TensorArgument,
    randn,
)


def _heads(case: Case) -> int:
    return case.sizes.get("Hkv", case["H"])


def _key_start(case: Case, device: torch.device) -> torch.Tensor | None:
    """The `key_start` option: "padding" (B,); "documents", "window" or "empty" (no keys) (B, Tq)."""
    kind = case.options.get("key_start")
    if kind is None:
        return None
    b, tq, tk = case["B"], case["Tq"], case["Tk"]
    position = torch.arange(tk - tq, tk, device=device)
    if kind == "padding":
        return (torch.arange(b, device=device) * max(1, tk // 3)).clamp(max=tk - 1).to(torch.int32)
    if kind == "documents":
        starts = position - position % max(1, tk // 3)
    elif kind == "window":
        starts = (position - max(1, tk // 4)).clamp(min=0)
    elif kind == "empty":
        starts = torch.where(position % 5 == 0, tk + 7, -3)
    else:
        raise ValueError(f"causal_attention: case option key_start is {kind!r}")
    return starts.to(torch.int32).expand(b, tq).contiguous()


def _options(case: Case) -> dict[str, Any]:
    names = ("scale", "dropout_p", "seed", "deterministic")
    return {name: case.options[name] for name in names if name in case.options}


def _causal_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    b, h, tq, tk, d = (case[n] for n in ("B", "H", "Tq", "Tk", "D"))
    if case.options.get("layout") == "qkv":  # views of one fused projection (B, T, 3, H, D), as in the model
        q, k, v = randn((b, tq, 3, h, d), dtype, device, generator).permute(2, 0, 3, 1, 4)
    else:
        shapes = (b, h, tq, d), (b, _heads(case), tk, d), (b, _heads(case), tk, d)
        q, k, v = (randn(shape, dtype, device, generator) for shape in shapes)
    if case.options.get("layout") == "padded":  # odd strides, and NaN after each row, which no kernel may use
        q, k, v = (F.pad(x, (0, 3), value=math.nan)[..., :-3] for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "key_start": _key_start(case, device), **_options(case)}


def _packed_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    b, t, h, d = (case[n] for n in ("B", "T", "H", "D"))
    qkv = randn((b, t, 3, h, d), dtype, device, generator)
    if case.options.get("layout") == "padded":  # odd strides, and NaN after each row, which no kernel may use
        qkv = F.pad(qkv, (0, 3), value=math.nan)[..., :-3]
    return {"qkv": qkv, "key_start": _key_start(_unpacked(case), device), **_options(case)}


def _unpacked(case: Case) -> Case:
    """The case of `causal_attention` that computes the same."""
    return _causal_case(case["B"], case["H"], case["T"], case["D"], **case.options)


def _decode_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    b, h, tq, tmax, d = (case[n] for n in ("B", "H", "Tq", "Tmax", "D"))
    shortest = 0 if case.options.get("cache_len") == "short" else tq  # 0: queries without keys
    lengths = torch.linspace(tmax, shortest, b, device=device).to(torch.int32)
    return {
        "q": randn((b, h, tq, d), dtype, device, generator),
        "k_cache": randn((b, _heads(case), tmax, d), dtype, device, generator),
        "v_cache": randn((b, _heads(case), tmax, d), dtype, device, generator),
        "cache_len": lengths,
        "key_start": (lengths // 3) if case.options.get("key_start") == "padding" else None,
    }


def _pairs(tq: int, tk: int) -> int:
    """Query-key pairs under the causal mask."""
    return tq * (tk - tq) + tq * (tq + 1) // 2


def _causal_flops(case: Case, direction: str) -> int:
    forward = 4 * case["B"] * case["H"] * _pairs(case["Tq"], case["Tk"]) * case["D"]
    return forward if direction == "forward" else forward * 5 // 2


def _causal_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    queries = case["B"] * case["H"] * case["Tq"] * case["D"] * dtype.itemsize
    keys = case["B"] * _heads(case) * case["Tk"] * case["D"] * dtype.itemsize
    return 2 * queries + 2 * keys if direction == "forward" else 4 * queries + 4 * keys


def _causal_terms(inputs: Mapping[str, Any]) -> int:
    """A key's gradient sums over the queries of all heads that share it; a query's sums over the keys."""
    q, k = inputs["q"], inputs["k"]
    return max(q.shape[1] // k.shape[1] * q.shape[2], k.shape[2])


def _decode_flops(case: Case, direction: str) -> int:
    return 4 * case["B"] * case["H"] * case["Tq"] * case["Tmax"] * case["D"] if direction == "forward" else 0


def _decode_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    cache = 2 * case["B"] * _heads(case) * case["Tmax"] * case["D"]
    return (
        (cache + 2 * case["B"] * case["H"] * case["Tq"] * case["D"]) * dtype.itemsize
        if direction == "forward"
        else 0
    )


def _causal_builds(architecture: int) -> Iterable[Build]:
    from kernels.attention.builds import causal_builds

    return causal_builds(architecture)


def _decode_builds(architecture: int) -> Iterable[Build]:
    from kernels.attention.builds import decode_builds

    return decode_builds(architecture)


def _causal_case(
    b: int, h: int, tq: int, d: int, *tags: str, tk: int | None = None, hkv: int | None = None, **options: Any
) -> Case:
    sizes = {"B": b, "H": h, "Tq": tq, "Tk": tk or tq, "D": d} | ({"Hkv": hkv} if hkv else {})
    return Case(sizes, options, frozenset(tags or ("small",)))


def _packed_case(b: int, h: int, t: int, d: int, *tags: str, **options: Any) -> Case:
    return Case({"B": b, "H": h, "T": t, "D": d}, options, frozenset(tags or ("small",)))


_KEY_STARTS = ("padding", "documents", "window", "empty")
_LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 257)
_HEAD_DIMENSIONS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 256)
_EDGES = (
    *(
        _causal_case(1, 1, t, d, "edge")
        for t, d in zip(_LENGTHS, (256, 72, 128, 8, 64, 96, 40, 80, 32, 16), strict=True)
    ),
    _causal_case(1, 1, 1, 16, "edge", tk=129),
    # The diagonal lies just inside, and just outside, a tile.
    *(_causal_case(1, 1, 33, 16, "edge", tk=33 + more) for more in (1, 14)),
    _causal_case(1, 2, 17, 24, "edge", tk=63, key_start="empty"),
    _causal_case(2, 2, 70, 24, "edge", hkv=1, key_start="padding", layout="padded"),
    _causal_case(1, 2, 35, 16, "edge", tk=70, dropout_p=0.5, seed=-1, key_start="window"),
    _causal_case(2, 2, 40, 16, "edge", hkv=1, tk=44, dropout_p=0.1, seed=2**40),
    # Enough heads that the reference's largest error, which sets the bound, does not depend on chance.
    _causal_case(2, 4, 33, 16, "edge", scale=8.0),
    _causal_case(1, 1, 65, 16, "edge", deterministic=True),
)
_LONG_GRID = (
    *(_causal_case(1, 1, t, d, "slow") for t in _LENGTHS for d in _HEAD_DIMENSIONS),
    *(
        _causal_case(2, 2, t, 16, "slow", tk=t + 33, hkv=1, key_start=kind)
        for t in _LENGTHS
        for kind in _KEY_STARTS
    ),
    # At least two keys: with one key, dQ and dK are zero except for the rounding error of the output that the
    # backward pass reads.
    *(
        _causal_case(1, 2, t, 24, "slow", tk=t + more, dropout_p=0.2, seed=t)
        for t in _LENGTHS
        for more in (0, 3)
        if t + more > 1
    ),
    *(_causal_case(2, 2, t, 40, "slow", layout=layout) for t in _LENGTHS for layout in ("qkv", "padded")),
)
_FULL_SIZE = (
    *(_causal_case(1, 2, t, d, "gpu") for t in (1024, 4096, 8192) for d in (64, 128)),
    *(_causal_case(2, 4, 2048, d, "gpu", hkv=2, key_start=kind) for d in (64, 128) for kind in _KEY_STARTS),
    *(_causal_case(2, 4, 2048, d, "gpu", dropout_p=0.1, seed=3) for d in (64, 128)),
    _causal_case(4, 12, 1024, 64, "gpu", layout="qkv"),
    _causal_case(1, 2, 777, 256, "gpu", tk=2001),
)

CAUSAL = OpSpec(
    name="causal_attention",
    family="attention",
    function=causal_attention,
    reference=reference.causal_attention,
    arguments={
        "q": TensorArgument(("B", "H", "Tq", "D"), last_contiguous=True),
        "k": TensorArgument(("B", "Hkv", "Tk", "D"), last_contiguous=True),
        "v": TensorArgument(("B", "Hkv", "Tk", "D"), last_contiguous=True),
        "key_start": TensorArgument(("B",), torch.int32, optional=True),
        "scale": NumberArgument(0, optional=True),
        "dropout_p": NumberArgument(0, 1, open_high=True),
        "seed": SeedArgument(),
        "deterministic": ChoiceArgument((None, True, False)),
    },
    make_inputs=_causal_inputs,
    gradients=("q", "k", "v"),
    cases=(
        _causal_case(2, 2, 17, 16),
        _causal_case(1, 2, 65, 64),
        _causal_case(1, 4, 33, 40, hkv=2),
        _causal_case(2, 1, 9, 32, tk=70),
        _causal_case(2, 2, 37, 16, layout="qkv"),
        *(_causal_case(2, 1, 40, 16, key_start=kind) for kind in _KEY_STARTS),
        _causal_case(1, 2, 33, 16, dropout_p=0.3, seed=7),
        _causal_case(1, 1, 20, 16, scale=0.5),
        *_EDGES,
        *_LONG_GRID,
        *_FULL_SIZE,
        _causal_case(64, 12, 1024, 64, "bench"),
        *(
            _causal_case(max(1, 16384 // t), 16, t, d, "bench")
            for t in (1024, 2048, 4096, 512, 8192, 16384)
            for d in (64, 128)
        ),
    ),
    flops=_causal_flops,
    builds=_causal_builds,
    bytes=_causal_bytes,
    terms=_causal_terms,
)

CAUSAL_QKV = OpSpec(
    name="causal_attention_qkv",
    family="attention",
    function=causal_attention_qkv,
    reference=reference.causal_attention_qkv,
    arguments={
        "qkv": TensorArgument(PACKED, last_contiguous=True),
        **{name: CAUSAL.arguments[name] for name in list(CAUSAL.arguments)[3:]},
    },
    make_inputs=_packed_inputs,
    gradients=("qkv",),
    cases=(
        _packed_case(2, 2, 17, 16),
        _packed_case(1, 3, 65, 40),
        *(_packed_case(2, 1, 40, 16, key_start=kind) for kind in _KEY_STARTS),
        _packed_case(1, 2, 33, 16, dropout_p=0.3, seed=7),
        _packed_case(1, 1, 20, 16, scale=0.5),
        _packed_case(2, 2, 1, 24, "edge"),
        _packed_case(2, 2, 35, 72, "edge", layout="padded", key_start="padding", dropout_p=0.1, seed=2**40),
        _packed_case(1, 1, 65, 16, "edge", deterministic=True),
        *(_packed_case(2, 2, t, 40, "slow", layout="padded") for t in _LENGTHS),
        *(_packed_case(2, 4, 2048, d, "gpu", key_start="documents") for d in (64, 128)),
        *(_packed_case(4, 12, 1024, 64, "gpu", **options) for options in ({}, {"dropout_p": 0.1, "seed": 3})),
        _packed_case(64, 12, 1024, 64, "bench"),
        *(_packed_case(max(1, 16384 // t), 16, t, d, "bench") for t in (1024, 4096) for d in (64, 128)),
    ),
    flops=lambda case, direction: _causal_flops(_unpacked(case), direction),
    bytes=lambda case, dtype, direction: _causal_bytes(_unpacked(case), dtype, direction),
    terms=lambda inputs: inputs["qkv"].shape[1],
)

DECODE = OpSpec(
    name="decode_attention",
    family="attention",
    function=decode_attention,
    reference=reference.decode_attention,
    arguments={
        "q": TensorArgument(("B", "H", "Tq", "D"), last_contiguous=True),
        "k_cache": TensorArgument(("B", "Hkv", "Tmax", "D"), last_contiguous=True),
        "v_cache": TensorArgument(("B", "Hkv", "Tmax", "D"), last_contiguous=True),
        "cache_len": TensorArgument(("B",), torch.int32),
        "key_start": TensorArgument(("B",), torch.int32, optional=True),
        "scale": NumberArgument(0, optional=True),
    },
    make_inputs=_decode_inputs,
    gradients=(),
    cases=(
        Case({"B": 3, "H": 2, "Tq": 1, "Tmax": 70, "D": 16}),
        Case({"B": 2, "H": 4, "Hkv": 2, "Tq": 3, "Tmax": 33, "D": 32}, {"key_start": "padding"}),
        Case(
            {"B": 3, "H": 4, "Hkv": 1, "Tq": 5, "Tmax": 129, "D": 72},
            {"key_start": "padding"},
            frozenset({"edge"}),
        ),
        Case({"B": 2, "H": 1, "Tq": 17, "Tmax": 64, "D": 8}, {"cache_len": "short"}, frozenset({"edge"})),
        Case({"B": 1, "H": 2, "Tq": 1, "Tmax": 1, "D": 256}, {}, frozenset({"edge"})),
        *(
            Case(
                {"B": 2, "H": 6, "Hkv": hkv, "Tq": tq, "Tmax": 257, "D": d},
                {"key_start": "padding"},
                frozenset({"slow"}),
            )
            for hkv in (1, 3, 6)
            for tq in (1, 4, 17)
            for d in (8, 40, 64, 96, 256)
        ),
        *(
            Case(
                {"B": 4, "H": 8, "Hkv": hkv, "Tq": tq, "Tmax": 4096, "D": d},
                {"key_start": "padding"},
                frozenset({"gpu"}),
            )
            for hkv in (1, 8)
            for tq in (1, 5)
            for d in (64, 128)
        ),
        *(
            Case({"B": b, "H": 12, "Tq": 1, "Tmax": 1024, "D": 64}, {}, frozenset({"bench"}))
            for b in (1, 8, 64)
        ),
    ),
    flops=_decode_flops,
    builds=_decode_builds,
    bytes=_decode_bytes,
)

SPECS = (CAUSAL, CAUSAL_QKV, DECODE)
