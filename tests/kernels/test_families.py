"""Tests of every Triton op in the norm, feed-forward and loss families.

They cover layouts, subsets of gradients, empty inputs, saved tensors, guard pages, torch.library and
torch.compile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.registry import SPECS
from kernels.spec import SHORT_DTYPE, Case, OpSpec, TensorArgument
from kernels.tolerance import compare
from tests.memory import guard_allocations, guarded, in_a_fork

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
# The ops that take rows: any leading dimensions, and any layout of them.
OPS = [
    spec
    for spec in SPECS.values()
    if any(isinstance(a, TensorArgument) and a.dims[0] == "..." for a in spec.arguments.values())
]
SMALL = [
    pytest.param(spec, case, id=f"{spec.name}-{case.id}") for spec in OPS for case in spec.tagged("small")
]
NARROW = 256  # the longest row where a test does not depend on it: longer ones take the interpreter seconds
CHECKED = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.id}-{SHORT_DTYPE[dtype]}")
    for spec in OPS
    for dtype, cases in ((torch.float32, spec.tagged("small")), (torch.bfloat16, spec.tagged("small")[:3]))
    for case in cases
    if max(case.sizes.values()) <= NARROW
]
Results = dict[str, torch.Tensor | None]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with gaps between all elements; the gaps hold NaN, or a huge integer."""
    poison = float("nan") if tensor.is_floating_point() else 2**40
    wide = tensor.new_full([2 * size for size in tensor.shape], poison)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first row or element, expanded with stride 0 to the tensor's shape."""
    return tensor[:1].expand_as(tensor) if tensor.ndim else tensor


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that starts one element after an aligned address."""
    flat = tensor.new_empty(tensor.numel() + 1)[1:]
    return flat.view(tensor.shape).copy_(tensor)


LAYOUTS = (strided, transposed, expanded, misaligned)


def inputs_of(spec: OpSpec, case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return spec.make_inputs(case, dtype, CPU, torch.Generator().manual_seed(0))


def run(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    gradients: tuple[str, ...],
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    grad_layout: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Results:
    """`verify.run_case` with other layouts of the inputs and of the outputs' gradients."""
    leaves = {
        n: layout(v.detach()) if isinstance(v, torch.Tensor) and v.ndim else v for n, v in inputs.items()
    }
    wanted = [n for n in gradients if leaves.get(n) is not None]
    for name in wanted:
        leaves[name] = leaves[name].detach().requires_grad_()
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results: Results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    if wanted:
        generator = torch.Generator().manual_seed(1)
        grads = [
            grad_layout(torch.randn(o.shape, generator=generator).to(o.device, o.dtype)) for o in outputs
        ]
        values = torch.autograd.grad(outputs, [leaves[n] for n in wanted], grads)
        results |= {f"d{n}": gradient for n, gradient in zip(wanted, values, strict=True)}
    return results


def triton(spec: OpSpec, *args: Any) -> Results:
    with kernels.use_backend(**{spec.name: "triton"}):
        return run(spec.function, *args)


