"""What the families' ops share on their way into torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_gpt", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Defines `torch.ops.fused_gpt.<name>`.

    Args:
        schema: Name, arguments and results in torch's notation.
        kernel: Runs on CUDA tensors, and on CPU tensors in the interpreter.
        fake: Gives results of the right shapes, dtypes and strides, which nobody reads.
        differentiate: From the results' gradients to the arguments'; None where no gradient can be asked for.
        save: Keeps what `differentiate` needs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"fused_gpt::{name}", fake, lib=_LIBRARY)
    if differentiate is not None:
        torch.library.register_autograd(f"fused_gpt::{name}", differentiate, setup_context=save, lib=_LIBRARY)


def refuse(op: str) -> Callable[..., Any]:
    """The `differentiate` of a backward pass of `op`, which has no derivative of its own."""

    def differentiate(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{op}: a gradient of its gradient is asked for, expected one derivative (use the reference)"
        )

    return differentiate
