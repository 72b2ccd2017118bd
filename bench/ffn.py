"""`python -m bench.ffn`: the GELU feed-forward."""

from __future__ import annotations

import sys

from bench.command import command
from bench.engine import Bench
from kernels.spec import Case, OpSpec


def matmul(spec: OpSpec, case: Case) -> tuple[int, int, int]:
    """The first of the two matmuls."""
    return case["N"], case["I"], case["C"]


BENCH = Bench("ffn", matmul=matmul)

if __name__ == "__main__":
    sys.exit(command(BENCH))
