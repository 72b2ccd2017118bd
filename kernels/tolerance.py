"""The rule that decides whether a result agrees with its reference.

With y the result, r the reference in the same dtype and r64 the reference in float64:

    max|y - r64| <= 2 max|r - r64| + eps max|r64|           + 4 eps32 scale
    rms(y - r64) <= 2 rms(r - r64) + eps rms(r64) / sqrt(n) + 4 eps32 scale

The error of a result may be twice the error of plain PyTorch in the same dtype, plus a rounding floor. The
floor has two terms: one unit in the last place of the largest value, and the float32 cancellation error at
the `scale` of the case (its largest input, gradient or output). Where the expected value is zero, only the
second term remains. The first line bounds the largest error of an element, the second bounds the error of the
whole tensor.

A float32 sum of `terms` values, added one after another, has a floor of sqrt(terms) eps32 max|r64| in the
first line, where that is larger. Each addition rounds by at most eps32 / 2 of the sum, with a standard
deviation of at most 0.29 eps32 of it, and `terms` independent roundings have sqrt(terms) times that.
PyTorch's matmuls add partial sums, and have smaller errors.

The second line holds for tensors of at least SAMPLE elements. Two samples of n random errors of one size
differ in rms: without the floor, one would have more than twice the rms of the other with a probability of
10% at n = 4, 0.9% at n = 13 and 1e-4 at n = 32 (the F distribution beyond 4).

Integers, such as the indices of an argmax, must be equal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SAMPLE = 32  # elements


class Verdict(NamedTuple):
    """The errors of one tensor divided by their bounds.

    1 is the limit of `max_ratio` and `rms_ratio`; NaN and infinity never pass.
    """

    name: str
    max_ratio: float
    rms_ratio: float
    problem: str = ""  # a wrong shape or dtype, or values that are not finite

    @property
    def ok(self) -> bool:
        return not self.problem and self.max_ratio <= 1 and self.rms_ratio <= 1

    def __str__(self) -> str:
        state = "ok" if self.ok else "FAILED"
        return (
            f"{self.name}: {state} max {self.max_ratio:.2f} "
            f"rms {self.rms_ratio:.2f} of the bound {self.problem}".rstrip()
        )


def compare(
    name: str,
    y: torch.Tensor | None,
    r: torch.Tensor | None,
    r64: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    scale: float,
    terms: int = 1,
) -> Verdict:
    """Compares `y` with the references by the rule.

    Args:
        name: The tensor's name in the verdict.
        y: The result under test; None for a gradient that was not computed.
        r: The reference evaluated in the case's dtype.
        r64: The reference evaluated in float64.
        dtype: The dtype that the case computes in (y itself may be float32, as a loss is).
        scale: The largest magnitude among the case's inputs, gradients and outputs.
        terms: The number of values that an element of `y` sums one after another.
    """
    if y is None or r is None or r64 is None:
        if y is None and r64 is None:
            return Verdict(name, 0.0, 0.0)
        return Verdict(
            name, math.inf, math.inf, "missing" if y is None else "unexpected: the reference has none"
        )
    if y.shape != r64.shape:
        return Verdict(name, math.inf, math.inf, f"shape {tuple(y.shape)}, expected {tuple(r64.shape)}")
    if y.dtype != r.dtype:
        return Verdict(name, math.inf, math.inf, f"{y.dtype}, expected {r.dtype}")
    if y.numel() == 0:
        return Verdict(name, 0.0, 0.0)
    if not y.is_floating_point():
        wrong = (y != r64).sum().item()
        return Verdict(name, 0.0, 0.0, f"{wrong} of {y.numel()} integers differ" if wrong else "")
    r64 = r64.detach().double()
    error, allowed = y.detach().double() - r64, r.detach().double() - r64
    for values, source in ((error, "the result"), (allowed, "the reference")):
        if not torch.isfinite(values).all():
            return Verdict(name, math.inf, math.inf, f"{source} is not finite")
    eps = torch.finfo(dtype).eps
    unit = eps if dtype == torch.float64 else torch.finfo(torch.float32).eps  # of sums
    floor = 4 * unit * scale
    max_bound = 2 * _max(allowed) + eps * _max(r64) + max(floor, math.sqrt(terms) * unit * _max(r64))
    rms_bound = 2 * _rms(allowed) + eps * _rms(r64) / math.sqrt(r64.numel()) + floor
    rms_ratio = _ratio(_rms(error), rms_bound) if r64.numel() >= SAMPLE else 0.0
    return Verdict(name, _ratio(_max(error), max_bound), rms_ratio)


def _max(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _ratio(error: float, bound: float) -> float:
    if error == 0:
        return 0.0
    return error / bound if bound > 0 else math.inf
