"""Executes compiled kernels without a GPU: a session of ttsem, completed for this package.

While it is open, CPU tensors say that they are on a GPU. Triton's front end compiles every launch, and ttsem
executes the IR: an access outside a tensor, a race between programs or an undefined result raises.
`torch.empty` returns NaN. ttsem lacks a few things that `upstream/` describes; this module adds them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from ttsem import harness, mlir, sanitize

from gpt import decoding
from kernels import tuning
from kernels.registry import SPECS
from tests.compiled.ordering import without_ordered_reads

NAMESPACE = "fused_gpt"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
ARCHITECTURE = int(os.environ.get("FUSED_GPT_ARCH", "90"))
CHILD = [sys.executable, "-c", "from tests.compiled.session import serve; serve()"]


@contextmanager
def session(
    architecture: int = ARCHITECTURE, on_stop: Callable[[Exception], object] | None = None
) -> Iterator[Any]:
    """An open session, which counts its launches.

    architecture: 90 compiles for sm_90, with the tiles of sm_90. on_stop: called with the fault of a launch
    before it is raised.
    """
    importlib.import_module("kernels.preflight")
    with ExitStack() as stack:
        state = stack.enter_context(sanitize.session(architecture, "<pytest>", on_stop=on_stop))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        for owner, name, replacement in (
            (harness, "ir_for_launch", FrontEnd()),
            (sanitize, "_without_protocol_buffers", lambda log, buffers: without_ordered_reads(log)),
            (torch, "Generator", Generator),
            (torch, "addmm", _addmm_of(torch.addmm)),
            (torch, "autocast", Autocast),
            (torch.amp, "autocast", Autocast),
            (torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu")),
            (torch, "get_autocast_dtype", lambda kind="cpu": dtype("cpu")),
            (sys.modules["kernels.preflight"], "CHILD", CHILD),
            (decoding, "captures", lambda device: False),  # there are no CUDA graphs
            (tuning, "starts_early", lambda architecture: False),  # launches run one after another
        ):
            patch.setattr(owner, name, replacement)
        stack.enter_context(_inside_ops())
        yield state


def serve() -> None:
    """The child process of preflight, whose kernels run in a session too."""
    from kernels.preflight import serve as serve_cases

    with session():
        serve_cases()


class FrontEnd:
    """`harness.ir_for_launch` that stops at the executed module, and that compiles each module once.

    ttsem compiles a launch down to machine code before it executes the module of the front end, which takes
    most of a test's time.
    """

    def __init__(self) -> None:
        mlir.enable_generic_printing()
        self.modules: dict[Any, str] = {}

    def __call__(self, record: harness.LaunchRecord, stage: str, target: Any) -> str:
        key = record.fn, repr(harness._specialize(record.fn, record.args, record.kwargs, target))
        if key not in self.modules:
            self.modules[key] = mlir.to_generic(harness._stage_text(record, stage, target))
        return self.modules[key]


class Generator(torch.Generator):
    """A CPU generator that says that it is on the device that was asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator = super().__new__(cls, device="cpu")
        generator.requested = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:
        return self.requested


class Autocast(torch.autocast):
    """Autocast for the CPU, where the tensors are, whatever device type was asked for."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _addmm_of(addmm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.addmm` with `out_dtype`, which torch has on CUDA only."""

    def call(
        total: Any, a: Any, b: Any, *, out_dtype: torch.dtype | None = None, **rest: Any
    ) -> torch.Tensor:
        if out_dtype is not None:
            a, b = a.to(out_dtype), b.to(out_dtype)
        return addmm(total, a, b, **rest)

    return call


@contextmanager
def _inside_ops() -> Iterator[None]:
    """Keeps the session's function mode in force inside the ops of this package.

    A session is a torch function mode, and a mode is off while it handles a call. Calling an op of
    torch.library is such a call: inside it the tensors would say that they are on the CPU, so the op would
    take the tiles of the interpreter, and `torch.empty` would not return NaN.
    """
    for family in {spec.family for spec in SPECS.values()}:
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


def _entering(mode: TorchFunctionMode, op: Any) -> Callable[..., Any]:
    """An implementation of `op` that enters `mode` and calls the one for CUDA, which is the same function."""

    def call(*args: Any, **options: Any) -> Any:
        with mode:
            return op.redispatch(CUDA, *args, **options)

    return call
