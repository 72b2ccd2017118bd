"""The contestants: this package, its reference, the compiled reference, and peer packages if installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

import kernels
from gpt.errors import first_line
from kernels.spec import OpSpec

OURS = "fused-gpt"
DETERMINISTIC = ", deterministic"  # the end of the name of a contestant with a deterministic backward pass
OWN = OURS, OURS + DETERMINISTIC
REFERENCE = "reference"
COMPILED = "torch.compile"


class Unsupported(RuntimeError):
    """A contestant does not support the case."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of an op.

    Args:
        name: Its name in tables and in `--contestants`.
        function: Takes the op's own arguments by keyword and returns its outputs. None: it cannot run.
        context: Makes the context manager that is entered around its calls.
        absent: Why it cannot run.
        peer: A third-party implementation. It is timed even where its error exceeds what the tolerance
            allows this package, up to a limit, and the table shows the error.
    """

    name: str
    function: Callable[..., Any] | None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    absent: str = ""
    peer: bool = True


def ours(spec: OpSpec, *, deterministic: bool = False) -> Contestant:
    """The op of this package, on its kernels; `deterministic` sets its argument of that name."""
    backend: dict[str, str] = {spec.name: "triton"}
    function = partial(spec.function, deterministic=True) if deterministic else spec.function
    name = OURS + DETERMINISTIC * deterministic
    return Contestant(name, function, lambda: kernels.use_backend(**backend), peer=False)


def shared(spec: OpSpec, *, compiled: bool) -> list[Contestant]:
    """The contestants of every op; `compiled` says whether torch.compile is included."""
    return [
        ours(spec),
        Contestant(REFERENCE, spec.reference, peer=False),
        compile_of(COMPILED, spec.reference, compiled),
    ]


def compile_of(name: str, function: Callable[..., Any], included: bool) -> Contestant:
    """`function` under torch.compile, which the first call imports."""
    if not included:
        return Contestant(name, None, absent="left out by --quick on a CPU")

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return Contestant(name, lambda **arguments: compiled()(**arguments))


def padded_vocabulary(v: int) -> int:
    """`v` rounded up to a multiple of 64, as baselines pad it for cuBLAS, which is slower at odd sizes."""
    return -(-v // 64) * 64


def foreign(module: str, name: str) -> Any:
    """Imports `name` from a peer package's `module`.

    Raises:
        ImportError: The package is not installed. A broken package may raise any other exception.
    """
    return getattr(import_module(module), name)


def optional(name: str, build: Callable[[], Callable[..., Any]]) -> Contestant:
    """A contestant from a peer package, if it is installed; `build` imports it and returns its function."""
    try:
        return Contestant(name, build())
    except ImportError:
        return Contestant(name, None, absent="not installed")
    except Exception as error:  # a broken package may raise anything
        return Contestant(name, None, absent=f"its import failed: {first_sentence(error)}")


def only(function: Callable[..., Any], takes: tuple[str, ...]) -> Callable[..., Any]:
    """Passes only the arguments in `takes` to `function`; any other must be None or 0."""
    return partial(_call_with, function, takes)


def _call_with(function: Callable[..., Any], takes: tuple[str, ...], **arguments: Any) -> Any:
    for name, value in arguments.items():
        if name not in takes and value not in (None, 0):
            raise Unsupported(f"has no {name}")
    return function(**{name: arguments[name] for name in takes if name in arguments})


def first_sentence(error: BaseException) -> str:
    """The first sentence of an exception's message."""
    return first_line(error).partition(". ")[0]
