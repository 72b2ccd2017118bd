"""The feed-forward beyond the registry's cases: GELU at its extremes, what is saved, the product with GELU,
far offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.tuning import Tile, gelu_tile
from tests.memory import sparse, start_at_program

pytestmark = pytest.mark.interpreter

APPROXIMATIONS = ("tanh", "none")


def arguments(n: int, c: int, i: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, w_up, b_up, w_down, b_down."""
    shapes, scales = ((n, c), (i, c), (i,), (c, i), (c,)), (1, c**-0.5, 1, i**-0.5, 1)
    return [
        (torch.randn(s) * scale).to(dtype).requires_grad_() for s, scale in zip(shapes, scales, strict=True)
    ]


@pytest.fixture(autouse=True)
def on_triton() -> Any:
    with kernels.use_backend(ffn="triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_from_end_to_end_of_its_range(approximate: str, dtype: torch.dtype) -> None:
    """tanh by exponentials that overflow at |x| = 1e4, a derivative that is 0 times infinity, erf in place of
    tanh."""
    h = torch.cat(
        [torch.linspace(-12, 12, 481), torch.tensor([0.0, 1e-6, 100, -100, 1e4, -1e4, 6e4, -6e4])]
    ).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    x = h[:, None].clone().requires_grad_()
    y = kernels.gelu_ffn(x, one, None, one, None, approximate=approximate)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    exact = h.double().requires_grad_()
    true = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(true.sum(), exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        y[:, 0].double(), true, rtol=2 * eps, atol=2 * torch.finfo(torch.float32).eps * 12
    )
    torch.testing.assert_close(gradient[:, 0].double(), slope, rtol=2 * eps, atol=1e-6)


def test_only_x_and_the_product_are_saved() -> None:
    """GELU's output kept for backward: twice the activation memory."""
    saved: list[torch.Tensor] = []
    leaves = arguments(10, 8, 40)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        kernels.gelu_ffn(*leaves)
    assert sorted(tuple(tensor.shape) for tensor in saved) == sorted(
        [(10, 8), (10, 40), (40, 8), (40,), (8, 40)]
    )


def test_inference_keeps_nothing() -> None:
    """A forward without gradients that fills a second buffer of activations."""
    leaves = arguments(10, 8, 40)
    expected = kernels.gelu_ffn(*leaves)
    with torch.no_grad():
        assert torch.equal(kernels.gelu_ffn(*leaves), expected)
        assert torch.ops.fused_gpt.gelu_ffn_forward(*leaves, True, False)[1].numel() == 0


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_with_gelu_inside(dtype: torch.dtype, approximate: str, bias: bool) -> None:
    """The Triton product that the table may choose: a tail that is not masked, a lost bias, GELU of an
    unrounded value."""
    from kernels.ffn import gelu
    from kernels.ffn.gemm import launch_gelu_gemm

    x, w, b, _, _ = (tensor.detach() for tensor in arguments(37, 75, 90, dtype))
    for left, right in ((x, w), (x.mT.contiguous().mT, w.mT.contiguous().mT)):
        h, a, again = (torch.full((37, 90), float("nan"), dtype=dtype) for _ in range(3))
        launch_gelu_gemm(left, right, b if bias else None, h, a, approximate == "tanh", Tile(16, 32)).run()
        true = x.double() @ w.double().mT
        assert (h.double() - true).norm() / true.norm() < torch.finfo(dtype).eps
        gelu.launch_forward(h, b if bias else None, again, approximate == "tanh").run()
        assert torch.equal(a, again)


def test_the_table_can_choose_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table that changes results, or is not followed."""
    from kernels.ffn import torch_op

    leaves = arguments(20, 24, 70)
    results = []
    for tile in (None, Tile(16, 16)):
        monkeypatch.setattr(torch_op, "gelu_gemm_tile", lambda *args, tile=tile: tile)
        y = kernels.gelu_ffn(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_many_programs_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of db_up that collide, or rows that no program takes."""
    from kernels.ffn import torch_op

    leaves = arguments(150, 8, 70)
    dy = torch.randn(150, 8)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(kernels.reference.gelu_ffn(*exact), exact, dy.double())
    for programs in (1, 3, 5, 9):
        monkeypatch.setattr(torch_op, "gelu_programs", lambda *args, programs=programs: programs)
        for gradient, true in zip(
            torch.autograd.grad(kernels.gelu_ffn(*leaves), leaves, dy), expected, strict=True
        ):
            torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-4)


def test_partial_sums_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of db_up that are rounded to 16 bits: two programs' sums nearly cancel here."""
    from kernels.ffn import torch_op

    monkeypatch.setattr(torch_op, "gelu_programs", lambda *args: 2)
    leaves = arguments(63, 8, 40, torch.bfloat16)
    dy = torch.randn(8).expand(63, 8).clone()
    dy[gelu_tile(40).block_m :] *= -1
    with torch.no_grad():
        leaves[0].zero_()
    (found,) = torch.autograd.grad(kernels.gelu_ffn(*leaves), leaves[2], dy.bfloat16())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (true,) = torch.autograd.grad(kernels.reference.gelu_ffn(*exact), exact[2], dy.bfloat16().double())
    assert (found.double() - true).norm() / true.norm() < 2 * torch.finfo(torch.bfloat16).eps


def test_autocast() -> None:
    """Under autocast: products in float32, or gradients of float32 parameters that are not."""
    leaves = arguments(6, 8, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.gelu_ffn(*leaves)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = kernels.gelu_ffn(*half)
    assert torch.equal(y, expected)
    found = (
        torch.autograd.grad(y, leaves, torch.ones_like(y)),
        torch.autograd.grad(expected, half, torch.ones_like(y)),
    )
    for gradient, true in zip(*found, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, true.float())


def test_activations_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """N I in 32 bits: the last rows of activations with more than 2**31 elements."""
    from kernels.ffn.gelu import launch_backward, launch_forward

    width = 2**14
    rows, columns, _, _ = gelu_tile(width)
    blocks = 2**31 // (width * rows) + 2
    n = blocks * rows
    h, a, dh = (sparse(n * width, torch.bfloat16).view(n, width) for _ in range(3))
    near = torch.randn(rows, columns)
    h[-rows:, -columns:] = near
    forward = launch_forward(h, None, a, True)
    backward = launch_backward(h, h, None, dh, None, None, True, 1)
    with monkeypatch.context() as patch:
        start_at_program(patch, forward.grid[0] - 1)
        forward._replace(grid=(1,)).run()
    torch.testing.assert_close(a[-rows:, -columns:], F.gelu(near.bfloat16(), approximate="tanh"))
    start_at_program(monkeypatch, width // columns - 1, blocks - 1)
    backward._replace(grid=(1, 1)).run()
    leaf = near.bfloat16().float().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, near.bfloat16().float())
    torch.testing.assert_close(dh[-rows:, -columns:].float(), slope, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("far", ["rows of x", "columns of x", "rows of w", "columns of w"])
def test_the_product_past_two_to_the_31(far: str) -> None:
    """M K or N K in 32 bits, in the Triton product that the table may choose."""
    from kernels.ffn.gemm import launch_gelu_gemm

    x, w = torch.randn(4, 20), torch.randn(5, 20)
    stride = {"rows": 2**30 + 64, "columns": 2**27 + 64}[far.split()[0]]
    shape = (4, 20) if far.endswith("x") else (5, 20)
    spread = sparse(2**33, torch.float32).as_strided(shape, (stride, 1) if stride > 2**30 else (1, stride))
    products = []
    for left, right in ((x, w), (spread.copy_(x), w) if far.endswith("x") else (x, spread.copy_(w))):
        h, a = torch.empty(2, 4, 5)
        launch_gelu_gemm(left, right, None, h, a, True, Tile(16, 16)).run()
        products += [h]
    assert torch.equal(*products)


def test_products_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """M N in 32 bits: the last rows of a product with more than 2**31 elements."""
    from kernels.ffn.gemm import launch_gelu_gemm

    m, n = 2**17 + 16, 2**14
    x, w = sparse(m * 8, torch.float32).view(m, 8), torch.zeros(n, 8)
    x[-16:], w[-16:] = torch.randn(16, 8), torch.randn(16, 8)
    h, a = (sparse(m * n, torch.float32).view(m, n) for _ in range(2))
    launch = launch_gelu_gemm(x, w, None, h, a, True, Tile(16, 16))
    start_at_program(monkeypatch, launch.grid[0] - 1)
    launch._replace(grid=(1,)).run()
    torch.testing.assert_close(h[-16:, -16:], x[-16:] @ w[-16:].mT)
    torch.testing.assert_close(a[-16:, -16:], F.gelu(h[-16:, -16:], approximate="tanh"))
