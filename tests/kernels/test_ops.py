"""Tests of every op in the registry.

They compare the reference with float64 and gradcheck, and Triton with the reference. They also cover explain,
autocast and bad arguments.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

import kernels
from kernels import dispatch
from kernels.registry import SPECS
from kernels.spec import (
    SHORT_DTYPE,
    Case,
    ChoiceArgument,
    NumberArgument,
    OpSpec,
    SeedArgument,
    TensorArgument,
)
from kernels.verify import check, run_case

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def cases(*tags: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Any]:
    return [
        pytest.param(spec, case, dtype, id=f"{spec.name}-{case.id}-{SHORT_DTYPE[dtype]}")
        for spec in SPECS.values()
        for case in spec.tagged(*tags)
        for dtype in dtypes or spec.dtypes
    ]


def first_case(spec: OpSpec) -> Case:
    return spec.tagged("small")[0]


def inputs_of(
    spec: OpSpec, case: Case, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> dict[str, Any]:
    return spec.make_inputs(case, dtype, device, torch.Generator(device).manual_seed(0))


def assert_within_tolerance(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    wrong = [str(verdict) for verdict in check(spec, case, dtype, device, backend=backend) if not verdict.ok]
    assert not wrong, wrong


@pytest.mark.parametrize(("spec", "case", "dtype"), cases("small"))
def test_the_public_op_runs_its_reference(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A public function that changes an argument, an output or a gradient of the reference."""
    assert_within_tolerance(spec, case, dtype, CPU, "reference")


@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [case for case in cases("small", dtypes=(torch.float64,)) if case.values[0].gradients],
)
def test_reference_gradients_are_derivatives(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A wrong gradient of the reference, which the other tests use as the expected value."""
    case = Case(
        {
            name: min(size, 7) if name in ("N", "T", "Tq", "C", "I", "V") else size
            for name, size in case.sizes.items()
        },
        case.options,
    )
    inputs = inputs_of(spec, case, dtype)
    names = [name for name in spec.gradients if inputs[name] is not None]
    clamped = {name: inputs[name].clamp(-3, 3) for name in names}  # finite differences need small values

    def function(*tensors: torch.Tensor) -> Any:
        return spec.reference(**(inputs | dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(
        function, [clamped[name].double().requires_grad_() for name in names], fast_mode=True
    )


def interpreted_cases() -> list[Any]:
    """The small and edge cases; the widest row of `layer_norm` in one dtype.

    The interpreter takes 10 s for the sums of its gradients, which are in float32 for every dtype.
    """
    return [
        case
        for case in cases("small", "edge")
        if case.values[1].sizes.get("C", 0) <= 8192 or case.values[2] == torch.bfloat16
    ]


@pytest.mark.interpreter
@pytest.mark.parametrize(("spec", "case", "dtype"), interpreted_cases())
def test_triton_agrees_with_the_reference(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A kernel, forward or backward, that is wrong at a small or irregular shape."""
    assert_within_tolerance(spec, case, dtype, CPU, "triton")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("spec", "case", "dtype"), cases("slow"))
