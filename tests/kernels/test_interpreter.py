"""The patched interpreter: bfloat16 as in torch, and errors for overflows. Is the patch still needed?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

pytestmark = pytest.mark.interpreter


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "maximum":
        out = tl.maximum(a, b)
    elif OP == "greater":
        out = tl.where(a > b, a, b)
    elif OP == "sum":
        out = tl.sum(a, 1)[:, None] + tl.zeros([N, N], a.dtype)
    elif OP == "cast":
        out = (a.to(tl.float32) / 3).to(a.dtype)
    else:
        out = tl.dot(a, b, input_precision="ieee")
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty))


EXPECTED = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "maximum": torch.maximum,
    "greater": torch.maximum,
    "sum": lambda a, b: a.float().sum(1, keepdim=True).expand_as(a).to(a.dtype),
    "cast": lambda a, b: (a.float() / 3).to(a.dtype),
    "dot": lambda a, b: (a.float() @ b.float()).to(a.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", EXPECTED)
def test_arithmetic_equals_torch(op: str, dtype: torch.dtype) -> None:
    """An interpreter that computes with bfloat16's bit patterns, or that truncates instead of rounding."""
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, out, OP=op, N=16)
    unit = torch.finfo(dtype).eps if op in ("dot", "sum") else 0  # the order of summation may differ
    torch.testing.assert_close(out, EXPECTED[op](a, b), rtol=unit, atol=16 * unit)


def test_rounding_of_special_values() -> None:
    """A conversion to bfloat16 that loses NaN or infinity, or does not round ties to even."""
    values = [
        float("nan"),
        float("inf"),
        -float("inf"),
        3.4028e38,
        1 + 2**-8,
        1 + 3 * 2**-8,
        -(1 + 2**-8),
        1e-40,
    ]
    source = torch.tensor(values).repeat(32).reshape(16, 16)
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](source, torch.zeros_like(source), out, OP="add", N=16)
    torch.testing.assert_close(out, source.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "a", "b"),
    [("add", 2**31 - 9, 9), ("sub", 9 - 2**31, 10), ("mul", 2**16, 2**15), ("mul", -(2**16), 2**15 + 1)],
)
def test_overflow_is_an_error(op: str, a: int, b: int) -> None:
    """An offset that wraps to another address, which a small tensor or a mask hides."""
    left, right = torch.full((2, 16, 16), b, dtype=torch.int32)
    left[15, 15] = a
    out = torch.empty_like(left)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"{op} overflows int32"):
        _arithmetic_kernel[(1,)](left, right, out, OP=op, N=16)
    right[15, 15] -= 1
    _arithmetic_kernel[(1,)](left, right, out, OP=op, N=16)
    torch.testing.assert_close(out, EXPECTED[op](left, right), rtol=0, atol=0)


def test_unsigned_integers_wrap() -> None:
    """A random number generator that cannot run, because it is defined modulo 2**32."""
    left = torch.full((16, 16), 2**32 - 1, dtype=torch.int64)
    out = torch.empty(16, 16, dtype=torch.uint32)
    _arithmetic_kernel[(1,)](left.to(torch.uint32), left.to(torch.uint32), out, OP="add", N=16)
    assert out.tolist() == [[2**32 - 2] * 16] * 16


CANARY = """
import torch
from tests.kernels.test_interpreter import EXPECTED, _arithmetic_kernel
a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
for op in ("cast", "dot", "add"):
    out = torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, out, OP=op, N=16)
    print(op, torch.equal(out, EXPECTED[op](a, b)))
a = torch.full((16, 16), 2**31 - 1, dtype=torch.int32)
_arithmetic_kernel[(1,)](a, a, a, OP="add", N=16)
print("overflow", a[0, 0].item())
"""


def test_triton_still_needs_the_patch() -> None:
    """A patch that Triton no longer needs.

    If this fails, Triton computes bfloat16 correctly or checks for overflow: remove that part of
    tests/interpreter.py, and for bfloat16 `trust_interpreted_bfloat16` from kernels/dispatch.py.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CANARY]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cast", "False", "dot", "False", "add", "False", "overflow", "-2"]
