"""Tensors with a guard page right after them, or with addresses far apart in memory that
is never touched."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

PAGE = mmap.PAGESIZE
PROT_NONE = 0
NO_RESERVE = 0x4000  # MAP_NORESERVE: the module has it from Python 3.12 on


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, whose last element is followed by a page that cannot be touched."""
    if tensor.numel() == 0:
        return tensor.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    copy = torch.as_strided(_guarded_memory(extent, tensor.dtype), tensor.shape, tensor.stride())
    if 0 not in tensor.stride():
        return copy.copy_(tensor)
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    copy[tuple(once)].copy_(tensor[tuple(once)])
    return copy


def _guarded_memory(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous vector that ends where a guard page begins."""
    size = elements * dtype.itemsize
    whole = -(-size // PAGE) * PAGE
    block = torch.frombuffer(mmap.mmap(-1, whole + PAGE), dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(block.data_ptr() + whole), ctypes.c_size_t(PAGE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    return block[whole - size : whole].view(dtype)


def guard_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what torch.empty, zeros, full, their `_like`s and their `new_`s return has a guard page
    after it."""
    places: tuple[tuple[Any, Sequence[str]], ...] = (
        (torch, ("empty", "empty_like", "zeros", "zeros_like", "full", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_zeros", "new_full", "contiguous", "new_empty_strided")),
    )
    for owner, names in places:
        for name in names:
            plain = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *args, plain=plain, **kwargs: guarded(plain(*args, **kwargs))
            )


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector of zeros whose pages cost nothing until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def exit_status(function: Callable[[], None]) -> int:
    """Runs `function` in a forked child: 0 if it returned, 1 if it raised, -signal if it died of one."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # forking while threads exist: the child starts none
        child = os.fork()
    if child == 0:
        faulthandler.disable()  # where a fault is expected, its stack is noise
        try:
            torch.set_num_threads(1)
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_at_program(monkeypatch: pytest.MonkeyPatch, *first: int) -> None:
    """Interpreted kernels see program ids that begin at `first`, by axis, so that a launch of one program is
    a far one."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_get_program_id

    def shifted(self: InterpreterBuilder, axis: int) -> TensorHandle:
        handle = plain(self, axis)
        return TensorHandle(handle.data + (first[axis] if axis < len(first) else 0), handle.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", shifted)
