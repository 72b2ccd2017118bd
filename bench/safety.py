"""`python -m bench.safety`: the compiled kernels on a GPU, at small shapes: the same bits every time, and nothing else.

`python -m bench` runs it as it is, and once more under compute-sanitizer where that is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import kernels
from gpt.errors import InputError, unknown
from gpt.options import OptionParser, run_command
from kernels.preflight import run_case
from kernels.registry import SPECS
from kernels.spec import SHORT_DTYPE, Case, OpSpec


@dataclass(frozen=True)
class Options:
    """Flags."""

    op: tuple[str, ...] = field(default=tuple(SPECS), metadata={"help": "ops"})
    repeats: int = field(default=10, metadata={"help": "how often each call is made again; 0 makes it once, for a sanitizer"})


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.safety", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    for name in options.op:
        if name not in SPECS:
            raise unknown("--op", name, SPECS)
    if not torch.cuda.is_available():
        raise InputError("no GPU was found, expected one: kernels run compiled here")
    bad = 0
    for spec in (SPECS[name] for name in options.op):
        for case in spec.tagged("small", "edge"):
            for dtype in spec.dtypes:
                changed = unsteady(spec, case, dtype, torch.device("cuda"), options.repeats)
                bad += bool(changed)
                if changed:
                    print(f"{spec.name} {case.id} {SHORT_DTYPE[dtype]}: other bits the next time: {', '.join(changed)}")
    torch.cuda.synchronize()
    print(f"{bad} of the calls gave other bits" if options.repeats else "every call was made once")
    return 1 if bad else 0


def unsteady(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, repeats: int, backend: str = "triton"
) -> list[str]:
    """The outputs and gradients that differ in any bit between calls with the same inputs."""
    inputs = spec.make_inputs(case, dtype, device, torch.Generator().manual_seed(0))
    changed: set[str] = set()
    with kernels.use_backend(**{spec.name: backend}):
        first = run_case(spec.function, inputs, spec.gradients)
        for _ in range(repeats):
            again = run_case(spec.function, inputs, spec.gradients)
            changed |= {name for name, value in first.items() if value is not None and not _same(value, again[name])}
    return sorted(changed)


def _same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    """Bit for bit, so that NaN is like NaN."""
    return b is not None and torch.equal(_bits(a), _bits(b))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    sys.exit(run_command("bench.safety", main))
