"""LayerNorm in Triton beyond the registry's cases: seeds, unused outputs, autocast, z, far offsets, tiles."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.tolerance import compare
from kernels.tuning import NORM_COLUMNS, norm_backward_tile, norm_tile
from tests.memory import sparse, start_at_program

pytestmark = pytest.mark.kernels


def arguments(n: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, residual, weight, bias."""
    x, residual = torch.randn(2, n, c).to(dtype)
    return x, residual, torch.randn(c), torch.randn(c)


@pytest.fixture(autouse=True)
def on_triton() -> Any:
    with kernels.use_backend(norm="triton"):
        yield


def drop(seed: int | torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The dropout masks of forward and of backward, times 1 / (1 - p): what becomes of ones."""
    x = torch.ones(9, 64, requires_grad=True)
    residual = torch.zeros(9, 64, requires_grad=True)
    _, new_residual = kernels.add_layer_norm(x, residual, torch.ones(64), dropout_p=0.5, seed=seed)
    (gradient,) = torch.autograd.grad(new_residual, x, torch.ones(9, 64))
    return new_residual.detach(), gradient


def test_forward_and_backward_have_one_mask() -> None:
    """A mask that differs between forward and backward."""
    for seed in (None, 5, torch.tensor(2**40 + 3)):
        forward, backward = drop(seed)
        assert torch.equal(forward, backward)
        assert set(forward.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < forward.bool().float().mean() < 0.6


def test_a_seed_of_none_follows_torchs_generator() -> None:
    """A mask that ignores torch.manual_seed, or that is the same in every call."""
    torch.manual_seed(3)
    first, second = drop()[0], drop()[0]
    torch.manual_seed(3)
    assert torch.equal(drop()[0], first)
    assert torch.equal(drop()[0], second)
    assert not torch.equal(first, second)


def test_a_seed_may_be_a_tensor() -> None:
    """A tensor seed with another mask than the same int, or a seed that loses its sign or high 32 bits."""
    for seed in (7, -7, 2**40 + 7, -(2**63)):
        assert torch.equal(drop(seed)[0], drop(torch.tensor(seed))[0])
    assert len({drop(seed)[0].sum().item() for seed in (7, 2**40 + 7, 2**33 + 7, -7)}) > 1


@pytest.mark.parametrize("used", ["y", "new_residual"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_one_output_may_be_unused(used: str, dropout_p: float) -> None:
    """A backward that needs the gradients of both outputs."""
    leaves = [tensor.requires_grad_() for tensor in arguments(6, 40)]
    results = []
    for backend in ("triton", "reference"):
        with kernels.use_backend(backend, norm=backend):
            y, new_residual = kernels.add_layer_norm(*leaves, dropout_p=dropout_p, seed=1)
        output = y if used == "y" else new_residual
        results.append(torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected)


def test_many_programs_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that skips a block of rows, takes one twice, or overwrites another program's partial sums."""
    from kernels.norm import torch_op

    x, _, weight, bias = arguments(200, 96)
    dy = torch.randn(200, 96)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.autograd.grad(kernels.reference.layer_norm(*leaves), leaves, dy.double())
    for programs in (1, 2, 7, 17):
        monkeypatch.setattr(torch_op, "norm_programs", lambda *args, programs=programs: programs)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        first, second = (torch.autograd.grad(kernels.layer_norm(*leaves), leaves, dy) for _ in range(2))
        for actual, repeated, oracle in zip(first, second, expected, strict=True):
            assert torch.equal(actual, repeated)
            torch.testing.assert_close(actual.double(), oracle, rtol=1e-4, atol=1e-4)


def test_sums_of_more_programs_than_one_tile_holds() -> None:
    """Partial sums of dweight and dbias that are lost after the first tile, or in the last, partial tile."""
    from kernels.norm.backward import layer_norm_backward_sum

    partials = torch.randn(2, 700, 40)
    sums = torch.empty(2, 40)
    layer_norm_backward_sum(
        partial_dweight=partials[0], partial_dbias=partials[1], dweight=sums[0], dbias=sums[1]
    ).run()
    torch.testing.assert_close(sums, partials.sum(1), rtol=1e-4, atol=1e-4)


def test_partial_sums_keep_float32() -> None:
    """Partial sums of dweight and dbias that are rounded to 16 bits; those of two programs nearly cancel."""
    rows = norm_backward_tile(0, 24, 2, dropout=False).block_m
    x, _, weight, bias = (tensor.bfloat16() for tensor in arguments(1, 24))
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    dy = torch.randn(24).bfloat16().expand(2 * rows - 1, 24).clone()
    dy[rows:] *= -1
    actual = torch.autograd.grad(kernels.layer_norm(x.expand(2 * rows - 1, 24), *leaves), leaves, dy)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = torch.autograd.grad(kernels.reference.layer_norm(x.double(), *exact), exact, dy[:1].double())
    for gradient, expected in zip(actual, oracle, strict=True):
        torch.testing.assert_close(
            gradient.double(), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-4
        )


def test_eps_is_added_to_the_variance() -> None:
    """An eps that is ignored, or added to the standard deviation."""
    eps = 0.3
    leaves = [tensor.requires_grad_() for tensor in arguments(5, 24)]
    results = []
    for backend in ("triton", "reference"):
        with kernels.use_backend(norm=backend):
            outputs = (
                kernels.layer_norm(leaves[0], *leaves[2:], eps=eps),
                *kernels.add_layer_norm(*leaves, eps=eps),
            )
        ones = [torch.ones_like(output) for output in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, ones)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_once(dtype: torch.dtype) -> None:
    """Under autocast, a y that is rounded twice or stays float32, or weights or a residual that are cast."""
    x, residual, weight, bias = arguments(5, 48, dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, residual.float().detach(), weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.layer_norm(x, weight, bias)
        fused, new_residual = kernels.add_layer_norm(*leaves)
    with torch.no_grad():
        assert torch.equal(y, kernels.layer_norm(x.float(), weight, bias).bfloat16())
        assert torch.equal(fused, kernels.layer_norm(leaves[1] + x.float(), weight, bias).bfloat16())
    assert new_residual.dtype == torch.float32
    gradients = torch.autograd.grad(
        (fused, new_residual), leaves, (torch.ones_like(fused), torch.ones_like(new_residual))
    )
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32, torch.float32]


def test_gradients_take_their_inputs_dtypes() -> None:
    """With mixed dtypes, a gradient in another dtype than its input's, or rounded to another on the way."""
    for dtype, residual_dtype, parameter_dtype in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
    ):
        x, residual, weight, bias = arguments(5, 24)
        dtypes = dtype, residual_dtype, parameter_dtype, torch.float32
        leaves = [
            tensor.to(d).requires_grad_()
            for tensor, d in zip((x, residual, weight, bias), dtypes, strict=True)
        ]
        y, new_residual = kernels.add_layer_norm(*leaves)
        assert (y.dtype, new_residual.dtype) == (dtype, residual_dtype)
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad((y, new_residual), leaves, (dy, torch.ones_like(new_residual)))
        assert tuple(gradient.dtype for gradient in gradients) == dtypes
        torch.testing.assert_close(gradients[3], dy.float().sum(0))


