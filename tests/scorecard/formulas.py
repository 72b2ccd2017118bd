"""The ops by their formulas, in float64 and with loops: what the references are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from kernels import reference
from kernels.loss import reference as loss_reference

Check = Callable[[Any], None]


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: Callable[[int, int], int],
    last: Any,
    scale: float,
) -> torch.Tensor:
    """Row by row: query (b, i) sees keys first(b, i) to last(b, i)."""
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = slice(max(0, first(b, i)), last(b, i) + 1)
                visible = k[b, h // groups, keys]
                if keys.start < keys.stop and len(visible):
                    p = torch.softmax(visible @ q[b, h, i] * scale, 0)
                    out[b, h, i] = p @ v[b, h // groups, keys]
    return out


def _attention(launchers: Any) -> None:
    q, k, v = _numbers(2, 4, 5, 8), _numbers(2, 2, 9, 8, seed=1), _numbers(2, 2, 9, 8, seed=2)
    start = torch.tensor([[0, 1, 9, 3, 8], [2, 2, 0, 12, -4]], dtype=torch.int32)
    for key_start, scale in ((None, None), (start, None), (start[:, 0], 0.3)):
        for tk in (9, 5):
            if tk == 5 and key_start is not None and key_start.ndim == 2:
                continue

            def first(b: int, i: int, key_start: Any = key_start) -> int:
                return (
                    0 if key_start is None else int(key_start[b] if key_start.ndim == 1 else key_start[b, i])
                )

            expected = _attended(
                q, k[:, :, :tk], v[:, :, :tk], first, lambda b, i, tk=tk: tk - 5 + i, scale or 8**-0.5
            )
            actual = reference.causal_attention(
                q, k[:, :, :tk], v[:, :, :tk], key_start=key_start, scale=scale
            )
            torch.testing.assert_close(actual, expected)
    qkv = torch.stack((q, _numbers(2, 4, 5, 8, seed=3), _numbers(2, 4, 5, 8, seed=4)), 0)
    packed = qkv.permute(1, 3, 0, 2, 4).contiguous()  # (B, T, 3, H, D)
    actual = reference.causal_attention_qkv(packed).transpose(1, 2)
    torch.testing.assert_close(actual, _attended(*qkv, lambda b, i: 0, lambda b, i: i, 8**-0.5))
    one = reference.causal_attention(q[:, :, :1], k, v)
    torch.testing.assert_close(one, _attended(q[:, :, :1], k, v, lambda b, i: 0, lambda b, i: 8, 8**-0.5))


def _attention_dropout(launchers: Any) -> None:
    """With the seed of the weights' mask, which `kernels.reference.dropout` gives."""
    q, k, v = _numbers(2, 4, 5, 8), _numbers(2, 2, 9, 8, seed=1), _numbers(2, 2, 9, 8, seed=2)
    start = torch.tensor([0, 2], dtype=torch.int32)
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    logits = q @ wide_k.mT * 0.25
    position = torch.arange(4, 9)
    for b in range(2):
        for i in range(5):
            logits[b, :, i, int(position[i]) + 1 :] = -math.inf
            logits[b, :, i, : int(start[b])] = -math.inf
    p = torch.softmax(logits, -1)
    masked = reference.dropout(p.reshape(-1, 9), 0.4, seed=7).reshape(p.shape)
    actual = reference.causal_attention(q, k, v, key_start=start, scale=0.25, dropout_p=0.4, seed=7)
    torch.testing.assert_close(actual, masked @ wide_v)
    p = torch.softmax((q @ wide_k.mT * 8**-0.5).masked_fill(logits.isinf() & False, 0), -1)
    alone = reference.causal_attention(q[:, :, :1], k, v, dropout_p=0.4, seed=7)
    weights = torch.softmax(q[:, :, :1] @ wide_k.mT * 8**-0.5, -1)
    weights = reference.dropout(weights.reshape(-1, 9), 0.4, seed=7).reshape(weights.shape)
    torch.testing.assert_close(alone, weights @ wide_v)
    empty = reference.causal_attention(
        q, k, v, key_start=torch.tensor([20, 0], dtype=torch.int32), dropout_p=0.4, seed=7
    )
    assert torch.equal(empty[0], torch.zeros_like(empty[0]))


