"""`python -m bench.norm`: LayerNorm, alone and after a residual addition with dropout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from bench.command import command
from bench.contestants import Contestant, foreign, only, optional
from bench.engine import Bench
from kernels.spec import OpSpec

ARGUMENTS = ("x", "weight", "bias", "eps")


def liger() -> Callable[..., Any]:
    function = foreign("liger_kernel.ops.layer_norm", "LigerLayerNormFunction").apply
    return lambda x, weight, bias, eps=1e-5: function(x, weight, bias, eps)


def flash_attn() -> Callable[..., Any]:
    function = foreign("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
    return lambda x, weight, bias, eps=1e-5: function(x, weight, bias, eps=eps)


def flash_attn_add() -> Callable[..., Any]:
    function = foreign("flash_attn.ops.triton.layer_norm", "layer_norm_fn")

    def add(x: Any, residual: Any, weight: Any, bias: Any, eps: float = 1e-5, dropout_p: float = 0.0) -> Any:
        return function(x, weight, bias, residual=residual, eps=eps, dropout_p=dropout_p, prenorm=True)

    return add


def peers(spec: OpSpec, compiled: bool) -> list[Contestant]:
    if spec.name == "dropout":
        return []  # no other package takes our masks
    if spec.name == "add_layer_norm":
        return [optional("flash-attn", lambda: only(flash_attn_add(), (*ARGUMENTS, "residual", "dropout_p")))]
    builders = {"liger-kernel": liger, "flash-attn": flash_attn}
    return [optional(name, lambda build=build: only(build(), ARGUMENTS)) for name, build in builders.items()]


BENCH = Bench("norm", peers)

if __name__ == "__main__":
    sys.exit(command(BENCH))