@pytest.mark.interpreter
def test_rows_far_apart() -> None:
    """A row's offset that is computed in 32 bits; here the rows are 2**30 elements apart."""
    stride, c = 2**30 + 16, 24
    memory = [sparse(4 * stride, torch.bfloat16).as_strided((4, c), (stride, 1)) for _ in range(3)]
    values = torch.randn(3, 4, c).bfloat16()
    for far, value in zip(memory, values, strict=True):
        far.copy_(value)
    weight = torch.randn(c)
    results = []
    for x, residual, dy in (memory, values):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, weight)]
        outputs = kernels.add_layer_norm(*leaves, dropout_p=0.2, seed=4)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, (dy, dy))))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


@pytest.mark.interpreter
def test_outputs_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output's offset that is computed in 32 bits; here the outputs have more than 2**31 elements."""
    from kernels.norm.backward import layer_norm_backward
    from kernels.norm.forward import layer_norm_forward

    c = 4096
    rows = norm_tile(c).block_m
    first = 2**31 // (c * rows) + 5
    n = (first + 1) * rows
    near, weight = torch.randn(n - first * rows, c), torch.randn(c)
    x, y, z, dx = (sparse(n * c, torch.bfloat16).view(n, c) for _ in range(4))
    x[first * rows :] = near
    stats = sparse(2 * n, torch.float32).view(2, n)
    partial = sparse((first + 1) * c, torch.float32).view(first + 1, c)
    common: dict[str, Any] = {"weight": weight, "seed": None, "stats": stats, "dropout_p": 0.0}

    start_at_program(monkeypatch, first)
    forward = layer_norm_forward(
        **common, x=x, residual=None, bias=None, y=y, new_residual=None, z=z, eps=1e-5
    )
    forward._replace(grid=(1,)).run()
    layer_norm_backward(
        **common,
        dy=y,
        dnew_residual=None,
        h=z,
        holds_z=True,
        dx=dx,
        dresidual=None,
        partial_dweight=partial,
        partial_dbias=None,
        programs=1,
        tile=norm_tile(c),
    ).run()

    leaf = x[first * rows :].float().requires_grad_()
    expected = torch.nn.functional.layer_norm(leaf, (c,), weight)
    torch.testing.assert_close(y[first * rows :], expected.detach().bfloat16())
    (gradient,) = torch.autograd.grad(expected, leaf, y[first * rows :].float())
    torch.testing.assert_close(dx[first * rows :].float(), gradient, rtol=0.02, atol=0.02)
    assert partial[first].abs().sum() > 0


