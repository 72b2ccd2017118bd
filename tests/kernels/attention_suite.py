"""What must hold of attention's launchers, for the kernels themselves and for copies with a planted bug."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from kernels.registry import SPECS
from kernels.spec import Case
from kernels.tuning import Tile, attention_decode_tile, attention_tiles
from kernels.verify import Oracle, check, run_case
from tests.kernels.memory import fits, guarded, sparse, spread

CAUSAL, DECODE = SPECS["causal_attention"], SPECS["decode_attention"]
CPU = torch.device("cpu")
TILES = attention_tiles(0, 4, 16, dropout=False, grouped=False)
FIVE = TILES._replace(five=Tile(32, 16))


def _agrees(sizes: str, **options: Any) -> Callable[[Any], None]:
    """The public op against the reference, through whatever launchers the op module has."""
    b, h, hkv, tq, tk, d = map(int, sizes.split())
    chosen = Case({"B": b, "H": h, "Hkv": hkv, "Tq": tq, "Tk": tk, "D": d}, options)

    def run(launchers: Any) -> None:
        wrong = [str(verdict) for verdict in check(CAUSAL, chosen, torch.float32, CPU) if not verdict.ok]
        assert not wrong, wrong

    return run


def _decodes(launchers: Any) -> None:
    for chosen in (*DECODE.tagged("small"), *DECODE.tagged("edge")):
        wrong = [str(verdict) for verdict in check(DECODE, chosen, torch.float32, CPU) if not verdict.ok]
        assert not wrong, wrong
    q, k, v = torch.randn(3, 3, 1, 20, 16)
    lengths = torch.tensor([2**31 - 1, -7, 0], dtype=torch.int32)  # clamped to [0, Tmax]
    with kernels.use_backend("triton"):
        found = kernels.decode_attention(q[:, :, :2], k, v, lengths)
    torch.testing.assert_close(
        found, kernels.reference.decode_attention(q[:, :, :2], k, v, lengths), rtol=1e-4, atol=1e-5
    )


def _half(launchers: Any) -> None:
    chosen = Case({"B": 1, "H": 1, "Tq": 40, "Tk": 40, "D": 16})
    for dtype in (torch.float16, torch.bfloat16):
        wrong = [str(verdict) for verdict in check(CAUSAL, chosen, dtype, CPU) if not verdict.ok]
        assert not wrong, wrong


def _takes_strided_gradients(launchers: Any) -> None:
    inputs = {name: torch.randn(2, 2, 20, 16) for name in "qkv"}
    leaves = [x.requires_grad_() for x in inputs.values()]
    grad = torch.randn(2, 20, 2, 16).transpose(1, 2)
    with kernels.use_backend("triton"):
        found = torch.autograd.grad(kernels.causal_attention(*leaves), leaves, grad)
    plain = torch.autograd.grad(kernels.reference.causal_attention(*leaves), leaves, grad)
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _launched(
    launchers: Any, place: Callable[[int, torch.Tensor], torch.Tensor], *, dropout_p: float = 0.0
) -> None:
    """Forward, backward and decoding over tensors that `place` lays out, against the reference."""
    b, h, hkv, tq, tk, d = 2, 4, 2, 19, 35, 24
    drawn = [torch.randn(b, n, t, d).half() for n, t in ((h, tq), (hkv, tk), (hkv, tk), (h, tq))]
    q, k, v, grad = (place(i, x) for i, x in enumerate(drawn))
    out, dq = (place(i, torch.zeros(b, h, tq, d).half()) for i in (4, 5))
    dk, dv = (place(i, torch.zeros(b, hkv, tk, d).half()) for i in (6, 7))
    start = guarded((torch.arange(b * tq).reshape(b, tq) // 2).to(torch.int32))
    seed = guarded(torch.tensor([12345])).reshape(()) if dropout_p else None
    lse2 = guarded(torch.zeros(b, h, tq))
    scale = d**-0.5
    launchers.launch_forward(q, k, v, start, seed, out, lse2, scale, dropout_p, TILES.forward).run()
    inputs = dict(zip("qkv", drawn, strict=False)) | {
        "key_start": start,
        "dropout_p": dropout_p,
        "seed": seed,
    }
    leaves = {n: x.clone().requires_grad_() if n in "qkv" else x for n, x in inputs.items()}
    expected = kernels.reference.causal_attention(**leaves)
    gradients = torch.autograd.grad(expected, [leaves[n] for n in "qkv"], drawn[3])
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-3)
    for wanted, tiles in (((dq, dk, dv), TILES), ((None, dk, dv), TILES), ((dq, dk, dv), FIVE)):
        for launch in launchers.launch_backward(
            grad, q, k, v, out, lse2, start, seed, *wanted, scale, dropout_p, tiles
        ):
            launch.run()
        for mine, theirs in zip(wanted, gradients, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=5e-3)
                mine.zero_()

    lengths, first = (guarded(torch.tensor(x, dtype=torch.int32)) for x in ([tk, 21], [3, 0]))
    few, decoded = (place(i, torch.randn(b, h, 3, d).half()) for i in (8, 9))
    for launch in launchers.launch_decode(
        few, k, v, lengths, first, decoded, scale, 2, attention_decode_tile(0, 2, d)
    ):
        launch.run()
    joined = kernels.reference.decode_attention(few.clone(), *drawn[1:3], lengths, key_start=first)
    torch.testing.assert_close(decoded, joined, rtol=2e-2, atol=5e-3)


def stays_inside(launchers: Any) -> None:
    """No access past the end of any tensor, those that the launchers allocate included."""
    with pytest.MonkeyPatch.context() as patch:
        new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda self, *args, **options: guarded(new_empty(self, *args, **options)),
        )
        patch.setattr(torch, "empty_like", lambda x: guarded(empty_like(x)))
        _launched(launchers, lambda i, x: guarded(x))
        _launched(launchers, lambda i, x: guarded(x), dropout_p=0.4)


def _skips_empty_tiles(launchers: Any) -> None:
    q, k, v = torch.randn(3, 1, 1, 96, 16)
    start = torch.where(torch.arange(96) < 64, 0, 64).to(torch.int32)[None]
    inputs = {"q": q, "k": k, "v": v, "key_start": start}
    with kernels.use_backend("triton"):
        results = run_case(kernels.causal_attention, inputs, ("q", "k", "v"))
    wrong = [
        str(verdict) for verdict in Oracle(CAUSAL, inputs, torch.float32).judge(results) if not verdict.ok
    ]
    assert not wrong, wrong


def reaches_far_along(dim: int) -> Callable[[Any], None]:
    """Right values where offsets along dimension `dim` pass 2**31 elements."""

    def run(launchers: Any) -> None:
        memory = sparse(fits([(2, 4, 35, 24)] * 10), torch.float16)
        _launched(launchers, lambda i, x: spread(x, dim, i * 2 * 4 * 35 * 24, memory))

    return run


CHECKS: dict[str, Callable[[Any], None]] = {
    "documents": _agrees("2 2 1 37 43 24", key_start="documents", layout="padded"),
    "several tiles": _agrees("1 2 2 70 70 16"),
    "dropout": _agrees("1 2 2 33 33 16", dropout_p=0.4, seed=5),
    "dropout by fours": _agrees("1 2 1 35 44 16", dropout_p=0.4, seed=5, key_start="window"),
    "empty rows": _agrees("1 1 1 33 34 16", key_start="empty"),
    "one key ahead": _agrees("1 1 1 33 34 16"),
    "padding": _agrees("2 1 1 66 66 16", key_start="padding"),
    "large logits": _agrees("1 1 1 40 40 16", scale=30.0),
    "strided gradients": _takes_strided_gradients,
    "skipped tiles": _skips_empty_tiles,
    "16 bits": _half,
    "decoding": _decodes,
    "guard pages": stays_inside,
    "far rows": reaches_far_along(2),
}
