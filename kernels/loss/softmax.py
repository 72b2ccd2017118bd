"""Logits to losses and, in place, to their gradients; and the scaling of finished gradients by a number on
the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import LOG2E
from kernels.launch import Launch, cdiv
from kernels.tuning import Tile, loss_tile


@triton.jit
def _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, width):
    """Logits (BLOCK_M, BLOCK_V), -inf past V. The mask ends at the padded width: at an odd V it would split
    every access."""
    mask = counted[:, None] & (offs_v < width)[None, :]
    logits = tl.load(logits_ptr + offs_v[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.where((offs_v < V)[None, :], logits, float("-inf"))
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v, mask=offs_v < width, other=0.0)[None, :]
    return logits


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, bias_ptr, grad_ptr, losses_ptr,
    stride_ln, stride_gn, N, V, ignore_index, label_smoothing, z_loss,
    HAS_SMOOTHING: tl.constexpr, HAS_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=ignore_index)
    counted = mask_m & (target != ignore_index)
    # A target outside [0, V) cannot raise here without a synchronisation: its loss is NaN.
    inside = counted & (target >= 0) & (target < V)
    target_logit = tl.load(logits_ptr + offs_m * stride_ln + target, mask=inside, other=float("nan")).to(
        tl.float32
    )
    if bias_ptr is not None:
        target_logit += tl.load(bias_ptr + target, mask=inside, other=0.0)
    logits_ptr += offs_m[:, None] * stride_ln

    row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite, so that a block of -inf gives no NaN
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        row_sum = row_sum * tl.exp2((row_max - new_max) * LOG2E) + tl.sum(
            tl.exp2((logits - new_max[:, None]) * LOG2E), 1
        )
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
            dlogits = tl.exp2((logits - row_max[:, None]) * LOG2E) * factor[:, None]
            dlogits -= tl.where(
                offs_v[None, :] == target[:, None], (grad * (1 - label_smoothing))[:, None], 0.0
            )
            if HAS_SMOOTHING:
                dlogits -= (grad * (label_smoothing / V))[:, None]
            mask = mask_m[:, None] & (offs_v < stride_ln)[None, :]
            tl.store(logits_ptr + offs_v[None, :], dlogits.to(logits_ptr.dtype.element_ty), mask=mask)


def launch_cross_entropy(
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
    """Losses (N,) of logits + bias; with `gradient`, the logits become grad (N,), or one, times their
    gradients.

    The logits are (N, V), the first columns of a contiguous buffer, whose others are overwritten; the float32
    bias has an element for each column of the buffer.
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
def _scale_kernel(in_ptr, scale_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(in_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + offs_n, value.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def launch_scale(x: Tensor, scale: Tensor, out: Tensor) -> Launch:
    """out = x * scale, in float32 and rounded once, for contiguous tensors and a float32 scale () on their
    device."""
    tile = Tile(1, 4096, num_warps=8, num_stages=1)
    arguments = {"in_ptr": x, "scale_ptr": scale, "out_ptr": out, "N": x.numel(), "BLOCK_N": tile.block_n}
    return Launch(_scale_kernel, (cdiv(x.numel(), tile.block_n),), arguments, tile)
