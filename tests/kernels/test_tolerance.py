"""The tolerance rule accepts rounding errors and rejects each planted fault."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.tolerance import Verdict, compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def attention_case(
    dtype: torch.dtype, t: int = 96
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 2, t, 32, generator=generator).to(dtype)
    return (
        q,
        k,
        v,
        reference.causal_attention(q, k, v),
        reference.causal_attention(q.double(), k.double(), v.double()),
    )


def judge(y: torch.Tensor, r: torch.Tensor, r64: torch.Tensor, dtype: torch.dtype) -> Verdict:
    return compare("out", y, r, r64, dtype=dtype, scale=5.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_summation_passes(dtype: torch.dtype) -> None:
    """A rule so tight that a correct result fails because it rounds at other places."""
    q, k, v, r, r64 = attention_case(dtype)
    logits = (q.float() @ k.float().mT / math.sqrt(32)).masked_fill(
        ~torch.ones(96, 96, dtype=torch.bool).tril(), -math.inf
    )
    y = (logits.softmax(-1) @ v.float()).to(dtype)
    assert judge(y, r, r64, dtype).ok


FAULTS = {
    "the scale is 2% off": lambda q, k, v: reference.causal_attention(q, k, v, scale=1.02 / math.sqrt(32)),
    "the causal mask is missing": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    "the result is 0.7% too large": lambda q, k, v: reference.causal_attention(q, k, v) * 1.007,
    "one row is a copy of the row before it": lambda q, k, v: _with_row(
        reference.causal_attention(q, k, v), 60, 59
    ),
    "the result is zero": lambda q, k, v: torch.zeros_like(q),
    "one element is off by 3% of the largest": lambda q, k, v: _nudged(
        reference.causal_attention(q, k, v), 0.03
    ),
    "one element is NaN": lambda q, k, v: _with_value(reference.causal_attention(q, k, v), math.nan),
    "one element is infinite": lambda q, k, v: _with_value(reference.causal_attention(q, k, v), math.inf),
    "the diagonal is masked": lambda q, k, v: reference.causal_attention(
        q, torch.roll(k, 1, 2), torch.roll(v, 1, 2)
    ),
}


def _with_row(y: torch.Tensor, to: int, source: int) -> torch.Tensor:
    y = y.clone()
    y[1, 1, to] = y[1, 1, source]
    return y


def _with_value(y: torch.Tensor, value: float) -> torch.Tensor:
    y = y.clone()
    y[0, 1, 5, 3] = value
    return y


def _nudged(y: torch.Tensor, share: float) -> torch.Tensor:
    y = y.clone()
    y[0, 1, 5, 3] += share * y.max()
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail(fault: str, dtype: torch.dtype) -> None:
    """A rule so loose that a wrong kernel passes."""
    q, k, v, r, r64 = attention_case(dtype)
    verdict = judge(FAULTS[fault](q, k, v), r, r64, dtype)
    assert not verdict.ok, f"{fault}: {verdict}"


def test_few_elements_are_judged_by_their_largest_error() -> None:
    """A correct result of 4 elements that fails because the reference's roundings happen to be small."""
    r64 = torch.tensor([1.0, 0.4, 0.2, -0.3], dtype=torch.float64)
    y, r = (r64 + torch.tensor(errors) for errors in ([4e-3, 4e-3, -4e-3, 4e-3], [1e-3, 1e-4, 1e-4, 0.0]))
    assert compare("dw", y, r, r64, dtype=torch.bfloat16, scale=1.0).ok
    many = [t.repeat(8) for t in (y, r, r64)]
    assert not compare("dw", *many, dtype=torch.bfloat16, scale=1.0).ok
    assert not compare("dw", r64 + 2e-2, r, r64, dtype=torch.bfloat16, scale=1.0).ok


def test_many_terms_may_be_added_one_after_another() -> None:
    """A correct float32 sum that fails because the reference adds partial sums, or an excuse for faults."""
    addends = torch.randn(8192, 2000) * 0.02
    addends[0] = 2
    addends[:, 100:] *= 0.01  # gradients of most keys are small
    r, r64 = addends.sum(0), addends.double().sum(0)
    y = torch.from_numpy(np.add.accumulate(addends.numpy())[-1])
    rule: dict[str, Any] = {"dtype": torch.float32, "scale": 4.0}
    assert not compare("dk", y, r, r64, **rule).ok
    assert compare("dk", y, r, r64, **rule, terms=8192).ok
    assert not compare("dk", r64.float() + 1e-4, r, r64, **rule, terms=8192).ok
    assert not compare("dk", (r64 - addends[-1]).float(), r, r64, **rule, terms=8192).ok
    half: dict[str, Any] = {"dtype": torch.bfloat16, "scale": 4.0}
    ratios = [compare("dk", y, r, r64, **half, terms=terms).max_ratio for terms in (1, 8192)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01)  # hidden by the rounding of the result


def test_integers_must_be_equal() -> None:
    """An index that is off by one, which the rule for floats would call a rounding error."""
    index = torch.tensor([3, 50000])
    assert compare("out", index.clone(), index, index, dtype=torch.bfloat16, scale=1.0).ok
    assert not compare("out", index + 1, index, index, dtype=torch.bfloat16, scale=1.0).ok


def test_a_missing_gradient_fails() -> None:
    """A backward pass that returns None where the reference has a gradient, or the reverse."""
    r64 = torch.ones(3, dtype=torch.float64)
    assert not compare("dq", None, r64.float(), r64, dtype=torch.float32, scale=1.0).ok
    assert not compare("dq", r64.float(), None, None, dtype=torch.float32, scale=1.0).ok
    assert compare("dq", None, None, None, dtype=torch.float32, scale=1.0).ok


def test_zero_fails_for_a_small_gradient_and_rounding_passes_for_zero() -> None:
    """A zero that passes for a small gradient, or a rounding error that fails where zero is expected."""
    small = torch.full((8,), 1e-3, dtype=torch.float64)
    assert not compare("db", torch.zeros(8), small.float(), small, dtype=torch.float32, scale=1.0).ok
    zero = torch.zeros(8, dtype=torch.float64)
    assert compare("dq", torch.full((8,), 1e-7), zero.float(), zero, dtype=torch.float32, scale=1.0).ok
    assert not compare("dq", torch.full((8,), 1e-4), zero.float(), zero, dtype=torch.float32, scale=1.0).ok


def test_another_dtype_or_shape_fails() -> None:
    """A loss in bfloat16, or an output of another shape that broadcasting would accept."""
    r64 = torch.ones(4, dtype=torch.float64)
    assert (
        "torch.bfloat16"
        in compare("out", r64.bfloat16(), r64.float(), r64, dtype=torch.bfloat16, scale=1.0).problem
    )
    assert "shape" in compare("out", torch.ones(1), r64.float(), r64, dtype=torch.float32, scale=1.0).problem


def test_a_reference_that_overflows_fails() -> None:
    """An infinite bound because the reference overflows in float16, so that any result passes."""
    r64 = torch.tensor([7e4], dtype=torch.float64)
    assert not compare(
        "out", torch.zeros(1, dtype=torch.float16), r64.half(), r64, dtype=torch.float16, scale=7e4
    ).ok
