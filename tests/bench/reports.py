"""Invented reports: figures that no machine measured, to test what is made of them."""

from __future__ import annotations

from dataclasses import replace

from bench.contestants import OURS
from bench.record import Machine, Report, Row
from kernels.registry import SPECS

MACHINE = Machine(
    "Invented GPU",
    "cuda",
    "sm_90",
    80 * 2**30,
    16,
    "1.0",
    "13.0",
    "3.11.0",
    "2.13.0",
    "3.7.1",
    "Linux",
    "0" * 12,
    "2000-01-01T00:00:00+00:00",
)
RIVALS = {
    "eager": 1.3,
    "torch.compile": 1.15,
    "SDPA flash": 1.25,
    "SDPA cudnn": 1.1,
    "SDPA math": 9.0,
    "FlexAttention": 1.4,
}


def models() -> list[Row]:
    """Invented rows of whole models on a GPU: a training step, and decoding at two batch sizes."""
    training = Row(
        "train",
        "12x768-V50257-B64-T1024",
        "bf16",
        "step",
        "",
        "measured",
        tokens=65536,
        limit=0.05,
        samples=9,
    )
    rows = [
        replace(training, contestant=name, seconds=s) for name, s in ((OURS, 0.1), ("plain PyTorch", 0.12))
    ]
    for batch in (1, 64):
        decoding = Row(
            "generate",
            f"12x768-V50257-B{batch}-T128-new128",
            "bf16",
            "decode",
            "",
            "measured",
            tokens=batch,
            samples=9,
        )
        rows += [
            replace(decoding, contestant=name, seconds=s)
            for name, s in ((OURS, 2e-4), ("transformers", 9e-3))
        ]
    return rows


def invented(*ops: str, kind: str = "cuda") -> Report:
    """A report over all bench cases of `ops`, in which ours takes half the limit's speed and the rivals
    RIVALS times as long."""
    report = Report("invented", Machine(**{**vars(MACHINE), "kind": kind}), complete=True)
    for spec in (SPECS[op] for op in ops):
        for case in spec.tagged("bench"):
            for direction in ("both", "forward", "backward") if spec.gradients else ("forward",):
                parts = ("forward", "backward") if direction == "both" else (direction,)
                flops = sum(spec.flops(case, part) for part in parts)
                limit = flops / 8e14
                for name, factor in {OURS: 1.0, **RIVALS}.items():
                    seconds = 2 * limit * factor
                    times = {"seconds": seconds, "low": seconds * 0.99, "high": seconds * 1.01, "samples": 20}
                    more = {
                        "error": 0.5,
                        "graph_seconds": seconds * 0.98,
                        "memory": int(factor * 2**28),
                        "flops": flops,
                        "bytes": 10**8,
                    }
                    report.rows.append(
                        Row(
                            spec.name,
                            case.id,
                            "bf16",
                            direction,
                            name,
                            "measured",
                            limit=limit,
                            **times,
                            **more,
                        )
                    )
    return report
