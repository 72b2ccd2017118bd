"""Registration of the families' ops with torch.library."""

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
        schema: Name, arguments and results in torch's schema notation.
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
    if differentiate is not None:
        torch.library.register_autograd(f"fused_gpt::{name}", differentiate, setup_context=save, lib=_LIBRARY)


def refuse(op: str) -> Callable[..., Any]:
    """A `differentiate` for the backward op of `op`: it raises, because there is no second derivative."""

    def differentiate(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{op}: a second derivative is requested, expected one derivative (use the reference)"
        )

    return differentiate