def assert_agree(spec: OpSpec, inputs: dict[str, Any], dtype: torch.dtype, *layouts: Any) -> None:
    exact = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }
    results, plain = (
        triton(spec, inputs, spec.gradients, *layouts),
        run(spec.reference, inputs, spec.gradients, *layouts),
    )
    oracle = run(spec.reference, exact, spec.gradients, *layouts)
    floats = [
        v
        for v in (*inputs.values(), *oracle.values())
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    ]
    scale = max((t.abs().max().item() for t in floats if t.numel()), default=1.0)
    verdicts = [compare(n, results.get(n), plain[n], oracle[n], dtype=dtype, scale=scale) for n in oracle]
    assert all(verdict.ok for verdict in verdicts), [str(verdict) for verdict in verdicts if not verdict.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT_DTYPE.get)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_inputs_in_any_layout(spec: OpSpec, layout: Callable[..., Any], dtype: torch.dtype) -> None:
    """A kernel that assumes the strides of an input, or reads the gaps between its elements."""
    for case in spec.tagged("small"):
        assert_agree(spec, inputs_of(spec, case, dtype), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_gradients_in_any_layout(spec: OpSpec, layout: Callable[..., Any]) -> None:
    """A backward pass that assumes the strides of the incoming gradient."""
    for case in spec.tagged("small"):
        assert_agree(spec, inputs_of(spec, case), torch.float32, lambda tensor: tensor, layout)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_leading_dimensions(spec: OpSpec, case: Case) -> None:
    """An op that accepts only matrices, or whose output loses the leading dimensions."""
    inputs = inputs_of(spec, case)
    flat = triton(spec, inputs, spec.gradients)
    rows = {
        n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and spec.arguments[n].dims[0] == "..."
    }
    deep = triton(spec, inputs | {n: v[None, :, None] for n, v in rows.items()}, spec.gradients)
    for name, value in flat.items():
        expected = value if value is None or value.shape[:1] != (case["N"],) else value[None, :, None]
        if name.startswith("d") and name[1:] not in rows:
            expected = value
        if inputs.get("reduction") == "none" and name.startswith("d"):
            continue  # its random incoming gradients have another shape
        assert torch.equal(deep[name], expected), name


class Recorder(TorchDispatchMode):
    """Records the calls of this package's ops, and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fused_gpt":
            self.calls.append((func, args, result))
        return result

    def gradients(self) -> set[str]:
        """The names of the gradients that were computed."""
        returned = [(op._schema.returns, result) for op, _, result in self.calls if isinstance(result, tuple)]
        pairs = [pair for names, values in returned for pair in zip(names, values, strict=True)]
        return {name.name for name, value in pairs if name.name.startswith("d") and value.numel() > 0}


@pytest.mark.parametrize(("spec", "case"), [p for p in SMALL if max(p.values[1].sizes.values()) <= NARROW])
def test_any_subset_of_gradients(spec: OpSpec, case: Case) -> None:
    """A backward pass that computes a gradient that is not requested, or is wrong for a subset."""
    inputs = inputs_of(spec, case)
    names = [n for n in spec.gradients if inputs[n] is not None]
    full = triton(spec, inputs, spec.gradients)
    for count in range(len(names)):
        for subset in itertools.combinations(names, count):
            with Recorder() as recorder:
                actual = triton(spec, inputs, subset)
            assert recorder.gradients() <= {f"d{n}" for n in subset}
            assert set(actual) == {n for n in full if n.startswith("out")} | {f"d{n}" for n in subset}
            for name, value in actual.items():
                torch.testing.assert_close(value, full[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_empty_batches(spec: OpSpec) -> None:
    """An empty batch that launches an empty grid, divides by zero or leaves gradients uninitialised."""
    for case in spec.tagged("small"):
        inputs = inputs_of(spec, Case(dict(case.sizes) | {"N": 0}, case.options))
        actual, expected = triton(spec, inputs, spec.gradients), run(spec.reference, inputs, spec.gradients)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (case.id, name)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_a_second_backward_pass_gives_the_same_gradients(spec: OpSpec, case: Case) -> None:
    """A backward pass that overwrites an input, a saved tensor or the incoming gradient."""
    leaves = {
        n: v.requires_grad_(n in spec.gradients) if isinstance(v, torch.Tensor) else v
        for n, v in inputs_of(spec, case).items()
    }
    before = {n: v.detach().clone() for n, v in leaves.items() if isinstance(v, torch.Tensor)}
    with kernels.use_backend(**{spec.name: "triton"}):
        outputs = spec.function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) for output in outputs]
    kept = [grad.clone() for grad in grads]
    wanted = [leaves[n] for n in spec.gradients if leaves[n] is not None]
    first = torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    snapshot = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(outputs, wanted, grads)
    assert all(torch.equal(a, b) for a, b in zip(snapshot, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    assert all(torch.equal(leaves[n].detach(), value) for n, value in before.items())


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_a_second_derivative_is_right_or_refused(spec: OpSpec) -> None:
    """A second derivative that is silently zero or wrong."""

    def second(backend: str) -> torch.Tensor:
        inputs = inputs_of(spec, spec.tagged("small")[0])
        x = inputs["x"].requires_grad_()
        with kernels.use_backend(**{spec.name: backend}):
            outputs = spec.function(**inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        (gradient,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    try:
        actual = second("triton")
    except RuntimeError as error:
        if "expected one derivative" not in str(error):
            raise
    else:
        torch.testing.assert_close(actual, second("reference"))


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_no_access_past_the_end_of_a_tensor(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-bounds load that a masked store hides, or an out-of-bounds store."""

    def run_all_cases() -> None:
        guard_allocations(monkeypatch)
        for case in spec.tagged("small", "edge"):
            longest = max(case.sizes.values())
            if longest <= 1100:
                for dtype in (torch.float32, torch.bfloat16) if longest <= NARROW else (torch.float32,):
                    triton(spec, inputs_of(spec, case, dtype), spec.gradients, guarded, guarded)

    assert in_a_fork(run_all_cases) == ""


@pytest.mark.parametrize(("spec", "case", "dtype"), CHECKED)
def test_opcheck(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A wrong fake, an undeclared mutation or alias, or an autograd formula that cannot be traced."""
    with Recorder() as recorder:
        triton(spec, inputs_of(spec, case, dtype), spec.gradients)
    assert len(recorder.calls) >= 2
    for op, args, _ in recorder.calls:
        backward = op.__name__.split(".")[0].endswith(("backward", "scale"))
        leaves = tuple(
            a.detach().clone().requires_grad_(a.is_floating_point() and not backward)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        )
        torch.library.opcheck(op, leaves)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_compiled_equals_eager(spec: OpSpec, case: Case, backend: str) -> None:
    """A graph break, or a compiled call whose output or gradients differ from the eager call's."""
    inputs = inputs_of(spec, case)
    compiled = torch.compile(spec.function, fullgraph=True, backend=backend, dynamic=False)
    with kernels.use_backend(**{spec.name: "triton"}):
        eager, actual = run(spec.function, inputs, spec.gradients), run(compiled, inputs, spec.gradients)
    torch.compiler.reset()
    for name, value in eager.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_compiled_with_an_input_that_changes(spec: OpSpec) -> None:
    """Compiled code that reads an input after the caller's in-place update, or that loses the update."""
    inputs = inputs_of(spec, spec.tagged("small")[0])

    def function(x: torch.Tensor, **rest: Any) -> tuple[Any, torch.Tensor]:
        before = spec.function(x=x, **rest)
        x.mul_(2)
        return before, x

    with kernels.use_backend(**{spec.name: "triton"}), torch.no_grad():
        eager = function(**inputs | {"x": inputs["x"].clone()})
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(
            **inputs | {"x": inputs["x"].clone()}
        )
    torch.compiler.reset()
    torch.testing.assert_close(actual, eager, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.driver("torch's check for synchronisations needs a CUDA context")
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_no_call_synchronises(spec: OpSpec) -> None:
    """A call, forward or backward, that synchronises with the device."""
    for case in spec.tagged("small"):
        inputs = spec.make_inputs(
            case, torch.bfloat16, torch.device("cuda"), torch.Generator().manual_seed(0)
        )
        triton(spec, inputs, spec.gradients)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            with kernels.use_backend(**{spec.name: "triton"}):
                leaves = {
                    n: v.requires_grad_(n in spec.gradients) if isinstance(v, torch.Tensor) else v
                    for n, v in inputs.items()
                }
                outputs = spec.function(**leaves)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        finally:
            torch.cuda.set_sync_debug_mode("default")
