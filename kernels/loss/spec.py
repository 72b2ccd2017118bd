"""The specification of `linear_cross_entropy`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from kernels.loss import linear_cross_entropy, reference
from kernels.spec import Build, Case, ChoiceArgument, NumberArgument, OpSpec, TensorArgument, randn


def _case(n: int, c: int, v: int, *tags: str, **options: Any) -> Case:
    return Case({"N": n, "C": c, "V": v}, options, frozenset(tags or ("small",)))


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    n, c, v = case["N"], case["C"], case["V"]
    targets = torch.randint(v, (n,), generator=generator, device=generator.device).to(device)
    ignored = case.options.get("ignored")
    if ignored == "some":
        targets[::3] = -100
    elif ignored == "all":
        targets.fill_(-100)
    options = {o: case.options[o] for o in ("reduction", "label_smoothing", "z_loss") if o in case.options}
    peak = case.options.get("peak", 1.0)
    x, weight = (
        randn((n, c), dtype, device, generator),
        randn((v, c), dtype, device, generator) * (peak / math.sqrt(c)),
    )
    if case.options.get("confident"):  # every target has a probability of about 0.999
        x = 12 * weight[targets]
    return {
        "x": x,
        "weight": weight,
        "targets": targets,
        "bias": randn((v,), dtype, device, generator) if case.options.get("bias") else None,
        **options,
    }


def _flops(case: Case, direction: str) -> int:
    return (2 if direction == "forward" else 4) * case["N"] * case["C"] * case["V"]


def _bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    n, c, v = case["N"], case["C"], case["V"]
    return ((n * c + v * c) if direction == "forward" else 2 * (n * c + v * c)) * dtype.itemsize + 8 * n


def _builds(architecture: int) -> Iterator[Build]:
    from kernels.loss.builds import linear_cross_entropy_builds

    return linear_cross_entropy_builds()


LINEAR_CROSS_ENTROPY = OpSpec(
    name="linear_cross_entropy",
    family="loss",
    function=linear_cross_entropy,
    reference=reference.linear_cross_entropy,
    arguments={
        "x": TensorArgument(("...", "C")),
        "weight": TensorArgument(("V", "C")),
        "targets": TensorArgument(("...",), torch.int64),
        "bias": TensorArgument(("V",), optional=True),
        "ignore_index": NumberArgument(integer=True),
        "reduction": ChoiceArgument(("mean", "sum", "none")),
        "label_smoothing": NumberArgument(0, 1),
        "z_loss": NumberArgument(0, math.inf, open_high=True),
    },
    make_inputs=_inputs,
    gradients=("x", "weight", "bias"),
    cases=(
        _case(7, 16, 65),
        _case(5, 17, 2, reduction="sum"),
        _case(9, 16, 50, reduction="none", ignored="some"),
        _case(6, 16, 33, bias=True, label_smoothing=0.1, z_loss=1e-2, ignored="some"),
        _case(4, 16, 33, ignored="all"),
        _case(5, 32, 100, peak=8.0),
        *(_case(13, c, 65, "edge") for c in (1, 17, 64, 255, 768)),
        _case(35, 16, 2, "edge", bias=True),
        _case(9, 33, 1000, "edge", reduction="none", bias=True, ignored="some"),
        _case(3, 17, 50257, "edge", ignored="some"),
        _case(3, 17, 50257, "edge", reduction="none", bias=True, label_smoothing=0.1, z_loss=1e-3),
        _case(7, 64, 1000, "edge", peak=12.0, label_smoothing=0.05),
        _case(21, 64, 65, "edge", confident=True),
        _case(9, 32, 100, "edge", peak=200.0),
        _case(5, 16, 130, "edge", bias=True),
        _case(4, 16, 33, "edge", ignored="all", reduction="none"),
        *(
            _case(
                67,
                c,
                v,
                "slow",
                reduction=reduction,
                bias=bias,
                label_smoothing=smoothing,
                z_loss=z,
                ignored="some",
            )
            for c, v in ((17, 2), (64, 65), (255, 1000), (768, 1000), (17, 50257))
            for reduction in ("mean", "sum", "none")
            for bias in (True, False)
            for smoothing, z in ((0.0, 0.0), (0.1, 1e-2))
        ),
        *(_case(n, 768, 50257, "bench", "gpu") for n in (65536, 32768, 8192)),
    ),
    flops=_flops,
    bytes=_bytes,
    builds=_builds,
    follows_autocast=False,
)

SPECS = (LINEAR_CROSS_ENTROPY,)
