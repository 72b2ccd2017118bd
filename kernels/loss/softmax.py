"""From logits to losses and, in place, to the logits' gradients; and the scaling of finished gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.device_functions import LOG2E, unfused_multiply
from kernels.launch import Launch, cdiv
from kernels.tuning import Tile, loss_tile


@triton.jit
def _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, width, MASKED: tl.constexpr):
    """Logits plus bias of the columns offs_v (BLOCK,): float32 (BLOCK_M, BLOCK).

    logits_ptr: (BLOCK_M, 1), pointers to the rows. MASKED: rows that are not `counted` (BLOCK_M,) are not
    loaded and are 0, and columns past V are -inf. width: columns of the buffer, at least V.
    """
    # As (1, BLOCK), the bias of a single row of logits has the layout of the logits.
    if MASKED:
        # The mask ends at the padded width, not at V: a mask that ends at an odd V would split every access.
        mask = (offs_v < width)[None, :]
        logits = tl.load(logits_ptr + offs_v[None, :], mask=counted[:, None] & mask, other=0.0)
        logits = tl.where((offs_v < V)[None, :], logits.to(tl.float32), float("-inf"))
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + offs_v[None, :], mask=mask, other=0.0)
    else:
        logits = tl.load(logits_ptr + offs_v[None, :]).to(tl.float32)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + offs_v[None, :])
    return logits


@triton.jit
def _by_lane(x, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """x (BLOCK_M, BLOCK) as (BLOCK_M, BLOCK / (LANES WIDTH), LANES, WIDTH).

    A lane holds every LANES-th group of WIDTH columns. A group is one 16-byte access, and a thread holds
    whole lanes: reducing the columns of a lane exchanges nothing between threads.
    """
    return tl.reshape(x, [x.shape[0], x.shape[1] // (LANES * WIDTH), LANES, WIDTH])


@triton.jit
def _exp(x):
    """exp(x) of a difference x of logits.

    The difference comes first: it is exact where the logits are close. Scaled first, large logits would be
    rounded, and differently in each place where the compiler fuses the multiplication or does not.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def _add_tile(logits, level, total, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Online softmax by lane: adds a tile of logits (BLOCK_M, BLOCK) to level and total (BLOCK_M, LANES).

    Over all logits x of a lane, level = max(x) and total = Σ exp(x - level).
    """
    logits = _by_lane(logits, LANES, WIDTH)
    new_level = tl.maximum(level, tl.max(tl.max(logits, 3), 1))
    p = _exp(logits - new_level[:, None, :, None])
    return new_level, total * _exp(level - new_level) + tl.sum(tl.sum(p, 3), 1)


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
    BLOCK_MASKED: tl.constexpr,  # columns per masked tile
):
    """One program reads BLOCK_M whole rows once for the losses, and once more for the gradients."""
    WIDTH: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth  # columns of 16 bytes
    LANES: tl.constexpr = BLOCK_MASKED // WIDTH
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

    # Whole tiles need no mask; the columns after them take masked tiles. So do all columns of a program that
    # has a row that is not counted: this row is not read.
    whole = tl.where(tl.min(counted.to(tl.int32), 0) == 1, V // BLOCK_V * BLOCK_V, 0)
    # The level starts at a finite value: -inf would give NaN for lanes without columns.
    level = tl.full([BLOCK_M, LANES], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M, LANES], tl.float32)
    logit_sum = tl.zeros([BLOCK_M, LANES], tl.float32)  # for label smoothing
    for start in tl.range(0, whole, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln, MASKED=False)
        level, total = _add_tile(logits, level, total, LANES, WIDTH)
        if HAS_SMOOTHING:
            logit_sum += tl.sum(tl.sum(_by_lane(logits, LANES, WIDTH), 3), 1)
    for start in tl.range(whole, V, BLOCK_MASKED):
        offs_v = start + tl.arange(0, BLOCK_MASKED)
        logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln, MASKED=True)
        level, total = _add_tile(logits, level, total, LANES, WIDTH)
        if HAS_SMOOTHING:
            logits = tl.where((offs_v < V)[None, :], logits, 0.0)
            logit_sum += tl.sum(tl.sum(_by_lane(logits, LANES, WIDTH), 3), 1)

    row_level = tl.max(level, 1)  # (BLOCK_M,)
    row_sum = tl.sum(unfused_multiply(total, _exp(level - row_level[:, None])), 1)
    log_sum = tl.log(row_sum)
    lse = row_level + log_sum
    # The loss is a sum of differences from the level: lse - target_logit would cancel in a confident row.
    shifted_target = target_logit - row_level
    loss = log_sum - (1 - label_smoothing) * shifted_target + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss -= label_smoothing * (tl.sum(logit_sum, 1) / V - row_level)
    tl.store(losses_ptr + offs_m, tl.where(counted, loss, 0.0), mask=mask_m)

    if HAS_GRADIENT:
        grad = counted.to(tl.float32)
        if grad_ptr is not None:
            grad *= tl.load(grad_ptr + offs_m * stride_gn, mask=counted, other=0.0)
        factor = grad * (1 + 2 * z_loss * lse) / row_sum
        smoothing = grad * (label_smoothing / V)

        tl.debug_barrier()  # every thread has read its target's logit before any thread overwrites it
        for start in tl.range(0, whole, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln, MASKED=False)
            dlogits = _exp(logits - row_level[:, None]) * factor[:, None]  # (BLOCK_M, BLOCK_V)
            if HAS_SMOOTHING:
                dlogits -= smoothing[:, None]
            tl.store(logits_ptr + offs_v[None, :], dlogits.to(logits_ptr.dtype.element_ty))
        for start in tl.range(whole, V, BLOCK_MASKED):
            offs_v = start + tl.arange(0, BLOCK_MASKED)
            logits = _load_logits(logits_ptr, bias_ptr, offs_v, counted, V, stride_ln, MASKED=True)
            dlogits = _exp(logits - row_level[:, None]) * factor[:, None]
            if HAS_SMOOTHING:
                dlogits -= tl.where((offs_v < V)[None, :], smoothing[:, None], 0.0)
            mask = mask_m[:, None] & (offs_v < stride_ln)[None, :]
            tl.store(logits_ptr + offs_v[None, :], dlogits.to(logits_ptr.dtype.element_ty), mask=mask)

        tl.debug_barrier()  # the loops have written the target's column before another thread overwrites it
        dtarget = _exp(shifted_target) * factor - grad * (1 - label_smoothing) - smoothing
        tl.store(target_ptrs, dtarget.to(logits_ptr.dtype.element_ty), mask=inside)


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

    logits: (N, V), the first columns of a contiguous buffer (N, width), width a multiple of 64. The gradients
    of the padding are 0. bias: (width,) float32, added to the logits. targets: (N,) int64. losses: (N,)
    float32. grad: (N,) float32, the gradients of the losses; None means ones.
    """
    n, v = logits.shape
    tile = loss_tile(v, bias=bias is not None)
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
        "BLOCK_MASKED": min(tile.block_n, tile.num_warps * 512 // logits.element_size()),
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
