"""Tests of the functions that call ops: without torch's dispatcher, or with it where a call is not plain."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.registry import SPECS
from kernels.spec import OpSpec
from kernels.torch_library import ops
from kernels.verify import run_case

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
NORM = "fused_gpt::layer_norm_forward"


class Dispatched(TorchDispatchMode):
    """Notes the ops of this package that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removesuffix(".default")
        if name.startswith("fused_gpt::"):
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


def arguments(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias of a LayerNorm."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 5, 16), (16,), (16,)))
    for tensor in (x, weight, bias):
        tensor.requires_grad_(requires_grad)
    return x, weight, bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with kernels.use_backend("triton"):
        return kernels.layer_norm(x, weight, bias)


def node(tensor: Tensor) -> str:
    """The name of the function that computes the gradient."""
    assert tensor.grad_fn is not None
    return tensor.grad_fn.name()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_results_are_those_of_torchs_op(spec: OpSpec) -> None:
    """An output or a gradient that depends on whether the dispatcher was taken."""
    inputs = spec.make_inputs(spec.tagged("small")[0], torch.float32, CPU, torch.Generator().manual_seed(0))
    with kernels.use_backend("triton"):
        direct = run_case(spec.function, inputs, spec.gradients, spec.writes)
        with Dispatched() as seen:
            dispatched = run_case(spec.function, inputs, spec.gradients, spec.writes)
    assert seen.ops
    for name, value in dispatched.items():
        other = direct[name]
        assert value is not None
        assert other is not None
        assert torch.equal(value, other), name


def test_a_plain_call_is_direct() -> None:
    """A call that takes the dispatcher although nothing requires it."""
    assert node(layer_norm(*arguments())) == "layer_norm_forwardBackward"
    with Dispatched():
        assert "fused_gpt" in node(layer_norm(*arguments()))


def test_gradients_only_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph, or the time to build one, where no gradient can be asked for."""
    x, weight, bias = arguments()
    assert layer_norm(x.detach(), weight, bias.detach()).requires_grad
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    assert layer_norm(*arguments(requires_grad=False)).grad_fn is None
    with torch.no_grad():
        assert layer_norm(*arguments()).grad_fn is None
    with torch.inference_mode():
        assert layer_norm(*arguments(requires_grad=False)).is_inference()
        assert layer_norm(*arguments()).is_inference()


def test_arguments_by_name() -> None:
    """Arguments that are mixed up when they are given by name."""
    x, weight, bias = arguments(requires_grad=False)
    options = {"keep_z": True, "dtype": torch.float16, "eps": 1e-5, "bias": bias}
    actual = ops.layer_norm_forward(x, weight=weight, **options)
    expected = ops.layer_norm_forward(x, weight, bias, 1e-5, torch.float16, True)
    assert all(map(torch.equal, actual, expected))


def test_second_derivatives_are_refused() -> None:
    """A second derivative that is silently zero."""
    x, *rest = arguments()
    (dx,) = torch.autograd.grad(layer_norm(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm: a second derivative is requested"):
        dx.sum().backward()


class Functions(TorchFunctionMode):
    """Notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op() -> None:
    """A mode, such as the one that counts floating-point operations, that misses an op."""
    with torch.no_grad(), Dispatched() as dispatched:
        layer_norm(*arguments())
    assert dispatched.ops == [NORM]
    with torch.no_grad(), Functions() as functions:
        layer_norm(*arguments())
    assert "fused_gpt.layer_norm_forward.default" in functions.ops


def test_the_profiler_sees_the_op() -> None:
    """A profile without the names of the ops."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer_norm(*arguments())
    assert NORM in {event.key for event in profile.key_averages()}


class Subclass(Tensor):
    """A tensor that notes the ops that are called with it."""

    ops: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.ops.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_the_op() -> None:
    """An op that a tensor's class cannot replace, or a result that is not of this class."""
    x, weight, bias = arguments(requires_grad=False)
    assert type(layer_norm(x.as_subclass(Subclass), weight, bias)) is Subclass
    assert "fused_gpt.layer_norm_forward.default" in Subclass.ops


def test_meta_tensors_give_meta_tensors() -> None:
    """A launch on tensors without memory."""
    x, weight, bias = (tensor.detach().to("meta") for tensor in arguments())
    y = layer_norm(x, weight, bias)
    assert y.shape == (3, 5, 16)
    assert y.is_meta


def test_fake_tensors_give_fake_tensors() -> None:
    """A launch on fake tensors, also outside their mode."""
    with FakeTensorMode():
        x, weight, bias = torch.empty(3, 16), torch.empty(16), torch.empty(16)
        assert isinstance(layer_norm(x, weight, bias), FakeTensor)
    assert isinstance(layer_norm(x, weight, bias), FakeTensor)


def test_negative_views_are_resolved() -> None:
    """A view of a tensor's negative whose memory is read as it is."""
    x, weight, bias = arguments(requires_grad=False)
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    assert torch.equal(layer_norm(negative, weight, bias), layer_norm(-x, weight, bias))


def test_transforms_see_the_op() -> None:
    """A transform of `torch.func` whose own tensors a kernel would read as plain ones."""
    x, weight, bias = arguments(requires_grad=False)
    rows = torch.vmap(lambda row: layer_norm(row, weight, bias))(x)
    assert torch.equal(rows, layer_norm(x, weight, bias))


def test_traces_contain_the_op() -> None:
    """A trace of PyTorch's own tracers that holds the results of a launch as constants."""
    x, weight, bias = arguments(requires_grad=False)
    graph = make_fx(layer_norm)(x, weight, bias)
    assert "fused_gpt.layer_norm_forward" in graph.code
    assert torch.equal(graph(x + 1, weight, bias), layer_norm(x + 1, weight, bias))
