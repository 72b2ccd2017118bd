"""The modules that Triton's passes receive for a launch, each executed on the CPU by ttsem.

This module and `bench.validate.late_completion` alone import ttsem. Importing it changes how Triton prints
modules in this process, for good.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from ttsem import harness, mlir, validate

import bench.validate.late_completion  # noqa: F401  replaces ttsem's asynchronous operations
from bench.validate.record import Recorded
from bench.validate.report import TOLERANCES, Stage
from kernels.launch import options

_NAME = re.compile(r"^Before ([^:]+)(?::.*?)?( \(step \d+\))?$", re.DOTALL)
_LOCATION = re.compile(r" loc\(.*\)$", re.MULTILINE)


def as_record(recorded: Recorded) -> Any:
    """ttsem's record of a launch."""
    kernel = getattr(importlib.import_module(recorded.module), recorded.kernel)
    tensors = {name: torch.empty(1, dtype=buffer.dtype) for name, buffer in recorded.buffers.items()}
    return harness.LaunchRecord(
        launch_id=0,
        fn=kernel,
        fn_name=recorded.kernel,
        fn_file="",
        grid=recorded.grid,
        args=(),
        kwargs=recorded.arguments | tensors | options(recorded.tile),
        bound=recorded.arguments,
        pre={name: buffer.before for name, buffer in recorded.buffers.items()},
        post={name: buffer.after for name, buffer in recorded.buffers.items()},
        ptrs={name: buffer.address for name, buffer in recorded.buffers.items()},
        bases={name: buffer.base for name, buffer in recorded.buffers.items()},
        elems={name: str(buffer.dtype) for name, buffer in recorded.buffers.items()},
    )


class _Stopped(Exception):
    """The compilation has reached the conversion to LLVM."""


def modules(record: Any, architecture: int) -> list[tuple[str, str]]:
    """(pass, the module that it receives) in the order of the compilation of a launch, up to the final TTGIR.

    The modules are what Triton prints with MLIR_ENABLE_DUMP=1. The compilation stops where the conversion to
    LLVM begins, through the hook that Triton has for its profiler.
    """
    mlir.enable_generic_printing()
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    specialized, signature, constants, attributes = harness._specialize(record.fn, (), record.kwargs, target)
    source = ASTSource(record.fn, signature, constants, attributes)
    compiler_options = backend.parse_options({**vars(specialized), **source.parse_options()})
    metadata = {"target": target, **vars(compiler_options)}
    compilation: dict[str, Any] = {}
    backend.add_stages(compilation, compiler_options, source.language)

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(compiler_options)
    module = source.make_ir(target, compiler_options, functions, backend.get_module_map(), context)

    class Hook:
        @staticmethod
        def patch(point: str, passes: Any, _: Any) -> None:
            if point == "ttgpuir_to_llvmir":
                nvidia.nvidia.passes.ttnvgpuir.add_proxy_fence_insertion(passes, architecture)
                nvidia.nvidia.passes.ttnvgpuir.add_tmem_barrier_insertion(passes)
                passes.run(module, "make_llir")
                raise _Stopped

    with _printed() as read:
        for name in ("ttir", "ttgir"):
            module = compilation[name](module, metadata)
        nvidia.CUDABackend.instrumentation = Hook
        try:
            with suppress(_Stopped):
                compilation["llir"](module, metadata)
        finally:
            nvidia.CUDABackend.instrumentation = None
        dump = read()
    dumped = [*validate.split_dump(dump), ("Before the conversion to LLVM", str(module))]
    return [(_NAME.sub(r"\1\2", name), text) for name, text in dumped]


class _Errors:
    """llvm::errs(), where the compiler prints, with a buffer: without one, each word is a system call."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(next((Path(triton.__file__).parent / "_C").glob("libtriton*.so"))))
        stream = self.library._ZN4llvm4errsEv
        stream.restype = ctypes.c_void_p
        self.stream = ctypes.c_void_p(stream())
        self.library._ZN4llvm11raw_ostream11SetBufferedEv(self.stream)

    def flush(self) -> None:
        # LLVM asserts that the buffer is not empty, so a line end is written first.
        self.library._ZN4llvm11raw_ostream5writeEPKcm(self.stream, b"\n", ctypes.c_size_t(1))
        self.library._ZN4llvm11raw_ostream14flush_nonemptyEv(self.stream)


@contextmanager
def _printed() -> Iterator[Callable[[], str]]:
    """Collects what the compiler prints to file descriptor 2; yields the function that returns it."""
    errors = _Errors()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        os.environ["MLIR_ENABLE_DUMP"] = "1"

        def read() -> str:
            errors.flush()
            file.seek(0)
            return file.read().decode("utf-8", errors="replace")

        try:
            yield read
        finally:
            errors.flush()
            del os.environ["MLIR_ENABLE_DUMP"]
            os.dup2(kept, 2)
            os.close(kept)


def run_stages(record: Any, stages: Iterable[tuple[str, str]]) -> list[Stage]:
    """Executes the modules on the inputs of a launch, each distinct text once, and compares the results."""
    results: list[Stage] = []
    first: dict[str, int] = {}
    for place, (name, text) in enumerate(stages):
        key = _LOCATION.sub("", text)
        original = first.setdefault(key, place)
        if original < place:
            results.append(results[original]._replace(receiver=name, same_as=original))
        else:
            results.append(_execute(record, name, key))
    return results


def _execute(record: Any, name: str, text: str) -> Stage:
    try:
        generic = mlir.to_generic(text, None)
        comparison = harness.run_launch(record, generic)
    except Exception as error:  # any failure of the tool is reported
        return Stage(name, problem=f"{type(error).__name__}: {error}")
    if comparison.unsupported:
        return Stage(name, unsupported=", ".join(map(str, comparison.unsupported)))
    if comparison.verdict in ("error", "poison"):
        return Stage(name, problem=comparison.message or comparison.verdict)
    error = max((_error(record.post[diff["name"]], diff) for diff in comparison.diffs), default=0.0)
    return Stage(name, n_diff=comparison.n_diff, error=error)


def _error(expected: np.ndarray, diff: dict[str, Any]) -> float:
    """The largest difference in a tensor over what is allowed; infinite for integers, NaN and infinity."""
    tolerance = TOLERANCES.get(str(expected.dtype))
    if tolerance is None or "max_abs_err" not in diff:
        return float("inf")
    finite = np.abs(expected[np.isfinite(expected)]).astype(np.float64)
    scale = finite.max(initial=0.0)
    return diff["max_abs_err"] / (tolerance * scale) if scale else float("inf")
