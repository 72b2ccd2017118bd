"""Reports with invented figures, to test what the benches do with a report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.contestants import OURS
from bench.record import Machine, Report, Row
from kernels.registry import SPECS

MACHINE = Machine(
    device="Invented GPU",
    kind="cuda",
    architecture="sm_90",
    memory_bytes=80 * 2**30,
    threads=16,
    driver="1.0",
    cuda="13.0",
    python="3.11.0",
    torch="2.13.0",
    triton="3.7.1",
    system="Linux",
    commit="0" * 12,
    date="2000-01-01T00:00:00+00:00",
)
FACTORS = {  # the time of each contestant over ours
    OURS: 1.0,
    "reference": 1.3,
    "torch.compile": 1.15,
    "SDPA flash": 1.25,
    "SDPA cudnn": 1.1,
    "SDPA math": 9.0,
    "FlexAttention": 1.4,
}


def measured(op: str, case: str, direction: str, **more: Any) -> Row:
    """A measured row in bf16, without a contestant."""
    row = Row(
        op=op, case=case, dtype="bf16", direction=direction, contestant="", status="measured", samples=9
    )
    return replace(row, **more)


def models() -> list[Row]:
    """Invented rows of whole models on a GPU: a training step, and decoding at two batch sizes."""
    training = measured("train", "12x768-V50257-B64-T1024", "step", tokens=65536, limit=0.05)
    rows = [
        replace(training, contestant=name, seconds=s) for name, s in ((OURS, 0.1), ("plain PyTorch", 0.12))
    ]
    for batch in (1, 64):
        decoding = measured("generate", f"12x768-V50257-B{batch}-T128-new128", "decode", tokens=batch)
        rows += [
            replace(decoding, contestant=name, seconds=s)
            for name, s in ((OURS, 2e-4), ("transformers", 9e-3))
        ]
    return rows


def invented(*ops: str, kind: str = "cuda") -> Report:
    """A report over all bench cases of `ops`: ours takes twice the limit, each contestant FACTORS of it."""
    report = Report("invented", Machine(**{**vars(MACHINE), "kind": kind}), complete=True)
    for spec in (SPECS[op] for op in ops):
        for case in spec.tagged("bench"):
            for direction in ("both", "forward", "backward") if spec.gradients else ("forward",):
                parts = ("forward", "backward") if direction == "both" else (direction,)
                flops = sum(spec.flops(case, part) for part in parts)
                limit = flops / 8e14
                for name, factor in FACTORS.items():
                    seconds = 2 * limit * factor
                    row = measured(
                        spec.name,
                        case.id,
                        direction,
                        contestant=name,
                        error=0.5,
                        seconds=seconds,
                        low=seconds * 0.99,
                        high=seconds * 1.01,
                        samples=20,
                        graph_seconds=seconds * 0.98,
                        flops=flops,
                        bytes=10**8,
                        limit=limit,
                        memory=int(factor * 2**28),
                    )
                    report.rows.append(row)
    return report
