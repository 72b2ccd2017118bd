"""Memory that exposes wrong addresses: tensors that end at a guard page, and huge sparse tensors."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import traceback
import warnings
from collections.abc import Callable, Sequence

import torch

PAGE = mmap.PAGESIZE
NORESERVE = 0x4000  # Linux's MAP_NORESERVE: address space that reserves no memory


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous `x`; any access to the page after its last byte raises SIGSEGV."""
    if x.numel() == 0:
        return x
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE) + 1
    region = mmap.mmap(-1, pages * PAGE)

    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if libc.mprotect(ctypes.c_void_p(address + (pages - 1) * PAGE), PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")

    offset = (pages - 1) * PAGE - size
    copy = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=offset).reshape(x.shape)
    return copy.copy_(x)


def sparse(count: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector of `count` zeros; only pages that are touched take memory."""
    region = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(region, dtype=dtype)


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
