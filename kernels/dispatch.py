"""The one choice between a Triton kernel and its reference, and the reason for it.

A backend is "triton", "reference" or "auto". Precedence, highest first: ``use_backend(op=...)``,
``use_backend("...")``, the model's ``use_triton``, the environment variable ``FUSED_GPT_BACKEND``, then
``"auto"``. Settings hold in the thread that made them. A new thread starts without any. The environment is
read once, at import. ``torch.compile(fullgraph=True)`` traces every choice, and recompiles where a choice
changes.

Under ``TRITON_INTERPRET=1`` the kernels run in Triton's interpreter, on CPU tensors too. The interpreter
computes bfloat16 wrongly, so bfloat16 takes the reference there, unless `trust_interpreted_bfloat16` is True:
set it after patching the interpreter, as the tests do.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, overload

import torch

from kernels.plain import called_submodules

Prepare = TypeVar("Prepare", bound=Callable[..., Any])

BACKENDS = ("triton", "reference", "auto")
USE_TRITON: dict[bool | str, str] = {True: "triton", False: "reference", "auto": "auto"}  # -> backend
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """Which backend a call takes, and why."""

    backend: str  # "triton" | "reference"
    reason: str


class FallbackWarning(UserWarning):
    """Triton was preferred but cannot run here, so the reference runs."""


def _installed_triton() -> tuple[int, int] | None:
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


triton_version = _installed_triton()
interpreting = os.environ.get("TRITON_INTERPRET") == "1"
trust_interpreted_bfloat16 = False
environment = os.environ.get("FUSED_GPT_BACKEND", "auto")
_WITHOUT_AUTOCAST = tuple(  # torch.compile of torch 2.11 cannot trace `is_autocast_available`
    kind
    for kind in ("meta", "lazy", "vulkan", "opengl", "opencl", "ideep", "hip", "ve", "fpga")
    if not torch.amp.is_autocast_available(kind)
)

_ops: dict[str, Op] = {}
_preparations: dict[str, Callable[..., Any]] = {}  # op -> its argument checks and choice
_distrusted: dict[str, str] = {}  # op -> why its kernel must not run in this process, in any thread


class _Thread(threading.local):
    """The contexts that a thread is in, and their settings merged: op, family, "all" or "model" -> backend.

    torch.compile guards attributes of a `threading.local` that `__init__` sets, but not class attributes. It
    cannot trace context variables before torch 2.15, nor thread ids.
    """

    def __init__(self) -> None:
        self.contexts: tuple[_Context, ...] = ()
        self.settings: dict[str, str] = {}

    def replace(self, contexts: tuple[_Context, ...]) -> None:
        self.contexts = contexts
        self.settings = {key: value for context in contexts for key, value in context._settings.items()}


_thread = _Thread()


@dataclass(frozen=True)
class Op:
    """A public op: its name, its family, and the dtypes that its kernels take."""

    name: str
    family: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def __post_init__(self) -> None:
        _ops[self.name] = self

    def prepares(self, prepare: Prepare) -> Prepare:
        """Decorator: registers the function that checks a call's arguments and chooses its backend.

        `prepare` takes all parameters of the public op under the same names, without defaults. It computes
        nothing, and returns the Choice, or a tuple that starts with it. The public op calls it first, and
        `explain` calls nothing else.
        """
        _preparations[self.name] = prepare
        return prepare

    def choose(self, tensor: torch.Tensor, *, limit: str | None = None, slower: str | None = None) -> Choice:
        """The backend for a call whose leading tensor is `tensor`.

        Args:
            tensor: Has the device and the dtype that the op computes in.
            limit: The reason why the kernel cannot take this call, such as a head dimension; None if it can.
            slower: The reason why "auto" takes the reference, from the tuning table; None if it does not.

        Raises:
            RuntimeError: ``use_backend("triton")`` or ``FUSED_GPT_BACKEND=triton`` cannot be honoured.
        """
        wanted, source, binding = self._wanted()
        if wanted == "reference":
            return Choice("reference", source)
        obstacle = self.obstacle(tensor.device, tensor.dtype) or limit
        if obstacle is not None:
            if wanted == "triton" and binding:
                raise RuntimeError(f"{self.name}: {source} cannot be honoured: {obstacle}")
            return Choice("reference", obstacle)
        if wanted == "triton":
            return Choice("triton", source)
        if tensor.device.type == "cpu":
            return Choice("reference", "auto: on a CPU the interpreter only serves tests")
        if slower is not None:
            return Choice("reference", f"auto: {slower}")
        return Choice("triton", "auto: the kernel applies")

    def _wanted(self) -> tuple[str, str, bool]:
        """The backend asked for, the setting that asks, and whether a call that cannot take it raises."""
        settings = _thread.settings
        for key in (self.name, self.family):
            if key in settings:
                return settings[key], f"use_backend({key}={settings[key]!r})", True
        if "all" in settings:
            return settings["all"], f"use_backend({settings['all']!r})", True
        model = settings.get("model", "auto")
        if model != "auto":
            return model, f"use_triton={model == USE_TRITON[True]}", False
        if environment not in BACKENDS:
            raise RuntimeError(f"FUSED_GPT_BACKEND is {environment!r}, expected one of {', '.join(BACKENDS)}")
        return environment, f"FUSED_GPT_BACKEND={environment}", True

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why the kernels cannot run for `device` and `dtype`; None if they can."""
        if self.name in _distrusted:
            return _distrusted[self.name]
        if triton_version is None:
            return "triton is not installed"
        if triton_version < OLDEST_TRITON:
            return (
                f"triton {'.'.join(map(str, triton_version))} "
                f"is older than {'.'.join(map(str, OLDEST_TRITON))}"
            )
        if dtype not in self.dtypes:
            return f"the kernel takes {', '.join(_short(d) for d in self.dtypes)}, not {_short(dtype)}"
        if interpreting:
            if dtype == torch.bfloat16 and not trust_interpreted_bfloat16:
                return "Triton's interpreter computes bfloat16 wrongly"
            return None
        if device.type != "cuda":
            return f"tensors on {device.type} need TRITON_INTERPRET=1"
        if torch.version.hip is not None:
            return "ROCm is not supported"
        capability = capability_of(device)
        if capability < OLDEST_CAPABILITY:
            return f"sm_{capability[0]}{capability[1]} is older than sm_80"
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def capability_of(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device, read in a way that torch.compile folds into a constant."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


class _Context:
    """Applies its settings in the current thread from `__enter__` to `__exit__`.

    One object may be entered again before it is exited, also by other threads.
    """

    _settings: dict[str, str]

    def __enter__(self) -> None:
        _thread.replace((*_thread.contexts, self))

    def __exit__(self, *exc: object) -> None:
        contexts = _thread.contexts
        # Not always the innermost context: generators and asyncio tasks can end in another order.
        for i in reversed(range(len(contexts))):
            if contexts[i] is self:
                return _thread.replace(contexts[:i] + contexts[i + 1 :])
        raise RuntimeError(f"{type(self).__name__}: exited in a thread that has not entered it")


class use_backend(_Context):
    """Context manager: inside, in this thread, all ops or the named ones take `backend`.

    Args:
        backend: "triton", "reference" or "auto" for all ops; None leaves the other ops unchanged.
        **per_op: The backend of single ops (``causal_attention=``) or families (``attention=``, ``norm=``,
            ``ffn=``, ``loss=``, ``decode=``).

    Raises:
        ValueError: Unknown backend, op or family.
        RuntimeError: Raised by an op called inside with "triton" if its kernel cannot run; or by the end of a
            block that another thread entered.
    """

    def __init__(self, backend: str | None = None, /, **per_op: str) -> None:
        known = {op.name for op in _ops.values()} | {op.family for op in _ops.values()}
        for key in per_op:
            if key not in known:
                raise ValueError(
                    f"use_backend: {key!r} is not an op or family, expected one of {', '.join(sorted(known))}"
                )
        self._settings = dict(per_op) if backend is None else {"all": backend, **per_op}
        for key, value in self._settings.items():
            if value not in BACKENDS:
                raise ValueError(f"use_backend: {key} is {value!r}, expected one of {', '.join(BACKENDS)}")


class model_backend(_Context):
    """Context manager: inside, in this thread, a model's ops take the backend that the model prefers.

    It is weaker than `use_backend` and stronger than the environment. An op whose kernel cannot run falls
    back to its reference; see `warn_if_unavailable`.

    Args:
        backend: "triton", "reference" or "auto"; or a model's `use_triton`: True for "triton", False for
            "reference", or "auto".

    Raises:
        ValueError: Another backend.
    """

    def __init__(self, backend: bool | str) -> None:
        self.backend = USE_TRITON.get(backend, str(backend)) if isinstance(backend, (bool, str)) else ""
        if self.backend not in BACKENDS:
            raise ValueError(f"model_backend: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
        self._settings = {"model": self.backend}


class same_backend(_Context):
    """Context manager: inside, in any thread, ops take the backends that hold where it is created.

    For work that is done later, such as a block that the backward pass recomputes.
    """

    def __init__(self) -> None:
        self._settings = dict(_thread.settings)


def warn_if_unavailable(device: torch.device, dtype: torch.dtype) -> None:
    """Gives one FallbackWarning, naming the ops, per reason why Triton cannot run on `device` in `dtype`."""
    reasons: dict[str, list[str]] = {}
    for op in _ops.values():
        obstacle = op.obstacle(device, dtype)
        if obstacle is not None:
            reasons.setdefault(obstacle, []).append(op.name)
    for reason, names in reasons.items():
        message = f"use_triton=True: {reason}; the reference runs for {', '.join(names)}"
        warnings.warn(message, FallbackWarning, stacklevel=3)


def backend_settings() -> Hashable:
    """A value that is equal wherever equal calls take the same backend: for a CUDA graph that is kept."""
    return tuple(sorted(_thread.settings.items())), environment, tuple(_distrusted)


def distrust(op: str, reason: str) -> None:
    """Rules out the kernels of `op` for the rest of this process; `reason` is what `explain` answers."""
    _distrusted[op] = reason


@overload
def explain(op: torch.nn.Module) -> dict[str, str]: ...
@overload
def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice: ...
def explain(
    op: str | Callable[..., Any] | torch.nn.Module, *args: Any, **kwargs: Any
) -> Choice | dict[str, str]:
    """Which backend ``op(*args, **kwargs)`` would take now, and why. Nothing is computed.

    Args:
        op: A public op or its name. For a module, the answer is instead the names of the submodules for which
            a fused op steps aside, with the reason for each: see `is_plain`.
        *args, **kwargs: The arguments of the call; they are checked as in the call.

    Raises:
        ValueError: `op` is unknown.
        TypeError, ValueError, RuntimeError: The call itself would raise this error.
    """
    import kernels

    if isinstance(op, torch.nn.Module):
        return called_submodules(op)
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _ops:
        raise ValueError(f"explain: {name!r} is not an op, expected one of {', '.join(sorted(_ops))}")
    call = inspect.signature(getattr(kernels, name)).bind(*args, **kwargs)
    call.apply_defaults()
    prepared = _preparations[name](**call.arguments)
    return prepared if isinstance(prepared, Choice) else prepared[0]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of an enabled autocast on `device`, else None."""
    kind = device.type
    if kind in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """`tensors` in the autocast dtype if autocast is enabled; float64, integers and None stay unchanged."""
    dtype = next((autocast_dtype(t.device) for t in tensors if isinstance(t, torch.Tensor)), None)
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )
