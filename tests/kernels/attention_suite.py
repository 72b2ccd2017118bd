"""Checks of attention's launchers: of the kernels themselves, and of copies with a planted bug."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import kernels
from kernels.registry import SPECS
from kernels.spec import Case
from kernels.tolerance import Verdict
from kernels.tuning import Tile, attention_decode_tile, attention_tiles
from kernels.verify import Oracle, check, run_case
from tests.memory import fits, guarded, sparse, spread

CAUSAL, DECODE = SPECS["causal_attention"], SPECS["decode_attention"]
CPU = torch.device("cpu")
TILES = attention_tiles(0, 4, 16, dropout=False, grouped=False)
ATOMIC_TILES = TILES._replace(atomic=Tile(32, 16))

# A check takes an object with the launchers attention_forward, attention_backward and attention_decode.
# A check of the public ops ignores it: the caller has patched kernels.attention.torch_op with the launchers.
Check = Callable[[Any], None]


def assert_all_ok(verdicts: Iterable[Verdict]) -> None:
    failures = [str(verdict) for verdict in verdicts if not verdict.ok]
    assert not failures, failures


def assert_same_gradients(
    inputs: list[torch.Tensor], output_gradient: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """The gradients of q, k and v from the kernel equal the reference's."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with kernels.use_backend("triton"):
        actual = torch.autograd.grad(kernels.causal_attention(*leaves), leaves, output_gradient)
    expected = torch.autograd.grad(kernels.reference.causal_attention(*leaves), leaves, output_gradient)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def _agrees(sizes: str, **options: Any) -> Check:
    """causal_attention agrees with the reference. sizes: B H Hkv Tq Tk D."""
    b, h, hkv, tq, tk, d = map(int, sizes.split())
    case = Case({"B": b, "H": h, "Hkv": hkv, "Tq": tq, "Tk": tk, "D": d}, options)
    return lambda launchers: assert_all_ok(check(CAUSAL, case, torch.float32, CPU))


def _decoding_agrees(launchers: Any) -> None:
    for case in (*DECODE.tagged("small"), *DECODE.tagged("edge")):
        assert_all_ok(check(DECODE, case, torch.float32, CPU))
    q, k, v = torch.randn(3, 3, 1, 20, 16)
    lengths = torch.tensor([2**31 - 1, -7, 0], dtype=torch.int32)  # clamped to [0, Tmax]
    with kernels.use_backend("triton"):
        actual = kernels.decode_attention(q[:, :, :2], k, v, lengths)
    expected = kernels.reference.decode_attention(q[:, :, :2], k, v, lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def _half_precision_agrees(launchers: Any) -> None:
    case = Case({"B": 1, "H": 1, "Tq": 40, "Tk": 40, "D": 16})
    for dtype in (torch.float16, torch.bfloat16):
        assert_all_ok(check(CAUSAL, case, dtype, CPU))


def _takes_strided_gradients(launchers: Any) -> None:
    inputs = [torch.randn(2, 2, 20, 16) for _ in range(3)]
    assert_same_gradients(inputs, torch.randn(2, 20, 2, 16).transpose(1, 2))


def _launches_agree(
    launchers: Any, place: Callable[[int, torch.Tensor], torch.Tensor], *, dropout_p: float = 0.0
) -> None:
    """Forward, backward and decoding agree with the reference on tensors that `place` lays out in memory.

    place: (index of the tensor, 0 to 9; its values) -> a tensor of these values.
    """
    b, h, hkv, tq, tk, d = 2, 4, 2, 19, 35, 24
    values = [torch.randn(b, n, t, d).half() for n, t in ((h, tq), (hkv, tk), (hkv, tk), (h, tq))]
    q, k, v, grad = (place(i, x) for i, x in enumerate(values))
    out, dq = (place(i, torch.zeros(b, h, tq, d).half()) for i in (4, 5))
    dk, dv = (place(i, torch.zeros(b, hkv, tk, d).half()) for i in (6, 7))
    start = guarded((torch.arange(b * tq).reshape(b, tq) // 2).to(torch.int32))
    seed = guarded(torch.tensor([12345])).reshape(()) if dropout_p else None

    leaves = [x.clone().requires_grad_() for x in values[:3]]
    expected = kernels.reference.causal_attention(*leaves, key_start=start, dropout_p=dropout_p, seed=seed)
    gradients = torch.autograd.grad(expected, leaves, values[3])

    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "key_start": start,
        "seed": seed,
        "out": out,
        "lse2": guarded(torch.zeros(b, h, tq)),
        "scale": d**-0.5,
        "dropout_p": dropout_p,
    }
    launchers.attention_forward(**arguments, tile=TILES.forward).run()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-3)

    for outputs, tiles in (((dq, dk, dv), TILES), ((None, dk, dv), TILES), ((dq, dk, dv), ATOMIC_TILES)):
        for launch in launchers.attention_backward(
            **arguments, grad=grad, **dict(zip(("dq", "dk", "dv"), outputs, strict=True)), tiles=tiles
        ):
            launch.run()
        for output, gradient in zip(outputs, gradients, strict=True):
            if output is not None:
                torch.testing.assert_close(output, gradient, rtol=2e-2, atol=5e-3)
                output.zero_()

    lengths, first = (guarded(torch.tensor(x, dtype=torch.int32)) for x in ([tk, 21], [3, 0]))
    queries, decoded = (place(i, torch.randn(b, h, 3, d).half()) for i in (8, 9))
    launchers.attention_decode(
        q=queries,
        k=k,
        v=v,
        cache_len=lengths,
        key_start=first,
        out=decoded,
        counter=guarded(torch.zeros(b * hkv, dtype=torch.int32)),
        scale=d**-0.5,
        splits=2,
        tile=attention_decode_tile(0, 2, d, tk),
    ).run()
    expected = kernels.reference.decode_attention(queries.clone(), *values[1:3], lengths, key_start=first)
    torch.testing.assert_close(decoded, expected, rtol=2e-2, atol=5e-3)


def stays_inside(launchers: Any) -> None:
    """No access past the end of any tensor, including those that the launchers allocate."""
    with pytest.MonkeyPatch.context() as patch:
        new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda self, *args, **options: guarded(new_empty(self, *args, **options)),
        )
        patch.setattr(torch, "empty_like", lambda x: guarded(empty_like(x)))
        _launches_agree(launchers, lambda i, x: guarded(x))
        _launches_agree(launchers, lambda i, x: guarded(x), dropout_p=0.4)


