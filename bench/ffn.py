"""`python -m bench.ffn`: the GELU feed-forward."""

from __future__ import annotations

import sys

from bench.command import command
from bench.engine import Bench
from kernels.spec import Case, OpSpec


def product(spec: OpSpec, case: Case) -> tuple[int, int, int]:
    """The first product."""
    return case["N"], case["I"], case["C"]


BENCH = Bench("ffn", product=product)

if __name__ == "__main__":
    sys.exit(command(BENCH))
