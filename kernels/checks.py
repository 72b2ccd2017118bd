"""Argument checks in one message form: "causal_attention: k has D=48, expected 64 (q's)".

They run before any launch, never read device memory, and cost a few microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

Dims = tuple[str, ...]


def shapes(op: str, optional: Dims = (), /, **arguments: tuple[torch.Tensor | None, Dims]) -> dict[str, int]:
    """Checks ranks, sizes and devices of tensors against named dimensions, and returns the sizes by name.

    Args:
        op: The op's name, for messages.
        optional: Names of the arguments that may be None; they are skipped then.
        **arguments: name=(tensor, dimension names). The first use of a dimension fixes its size; a name such
            as "3" is itself the size. A leading "..." means any leading dimensions, equal in all tensors
            that have it; size "N" is the number of rows in them.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A rank, a size or a device differs from what is expected.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    leading: tuple[int, ...] | None = None
    first: tuple[str, torch.device] | None = None
    for name, (tensor, dims) in arguments.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a Tensor")
        shape = tuple(tensor.shape)
        named = dims
        if dims[0] == "...":
            named = dims[1:]
            if len(shape) < len(named):
                raise ValueError(f"{op}: {name} has shape {shape}, expected ({', '.join(dims)})")
            split = len(shape) - len(named)
            if leading is None:
                leading, owner["..."] = shape[:split], name
                sizes["N"] = math.prod(leading)
            elif shape[:split] != leading:
                wanted = (*leading, *(sizes.get(d, d) for d in named))
                raise ValueError(f"{op}: {name} has shape {shape}, expected {wanted} ({owner['...']}'s)")
            shape = shape[split:]
        elif len(shape) != len(dims):
            raise ValueError(
                f"{op}: {name} has {len(shape)} dimensions, expected {len(dims)} ({', '.join(dims)})"
            )
        for dim, size in zip(named, shape, strict=True):
            if dim.isdigit():
                if size != int(dim):
                    raise ValueError(
                        f"{op}: {name} has size {size} in dimension {dims.index(dim)}, expected {dim} "
                        f"({', '.join(dims)})"
                    )
            elif dim not in sizes:
                sizes[dim], owner[dim] = size, name
            elif sizes[dim] != size:
                raise ValueError(f"{op}: {name} has {dim}={size}, expected {sizes[dim]} ({owner[dim]}'s)")
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first[1]} ({first[0]}'s)")
    return sizes


def floating(op: str, /, **tensors: torch.Tensor | None) -> None:
    """Each tensor is float16, bfloat16, float32 or float64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
        ):
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected a floating-point dtype")


def same_dtype(op: str, /, **tensors: torch.Tensor | None) -> None:
    """All tensors have the first one's floating-point dtype."""
    floating(op, **tensors)
    first: tuple[str, torch.dtype] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.dtype
        elif tensor.dtype != first[1]:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {first[1]} ({first[0]}'s)")


def dtype(op: str, name: str, tensor: torch.Tensor | None, expected: torch.dtype) -> None:
    """`tensor` is None or has the `expected` dtype."""
    if tensor is not None and tensor.dtype != expected:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {expected}")


def last_contiguous(op: str, /, **tensors: torch.Tensor) -> None:
    """The last dimension of each tensor has stride 1 (any stride if its size is 1)."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{op}: {name} has stride {tensor.stride(-1)} in its last dimension, expected 1")


def number(op: str, name: str, value: Any, low: float, high: float, *, open_high: bool = False) -> None:
    """`value` is a real number in [low, high], or in [low, high) with `open_high`; NaN is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a number")
    if not (low <= value < high if open_high else low <= value <= high):
        raise ValueError(
            f"{op}: {name} is {value}, expected a number in [{low}, {high}{')' if open_high else ']'}"
        )


def integer(op: str, name: str, value: Any) -> None:
    """`value` is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected an int")


def finite(op: str, name: str, value: Any) -> None:
    """`value` is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")


def scale(op: str, value: Any) -> None:
    """`value`, attention's scale, is None or a positive finite number."""
    if value is None:
        return
    finite(op, "scale", value)
    if value <= 0:
        raise ValueError(f"{op}: scale is {value}, expected a positive number")


def one_of(op: str, name: str, value: Any, values: Sequence[str]) -> None:
    """`value` is one of `values`."""
    if value not in values:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, values))}")


def boolean(op: str, name: str, value: Any) -> None:
    """`value` is None, True or False."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected True, False or None")


def seed(op: str, value: Any, device: torch.device) -> None:
    """`value` is None, an int that fits 64 bits, or a 0-d int64 tensor on `device`."""
    if value is None:
        return
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64 or value.ndim != 0:
            raise TypeError(
                f"{op}: seed is {value.dtype} with {value.ndim} dimensions, expected a 0-d int64 tensor"
            )
        if value.device != device:
            raise ValueError(f"{op}: seed is on {value.device}, expected {device}")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: seed is {type(value).__name__}, expected an int, a 0-d int64 tensor or None")
    elif not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: seed is {value}, expected an int of 64 bits")
