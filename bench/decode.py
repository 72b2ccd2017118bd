"""`python -m bench.decode`: one decoded token of each sequence: embedding, block, head, argmax."""

from __future__ import annotations

import sys
from typing import Any

import torch

import kernels
from bench.command import command
from bench.contestants import Contestant
from bench.engine import Bench
from kernels.spec import OpSpec


def separate_block(
    x: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_len: torch.Tensor,
    key_start: torch.Tensor | None = None,
    **p: Any,
) -> torch.Tensor:
    """A block by the ops that a model calls for more sequences than the fused op takes."""
    b, hkv, tmax, d = k_cache.shape
    width, eps = p["proj_weight"].shape[1], p.get("eps", 1e-5)
    qkv = kernels.linear(
        kernels.layer_norm(x, p["norm_1_weight"], p["norm_1_bias"], eps), p["qkv_weight"], p["qkv_bias"]
    )
    q, k, v = qkv.split((width, hkv * d, hkv * d), 1)
    rows, index = torch.arange(b, device=x.device), cache_len.clamp(1, tmax) - 1
    k_cache[rows, :, index], v_cache[rows, :, index] = k.view(b, hkv, d), v.view(b, hkv, d)

    y = kernels.decode_attention(
        q.view(b, -1, 1, d), k_cache, v_cache, cache_len, key_start=key_start, scale=p.get("scale")
    )
    branch = kernels.linear(y.reshape(b, width), p["proj_weight"], p["proj_bias"])
    y, h = kernels.add_layer_norm(branch, x, p["norm_2_weight"], p["norm_2_bias"], eps)
    approximate = p.get("approximate", "tanh")
    up, down = ((p[f"{name}_weight"], p[f"{name}_bias"]) for name in ("up", "down"))
    return h + kernels.gelu_ffn(y, *up, *down, approximate=approximate)


def peers(spec: OpSpec, compiled: bool) -> list[Contestant]:
    if spec.name != "decode_block":
        return []
    return [Contestant("separate ops", separate_block, lambda: kernels.use_backend("triton"), peer=False)]


BENCH = Bench("decode", peers)

if __name__ == "__main__":
    sys.exit(command(BENCH))
