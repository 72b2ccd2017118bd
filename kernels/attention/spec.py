"""What `causal_attention` and `decode_attention` say about themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kernels.attention import causal_attention, decode_attention, reference
from kernels.spec import Build, Case, ChoiceArgument, NumberArgument, OpSpec, SeedArgument, TensorArgument, randn


def _heads(case: Case) -> int:
    return case.sizes.get("Hkv", case["H"])


def _key_start(case: Case, device: torch.device) -> torch.Tensor | None:
    """The `key_start` option: "padding" (B,), "documents" or "window" (B, Tq), "empty" with rows that see nothing."""
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


def _causal_inputs(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    b, h, tq, tk, d = (case[n] for n in ("B", "H", "Tq", "Tk", "D"))
    if case.options.get("layout") == "qkv":  # views of one fused projection (B, T, 3, H, D), as the model hands them over
        q, k, v = randn((b, tq, 3, h, d), dtype, device, generator).permute(2, 0, 3, 1, 4)
    else:
        q = randn((b, h, tq, d), dtype, device, generator)
        k = randn((b, _heads(case), tk, d), dtype, device, generator)
        v = randn((b, _heads(case), tk, d), dtype, device, generator)
    options = {n: case.options[n] for n in ("scale", "dropout_p", "seed", "deterministic") if n in case.options}
    return {"q": q, "k": k, "v": v, "key_start": _key_start(case, device), **options}


def _decode_inputs(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    b, h, tq, tmax, d = (case[n] for n in ("B", "H", "Tq", "Tmax", "D"))
    lengths = torch.linspace(tmax, tq, b, device=device).to(torch.int32)
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


def _decode_flops(case: Case, direction: str) -> int:
    return 4 * case["B"] * case["H"] * case["Tq"] * case["Tmax"] * case["D"] if direction == "forward" else 0


def _decode_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    cache = 2 * case["B"] * _heads(case) * case["Tmax"] * case["D"]
    return (cache + 2 * case["B"] * case["H"] * case["Tq"] * case["D"]) * dtype.itemsize if direction == "forward" else 0


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


CAUSAL = OpSpec(
    name="causal_attention",
    room="attention",
    function=causal_attention,
    reference=reference.causal_attention,
    arguments={
        "q": TensorArgument(("B", "H", "Tq", "D"), last_contiguous=True),
        "k": TensorArgument(("B", "Hkv", "Tk", "D"), last_contiguous=True),
        "v": TensorArgument(("B", "Hkv", "Tk", "D"), last_contiguous=True),
        "key_start": TensorArgument(("B",), torch.int32, optional=True),
        "scale": NumberArgument(optional=True),
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
        *(_causal_case(2, 1, 40, 16, key_start=kind) for kind in ("padding", "documents", "window", "empty")),
        _causal_case(1, 2, 33, 16, dropout_p=0.3, seed=7),
        _causal_case(1, 1, 20, 16, scale=0.5),
        _causal_case(64, 12, 1024, 64, "bench", "gpu"),
        *(
            _causal_case(max(1, 16384 // t), 16, t, d, "bench", "gpu")
            for d in (64, 128)
            for t in (512, 1024, 2048, 4096, 8192, 16384)
        ),
    ),
    flops=_causal_flops,
    builds=_causal_builds,
    bytes=_causal_bytes,
)

DECODE = OpSpec(
    name="decode_attention",
    room="attention",
    function=decode_attention,
    reference=reference.decode_attention,
    arguments={
        "q": TensorArgument(("B", "H", "Tq", "D"), last_contiguous=True),
        "k_cache": TensorArgument(("B", "Hkv", "Tmax", "D"), last_contiguous=True),
        "v_cache": TensorArgument(("B", "Hkv", "Tmax", "D"), last_contiguous=True),
        "cache_len": TensorArgument(("B",), torch.int32),
        "key_start": TensorArgument(("B",), torch.int32, optional=True),
        "scale": NumberArgument(optional=True),
    },
    make_inputs=_decode_inputs,
    gradients=(),
    cases=(
        Case({"B": 3, "H": 2, "Tq": 1, "Tmax": 70, "D": 16}),
        Case({"B": 2, "H": 4, "Hkv": 2, "Tq": 3, "Tmax": 33, "D": 32}, {"key_start": "padding"}),
        *(Case({"B": b, "H": 12, "Tq": 1, "Tmax": 1024, "D": 64}, {}, frozenset({"bench", "gpu"})) for b in (1, 8, 64)),
    ),
    flops=_decode_flops,
    builds=_decode_builds,
    bytes=_decode_bytes,
)

SPECS = (CAUSAL, DECODE)
