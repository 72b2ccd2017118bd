"""Mutations of the kernels of decode, norm, ffn and loss, and the checks that run on each of them."""

from __future__ import annotations

from typing import Any

import torch

import kernels
from tests.compiled.outcomes import Check, values
from tests.kernels import decode_suite
from tests.planting import Mutation


def _expanded_gradient(launchers: Any) -> None:
    """The gradient of a sum of losses has stride 0."""
    x, weight, targets = torch.randn(9, 16), torch.randn(50, 16), torch.randint(50, (9,))
    gradients = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with kernels.use_backend(backend):
            kernels.linear_cross_entropy(leaf, weight, targets, reduction="none").sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def _untouched_rows_and_padding(launchers: Any) -> None:
    """The gradients of an ignored row of NaN and of the padding are 0; the target's is rounded once."""
    for v in (130, 4170):
        logits, losses = torch.randn(4, -(-v // 64) * 64).half(), torch.empty(4)
        logits[2] = torch.nan
        targets = torch.tensor([0, v - 1, -100, 7])
        logits[[0, 1, 3], targets[[0, 1, 3]]] += 16
        before = logits.float()[:, :v]
        launchers.cross_entropy(
            logits=logits[:, :v],
            targets=targets,
            bias=None,
            grad=None,
            losses=losses,
            ignore_index=-100,
            label_smoothing=0.1,
            z_loss=0.0,
            gradient=True,
        ).run()
        assert torch.equal(logits[2], torch.zeros_like(logits[2]))
        assert torch.equal(logits[:, v:], torch.zeros_like(logits[:, v:]))
        for row in (0, 1, 3):
            leaf = before[row].double().requires_grad_()
            loss = torch.nn.functional.cross_entropy(leaf, targets[row], label_smoothing=0.1)
            (gradient,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(logits[row, :v].double(), gradient, rtol=1e-3, atol=1e-7)


CHECKS: dict[str, tuple[Check, ...]] = {
    "decode": tuple(decode_suite.CHECKS.values()),
    "norm": (
        values("layer_norm", {"N": 5, "C": 17}),
        values("layer_norm", {"N": 67, "C": 384}),
        values("add_layer_norm", {"N": 6, "C": 40}, dropout_p=0.4, seed=11),
        values("add_layer_norm", {"N": 37, "C": 1600}, dropout_p=0.1, seed=3),
        values("add_layer_norm", {"N": 5, "C": 17}),
        values("dropout", {"N": 7, "C": 64}, p=0.3, seed=2),
    ),
    "ffn": (
        values("gelu_ffn", {"N": 13, "C": 16, "I": 68}),
        values("gelu_ffn", {"N": 67, "C": 48, "I": 600}, approximate="none"),
        values("gelu_ffn", {"N": 4, "C": 16, "I": 32}, magnitude=3000),
    ),
    "loss": (
        values("linear_cross_entropy", {"N": 7, "C": 16, "V": 65}),
        values("linear_cross_entropy", {"N": 9, "C": 16, "V": 50}, reduction="none", ignored="some"),
        values(
            "linear_cross_entropy",
            {"N": 6, "C": 16, "V": 33},
            bias=True,
            label_smoothing=0.1,
            z_loss=1e-2,
            ignored="some",
        ),
        values("linear_cross_entropy", {"N": 3, "C": 16, "V": 5000}),
        values(
            "linear_cross_entropy", {"N": 3, "C": 16, "V": 5000}, bias=True, label_smoothing=0.1, z_loss=1e-2
        ),
        _expanded_gradient,
        _untouched_rows_and_padding,
    ),
}

MUTATIONS: dict[str, dict[str, Mutation]] = {
    "decode": decode_suite.MUTANTS,
    "norm": {
        "the mean of padded columns": (
            "forward",
            "mean = tl.sum(total, 1) / C",
            "mean = tl.sum(total, 1) / BLOCK_C",
        ),
        "the variance counts masked columns": (
            "forward",
            "tl.where((i * BLOCK_C + offs_c < C)[None, :], rows[i] - mean[:, None], 0.0)",
            "rows[i] - mean[:, None]",
        ),
        "eps is lost": ("forward", "/ C + eps", "/ C"),
        "the bias is the weight": ("forward", "y += load_columns(bias_ptr", "y += load_columns(weight_ptr"),
        "the weight is read past the end": (
            "device_functions",
            "cols[None, :], mask=mask, other=0.0).to(tl.float32)\n\n\n",
            "cols[None, :]).to(tl.float32)\n\n\n",
        ),
        "columns past the end are stored": (
            "forward",
            "y.to(y_ptr.dtype.element_ty), mask=mask)",
            "y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None])",
        ),
        "rows past the end are stored": (
            "forward",
            "y.to(y_ptr.dtype.element_ty), mask=mask)",
            "y.to(y_ptr.dtype.element_ty), mask=(cols < C)[None, :])",
        ),
        "rows past the end are loaded": (
            "forward",
            "x_ptr + offs_m[:, None] * stride_xn + cols[None, :], mask=mask,",
            "x_ptr + offs_m[:, None] * stride_xn + cols[None, :], mask=(cols < C)[None, :],",
        ),
        "statistics past the end are stored": ("forward", "offs_m, rstd, mask=mask_m)", "offs_m, rstd)"),
        "statistics past the end are loaded": (
            "backward",
            "stats_ptr + N + offs_m, mask=mask_m, other=0.0)",
            "stats_ptr + N + offs_m)",
        ),
        "the mean of wdy is lost": ("backward", "scaled[i] - mean_wdy - normed", "scaled[i] - normed"),
        "the projection on z is lost": ("backward", " - normed[i] * mean_wdy_z)", ")"),
        "dweight ignores z": ("backward", "dweight[i] + dy * z", "dweight[i] + dy"),
        "the last block of rows is lost": (
            "backward",
            "tl.range(pid, tl.cdiv(N, BLOCK_M),",
            "tl.range(pid, N // BLOCK_M,",
        ),
        "only the last block adds to dbias": ("backward", "dbias[i] + dy,)", "dy,)"),
        "only one program adds to dweight": ("backward", "(offs_p < P)[:, None]", "(offs_p < 1)[:, None]"),
        "columns past the end of the partial sums": (
            "backward",
            "tl.sum(dbias[i], 0), mask=cols < C)",
            "tl.sum(dbias[i], 0))",
        ),
        "columns past the end of dweight": ("backward", "element_ty), mask=cols < C)", "element_ty))"),
        "the gradient of new_residual is lost": ("backward", "if dnew_ptr is not None:", "if False:"),
        "kept gradients are not scaled": ("backward", "dh * keep_scale", "dh"),
        "one dropout mask for all tiles": ("forward", "START // 4 +", ""),
        "rows past the end of dropout": (
            "dropout_kernel",
            "y.to(y_ptr.dtype.element_ty), mask=mask)",
            "y.to(y_ptr.dtype.element_ty), mask=(cols < C)[None, :])",
        ),
    },
    "ffn": {
        "the bias is lost": (
            "gelu",
            "    if bias_ptr is not None:\n        h +=",
            "    if False:\n        h +=",
        ),
        "the bias is read past the end": (
            "gelu",
            "load_columns(bias_ptr, offs_m, offs_n, mask)",
            "load_columns(bias_ptr, offs_m, offs_n, (offs_m < N)[:, None])",
        ),
        "the bias is read past the end in backward": (
            "gelu",
            "bias = tl.load(bias_ptr + offs_n, mask=offs_n < F, other=0.0)",
            "bias = tl.load(bias_ptr + offs_n)",
        ),
        "rows past the end are stored": (
            "gelu",
            "a_ptr.dtype.element_ty), mask=mask)\n\n\n",
            "a_ptr.dtype.element_ty), mask=(offs_n < F)[None, :])\n\n\n",
        ),
        "columns past the end are stored": (
            "gelu",
            "a_ptr.dtype.element_ty), mask=mask)\n\n\n",
            "a_ptr.dtype.element_ty), mask=(offs_m < N)[:, None])\n\n\n",
        ),
        "rows past the end are loaded": (
            "gelu",
            "h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)  #",
            "h = tl.load(h_ptr + offs, mask=(offs_n < F)[None, :], other=0.0).to(tl.float32)  #",
        ),
        "rows of dh past the end are stored": (
            "gelu",
            "dh.to(dh_ptr.dtype.element_ty), mask=mask)",
            "dh.to(dh_ptr.dtype.element_ty), mask=(offs_n < F)[None, :])",
        ),
        "backward ignores the bias": ("gelu", ".to(tl.float32) + bias[None, :]", ".to(tl.float32)"),
        "GELU for its derivative": ("gelu", "gelu_derivative(h, TANH)\n", "gelu(h, TANH)\n"),
        "erf for tanh": (
            "gelu",
            "tl.store(a_ptr + offs, gelu(h, TANH)",
            "tl.store(a_ptr + offs, gelu(h, False)",
        ),
        "only the last block adds to dbias": ("gelu", "dbias += dh", "dbias = dh"),
        "the last block of rows is lost": (
            "gelu",
            "tl.range(pid_m, tl.cdiv(N, BLOCK_M),",
            "tl.range(pid_m, N // BLOCK_M,",
        ),
        "columns past the end of dbias": ("gelu", "tl.sum(dbias, 0), mask=offs_n < F)", "tl.sum(dbias, 0))"),
        "the recomputed GELU is not stored": ("gelu", "if a_ptr is not None:", "if False:"),
        "another cubic term": ("device_functions", " - 0.1029432395800235 *", " - 0.1029 *"),
        "the exponential overflows": (
            "device_functions",
            "tl.exp2(tl.minimum(exponent, 126.0))",
            "tl.exp2(exponent)",
        ),
    },
    "loss": {
        "the padding counts": (
            "softmax",
            "tl.where((offs_v < V)[None, :], logits.to",
            "tl.where((offs_v < width)[None, :], logits.to",
        ),
        "the bias is lost": (
            "softmax",
            "if bias_ptr is not None:\n            logits += tl.load(bias_ptr + offs_v[None, :], mask",
            "if False:\n            logits += tl.load(bias_ptr + offs_v[None, :], mask",
        ),
        "the bias of whole tiles is lost": (
            "softmax",
            "if bias_ptr is not None:\n            logits += tl.load(bias_ptr + offs_v[None, :])\n",
            "if False:\n            logits += tl.load(bias_ptr + offs_v[None, :])\n",
        ),
        "the target's bias is lost": (
            "softmax",
            "if bias_ptr is not None:\n        target_logit +=",
            "if False:\n        target_logit +=",
        ),
        "ignored rows count": ("softmax", "counted = mask_m & (target != ignore_index)", "counted = mask_m"),
        "the target of an ignored row is read": (
            "softmax",
            "tl.load(target_ptrs, mask=inside,",
            "tl.load(target_ptrs, mask=mask_m,",
        ),
        "the running sum is not rescaled": (
            "softmax",
            "total * tl.exp2(level - new_level)",
            "total",
        ),
        "the sums of the lanes are not rescaled": (
            "softmax",
            "tl.sum(total * tl.exp2(level - row_level[:, None]), 1)",
            "tl.sum(total, 1)",
        ),
        "the columns after the whole tiles are lost": (
            "softmax",
            "tl.range(whole, V, BLOCK_MASKED)",
            "tl.range(whole, V // BLOCK_V * BLOCK_V, BLOCK_MASKED)",
        ),
        "whole tiles are added twice": (
            "softmax",
            "tl.range(whole, V, BLOCK_MASKED)",
            "tl.range(0, V, BLOCK_MASKED)",
        ),
        "rows that do not count are read in whole tiles": (
            "softmax",
            "tl.where(tl.min(counted.to(tl.int32), 0) == 1, V // BLOCK_V * BLOCK_V, 0)",
            "V // BLOCK_V * BLOCK_V",
        ),
        "the target's share is lost": (
            "softmax",
            "- grad * (1 - label_smoothing) - smoothing",
            "- smoothing",
        ),
        "the target's share is not smoothed": (
            "softmax",
            "- grad * (1 - label_smoothing) - smoothing",
            "- grad * (1 - label_smoothing)",
        ),
        "the target's gradient is added to its softmax's rounding": (
            "softmax",
            "dtarget = tl.exp2(target_level) * factor",
            "dtarget = tl.load(target_ptrs, mask=inside, other=0.0).to(tl.float32) + smoothing",
        ),
        "the gradient ignores z_loss": (
            "softmax",
            "grad * (1 + 2 * z_loss * lse) / row_sum",
            "grad / row_sum",
        ),
        "the gradient ignores smoothing": (
            "softmax",
            "        if HAS_SMOOTHING:\n                dlogits -= tl",
            "        if False:\n                dlogits -= tl",
        ),
        "the gradient of whole tiles ignores smoothing": (
            "softmax",
            "        if HAS_SMOOTHING:\n                dlogits -= smoothing",
            "        if False:\n                dlogits -= smoothing",
        ),
        "smoothing reaches the padding": (
            "softmax",
            "tl.where((offs_v < V)[None, :], smoothing[:, None], 0.0)",
            "smoothing[:, None]",
        ),
        "smoothing counts the padding": (
            "softmax",
            "tl.where((offs_v < V)[None, :], logits, 0.0)",
            "tl.where((offs_v < stride_ln)[None, :], logits, 0.0)",
        ),
        "the padding's end is overwritten": (
            "softmax",
            "mask_m[:, None] & (offs_v < stride_ln)[None, :]\n            tl.store",
            "mask_m[:, None] & (offs_v < stride_ln + 64)[None, :]\n            tl.store",
        ),
        "rows past the end are stored": (
            "softmax",
            "mask_m[:, None] & (offs_v < stride_ln)[None, :]\n            tl.store",
            "(offs_v < stride_ln)[None, :]\n            tl.store",
        ),
        "losses past the end are stored": ("softmax", "loss, 0.0), mask=mask_m)", "loss, 0.0))"),
        "ignored rows have no loss": ("softmax", "loss, 0.0), mask=mask_m)", "loss, 0.0), mask=counted)"),
        "the gradient of the losses is ignored": ("softmax", "grad *= tl.load", "_ = tl.load"),
        "the gradient's stride is ignored": ("softmax", "grad_ptr + offs_m * stride_gn", "grad_ptr + offs_m"),
        "the gradient is not scaled": ("softmax", ".to(tl.float32) * tl.load(scale_ptr)", ".to(tl.float32)"),
        "elements past the end are scaled": (
            "softmax",
            "value.to(out_ptr.dtype.element_ty), mask=offs_n < N)",
            "value.to(out_ptr.dtype.element_ty))",
        ),
        "the barriers are lost": ("softmax", "tl.debug_barrier()", "pass"),
    },
}
