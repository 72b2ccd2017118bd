"""Registration of the families' ops with torch.library, and the functions that call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet

ops = SimpleNamespace()  # the function of each op, by the op's name: see `register`
_LIBRARY = torch.library.Library("fused_gpt", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Defines `torch.ops.fused_gpt.<name>`, and `ops.<name>`, which gives the same results and gradients.

    torch's dispatcher takes longer to reach a gradient formula in Python, and then the implementation, than
    most kernels take. So, in eager mode, `ops.<name>` calls `kernel` itself, inside an autograd function if a
    gradient is needed. It calls torch's op under torch.compile, and where a call is not plain: see
    `_is_plain`. For an op without a gradient formula it is torch's op, which takes no longer.

    Args:
        schema: Name, arguments and results in torch's schema notation, without default values.
        kernel: The implementation for CUDA tensors, and for CPU tensors in Triton's interpreter.
        fake: Returns tensors with the shapes, dtypes and strides of the results and undefined values.
        differentiate: Computes the gradients of the arguments from those of the results; None if the op has
            no gradient.
        save: Saves what `differentiate` needs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"fused_gpt::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fused_gpt, name).default
    if differentiate is not None:
        torch.library.register_autograd(f"fused_gpt::{name}", differentiate, setup_context=save, lib=_LIBRARY)
    setattr(ops, name, op if differentiate is None else _direct(name, op, kernel, differentiate, save))


def _direct(
    name: str,
    op: torch._ops.OpOverload[..., Any],
    kernel: Callable[..., Any],
    differentiate: Callable[..., Any],
    save: Callable[..., None] | None,
) -> Callable[..., Any]:
    """The function that calls `op`, or without the dispatcher what it would reach."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = kernel(*arguments)
        if save is not None:
            save(ctx, arguments, output)
        return output

    # What torch.library makes of `differentiate` and `save`.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    names = [argument.name for argument in op._schema.arguments]

    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments, **named)
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        if not _is_plain(tensors):
            return op(*arguments, **named)
        if not needs_gradient(*tensors):
            return kernel(*arguments, **named)
        return function.apply(*arguments, *(named[name] for name in names[len(arguments) :]))

    return call


def _keys(*names: str) -> DispatchKeySet:
    return reduce(or_, (DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names))


# With and without inference mode.
_PLAIN_THREAD = _keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")
_PLAIN_TENSOR = tuple(
    keys
    for device in ("CUDA", "CPU")
    for keys in (
        _keys(device, f"Autocast{device}", "ADInplaceOrView", f"Autograd{device}"),
        _keys(device, f"Autocast{device}"),
    )
)


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a call of an op reaches autograd and the implementation for CUDA or the CPU, and nothing else.

    Otherwise something has to see the call, or treats it in its own way: a mode, a transform of `torch.func`,
    a tracer, the profiler; or an argument, which is of a subclass, a fake, meta or sparse tensor, or a view
    of the negative of a tensor.
    """
    return (
        not torch.overrides.has_torch_function(tensors)
        and torch._C._dispatch_tls_local_include_set() in _PLAIN_THREAD
        and not torch._C._autograd._profiler_enabled()
        and all(torch._C._dispatch_keys(tensor) in _PLAIN_TENSOR for tensor in tensors)
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse(op: str) -> Callable[..., Any]:
    """A `differentiate` for the backward op of `op`: it raises, because there is no second derivative."""

    def differentiate(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{op}: a second derivative is requested, expected one derivative (use the reference)"
        )

    return differentiate
