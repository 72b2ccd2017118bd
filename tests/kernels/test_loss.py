"""The loss beyond the registry's cases: chunks, loss scales, targets, forward only, far offsets, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.loss import reference
from tests.memory import guarded, in_a_fork, sparse, start_at_program

ROOT = Path(__file__).parents[2]


def arguments(
    n: int, c: int, v: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and targets; every fifth target is ignored."""
    targets = torch.randint(v, (n,))
    targets[::5] = -100
    return (
        torch.randn(n, c).to(dtype).requires_grad_(),
        (torch.randn(v, c) / c**0.5).to(dtype).requires_grad_(),
        targets,
    )


def on_triton(*args: Any, **options: Any) -> torch.Tensor:
    with kernels.use_backend(loss="triton"):
        return kernels.linear_cross_entropy(*args, **options)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of sixteen rows of logits, in the kernel's loop and in the reference's."""
    pytest.importorskip("triton")
    from kernels.loss import torch_op

    monkeypatch.setattr(torch_op, "loss_chunk_rows", lambda *sizes: 16)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * 65)


@pytest.mark.kernels
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(dtype: torch.dtype, reduction: str, small_chunks: None) -> None:
    """dW accumulated in bfloat16, a chunk that is lost or counted twice, or a wrong last, partial chunk."""
    x, weight, targets = arguments(1030, 24, 65, dtype)
    bias = torch.randn(65).to(dtype).requires_grad_()
    leaves = x, weight, bias
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_loss = reference.linear_cross_entropy(exact[0], exact[1], targets, exact[2], **options)
    grad = torch.rand(exact_loss.shape)
    oracle = exact_loss.detach(), *torch.autograd.grad(exact_loss, exact, grad.double())
    # One rounding of the logits and one of dlogits; accumulating in bfloat16 would cost ten times as much.
    limit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)

    for backend in ("triton", "reference"):
        with kernels.use_backend(loss=backend):
            loss = kernels.linear_cross_entropy(x, weight, targets, bias, **options)
        assert loss.dtype == torch.float32
        results = loss.detach(), *torch.autograd.grad(loss, leaves, grad)
        for name, actual, expected in zip(("loss", "dx", "dweight", "dbias"), results, oracle, strict=True):
            error = (actual.double() - expected).norm() / expected.norm()
            assert error < limit, (backend, name, error)


@pytest.mark.kernels
def test_gradients_of_chunks_are_summed_in_float32(small_chunks: None) -> None:
    """A chunk's dweight or dbias that is rounded to 16 bits; those of two chunks nearly cancel here."""
    x, weight, _ = arguments(1, 24, 65, torch.bfloat16)
    leaves = x, weight, torch.randn(65).bfloat16().requires_grad_()
    targets, grad = torch.zeros(31, dtype=torch.int64), torch.where(torch.arange(31) < 16, 1.0, -1.0)
    loss = on_triton(x.expand(31, 24), weight, targets, leaves[2], reduction="none")
    gradients = torch.autograd.grad(loss, leaves[1:], grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_loss = reference.linear_cross_entropy(*exact[:2], targets[:1], exact[2])
    for gradient, oracle in zip(gradients, torch.autograd.grad(exact_loss, exact[1:]), strict=True):
        assert (gradient.double() / oracle - 1).abs().max() < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.kernels
@pytest.mark.parametrize("v", [33, 4170])
def test_each_token_has_its_own_gradient(v: int) -> None:
    """With "none", a gradient of one token applied to another, or lost where it is negative or 0."""
    x, weight, targets = arguments(21, 16, v)
    bias = torch.randn(v).requires_grad_()
    grad = torch.linspace(-2, 3, 21)
    grad[[3, 8]] = 0
    leaves = x, weight, bias
    options = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-2}
    loss = on_triton(x, weight, targets, bias, **options)
    gradients = torch.autograd.grad(loss, leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_loss = reference.linear_cross_entropy(exact[0], exact[1], targets, exact[2], **options)
    oracle = torch.autograd.grad(exact_loss, exact, grad.double())
    for gradient, expected in zip(gradients, oracle, strict=True):
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
    errors = (gradients[0] - oracle[0]).norm(dim=1)
    assert (errors <= 1e-5 * oracle[0].norm(dim=1)).all()
    zero = (grad == 0) | (targets == -100)
    assert torch.equal(gradients[0].eq(0).all(1), zero)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_scale_prevents_underflow(dtype: torch.dtype) -> None:
    """16-bit gradients that are divided by the token count before they are multiplied by the loss scale."""
    x, weight, targets = arguments(600, 16, 33, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    factor = 2.0**14
    expected = torch.autograd.grad(reference.linear_cross_entropy(*exact, targets) * factor, exact)
    gradients = torch.autograd.grad(on_triton(x, weight, targets) * factor, (x, weight))
    for gradient, oracle in zip(gradients, expected, strict=True):
        assert (gradient.double() - oracle).norm() / oracle.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.kernels
@pytest.mark.parametrize("ignore_index", [-100, 0, 3])
def test_the_definition_is_torchs(ignore_index: int) -> None:
    """A mean over ignored tokens, a smoothing other than torch's, or a wrong weight of the log-normaliser."""
    x, weight, targets = arguments(40, 16, 33)
    targets[::5] = ignore_index
    logits = x.detach() @ weight.detach().mT
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, ignore_index=ignore_index)
    counted = targets != ignore_index
    expected = expected + 0.3 * logits.logsumexp(-1).square()[counted].mean()
    for backend in ("triton", "reference"):
        with kernels.use_backend(loss=backend):
            loss = kernels.linear_cross_entropy(
                x, weight, targets, ignore_index=ignore_index, label_smoothing=0.2, z_loss=0.3
            )
        torch.testing.assert_close(loss, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_the_level_of_the_logits_changes_nothing(shift: float) -> None:
    """A running maximum that starts above the logits, so that the sums underflow, or no shift at all."""
    x, weight, targets = arguments(20, 16, 33)
    results = []
    for bias in (torch.zeros(33), torch.full((33,), shift)):
        loss = on_triton(x, weight, targets, bias, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("level", [-3000.0, 3000.0])
def test_large_logits_lose_no_accuracy(level: float) -> None:
    """Logits that are rounded once more, or differently in the sum and in the gradients."""
    weight = (level + torch.randn(33, 1)).requires_grad_()  # the logits of x = 1
    x, targets = torch.ones(1, 1), torch.tensor([5])
    results = []
    for leaf in (weight, weight.detach().double().requires_grad_()):
        loss = on_triton if leaf is weight else reference.linear_cross_entropy
        value = loss(x.to(leaf.dtype), leaf, targets)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.kernels
def test_all_targets_ignored() -> None:
    """0 / 0, or uninitialised gradients, where every target is ignored; or an ignore_index fixed at -100."""
    for reduction in ("mean", "sum", "none"):
        x, weight, _ = arguments(5, 8, 10)
        loss = on_triton(x, weight, torch.full((5,), 3), ignore_index=3, reduction=reduction)
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient in torch.autograd.grad(loss, (x, weight), torch.ones_like(loss)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def cross_entropy_launch(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Any:
    """The launch for losses and gradients of their sum."""
    pytest.importorskip("triton")
    from kernels.loss.softmax import cross_entropy

    return cross_entropy(
        logits=logits,
        targets=targets,
        bias=bias,
        grad=None,
        losses=losses,
        ignore_index=-100,
        label_smoothing=label_smoothing,
        z_loss=0.0,
        gradient=True,
    )


@pytest.mark.kernels
def test_a_target_outside_the_vocabulary_gives_nan() -> None:
    """An out-of-range target that reads past the logits, or that gives a plausible loss."""
    targets, losses = torch.tensor([2, 10, -5, -100, 2**40]), torch.empty(5)
    cross_entropy_launch(torch.randn(5, 64)[:, :10], targets, losses, label_smoothing=0.1).run()
    assert losses.isnan().tolist() == [False, True, True, False, True]


@pytest.mark.kernels
@pytest.mark.parametrize("v", [130, 4170])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradients_of_the_padding_are_zero(v: int, with_bias: bool) -> None:
    """A smoothing or a softmax that reaches the columns past V, which the matmuls include."""
    width = -(-v // 64) * 64
    logits, losses = torch.randn(3, width), torch.empty(3)
    bias = torch.randn(width) if with_bias else None
    targets = torch.tensor([0, -100, v - 1])
    cross_entropy_launch(logits[:, :v], targets, losses, bias=bias, label_smoothing=0.1).run()
    assert torch.equal(logits[:, v:], torch.zeros(3, width - v))
    assert logits[::2, :v].ne(0).all()


@pytest.mark.kernels
@pytest.mark.parametrize("v", [64, 4170])
def test_an_ignored_row_is_not_read(v: int) -> None:
    """A row of NaN, as padding may give, whose gradient is NaN although its target is ignored."""
    logits, losses = torch.randn(3, -(-v // 64) * 64), torch.empty(3)
    logits[1] = torch.nan
    cross_entropy_launch(logits[:, :v], torch.tensor([0, -100, 1]), losses).run()
    assert losses[1] == 0
    assert torch.equal(logits[1], torch.zeros_like(logits[1]))
    assert logits.isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmuls_in_16_bits_have_aligned_sizes(dtype: torch.dtype) -> None:
    """A matmul over an odd vocabulary, which cuBLAS runs slowly, or a copy of a float32 weight."""
    pytest.importorskip("triton")
    from kernels.loss import torch_op

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                sizes.update(size for tensor in args for size in tensor.shape)
            return func(*args, **kwargs or {})

    sizes: set[int] = set()
    x, weight, targets = (tensor.detach() for tensor in arguments(20, 16, 33, dtype))
    with Shapes():
        _, _, dx, dweight, _ = torch_op._gradients(
            x, weight, targets, None, -100, 0.1, 0.0, True, *[True] * 3
        )
    assert sizes == {20, 16, 33 if dtype == torch.float32 else 64}
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)


@pytest.mark.interpreter
@pytest.mark.skipif(sys.platform != "linux", reason="guard pages need Linux's mmap")
def test_nothing_past_the_bias_is_read() -> None:
    """A tile wider than the padded vocabulary that reads past the end of the bias."""
    logits, bias, losses = torch.randn(3, 192), guarded(torch.randn(192)), torch.empty(3)
    targets = torch.tensor([0, 129, 64])
    launch = cross_entropy_launch(logits[:, :130], targets, losses, bias=bias, label_smoothing=0.1)
    assert launch.tile.block_n > 192
    assert in_a_fork(launch.run) == ""


@pytest.mark.kernels
def test_forward_only_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that computes or allocates gradients."""
    pytest.importorskip("triton")
    from kernels.loss import torch_op

    x, weight, targets = arguments(20, 8, 33)
    with_gradients = {
        reduction: on_triton(x, weight, targets, reduction=reduction).detach()
        for reduction in ("mean", "sum", "none")
    }
    monkeypatch.setattr(torch_op, "_gradient_buffers", lambda *args: pytest.fail("gradients were allocated"))
    for reduction, expected in with_gradients.items():
        with torch.no_grad():
            loss = on_triton(x, weight, targets, reduction=reduction)
        detached_loss = on_triton(x.detach(), weight.detach(), targets, reduction=reduction)
        torch.testing.assert_close((loss, detached_loss), (expected, expected))


@pytest.mark.kernels
def test_a_tied_weight_and_accumulation() -> None:
    """A tied weight that gets one of its two gradients, or a second micro-batch that overwrites the first."""
    ids, targets = torch.randint(33, (2, 12)), torch.randint(33, (2, 12))
    gradients = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        weight = torch.randn(33, 16, requires_grad=True)
        with kernels.use_backend(loss=backend):
            for rows, aims in zip(ids, targets, strict=True):
                (kernels.linear_cross_entropy(weight[rows], weight, aims) / 2).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.kernels
def test_autocast() -> None:
    """Under autocast, matmuls in float32, a bfloat16 loss, or a float32 weight's gradient in bfloat16."""
    x, weight, targets = arguments(30, 16, 65)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = on_triton(x, weight, targets)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in (x, weight)]
    expected = on_triton(*half, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    gradients, half_gradients = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, half)
    for gradient, half_gradient in zip(gradients, half_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, half_gradient.float())


@pytest.mark.interpreter
def test_logits_past_two_to_the_31() -> None:
    """A row's offset that is computed in 32 bits; here the rows of logits are 2**30 elements apart."""
    near, targets = torch.randn(5, 320).bfloat16(), torch.randint(300, (5,))
    stride = 2**30 + 64
    far = sparse(5 * stride, torch.bfloat16).as_strided((5, 320), (stride, 1))
    far.copy_(near)
    losses = [torch.empty(5), torch.empty(5)]
    for logits, loss in zip((near[:, :300], far[:, :300]), losses, strict=True):
        cross_entropy_launch(logits, targets, loss).run()
    assert torch.equal(*losses)
    assert torch.equal(near[:, :300], far[:, :300])


@pytest.mark.interpreter
def test_gradients_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset that is computed in 32 bits where finished gradients are scaled."""
    pytest.importorskip("triton")
    from kernels.loss.softmax import scale_gradient

    size = 2**31 + 3 * 4096 + 5
    source, out = sparse(size, torch.bfloat16), sparse(size, torch.bfloat16)
    source[-5:] = torch.arange(1.0, 6.0)
    launch = scale_gradient(gradient=source, scale=torch.tensor(3.0), out=out)
    start_at_program(monkeypatch, launch.grid[0] - 1)
    launch._replace(grid=(1,)).run()
    assert out[-5:].tolist() == [3.0, 6.0, 9.0, 12.0, 15.0]


MEMORY = """
import sys, torch, kernels
backend, dtype, n = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
if backend == "triton":
    import tests.interpreter, kernels.launch
    tests.interpreter.patch_interpreter()
    # The interpreter would take hours, and bfloat16 matmuls on a CPU take minutes.
    kernels.launch.Launch.run = lambda self: None
    torch.mm = lambda a, b, *, out: out.zero_()
    torch.Tensor.addmm_ = lambda total, a, b: total
x = torch.randn(n, 768).to(dtype).requires_grad_()
weight = torch.randn(50257, 768).to(dtype).requires_grad_()
targets = torch.randint(1000, (n,))
with kernels.use_backend(backend):
    # Loads the libraries and starts the threads.
    kernels.linear_cross_entropy(x[:16], weight.detach()[:1000], targets[:16]).backward()
    x.grad = None
    status = lambda: open("/proc/self/status")
    memory = lambda name: next(int(line.split()[1]) * 1024 for line in status() if line.startswith(name))
    before = memory("VmRSS")
    peak = lambda: memory("VmHWM") - before  # getrusage counts what the parent process held too
    loss = kernels.linear_cross_entropy(x, weight, targets)
    forward = peak()
    loss.backward()
    print(forward, max(forward, peak() - x.grad.nbytes - weight.grad.nbytes))
"""


@pytest.mark.interpreter
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("backend", "dtype", "n"),
    [
        ("reference", "float32", 700),
        ("triton", "float32", 8192),
        ("triton", "bfloat16", 8192),
        pytest.param("reference", "float32", 8192, marks=pytest.mark.slow),
        pytest.param("reference", "bfloat16", 8192, marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(backend: str, dtype: str, n: int) -> None:
    """Logits of the whole batch, or one chunk too many: over 450 MB besides inputs, output and gradients."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", MEMORY, backend, dtype, str(n)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    forward, both = map(int, done.stdout.split())
    assert 100e6 < forward <= both <= 450e6
