"""The feed-forward beyond the registry's cases: GELU's range, saved tensors, the GELU matmul, far offsets."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.tolerance import compare
from kernels.tuning import Tile, gelu_backward_tile, gelu_tile
from tests.memory import sparse, start_at_program

pytestmark = pytest.mark.kernels

APPROXIMATIONS = ("tanh", "none")


def arguments(n: int, c: int, i: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, w_up, b_up, w_down, b_down."""
    shapes, scales = ((n, c), (i, c), (i,), (c, i), (c,)), (1, c**-0.5, 1, i**-0.5, 1)
    pairs = zip(shapes, scales, strict=True)
    return [(torch.randn(shape) * scale).to(dtype).requires_grad_() for shape, scale in pairs]


@pytest.fixture(autouse=True)
def on_triton() -> Any:
    with kernels.use_backend(ffn="triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_over_its_whole_range(approximate: str, dtype: torch.dtype) -> None:
    """An exponential that overflows at |x| = 1e4, a derivative of 0 times infinity, or erf for tanh."""
    h = torch.cat(
        [torch.linspace(-12, 12, 481), torch.tensor([0.0, 1e-6, 100, -100, 1e4, -1e4, 6e4, -6e4])]
    ).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    x = h[:, None].clone().requires_grad_()
    y = kernels.gelu_ffn(x, one, None, one, None, approximate=approximate)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    exact = h.double().requires_grad_()
    oracle = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(oracle.sum(), exact)
    eps, atol = torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps * 12
    torch.testing.assert_close(y[:, 0].double(), oracle, rtol=2 * eps, atol=atol)
    torch.testing.assert_close(gradient[:, 0].double(), slope, rtol=2 * eps, atol=1e-6)


def gelu_and_derivative(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU by tanh and its derivative at `h` (N, F), in h's dtype, by the kernels."""
    from kernels.ffn.gelu import bias_gelu_backward

    values, slopes = torch.empty_like(h), torch.empty_like(h)
    arguments: dict[str, Any] = {"h": h, "bias": None, "partial_dbias": None, "tanh": True, "programs": 1}
    tile = gelu_backward_tile(h.shape[1], h.element_size())
    bias_gelu_backward(**arguments, da=torch.ones_like(h), dh=slopes, a=values, tile=tile).run()
    return values, slopes


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [(-12, -4), (-4, -1), (-1, 1), (1, 4), (4, 12), (-12, 12)])
def test_gelu_allows_for_the_error_of_approximate_instructions(
    low: int, high: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form of GELU in which the largest error of a GPU's ex2 or rsqrt exceeds the tolerance."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def erring(exact: Any, error: float) -> Any:
        def approximate(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
            y = exact(self, x)
            signs = torch.randint(0, 2, y.data.shape).mul(2).sub(1).numpy()
            return TensorHandle((y.data * (1 + error * signs)).astype(y.data.dtype), y.dtype)

        return approximate

    for name, error in (("create_exp2", 2**-22), ("create_rsqrt", 2**-22.9)):
        monkeypatch.setattr(InterpreterBuilder, name, erring(getattr(InterpreterBuilder, name), error))

    h = torch.linspace(low, high, 4096).to(dtype).view(8, 512)
    results = []
    for leaf in (h.clone(), h.double()):
        value = F.gelu(leaf.requires_grad_(), approximate="tanh")
        results.append((value, *torch.autograd.grad(value.sum(), leaf)))
    for name, *values in zip(("value", "slope"), gelu_and_derivative(h), *results, strict=True):
        verdict = compare(name, *values, dtype=dtype, scale=max(-low, high))
        assert verdict.ok, str(verdict)


@pytest.mark.gpu
@pytest.mark.driver("the errors of a GPU's ex2 and rsqrt are not executed")
def test_the_error_of_gelu_on_a_gpu() -> None:
    """An error in float32 that is larger than the docstrings of kernels/device_functions.py state."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    h = bits.view(torch.bfloat16).float()
    h = h[h.abs() < 1e10]  # as stated for the derivative
    h = torch.cat([h, torch.linspace(-10, 10, 2**20)])
    h = h[: len(h) // 512 * 512].view(-1, 512).cuda()

    leaf = h.double().requires_grad_()
    expected = F.gelu(leaf, approximate="tanh")
    (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    values, slopes = gelu_and_derivative(h)
    assert ((values - expected).abs() <= torch.where(h > 0, 2**-20.7 * expected, 2**-22.6)).all()
    assert ((slopes - derivative).abs() <= 2**-19.9).all()


def test_only_inputs_and_the_first_matmul_are_saved() -> None:
    """GELU's output that is saved for backward, which doubles the activation memory."""
    saved: list[torch.Tensor] = []
    leaves = arguments(10, 8, 40)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        kernels.gelu_ffn(*leaves)
    assert sorted(tuple(tensor.shape) for tensor in saved) == sorted(
        [(10, 8), (10, 40), (40, 8), (40,), (8, 40)]
    )


def test_the_gradient_of_x_reuses_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer for dx beside dh and GELU's output: 96 MiB at 65,536 tokens of GPT-2 in 16 bits."""
    from kernels.ffn import torch_op

    x, w_up, b_up, w_down, _ = tensors = [leaf.detach() for leaf in arguments(2048, 64, 64)]
    y, h = torch.ops.fused_gpt.gelu_ffn_forward(*tensors, True, True)
    # The interpreter would keep the kernel's arguments alive.
    monkeypatch.setattr(torch_op, "bias_gelu_backward", lambda **_: SimpleNamespace(run=lambda: None))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        gradients = torch.ops.fused_gpt.gelu_ffn_backward(y, x, h, w_up, b_up, w_down, True, *[True] * 5)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = list(itertools.accumulate(event.nbytes() for event in events))
    assert live[-1] >= sum(gradient.nbytes for gradient in gradients)  # the profiler saw the allocations
    assert max(live) < 2.5 * h.nbytes


def test_inference_saves_nothing() -> None:
    """A forward pass without gradients that returns a second buffer of activations."""
    leaves = arguments(10, 8, 40)
    expected = kernels.gelu_ffn(*leaves)
    with torch.no_grad():
        assert torch.equal(kernels.gelu_ffn(*leaves), expected)
        assert torch.ops.fused_gpt.gelu_ffn_forward(*leaves, True, False)[1].numel() == 0


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_matmul_with_gelu(dtype: torch.dtype, approximate: str, bias: bool) -> None:
    """A tail that is not masked, a lost bias, or GELU of an unrounded value in the matmul with GELU."""
    from kernels.ffn.gelu import bias_gelu_forward
    from kernels.ffn.gemm import gelu_gemm_forward

    x, w, b, _, _ = (tensor.detach() for tensor in arguments(37, 75, 90, dtype))
    options: dict[str, Any] = {"bias": b if bias else None, "tanh": approximate == "tanh"}
    for left, right in ((x, w), (x.mT.contiguous().mT, w.mT.contiguous().mT)):
        h, a, expected = (torch.full((37, 90), float("nan"), dtype=dtype) for _ in range(3))
        gelu_gemm_forward(**options, x=left, w=right, h=h, a=a, tile=Tile(16, 32)).run()
        verdict = compare("h", h, x @ w.mT, x.double() @ w.double().mT, dtype=dtype, scale=1.0)
        assert verdict.ok, str(verdict)
        bias_gelu_forward(**options, h=h, a=expected).run()
        assert torch.equal(a, expected)


def test_the_table_can_choose_the_matmul_with_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile in the tuning table that changes the results."""
    from kernels.ffn import torch_op

    leaves = arguments(20, 24, 70)
    results = []
    for tile in (None, Tile(16, 16)):
        monkeypatch.setattr(torch_op, "gelu_gemm_tile", lambda *args, tile=tile: tile)
        y = kernels.gelu_ffn(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_many_programs_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that overwrite each other's partial sums of db_up, or rows that no program takes."""
    from kernels.ffn import torch_op

    leaves = arguments(150, 8, 70)
    dy = torch.randn(150, 8)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(kernels.reference.gelu_ffn(*exact), exact, dy.double())
    for programs in (1, 3, 5, 9):
        monkeypatch.setattr(torch_op, "gelu_programs", lambda *args, programs=programs: programs)
        gradients = torch.autograd.grad(kernels.gelu_ffn(*leaves), leaves, dy)
        for gradient, oracle in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), oracle, rtol=1e-4, atol=1e-4)


def test_partial_sums_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of db_up that are rounded to 16 bits; two programs' sums nearly cancel here."""
    from kernels.ffn import torch_op

    monkeypatch.setattr(torch_op, "gelu_programs", lambda *args: 2)
    leaves = arguments(63, 8, 40, torch.bfloat16)
    dy = torch.randn(8).expand(63, 8).clone()
    dy[gelu_backward_tile(40, 2).block_m :] *= -1
    with torch.no_grad():
        leaves[0].zero_()
    (actual,) = torch.autograd.grad(kernels.gelu_ffn(*leaves), leaves[2], dy.bfloat16())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (oracle,) = torch.autograd.grad(kernels.reference.gelu_ffn(*exact), exact[2], dy.bfloat16().double())
    assert (actual.double() - oracle).norm() / oracle.norm() < 2 * torch.finfo(torch.bfloat16).eps


def test_autocast() -> None:
    """Under autocast, matmuls in float32, or gradients of float32 parameters that are not float32."""
    leaves = arguments(6, 8, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.gelu_ffn(*leaves)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = kernels.gelu_ffn(*half)
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    half_gradients = torch.autograd.grad(expected, half, torch.ones_like(y))
    for gradient, half_gradient in zip(gradients, half_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, half_gradient.float())


@pytest.mark.interpreter
def test_activations_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offset of an activation that is computed in 32 bits; here there are more than 2**31 activations."""
    from kernels.ffn.gelu import bias_gelu_backward, bias_gelu_forward

    width = 2**14
    rows, columns = gelu_tile(width)[:2]
    blocks = 2**31 // (width * rows) + 2
    n = blocks * rows
    h, a, dh = (sparse(n * width, torch.bfloat16).view(n, width) for _ in range(3))
    near = torch.randn(rows, columns)
    h[-rows:, -columns:] = near
    forward = bias_gelu_forward(h=h, bias=None, a=a, tanh=True)
    backward = bias_gelu_backward(
        da=h,
        h=h,
        bias=None,
        dh=dh,
        a=None,
        partial_dbias=None,
        tanh=True,
        programs=1,
        tile=gelu_tile(width),
    )
    with monkeypatch.context() as patch:
        start_at_program(patch, forward.grid[0] - 1)
        forward._replace(grid=(1,)).run()
    torch.testing.assert_close(a[-rows:, -columns:], F.gelu(near.bfloat16(), approximate="tanh"))
    start_at_program(monkeypatch, width // columns - 1, blocks - 1)
    backward._replace(grid=(1, 1)).run()
    leaf = near.bfloat16().float().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, near.bfloat16().float())
    torch.testing.assert_close(dh[-rows:, -columns:].float(), slope, rtol=0.01, atol=0.01)


@pytest.mark.interpreter
@pytest.mark.parametrize("far", ["rows of x", "columns of x", "rows of w", "columns of w"])
def test_matmul_operands_past_two_to_the_31(far: str) -> None:
    """The offset of an operand's element that is computed in 32 bits."""
    from kernels.ffn.gemm import gelu_gemm_forward

    x, w = torch.randn(4, 20), torch.randn(5, 20)
    stride = {"rows": 2**30 + 64, "columns": 2**27 + 64}[far.split()[0]]
    shape = (4, 20) if far.endswith("x") else (5, 20)
    spread = sparse(2**33, torch.float32).as_strided(shape, (stride, 1) if stride > 2**30 else (1, stride))
    results = []
    for left, right in ((x, w), (spread.copy_(x), w) if far.endswith("x") else (x, spread.copy_(w))):
        h, a = torch.empty(2, 4, 5)
        gelu_gemm_forward(x=left, w=right, bias=None, h=h, a=a, tanh=True, tile=Tile(16, 16)).run()
        results.append(h)
    assert torch.equal(*results)


@pytest.mark.interpreter
def test_matmul_outputs_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offset of an output's element that is computed in 32 bits; here it has more than 2**31 elements."""
    from kernels.ffn.gemm import gelu_gemm_forward

    m, n = 2**17 + 16, 2**14
    x, w = sparse(m * 8, torch.float32).view(m, 8), torch.zeros(n, 8)
    x[-16:], w[-16:] = torch.randn(16, 8), torch.randn(16, 8)
    h, a = (sparse(m * n, torch.float32).view(m, n) for _ in range(2))
    launch = gelu_gemm_forward(x=x, w=w, bias=None, h=h, a=a, tanh=True, tile=Tile(16, 16))
    start_at_program(monkeypatch, launch.grid[0] - 1)
    launch._replace(grid=(1,)).run()
    torch.testing.assert_close(h[-16:, -16:], x[-16:] @ w[-16:].mT)
    torch.testing.assert_close(a[-16:, -16:], F.gelu(h[-16:, -16:], approximate="tanh"))