def _decoding(launchers: Any) -> None:
    q, k, v = _numbers(3, 4, 2, 8), _numbers(3, 2, 9, 8, seed=1), _numbers(3, 2, 9, 8, seed=2)
    for lengths, start in (
        ([9, 4, 2], None),
        ([9, 4, 40], [0, 3, 5]),
        ([2, 2, 2], None),
        ([0, 1, 9], [0, 0, 9]),
    ):
        length = torch.tensor(lengths, dtype=torch.int32)
        first = None if start is None else torch.tensor(start, dtype=torch.int32)
        for tq in (2, 1):
            actual = reference.decode_attention(q[:, :, :tq], k, v, length, key_start=first)
            expected = _attended(
                q[:, :, :tq],
                k,
                v,
                lambda b, i, start=start: 0 if start is None else start[b],
                lambda b, i, lengths=lengths, tq=tq: min(lengths[b], 9) - tq + i,
                8**-0.5,
            )
            torch.testing.assert_close(actual, expected)
    same = torch.full((3,), 6, dtype=torch.int32)
    actual = reference.decode_attention(q[:, :, :1], k, v, same, scale=0.5)
    torch.testing.assert_close(actual, _attended(q[:, :, :1], k, v, lambda b, i: 0, lambda b, i: 5, 0.5))


def _norms(launchers: Any) -> None:
    x, residual, weight, bias = (
        _numbers(3, 7),
        _numbers(3, 7, seed=1),
        _numbers(7, seed=2),
        _numbers(7, seed=3),
    )

    def norm(t: torch.Tensor, eps: float, shift: torch.Tensor | None) -> torch.Tensor:
        mean = t.sum(-1, keepdim=True) / 7
        variance = ((t - mean) ** 2).sum(-1, keepdim=True) / 7
        return (t - mean) / (variance + eps).sqrt() * weight + (0 if shift is None else shift)

    for eps, shift in ((1e-5, bias), (0.5, None)):
        torch.testing.assert_close(reference.layer_norm(x, weight, shift, eps), norm(x, eps, shift))
        y, new = reference.add_layer_norm(x, residual, weight, shift, eps)
        torch.testing.assert_close(new, x + residual)
        torch.testing.assert_close(y, norm(x + residual, eps, shift))
        dropped = reference.dropout(x, 0.3, seed=5)
        y, new = reference.add_layer_norm(x, residual, weight, shift, eps, dropout_p=0.3, seed=5)
        torch.testing.assert_close(new, dropped + residual)
        torch.testing.assert_close(y, norm(dropped + residual, eps, shift))
    narrow = x.bfloat16()
    mixed = reference.layer_norm(narrow, weight.float(), bias.float())
    torch.testing.assert_close(mixed, norm(narrow.double(), 1e-5, bias).bfloat16())
    half = reference.layer_norm(narrow, weight.bfloat16(), bias.float())
    assert half.dtype == torch.bfloat16
    y, new = reference.add_layer_norm(narrow, residual.float(), weight.float(), bias.float())
    assert (y.dtype, new.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, norm(narrow.double() + residual.float().double(), 1e-5, bias).bfloat16())
    y, new = reference.add_layer_norm(narrow, residual.float(), weight.float(), None)
    torch.testing.assert_close(y, norm(narrow.double() + residual.float().double(), 1e-5, None).bfloat16())
    y, new = reference.add_layer_norm(x.float(), residual.bfloat16(), weight.float(), bias.float())
    assert (y.dtype, new.dtype) == (torch.float32, torch.bfloat16)


def _dropout(launchers: Any) -> None:
    """Known words of Philox4x32-10 (Random123's test vectors), and the masks and scales made of them."""
    from kernels import philox

    for counter, seed, expected in ((0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),):
        words = philox.philox(seed, torch.tensor([counter]))
        assert tuple(int(word) for word in words) == expected, words
    x = torch.ones(40, 1000, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        for seed in (3, None):
            dropped = reference.dropout(x, p, seed=seed)
            kept = dropped != 0
            assert abs(kept.double().mean().item() - (1 - p)) < 0.02, kept.double().mean()
            torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)))
    assert torch.equal(reference.dropout(x, 0.5, seed=3), reference.dropout(x, 0.5, seed=torch.tensor(3)))
    assert not torch.equal(reference.dropout(x, 0.5, seed=3), reference.dropout(x, 0.5, seed=3 + 2**32))
    assert torch.equal(reference.dropout(x, 0.0, seed=3), x)


