"""Who takes part in a race: this package, its reference, the reference compiled, and whoever else is
installed."""

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
EAGER = "eager"
COMPILED = "torch.compile"


class Unsupported(RuntimeError):
    """A contestant does not do what the case asks."""


@dataclass(frozen=True)
class Contestant:
    """Somebody's form of an op.

    Args:
        name: As tables and `--contestants` name it.
        function: Takes the op's own arguments by keyword and returns its outputs. None: it cannot take part,
            for `absent`.
        context: What its calls must stand in.
        peer: Somebody else's: timed with its error beside it even where the error is more than the rule
            allows our own.
    """

    name: str
    function: Callable[..., Any] | None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    absent: str = ""
    peer: bool = True


def shared(spec: OpSpec, *, compiled: bool) -> list[Contestant]:
    """The contestants that every op has; `compiled` says whether torch.compile takes part."""
    backend: dict[str, str] = {spec.name: "triton"}
    found = [
        Contestant(OURS, spec.function, lambda: kernels.use_backend(**backend), peer=False),
        Contestant(EAGER, spec.reference, peer=False),
    ]
    return [*found, compile_of(COMPILED, spec.reference, compiled)]


def compile_of(name: str, function: Callable[..., Any], takes_part: bool) -> Contestant:
    """`function` under torch.compile, which is loaded by the first call."""
    if not takes_part:
        return Contestant(name, None, absent="left out by --quick on a CPU")

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return Contestant(name, lambda **arguments: compiled()(**arguments))


def foreign(module: str, name: str) -> Any:
    """`name` of another package's `module`.

    Raises:
        ImportError: It is not installed. Whatever else its import fails with.
    """
    return getattr(import_module(module), name)


def optional(name: str, build: Callable[[], Callable[..., Any]]) -> Contestant:
    """A contestant from another package, if it is installed: `build` imports it and returns its form of the
    op."""
    try:
        return Contestant(name, build())
    except ImportError:
        return Contestant(name, None, absent="not installed")
    except Exception as error:  # a foreign package may fail on import in any way, and is then not there
        return Contestant(name, None, absent=f"its import failed: {first_sentence(error)}")


def only(function: Callable[..., Any], takes: tuple[str, ...]) -> Callable[..., Any]:
    """`function` called with the arguments in `takes` alone; any other argument that asks for something is
    refused."""
    return partial(_call_with, function, takes)


def _call_with(function: Callable[..., Any], takes: tuple[str, ...], **arguments: Any) -> Any:
    for name, value in arguments.items():
        if name not in takes and value not in (None, 0):
            raise Unsupported(f"has no {name}")
    return function(**{name: arguments[name] for name in takes if name in arguments})


def first_sentence(error: BaseException) -> str:
    """Of what an exception says."""
    return first_line(error).partition(". ")[0]
