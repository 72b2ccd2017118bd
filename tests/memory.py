"""Memory that exposes wrong addresses: tensors that end at a guard page, and huge sparse tensors."""

from __future__ import annotations

import ctypes
import faulthandler
import math
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
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: address space that reserves no memory


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides; an access to the page after its last element raises SIGSEGV."""
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
    """Makes torch's allocating functions and methods return tensors with a guard page after the end."""
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
    """A vector of zeros; only the pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def spread(x: torch.Tensor, dim: int, offset: int, memory: torch.Tensor) -> torch.Tensor:
    """A copy of `x` in `memory`, from `offset`, that spans more than 2**31 elements along `dim`."""
    stride = list(torch.empty(x.shape, device="meta").stride())
    stride[dim] = -(-(2**31) // max(1, x.shape[dim] - 1)) + 64
    return memory.as_strided(x.shape, stride, offset).copy_(x)


def fits(shapes: Sequence[Sequence[int]]) -> int:
    """Elements of memory that `spread` copies of these shapes need, each at its own offset."""
    return 2**31 + 2**20 + sum(map(math.prod, shapes))


def in_a_fork(function: Callable[[], object]) -> str:
    """Runs `function` in a child process and returns "", its traceback, or the signal that killed it."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns that threads are not copied
        child = os.fork()

    if child == 0:
        os.close(reader)
        status = 0
        try:
            faulthandler.disable()
            torch.set_num_threads(1)
            function()
        except BaseException:
            status = 1
            with os.fdopen(writer, "w") as pipe:
                pipe.write(traceback.format_exc()[-4000:])
        os._exit(status)

    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return message or ("" if status == 0 else f"exit status {status}")


def start_at_program(monkeypatch: pytest.MonkeyPatch, *first: int) -> None:
    """Adds `first` to the program ids of interpreted kernels, by axis: one program can compute any tile."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_get_program_id

    def shifted(self: InterpreterBuilder, axis: int) -> TensorHandle:
        handle = plain(self, axis)
        return TensorHandle(handle.data + (first[axis] if axis < len(first) else 0), handle.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", shifted)