def _agrees_where_tiles_are_skipped(launchers: Any) -> None:
    q, k, v = torch.randn(3, 1, 1, 96, 16)
    _agrees_with_starts(q, k, v, torch.where(torch.arange(96) < 64, 0, 64).to(torch.int32)[None])


def _agrees_where_one_batch_sees_keys(launchers: Any) -> None:
    """Only the last of three sequences sees any key, so each must read the bounds of its own tiles."""
    q, k, v = torch.randn(3, 3, 1, 70, 16)
    start = torch.zeros(3, 70, dtype=torch.int32)
    start[:2] = 70
    _agrees_with_starts(q, k, v, start)


def _agrees_with_starts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor) -> None:
    inputs = {"q": q, "k": k, "v": v, "key_start": start}
    with kernels.use_backend("triton"):
        results = run_case(kernels.causal_attention, inputs, ("q", "k", "v"))
    assert_all_ok(Oracle(CAUSAL, inputs, torch.float32).judge(results))


def reaches_far_along(dim: int) -> Check:
    """The results are right where offsets along dimension `dim` exceed 2**31 elements."""

    def run(launchers: Any) -> None:
        memory = sparse(fits([(2, 4, 35, 24)] * 10), torch.float16)
        _launches_agree(launchers, lambda i, x: spread(x, dim, i * 2 * 4 * 35 * 24, memory))

    return run


CHECKS: dict[str, Check] = {
    "documents": _agrees("2 2 1 37 43 24", key_start="documents", layout="padded"),
    "several tiles": _agrees("1 2 2 70 70 16"),
    "dropout": _agrees("1 2 2 33 33 16", dropout_p=0.4, seed=5),
    "dropout by fours": _agrees("1 2 1 35 44 16", dropout_p=0.4, seed=5, key_start="window"),
    "empty rows": _agrees("1 1 1 33 34 16", key_start="empty"),
    "one key ahead": _agrees("1 1 1 33 34 16"),
    "padding": _agrees("2 1 1 66 66 16", key_start="padding"),
    "large logits": _agrees("1 1 1 40 40 16", scale=30.0),
    "strided gradients": _takes_strided_gradients,
    "skipped tiles": _agrees_where_tiles_are_skipped,
    "one batch sees keys": _agrees_where_one_batch_sees_keys,
    "16 bits": _half_precision_agrees,
    "decoding": _decoding_agrees,
    "guard pages": stays_inside,
    "far rows": reaches_far_along(2),
}
