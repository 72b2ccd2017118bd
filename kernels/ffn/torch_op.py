"""The torch.library ops of the feed-forward: torch computes the matmuls, Triton what comes between them.

Shapes: x, y (..., C), as N rows in the kernels; w_up (I, C); w_down (C, I); h = x w_upᵀ (N, I), without the
bias; a = gelu(h + b_up) (N, I).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.ffn.gelu import bias_gelu_backward, bias_gelu_forward
from kernels.ffn.gemm import gelu_gemm_forward
from kernels.torch_library import needs_gradient, ops, refuse, register
from kernels.tuning import architecture, gelu_backward_tile, gelu_gemm_tile, gelu_programs

# dx, dw_up, db_up, dw_down, db_down
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gelu_ffn(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, approximate: str
) -> Tensor:
    """`kernels.gelu_ffn`, after its arguments have been checked."""
    tensors = x, w_up, b_up, w_down, b_down
    y, _ = ops.gelu_ffn_forward(*tensors, approximate == "tanh", needs_gradient(*tensors))
    return y


def _rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C)."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def _forward(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y, and h for backward; without `save`, GELU overwrites h and an empty tensor takes its place."""
    rows, (i, c) = _rows(x), w_up.shape
    h = x.new_empty(rows.shape[0], i)
    a = torch.empty_like(h) if save else h
    b_up = None if b_up is None else b_up.contiguous()
    tile = gelu_gemm_tile(architecture(x.device), x.element_size(), rows.shape[0], i, c) if save else None

    with torch.cuda.device_of(x):
        if tile is not None:
            gelu_gemm_forward(x=rows, w=w_up, bias=b_up, h=h, a=a, tanh=tanh, tile=tile).run()
        else:
            torch.mm(rows, w_up.t(), out=h)
            bias_gelu_forward(h=h, bias=b_up, a=a, tanh=tanh).run()

    y = x.new_empty(*x.shape[:-1], w_down.shape[0])
    if b_down is None:
        torch.mm(a, w_down.t(), out=_rows(y))
    else:
        torch.addmm(b_down, a, w_down.t(), out=_rows(y))
    return y, h if save else x.new_empty(0)


def _forward_fake(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The fake of gelu_ffn_forward."""
    h = x.new_empty(x.numel() // x.shape[-1], w_up.shape[0]) if save else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], w_down.shape[0]), h


def _gradient_buffers(
    dy: Tensor, x: Tensor, h: Tensor, w_up: Tensor, w_down: Tensor, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients, uninitialised; each that is not needed is an empty tensor."""
    shapes = x.shape, w_up.shape, w_up.shape[:1], w_down.shape, w_down.shape[:1]
    dx, dw_up, db_up, dw_down, db_down = (
        x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dw_up, db_up, dw_down, db_down


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    tanh: bool,
    *needs: bool,
) -> Gradients:
    """The gradients for `dy`, the gradient of y. `needs` has a flag for each."""
    need_dx, need_dw_up, need_db_up, need_dw_down, need_db_down = needs
    later = False, *needs[1:]  # dx is allocated when the memory of `a` is free again
    dx, dw_up, db_up, dw_down, db_down = _gradient_buffers(dy, x, h, w_up, w_down, later)
    rows, dy = _rows(x), _rows(dy)
    b_up = None if b_up is None else b_up.contiguous()
    a = torch.empty_like(h) if need_dw_down else None

    with torch.cuda.device_of(x):
        if need_dx or need_dw_up or need_db_up:
            dh = torch.mm(dy, w_down, out=torch.empty_like(h))  # da, which the kernel overwrites with dh
            tile = gelu_backward_tile(h.shape[1], h.element_size())
            programs = gelu_programs(h.device, h.shape[0], h.shape[1], tile)
            partial = h.new_empty((programs, h.shape[1]), dtype=torch.float32) if need_db_up else None
            bias_gelu_backward(
                da=dh,
                h=h,
                bias=b_up,
                dh=dh,
                a=a,
                partial_dbias=partial,
                tanh=tanh,
                programs=programs,
                tile=tile,
            ).run()
            if partial is not None:
                db_up.copy_(partial.sum(0))
        elif a is not None:
            bias_gelu_forward(h=h, bias=b_up, a=a, tanh=tanh).run()

    if a is not None:
        torch.mm(dy.t(), a, out=dw_down)
        a = None
    if need_dw_up:
        torch.mm(dh.t(), rows, out=dw_up)
    if need_db_down:
        torch.sum(dy, 0, out=db_down)
    if need_dx:
        dx = x.new_empty(x.shape)
        torch.mm(dh, w_up, out=_rows(dx))
    return dx, dw_up, db_up, dw_down, db_down


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    tanh: bool,
    *needs: bool,
) -> Gradients:
    """The fake of gelu_ffn_backward."""
    return _gradient_buffers(dy, x, h, w_up, w_down, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what backward needs of a call of gelu_ffn_forward."""
    x, w_up, b_up, w_down, _, ctx.tanh, _ = inputs
    _, h = output
    ctx.set_materialize_grads(False)  # no tensor of zeros for the gradient of h
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, h, w_up, b_up, w_down)


def _differentiate(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """From the gradient of y to the gradients of gelu_ffn_forward's seven arguments."""
    needs = ctx.needs_input_grad[:5]
    gradients = ops.gelu_ffn_backward(dy, *ctx.saved_tensors, ctx.tanh, *needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


register(
    "gelu_ffn_forward(Tensor x, Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, bool tanh,"
    " bool save) -> (Tensor y, Tensor h)",
    kernel=_forward,
    fake=_forward_fake,
    differentiate=_differentiate,
    save=_save,
)
register(
    "gelu_ffn_backward(Tensor dy, Tensor x, Tensor h, Tensor w_up, Tensor? b_up, Tensor w_down, bool tanh,"
    " bool need_dx, bool need_dw_up, bool need_db_up, bool need_dw_down, bool need_db_down)"
    " -> (Tensor dx, Tensor dw_up, Tensor db_up, Tensor dw_down, Tensor db_down)",
    kernel=_backward,
    fake=_backward_fake,
    differentiate=refuse("gelu_ffn"),
)
