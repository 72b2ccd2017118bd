"""From logits to losses and, in place, to the logits' gradients; and the scaling of finished gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import LOG2E
from kernels.launch import Launch, cdiv
from kernels.tuning import Tile, loss_tile


@triton.jit
def _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, width):
    """Logits plus bias of the columns offs_v (BLOCK_V,): float32 (BLOCK_M, BLOCK_V), -inf past V.

    logits_ptr: (BLOCK_M, 1), pointers to the rows. counted: (BLOCK_M,), the rows to load; others are -inf.
    width: columns of the buffer, at least V.
    """
    # The mask ends at the padded width, not at V: a mask that ends at an odd V would split every access.
    mask = counted[:, None] & (offs_v < width)[None, :]
    logits = tl.load(logits_ptr + offs_v[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.where((offs_v < V)[None, :], logits, float("-inf"))
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v, mask=offs_v < width, other=0.0)[None, :]
    return logits


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # in, and out with HAS_GRADIENT: (N, V), the first columns of (N, stride_ln)
    targets_ptr,  # (N,) int64, contiguous
    bias_ptr,  # (stride_ln,) float32, contiguous, or None
    grad_ptr,  # (N,) float32, the gradients of the losses; None: ones
    losses_ptr,  # out: (N,) float32, contiguous
    stride_ln,  # logits: elements between rows, the padded width
    stride_gn,  # grad: elements between rows
    N,  # rows
    V,  # columns, the vocabulary
    ignore_index,  # the target of rows with loss 0 and gradient 0
    label_smoothing,  # share of the target that is spread evenly over the vocabulary
    z_loss,  # weight of the squared log-normaliser
    HAS_SMOOTHING: tl.constexpr,  # label_smoothing > 0
    HAS_GRADIENT: tl.constexpr,  # the logits are overwritten with grad times their gradients
    BLOCK_M: tl.constexpr,  # rows per program
    BLOCK_V: tl.constexpr,  # columns per tile
):
    """One program reads BLOCK_M whole rows once for the losses, and once more for the gradients."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=ignore_index)
    counted = mask_m & (target != ignore_index)
    # A target outside [0, V) cannot raise here without a synchronisation: its loss is NaN.
    inside = counted & (target >= 0) & (target < V)
    target_ptrs = logits_ptr + offs_m * stride_ln + target
    target_logit = tl.load(target_ptrs, mask=inside, other=float("nan")).to(tl.float32)  # (BLOCK_M,)
    if bias_ptr is not None:
        target_logit += tl.load(bias_ptr + target, mask=inside, other=0.0)
    logits_ptr += offs_m[:, None] * stride_ln

    # Online softmax. The maximum starts at a finite value: -inf would give NaN for rows that are not counted.
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)  # sum of the logits, for label smoothing
    for start in tl.range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln)  # (BLOCK_M, BLOCK_V)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        row_sum = row_sum * tl.exp2((row_max - new_max) * LOG2E)
        row_sum += tl.sum(tl.exp2((logits - new_max[:, None]) * LOG2E), 1)
        row_max = new_max
        if HAS_SMOOTHING:
            row_total += tl.sum(tl.where(counted[:, None] & (offs_v < V)[None, :], logits, 0.0), 1)

    row_sum = tl.where(counted, row_sum, 1.0)
    log_sum = tl.log(row_sum)
    lse = tl.where(counted, row_max + log_sum, 0.0)
    loss = log_sum + (1 - label_smoothing) * (row_max - target_logit) + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss += label_smoothing * (row_max - row_total / V)
    tl.store(losses_ptr + offs_m, tl.where(counted, loss, 0.0), mask=mask_m)

    if HAS_GRADIENT:
        tl.debug_barrier()  # every thread has read its target's logit before any thread overwrites it
        grad = counted.to(tl.float32)
        if grad_ptr is not None:
            grad *= tl.load(grad_ptr + offs_m * stride_gn, mask=counted, other=0.0)
        factor = grad * (1 + 2 * z_loss * lse) / row_sum

        for start in tl.range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln)
            dlogits = tl.exp2((logits - row_max[:, None]) * LOG2E) * factor[:, None]  # (BLOCK_M, BLOCK_V)
            is_target = offs_v[None, :] == target[:, None]
            dlogits -= tl.where(is_target, (grad * (1 - label_smoothing))[:, None], 0.0)
            if HAS_SMOOTHING:
                dlogits -= (grad * (label_smoothing / V))[:, None]
            mask = mask_m[:, None] & (offs_v < stride_ln)[None, :]
            tl.store(logits_ptr + offs_v[None, :], dlogits.to(logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy(
    *,
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
) -> Launch:
    """The launch that fills `losses` and, with `gradient`, overwrites the logits with their gradients.

    logits: (N, V), the first columns of a contiguous buffer (N, width); the padding is overwritten too. bias:
    (width,) float32, added to the logits. targets: (N,) int64. losses: (N,) float32. grad: (N,) float32, the
    gradients of the losses; None means ones.
    """
    n, v = logits.shape
    tile = loss_tile(v)
    arguments = {
        "logits_ptr": logits,
        "targets_ptr": targets,
        "bias_ptr": bias,
        "grad_ptr": grad,
        "losses_ptr": losses,
        "stride_ln": logits.stride(0),
        "stride_gn": 0 if grad is None else grad.stride(0),
        "N": n,
        "V": v,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "HAS_SMOOTHING": label_smoothing > 0,
        "HAS_GRADIENT": gradient,
        "BLOCK_M": tile.block_m,
        "BLOCK_V": tile.block_n,
    }
    return Launch(_cross_entropy_kernel, (cdiv(n, tile.block_m),), arguments, tile)


@triton.jit
def _scale_kernel(
    in_ptr,  # (N,)
    scale_ptr,  # 0-d float32
    out_ptr,  # out: (N,)
    N,  # elements
    BLOCK_N: tl.constexpr,  # elements per program
):
    """One program scales BLOCK_N elements."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(in_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + offs_n, value.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def scale_gradient(*, gradient: Tensor, scale: Tensor, out: Tensor) -> Launch:
    """The launch that fills out = gradient * scale, computed in float32 and rounded once.

    gradient, out: contiguous, of one shape. scale: 0-d float32 on their device.
    """
    tile = Tile(1, 4096, num_warps=8, num_stages=1)
    n = gradient.numel()
    arguments = {"in_ptr": gradient, "scale_ptr": scale, "out_ptr": out, "N": n, "BLOCK_N": tile.block_n}
    return Launch(_scale_kernel, (cdiv(n, tile.block_n),), arguments, tile)
