"""`python -m bench.loss`: linear + cross-entropy, against implementations with and without all logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.command import command
from bench.contestants import Contestant, compile_of, foreign, only, optional, padded_vocabulary
from bench.engine import Bench
from kernels.spec import Case, OpSpec

ARGUMENTS = ("x", "weight", "targets", "bias")
LARGEST_CHUNK = 8192  # rows of the matmul that is the ceiling


def whole_logits(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The simplest implementation: all logits, in float32 for the loss."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def padded_logits(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """All logits, from matmuls with a padded vocabulary."""
    v = weight.shape[0]
    more = padded_vocabulary(v) - v
    weight, bias = F.pad(weight, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more))
    return F.cross_entropy(F.linear(x, weight, bias)[:, :v].float(), targets)


def liger() -> Callable[..., Any]:
    loss = foreign("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda x, weight, targets, bias: loss(weight, x, targets, bias)


def quack() -> Callable[..., Any]:
    function = foreign("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x, weight, targets: function(x, weight, targets, reduction="mean").float()


def torch_chunked() -> Contestant:
    """PyTorch's own op over chunks of rows."""
    name, function = "F.linear_cross_entropy", getattr(F, "linear_cross_entropy", None)
    if function is None:
        return Contestant(name, None, absent=f"torch {torch.__version__} has none, torch 2.13 is needed")
    options = foreign("torch.nn", "LinearCrossEntropyOptions")()  # without options it holds all logits

    def chunked(
        x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return function(x, weight, targets, linear_bias=bias, options=options).float()

    return Contestant(name, only(chunked, ARGUMENTS))


def peers(spec: OpSpec, compiled: bool) -> list[Contestant]:
    plain, padded = only(whole_logits, ARGUMENTS), only(padded_logits, ARGUMENTS)
    return [
        Contestant("whole logits", plain),
        compile_of("whole logits, compiled", plain, compiled),
        compile_of("whole logits, padded, compiled", padded, compiled),
        torch_chunked(),
        optional("liger-kernel", lambda: only(liger(), ARGUMENTS)),
        optional("quack", lambda: only(quack(), ARGUMENTS[:3])),
    ]


def matmul(spec: OpSpec, case: Case) -> tuple[int, int, int]:
    """The logits of one chunk, with a padded vocabulary."""
    return min(case["N"], LARGEST_CHUNK), padded_vocabulary(case["V"]), case["C"]


BENCH = Bench(
    "loss",
    peers,
    matmul,
    uncompiled="it would unroll the loop over chunks; whole logits are compiled instead",
)

if __name__ == "__main__":
    sys.exit(command(BENCH))