@pytest.mark.interpreter
def test_one_tensor_for_both_arguments_compiles() -> None:
    """Compiled code that treats one tensor, passed twice, as two tensors."""
    x, _, weight, bias = arguments(5, 32)

    def function(x: torch.Tensor) -> torch.Tensor:
        y, new_residual = kernels.add_layer_norm(x, x, weight, bias)
        return (y * new_residual).sum()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        loss = call(leaf)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    torch.compiler.reset()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_limits_are_explained() -> None:
    """A call that the kernel does not support and that fails inside it, without a reason."""
    wide = torch.zeros(1, NORM_COLUMNS + 1)
    calls = (
        ((wide, wide[0]), rf"the kernel takes C in \[1, {NORM_COLUMNS}\], not {NORM_COLUMNS + 1}"),
        ((torch.zeros(2, 4), torch.ones(4).double()), "the kernel takes no float64"),
    )
    for call, reason in calls:
        with pytest.raises(RuntimeError, match=reason):
            kernels.layer_norm(*call)
        with kernels.use_backend(norm="auto"):
            assert kernels.explain("layer_norm", *call).backend == "reference"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_mask_few_columns(itemsize: int) -> None:
    """A tile that masks a quarter of the lanes at C = 768, or whose sizes are not powers of two."""
    for c in (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 2048, 3072, 4096, 5120, 8192, 16384):
        assert c % norm_tile(c, itemsize).block_n == 0
    for c in range(1, NORM_COLUMNS + 1, 37):
        rows, width, warps = norm_tile(c, itemsize)[:3]
        assert (rows, warps) == (norm_tile(c).block_m, norm_tile(c).num_warps)
        assert all(value & (value - 1) == 0 for value in (rows, width, warps))
        assert -(-c // width) <= 8
        assert -(-c // width) * width < max(16, 1.25 * c + 16)
        assert rows * -(-c // width) * width <= 64 * 32 * warps


def test_a_warp_holds_a_row_of_a_tile() -> None:
    """Float32 tiles of 256 columns: two warps share a row, and each sum over it needs barriers."""
    assert norm_tile(768, 2).block_n * 2 == norm_tile(768, 4).block_n * 4 == 32 * 16


Z = [("layer_norm", "autocast"), ("add_layer_norm", "autocast"), ("add_layer_norm", "mixed")]


def narrower(op: str, how: str, n: int = 6, c: int = 40) -> tuple[Any, list[torch.Tensor]]:
    """A function whose y is narrower than what it normalises, and its arguments, which require gradients."""
    x, residual, weight, bias = arguments(n, c)
    x = x if op == "layer_norm" else x.bfloat16()
    tensors = (x, weight, bias) if op == "layer_norm" else (x, residual, weight, bias)
    function = getattr(kernels, op)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            outputs = function(*tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call, [tensor.detach().requires_grad_() for tensor in tensors]


def gradients(function: Any, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of `function`, and the gradients of `leaves` for random gradients of the outputs."""
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def stored(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """The list that collects what each forward pass stores as z."""
    from kernels.norm import torch_op

    launch, values = torch_op.layer_norm_forward, []
    monkeypatch.setattr(
        torch_op, "layer_norm_forward", lambda **given: values.append(given["z"]) or launch(**given)
    )
    return values


@pytest.mark.parametrize(("op", "how"), Z)
def test_z_is_saved_in_place_of_what_is_normalised(op: str, how: str) -> None:
    """Float32 rows that are kept for backward: 4 bytes per element of each norm of a model, not 2."""
    function, leaves = narrower(op, how)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(*leaves)[0]
    matrices = [(tuple(t.shape), t.dtype) for t in saved if t.ndim == 2]
    assert sorted(matrices, key=str) == [((2, 6), torch.float32), ((6, 40), torch.bfloat16)]
    assert all(t.data_ptr() != y.data_ptr() for t in saved)


def test_a_residual_that_no_one_uses_is_freed() -> None:
    """A new_residual or an x that a reference of autograd keeps alive until the backward pass."""
    for op, how in Z:
        function, leaves = narrower(op, how)
        inner = [leaf * 1 for leaf in leaves]
        rows = weakref.ref(inner[0].untyped_storage())
        y, *rest = function(*inner)
        sums = [weakref.ref(tensor.untyped_storage()) for tensor in rest]
        del inner, rest
        gc.collect()
        assert rows() is None
        assert all(kept() is None for kept in sums)
        y.sum().backward()


@pytest.mark.parametrize(("op", "how"), Z)
def test_z_is_stored_only_for_a_gradient(op: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that writes z, or a y that is as wide as what is normalised and yet is kept twice."""
    values = stored(monkeypatch)
    function, leaves = narrower(op, how)
    function(*leaves)
    with torch.no_grad():
        function(*leaves)
    function(*(leaf.detach() for leaf in leaves))
    assert [value is not None for value in values] == [True, False, False]

    values.clear()
    for dtypes in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        x, residual = (torch.randn(3, 24, dtype=dtype, requires_grad=True) for dtype in dtypes)
        kernels.add_layer_norm(x, residual, torch.ones(24))
        kernels.layer_norm(x, torch.ones(24))
    assert values == [None] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0, 1000])
def test_gradients_of_float32_rows_under_autocast(dtype: torch.dtype, mean: float) -> None:
    """A gradient from a z that is y, unscaled or not centred: the reference reads the float32 rows."""
    x, _, weight, bias = arguments(13, 96)
    leaves = [tensor.requires_grad_() for tensor in (x + mean, weight, bias)]
    results = []
    for backend in ("triton", "reference"):
        with kernels.use_backend(norm=backend), torch.autocast("cpu", dtype=dtype):
            results.append(gradients(lambda *tensors: (kernels.layer_norm(*tensors),), leaves))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = gradients(lambda *tensors: (kernels.reference.layer_norm(*tensors),), exact)
    for name, *values in zip(("y", "dx", "dweight", "dbias"), *results, oracle, strict=True):
        verdict = compare(name, *values, dtype=dtype, scale=float(mean or 4))
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize(("op", "how"), Z)
def test_the_outputs_do_not_depend_on_z(op: str, how: str) -> None:
    """A y or new_residual that has other bits in training than in evaluation."""
    function, leaves = narrower(op, how)
    with torch.no_grad():
        expected = function(*leaves)
    assert all(map(torch.equal, function(*leaves), expected))


@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "how"), Z)
@pytest.mark.parametrize("reentrant", [False, True])
def test_z_is_recomputed_by_checkpointing(op: str, how: str, reentrant: bool) -> None:
    """A recomputation that stores another number of tensors, or gives other gradients."""
    function, leaves = narrower(op, how)
    expected = gradients(function, leaves)
    outputs = checkpoint(function, *leaves, use_reentrant=reentrant)
    generator = torch.Generator().manual_seed(2)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs])
    assert all(map(torch.equal, (*outputs, *(leaf.grad for leaf in leaves)), expected))


@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "how"), Z)
def test_z_compiles(op: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break, compiled code that keeps z without a gradient, or one for training in evaluation."""
    function, leaves = narrower(op, how)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    expected = gradients(function, leaves)
    values = stored(monkeypatch)
    assert all(map(torch.equal, gradients(compiled, leaves), expected))
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*leaves), expected))
    torch.compiler.reset()
    assert [value is not None for value in values] == [True, False]


@pytest.mark.parametrize(("op", "how"), Z)
def test_a_second_derivative_from_z_is_refused(op: str, how: str) -> None:
    """A second derivative that takes z, or the statistics, for a constant."""
    function, leaves = narrower(op, how)
    y = function(*leaves)[0]
    (gradient,) = torch.autograd.grad(y.float().square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative"):
        torch.autograd.grad(gradient.float().square().sum(), leaves[0])