def _feed_forward(launchers: Any) -> None:
    x, up, down = _numbers(3, 5), _numbers(6, 5, seed=1), _numbers(4, 6, seed=2)
    b_up, b_down = _numbers(6, seed=3), _numbers(4, seed=4)
    for approximate in ("tanh", "none"):
        for shift, last in ((b_up, b_down), (None, None)):
            h = x @ up.T + (0 if shift is None else shift)
            if approximate == "tanh":
                h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            else:
                h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
            expected = h @ down.T + (0 if last is None else last)
            actual = reference.gelu_ffn(x, up, shift, down, last, approximate=approximate)
            torch.testing.assert_close(actual, expected)


def _loss(launchers: Any) -> None:
    """In one chunk and in several, forward and backward."""
    for chunk in (2**25, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_reference, "CHUNK_ELEMENTS", chunk)
            for dtype in (torch.float64, torch.float32):
                for smoothing, z, biased in ((0.0, 0.0, False), (0.2, 0.03, True), (0.2, 0.0, False)):
                    for reduction in ("none", "sum", "mean"):
                        _loss_agrees(dtype, smoothing, z, biased, reduction)
                _loss_agrees(torch.bfloat16, 0.1, 0.01, True, "none")


def _loss_agrees(dtype: torch.dtype, smoothing: float, z: float, biased: bool, reduction: str) -> None:
    n, c, v = 7, 5, 11
    tensors = [t.to(dtype) for t in (_numbers(n, c), _numbers(v, c, seed=1), _numbers(v, seed=2))]
    targets = torch.tensor([3, 0, -100, 10, 5, -100, 1])
    leaves = [t.clone().requires_grad_() for t in tensors]
    wide = [t.double().requires_grad_() for t in tensors]
    actual = reference.linear_cross_entropy(
        leaves[0],
        leaves[1],
        targets,
        leaves[2] if biased else None,
        reduction=reduction,
        label_smoothing=smoothing,
        z_loss=z,
    )
    logits = wide[0] @ wide[1].T + (wide[2] if biased else 0)
    losses = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == -100:
            losses.append(row.sum() * 0)
            continue
        lse = torch.log(torch.exp(row).sum())
        losses.append(lse - (1 - smoothing) * row[target] - smoothing * row.mean() + z * lse**2)
    expected = torch.stack(losses)
    if reduction != "none":
        expected = expected.sum() / (5 if reduction == "mean" else 1)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    weights = _numbers(*expected.shape, seed=5) if expected.ndim else torch.ones((), dtype=torch.float64)
    wanted = 3 if biased else 2
    actual_gradients = torch.autograd.grad(actual, leaves[:wanted], weights.to(actual.dtype))
    expected_gradients = torch.autograd.grad(expected, wide[:wanted], weights)
    for a, e, leaf in zip(actual_gradients, expected_gradients, leaves, strict=False):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


def _one_target(launchers: Any) -> None:
    """The mean over one counted target, and over none."""
    x, weight = _numbers(3, 5), _numbers(11, 5, seed=1)
    for targets, rows in (([-100, 4, -100], [1]), ([-100, -100, -100], [])):
        actual = reference.linear_cross_entropy(x, weight, torch.tensor(targets))
        losses = [torch.logsumexp(x[i] @ weight.T, 0) - x[i] @ weight[targets[i]] for i in rows]
        torch.testing.assert_close(actual, sum(losses, torch.zeros((), dtype=torch.float64)))


def _backends_agree_on_a_frozen_input(launchers: Any) -> None:
    """Gradients of some inputs only, in several chunks."""
    x, weight, bias = (t.float() for t in (_numbers(7, 5), _numbers(11, 5, seed=1), _numbers(11, seed=2)))
    targets = torch.tensor([3, 0, -100, 10, 5, -100, 1])
    for wanted in ((0,), (1,), (2,), (0, 1)):
        results = []
        for chunk in (2**25, 40):
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
            with pytest.MonkeyPatch.context() as patch, kernels.use_backend("reference"):
                patch.setattr(loss_reference, "CHUNK_ELEMENTS", chunk)
                loss = kernels.linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2])
                results.append(torch.autograd.grad(loss, [leaves[i] for i in wanted]))
        torch.testing.assert_close(*results)


CHECKS: dict[str, tuple[Check, ...]] = {
    "attention": (_attention, _attention_dropout, _decoding),
    "norm": (_norms, _dropout),
    "ffn": (_feed_forward,),
    "loss": (_loss, _one_target, _backends_agree_on_a_frozen_input),
}
