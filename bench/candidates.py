"""The forms of kernels that `bench.tune` compares before any other.

For attention with 16-bit inputs, they trade programs on a multiprocessor against the traffic that larger
tiles save: only a GPU can decide. `python -m bench.tune --compile_only 90` compiles these without one. For a
decoded token, they turn on programmatic dependent launch, which GPUs have from sm_90 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import examine
from bench.gates import Compiled
from kernels import tuning
from kernels.registry import SPECS
from kernels.tuning import Tile

# Architecture -> head dimension -> kernel -> tiles.
FORMS: dict[int, dict[int, dict[str, tuple[Tile, ...]]]] = {
    80: {
        64: {
            "forward": (Tile(128, 64, 4, 3), Tile(128, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
            "dq": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
            "dkdv": (Tile(32, 64, 4, 3), Tile(32, 128, 8, 3)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
            "dq": (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)),
            "dkdv": (Tile(64, 64, 8, 3), Tile(32, 64, 4, 3)),
        },
    },
    86: {
        64: {
            "forward": (Tile(128, 64, 4, 3), Tile(128, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
            "dq": (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
            "dkdv": (Tile(32, 64, 4, 3), Tile(32, 128, 8, 3)),
        },
        128: {
            "forward": (Tile(128, 32, 8, 3),),
            "dq": (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)),
            "dkdv": (Tile(32, 64, 8, 3), Tile(32, 64, 4, 3)),
        },
    },
    90: {
        64: {
            "forward": (
                Tile(128, 64, 4, 3),
                Tile(128, 64, 8, 3, 128),
                Tile(128, 64, 4, 4),
                Tile(64, 64, 4, 3),
                Tile(128, 128, 4, 2),
            ),
            "dq": (
                Tile(128, 64, 4, 3),
                Tile(128, 64, 8, 3, 128),
                Tile(64, 64, 4, 3),
                Tile(64, 64, 4, 3, 128),
            ),
            "dkdv": (Tile(32, 64, 4, 3), Tile(32, 128, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
        },
        128: {
            "forward": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3, 128), Tile(64, 64, 4, 3)),
            "dq": (Tile(128, 32, 8, 3, 128), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
            "dkdv": (Tile(64, 64, 4, 2), Tile(64, 128, 8, 3), Tile(32, 64, 4, 3)),
        },
    },
}


def forms(function: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The changes to try of what a function of kernels/tuning.py returns: a list for each kernel, in order.

    Empty, except for 16-bit attention without dropout at a listed architecture and head dimension, and for
    the kernels of a decoded token from sm_90 on.
    """
    if function in ("decode_linear_tile", "attention_decode_tile"):
        return [[{"pdl": False}]] if arguments[0] >= 90 else []
    if function != "attention_tiles" or keywords.get("dropout"):
        return []
    architecture, itemsize, d = arguments
    kernels = FORMS.get(architecture, {}).get(d, {}) if itemsize == 2 else {}
    return [[{kernel: tile} for tile in tiles] for kernel, tiles in kernels.items()]


def compiled(architecture: int) -> Iterator[Compiled]:
    """The ahead-of-time report of every form of an architecture, in bfloat16."""
    spec, present = SPECS["causal_attention"], tuning.attention_tiles
    assert spec.builds is not None
    names = {"forward": "_attention_fwd_kernel", "dq": "_attention_bwd_dq_kernel"}
    names["dkdv"] = "_attention_bwd_dkdv_kernel"

    for d, kernels in FORMS[architecture].items():
        for kernel, tile in ((kernel, tile) for kernel, tiles in kernels.items() for tile in tiles):
            tuning.attention_tiles = lambda *a, **k: present(*a, **k)._replace(**{kernel: tile})  # noqa: B023
            try:
                builds = [b for b in spec.builds(architecture) if b.label == f"bf16-D{d}"]
            finally:
                tuning.attention_tiles = present
            for build in builds:
                if build.kernel.__name__ == names[kernel]:
                    yield examine(spec.name, build, architecture)
