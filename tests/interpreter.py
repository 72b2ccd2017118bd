"""Patches for Triton's interpreter: right results in bfloat16, checks of overflow, and faster launches.

The conftest calls `patch_interpreter` once, before any kernel runs. Triton 3.6 to 3.9 store bfloat16 values
as uint16 bits and then multiply, add and compare those bits; conversions from float32 truncate. They compute
whether integers overflow, which takes a quarter of a launch, and do not report it.
`test_interpreter.py` tests the patched results, and fails once Triton no longer needs the patch.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

import kernels.dispatch


def patch_interpreter() -> None:
    """Replaces what is wrong or slow in the interpreter, and lets the dispatcher use it for bfloat16."""
    for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op"):
        setattr(InterpreterBuilder, name, _PATCHES[name])
    ReduceOps.sum = _sum
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    interpreter._get_np_dtype = _numpy_dtype
    _patch_language_once()
    kernels.dispatch.trust_interpreted_bfloat16 = True


_cast, _dot, _binary, _custom_cast = (
    getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_dot", "binary_op", "create_fp_to_fp")
)
_plain_sum = ReduceOps.sum


def _is_bfloat16(*handles: TensorHandle) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: Any) -> TensorHandle:
    """float32 to bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16:
        return _narrow(_cast(self, _widen(src), tl.float32).data)
    return _cast(self, _widen(src), dst_type)


def _create_fp_to_fp(
    self: InterpreterBuilder, src: TensorHandle, dst_type: Any, rounding_mode: Any
) -> TensorHandle:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _cast_impl(self, src, dst_type)
    return _custom_cast(self, src, dst_type, rounding_mode)


def _create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(self, _widen(a), _widen(b), *rest)


def _binary_op(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
    if not _is_bfloat16(lhs, rhs):
        return _binary(self, lhs, rhs, op)
    result = _binary(self, _widen(lhs), _widen(rhs), op)
    return result if result.data.dtype == np.bool_ else _narrow(result.data)


def _sum(self: ReduceOps, values: Any) -> Any:
    if values.dtype.scalar != tl.bfloat16:
        return _plain_sum(self, values)
    total = np.sum(_widen(values.handle).data, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(_narrow(total).data, tl.bfloat16)


_scalar_dtype = cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype in which the interpreter stores values; its own function makes a table in each call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _scalar_dtype(scalar)


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(self: TritonSemantic[Any], a: tl.tensor, b: tl.tensor, operation: Any) -> None:
    """Raises OverflowError if a signed integer of less than 64 bits overflows; unsigned ones may."""
    scalar = a.type.scalar
    if scalar.is_int_unsigned() or scalar.int_bitwidth >= 64:
        return
    exact = _EXACT[operation.__name__](a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
    low, high = scalar.get_int_min_value(), scalar.get_int_max_value()
    if exact.min() < low or high < exact.max():
        raise OverflowError(f"{operation.__name__} overflows {scalar}")


_PATCHES = {
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _create_fp_to_fp,
    "create_dot": _create_dot,
    "binary_op": _binary_op,
}


def _patch_language_once() -> None:
    """Patches triton.language once; the interpreter does it at every launch and device function call."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # 3.6's fails with numpy 2.4
    kept = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: kept
