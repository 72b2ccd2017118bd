"""Keeps a session of ttsem in force inside the ops of this package.

A session is a torch function mode, and a mode is off while it handles a call. Calling an op of torch.library
is such a call. Without this module the tensors inside an op say that they are on the CPU: the op takes the
tiles of the interpreter, and `torch.empty` inside an op is not filled with NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

NAMESPACE = "fused_gpt"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@contextmanager
def inside_ops() -> Iterator[None]:
    """While open, the function mode that is in force now is in force inside the ops too."""
    for family in ("attention", "norm", "ffn", "loss"):
        importlib.import_module(f"kernels.{family}.torch_op")  # registers the ops

    mode = _get_current_function_mode_stack()[-1]
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == NAMESPACE:
            function = _entering(mode, getattr(torch.ops.fused_gpt, op).default)
            library.impl(op, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _entering(mode: TorchFunctionMode, op: Any) -> Any:
    """An implementation of `op` that enters `mode` and calls the one for CUDA, which is the same function."""

    def call(*args: Any) -> Any:
        with mode:
            return op.redispatch(CUDA, *args)

    return call


@contextmanager
def session(architecture: int = 90) -> Iterator[Any]:
    """A session of ttsem like the plugin's, in force inside the ops; the plugin does not count its faults."""
    from ttsem import harness, sanitize

    from tests.compiled.plugin import FrontEnd, Generator

    with sanitize.session(architecture) as state, pytest.MonkeyPatch.context() as patch, inside_ops():
        patch.setattr(harness, "ir_for_launch", FrontEnd())
        patch.setattr(torch, "Generator", Generator)
        yield state
