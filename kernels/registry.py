"""The op families.

Tests, benches, preflight and the ahead-of-time report iterate over `SPECS`; a new family is added here.
"""

from __future__ import annotations

from kernels.attention.spec import SPECS as ATTENTION
from kernels.ffn.spec import SPECS as FFN
from kernels.loss.spec import SPECS as LOSS
from kernels.norm.spec import SPECS as NORM
from kernels.spec import OpSpec

SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (*ATTENTION, *NORM, *FFN, *LOSS)}