def test_triton_agrees_on_the_long_grid(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A kernel that is wrong at one size of the long grid only."""
    assert_within_tolerance(spec, case, dtype, CPU, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case", "dtype"), cases("small", "edge"))
def test_triton_agrees_on_the_gpu(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A compiled kernel that is wrong although the interpreted kernel is right."""
    assert_within_tolerance(spec, case, dtype, GPU, "triton")


@pytest.mark.gpu
@pytest.mark.driver("full sizes need a GPU's memory and speed")
@pytest.mark.parametrize(("spec", "case", "dtype"), cases("gpu"))
def test_triton_agrees_at_full_size_on_the_gpu(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A compiled kernel that is wrong at the sizes of a real run only."""
    assert_within_tolerance(spec, case, dtype, GPU, "triton")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("spec", "case", "dtype"), cases("slow"))
def test_triton_agrees_on_the_long_grid_on_the_gpu(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A compiled kernel that is wrong at one size of the long grid only."""
    assert_within_tolerance(spec, case, dtype, GPU, "triton")


@pytest.mark.gpu
@pytest.mark.driver("races of warps and of memory need parallel hardware: executed IR always repeats itself")
@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [*cases("small", "edge"), *cases("bench", dtypes=(torch.float16, torch.bfloat16))],
)
def test_triton_repeats_bit_for_bit_on_the_gpu(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """A race: repeating a call gives different bits."""
    inputs = inputs_of(spec, case, dtype, GPU)
    with kernels.use_backend(**{spec.name: "triton"}):
        first = run_case(spec.function, inputs, spec.gradients, spec.writes)
        for _ in range(10):
            again = run_case(spec.function, inputs, spec.gradients, spec.writes)
            for name, value in first.items():
                assert value is None or torch.equal(value, again[name]), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_spec_describes_the_signature(spec: OpSpec) -> None:
    """A parameter that the bad-argument tests do not cover, or a reference with another signature."""
    public, reference = inspect.signature(spec.function), inspect.signature(spec.reference)
    assert list(spec.arguments) == list(public.parameters)
    assert [p.replace(annotation="") for p in public.parameters.values()] == [
        p.replace(annotation="") for p in reference.parameters.values()
    ]
    assert getattr(kernels, spec.name) is spec.function
    assert getattr(kernels.reference, spec.name) is spec.reference


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_flops_and_bytes_are_positive(spec: OpSpec) -> None:
    """A formula that gives a bench zero or negative work."""
    for case in spec.cases:
        assert spec.flops(case, "forward") > 0
        assert spec.bytes(case, torch.bfloat16, "forward") > 0
        assert (spec.flops(case, "backward") > 0) == bool(spec.gradients)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_input_is_written(spec: OpSpec, backend: str) -> None:
    """An op that overwrites an input or a saved tensor, e.g. a loss that overwrites its logits."""
    for case in spec.tagged("small"):
        inputs = inputs_of(spec, case)
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        with kernels.use_backend(**{spec.name: backend}):
            run_case(spec.function, inputs, spec.gradients, spec.writes)
        for name, value in before.items():
            assert torch.equal(value, inputs[name]), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_explain_names_the_backend_that_runs(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `explain` that names a backend other than that of the call."""
    inputs = inputs_of(spec, first_case(spec))
    with kernels.use_backend("reference"):
        assert kernels.explain(spec.name, **inputs).backend == "reference"
        assert kernels.explain(spec.function, **inputs).reason == "use_backend('reference')"
    monkeypatch.setattr(dispatch, "triton_version", None)
    assert kernels.explain(spec.name, **inputs) == ("reference", "triton is not installed")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_autocast_gives_the_autocast_dtype(spec: OpSpec) -> None:
    """An op that returns float32 activations under autocast, or a loss that is not float32."""
    inputs = inputs_of(spec, first_case(spec))

    def dtype_of_output() -> torch.dtype:
        result = spec.function(**inputs)
        return result[0].dtype if isinstance(result, tuple) else result.dtype

    with torch.no_grad():
        plain = dtype_of_output()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert dtype_of_output() == (torch.bfloat16 if spec.follows_autocast else plain)


def _bad_tensor(spec: OpSpec, name: str, inputs: dict[str, Any]) -> list[tuple[str, Any, type[Exception]]]:
    argument = spec.arguments[name]
    assert isinstance(argument, TensorArgument)
    value = _absent_tensor(spec, argument, inputs) if inputs[name] is None else inputs[name]
    other = torch.float32 if argument.dtype is not None else torch.int32
    bad: list[tuple[str, Any, type[Exception]]] = [
        ("a list", [1.0, 2.0], TypeError),
        ("another dtype", value.to(other), TypeError),
    ]
    if any(isinstance(value, torch.Tensor) for other, value in inputs.items() if other != name):
        bad += [
            ("another device", value.to("meta"), ValueError),
            ("another size", torch.cat([value, value], _shared_dimension(spec, name)), ValueError),
        ]
    bad += [
        (f"another size than {dim}", torch.cat([value, value], place), ValueError)
        for place, dim in enumerate(argument.dims)
        if dim.isdigit()
    ]
    if "..." not in argument.dims:
        bad.append(("another rank", value[None, None], ValueError))
    leading = next(iter(spec.arguments))  # the other tensors must have its dtype
    if argument.dtype is None and not argument.any_float and name != leading:
        bad.append(("a mixed dtype", value.double(), TypeError))
    if argument.last_contiguous:
        bad.append(
            ("a strided last dimension", torch.stack([value, value], -1).flatten(-2)[..., ::2], ValueError)
        )
    if not argument.optional:
        bad.append(("None", None, TypeError))
    return bad


def _shared_dimension(spec: OpSpec, name: str) -> int:
    """The last dimension of an argument that another argument has too, counted from the end."""
    others = [a.dims for n, a in spec.arguments.items() if n != name and isinstance(a, TensorArgument)]
    dims = spec.arguments[name].dims
    shared = [place for place in range(-len(dims), 0) if any(dims[place] in other for other in others)]
    return max(shared, default=-1)


def _absent_tensor(spec: OpSpec, argument: TensorArgument, inputs: dict[str, Any]) -> torch.Tensor:
    """A valid value for an optional tensor that is None in the case."""
    sizes: dict[str, int] = {}
    for name, declared in spec.arguments.items():
        if (
            isinstance(declared, TensorArgument)
            and isinstance(inputs.get(name), torch.Tensor)
            and "..." not in declared.dims
        ):
            sizes |= dict(zip(declared.dims, inputs[name].shape, strict=True))
    return torch.zeros([sizes[dim] for dim in argument.dims], dtype=argument.dtype or torch.float32)


def _bad_number(argument: NumberArgument) -> list[tuple[str, Any, type[Exception]]]:
    bad: list[tuple[str, Any, type[Exception]]] = [
        ("a string", "1", TypeError),
        ("a boolean", True, TypeError),
    ]
    if argument.integer:
        return [*bad, ("a float", 1.5, TypeError)]
    bad.append(("NaN", float("nan"), ValueError))
    if argument.low > float("-inf"):
        bad.append(("too small", argument.low - 1, ValueError))
    if argument.high == float("inf"):
        bad.append(("infinity", float("inf"), ValueError))
    elif argument.open_high:
        bad.append(("the open upper bound", argument.high, ValueError))
    else:
        bad.append(("too large", argument.high * 2, ValueError))
    return bad


def bad_arguments() -> list[Any]:
    parameters = []
    for spec in SPECS.values():
        inputs = inputs_of(spec, first_case(spec))
        for name, argument in spec.arguments.items():
            values: list[tuple[str, Any, type[Exception]]]
            if isinstance(argument, TensorArgument):
                values = _bad_tensor(spec, name, inputs)
            elif isinstance(argument, NumberArgument):
                values = _bad_number(argument)
            elif isinstance(argument, ChoiceArgument):
                strings = any(isinstance(value, str) for value in argument.values)
                values = [("an unknown word", "nonsense", ValueError if strings else TypeError)]
            else:
                assert isinstance(argument, SeedArgument)
                values = [
                    ("a float", 1.5, TypeError),
                    ("65 bits", 2**64, ValueError),
                    ("a vector", torch.zeros(3, dtype=torch.int64), TypeError),
                    ("another device", torch.zeros((), dtype=torch.int64, device="meta"), ValueError),
                ]
            parameters += [
                pytest.param(spec, name, bad, error, id=f"{spec.name}-{name}-{what}")
                for what, bad, error in values
            ]
    return parameters


@pytest.mark.parametrize(("spec", "name", "bad", "error"), bad_arguments())
def test_bad_arguments_are_refused(
    spec: OpSpec, name: str, bad: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad argument that reaches a kernel, or a message without the op, the value or the expectation."""
    monkeypatch.setattr(
        dispatch.Op, "choose", lambda *args, **kwargs: pytest.fail("the call passed its checks")
    )
    inputs = inputs_of(spec, first_case(spec)) | {name: bad}
    with pytest.raises(error, match=rf"^{spec.name}: .*expected ") as caught:
        spec.function(**inputs)
    assert "\n" not in str(caught.value)
    assert re.search(r"\b(is|has|requires)\b", str(caught.value))
