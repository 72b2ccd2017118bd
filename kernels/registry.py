"""The op families.

Tests, benches, preflight and the ahead-of-time report iterate over `SPECS`; a new family is added here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.attention.spec import SPECS as ATTENTION
from kernels.decode.spec import SPECS as DECODE
from kernels.ffn.spec import SPECS as FFN
from kernels.loss.spec import SPECS as LOSS
from kernels.norm.spec import SPECS as NORM
from kernels.spec import Case, OpSpec

SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (*ATTENTION, *NORM, *FFN, *LOSS, *DECODE)}


class Work(NamedTuple):
    """What one direction of a call has to do at least."""

    flops: int  # floating-point operations
    bytes: int  # read and written


def work(op: str, case: Case, dtype: torch.dtype, direction: str) -> Work:
    """The floating-point operations and the least bytes of a call, by the formulas of the op's specification.

    Args:
        op: The public name.
        case: The sizes and options of the call.
        dtype: Of the call's tensors.
        direction: "forward" or "backward".

    Raises:
        ValueError: An unknown op or direction.
    """
    if op not in SPECS:
        raise ValueError(f"work: op is {op!r}, expected one of {', '.join(SPECS)}")
    if direction not in ("forward", "backward"):
        raise ValueError(f"work: direction is {direction!r}, expected 'forward' or 'backward'")
    spec = SPECS[op]
    return Work(spec.flops(case, direction), spec.bytes(case, dtype, direction))
