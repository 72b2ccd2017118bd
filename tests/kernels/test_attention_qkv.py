"""`causal_attention_qkv` beyond its cases: the same bits as `causal_attention`, and one gradient buffer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.attention import SHORT
from kernels.registry import SPECS
from kernels.spec import Case
from kernels.tuning import AttentionTiles, Tile
from kernels.verify import Oracle, run_case
from tests.memory import guard_allocations, guarded, in_a_fork

SPEC = SPECS["causal_attention_qkv"]
CPU = torch.device("cpu")
BACKENDS = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "padding": {"key_start": "padding"},
    "documents": {"key_start": "documents", "dropout_p": 0.2, "seed": 5},
    "empty": {"key_start": "empty"},
    "dropout": {"dropout_p": 0.3, "seed": 7},
    "dropout without a seed": {"dropout_p": 0.3},
    "deterministic": {"deterministic": True},
    "padded": {"layout": "padded"},
}


def inputs_of(
    b: int = 2, h: int = 2, t: int = 35, d: int = 16, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    case = Case({"B": b, "H": h, "T": t, "D": d}, options)
    return SPEC.make_inputs(case, dtype, CPU, torch.Generator().manual_seed(0))


def unpacked(qkv: torch.Tensor, **options: Any) -> torch.Tensor:
    """The op by its definition: `causal_attention` on the three views."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return kernels.causal_attention(q, k, v, **options).transpose(1, 2)


def results(function: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(3)  # of the dropout mask without a seed
    return run_case(function, inputs, ("qkv",))


def assert_same_bits(backend: str, inputs: dict[str, Any]) -> None:
    with kernels.use_backend(attention=backend):
        packed, parts = results(kernels.causal_attention_qkv, inputs), results(unpacked, inputs)
    assert packed["out"].is_contiguous()
    for name, value in parts.items():
        assert torch.equal(packed[name], value), name


@BACKENDS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_bits_as_three_views(backend: str, options: dict[str, Any]) -> None:
    """A part, an option or a dropout mask that differs from `causal_attention`'s."""
    assert_same_bits(backend, inputs_of(**options))


@BACKENDS
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["documents"]], ids=["plain", "documents"])
def test_the_same_bits_in_bfloat16(backend: str, options: dict[str, Any]) -> None:
    """Another rounding than `causal_attention`'s."""
    assert_same_bits(backend, inputs_of(dtype=torch.bfloat16, **options))


def test_the_same_bits_of_long_sequences_in_bfloat16() -> None:
    """A CPU that computes bfloat16 in float32 for other lengths than `causal_attention`."""
    for t in (SHORT, SHORT + 1):
        assert_same_bits("reference", inputs_of(b=1, t=t, dtype=torch.bfloat16))


@pytest.mark.kernels
def test_the_atomic_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dQ of the backward pass with atomics that is not written into the gradient of qkv."""
    from kernels.attention import torch_op

    tiles = AttentionTiles(Tile(32, 16), Tile(32, 16), Tile(16, 32), Tile(32, 16), atomic=Tile(32, 16))
    monkeypatch.setattr(torch_op, "attention_tiles", lambda *args, **options: tiles)
    inputs = inputs_of(d=24)
    with kernels.use_backend("triton"):
        verdicts = Oracle(SPEC, inputs, torch.float32).judge(results(SPEC.function, inputs))
    assert all(verdict.ok for verdict in verdicts), list(map(str, verdicts))


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ones expanded": lambda grad: torch.ones(()).expand(grad.shape),
    "one row expanded": lambda grad: grad[:, :1].expand(grad.shape),
    "heads outside": lambda grad: grad.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda grad: grad.repeat_interleave(2, -1)[..., ::2],
}


@BACKENDS
@pytest.mark.parametrize("kind", GRADIENTS)
def test_strides_of_the_output_gradient(kind: str, backend: str) -> None:
    """A backward that assumes a contiguous gradient of the output."""
    qkv = inputs_of()["qkv"].requires_grad_()
    grad = GRADIENTS[kind](torch.randn(2, 35, 2, 16))
    with kernels.use_backend(attention=backend):
        out = kernels.causal_attention_qkv(qkv)
        actual, expected = (
            torch.autograd.grad(out, qkv, g, retain_graph=True)[0] for g in (grad, grad.contiguous())
        )
    torch.testing.assert_close(actual, expected)


class Allocations(TorchDispatchMode):
    """Counts the bytes of the results that are not views of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.mark.interpreter
def test_backward_fills_one_buffer() -> None:
    """Gradients of q, k and v that are written apart and then stacked: twice the memory and the traffic."""
    projection = torch.randn(2, 37, 3 * 2 * 16, requires_grad=True)
    with kernels.use_backend("triton"):
        out = kernels.causal_attention_qkv(projection.view(2, 37, 3, 2, 16)).flatten(2)
    grad = torch.randn_like(out)
    with Allocations() as allocations:
        (gradient,) = torch.autograd.grad(out, projection, grad)
    assert gradient.is_contiguous()
    assert allocations.bytes == projection.untyped_storage().nbytes()


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)], ids=str)
def test_empty_tensors(shape: tuple[int, ...], backend: str) -> None:
    """A launch with an empty grid that fails, or an output of another shape."""
    with kernels.use_backend(attention=backend):
        actual = run_case(kernels.causal_attention_qkv, {"qkv": torch.randn(shape)}, ("qkv",))
    assert actual["out"].shape == (*shape[:2], *shape[3:])
    assert actual["dqkv"].shape == shape


@pytest.mark.interpreter
def test_no_output_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the gradient that no kernel fills; here all memory is allocated as NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({"t": 1}, {"t": 33, "d": 24, "key_start": "empty"}, {"t": 65, "d": 8}):
            with kernels.use_backend("triton"):
                actual = run_case(kernels.causal_attention_qkv, inputs_of(**options), ("qkv",))
            assert all(value.isfinite().all() for value in actual.values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.interpreter
def test_nothing_past_the_end_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load past the end of qkv, which a masked store hides, or a store past the end of its gradient."""

    def run() -> None:
        guard_allocations(monkeypatch)
        for case in SPEC.tagged("small", "edge"):
            inputs = SPEC.make_inputs(case, torch.float16, CPU, torch.Generator().manual_seed(0))
            with kernels.use_backend("triton"):
                run_case(SPEC.function, inputs | {"qkv": guarded(inputs["qkv"])}, ("qkv",))

    assert in_a_fork(run) == ""


@BACKENDS
def test_a_second_pass_gives_the_same_gradient(backend: str) -> None:
    """A backward that overwrites qkv, the output or the incoming gradient."""
    qkv = inputs_of()["qkv"].requires_grad_()
    with kernels.use_backend(attention=backend):
        out = kernels.causal_attention_qkv(qkv)
    tensors = [qkv, out, torch.randn_like(out)]
    before = [tensor.detach().clone() for tensor in tensors]
    first, second = (torch.autograd.grad(out, qkv, tensors[2], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [False, True], ids=["plain", "start-seed"])
def test_opcheck(options: bool) -> None:
    """A schema, a fake or an autograd registration that contradicts what the op does."""
    from kernels.attention import torch_op  # noqa: F401  registers the ops

    qkv, grad, lse2 = torch.randn(1, 9, 3, 2, 16), torch.randn(1, 9, 2, 16), torch.zeros(1, 2, 9)
    start, seed = (torch.zeros(1, dtype=torch.int32), torch.tensor(3)) if options else (None, None)
    rest = (start, seed, 0.25, 0.1, False)
    ops = torch.ops.fused_gpt
    torch.library.opcheck(ops.attention_qkv_forward, (qkv.clone().requires_grad_(), *rest))
    torch.library.opcheck(ops.attention_qkv_backward, (grad, qkv, torch.randn_like(grad), lse2, *rest))


@BACKENDS
@pytest.mark.interpreter
def test_compiled_code_agrees_with_eager(backend: str) -> None:
    """A graph break, or a compiled call whose values, shapes or strides differ from the eager call's."""

    def attend(projection: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        qkv = projection.view(1, 20, 3, 2, 16)
        return kernels.causal_attention_qkv(qkv, dropout_p=0.2, seed=seed).view(1, 20, 32)

    projection = torch.randn(1, 20, 96, requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with kernels.use_backend(attention=backend):
        for seed in (torch.tensor(7), torch.tensor(11)):
            eager, actual = (function(projection, seed) for function in (attend, compiled))
            assert torch.equal(eager, actual)
            assert torch.equal(
                *(torch.autograd.grad(out.square().sum(), projection)[0] for out in (eager, actual))
            )


@BACKENDS
def test_autocast(backend: str) -> None:
    """An output that does not have autocast's dtype, or a gradient that does not have the input's dtype."""
    qkv = torch.randn(1, 20, 3, 2, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), kernels.use_backend(attention=backend):
        out = kernels.causal_attention_qkv(qkv)
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), qkv)
    assert gradient.dtype == torch.float32


@pytest.mark.kernels
def test_a_second_derivative_is_refused() -> None:
    """A second derivative that is silently zero."""
    qkv = torch.randn(1, 5, 3, 1, 16, requires_grad=True)
    with kernels.use_backend("triton"):
        out = kernels.causal_attention_qkv(qkv)
    (gradient,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^causal_attention_qkv: .*expected one derivative"):
        gradient.sum().backward()


@pytest.mark.interpreter
def test_limits_of_the_kernels() -> None:
    """A head dimension or a dtype that the kernels do not support, or a family name without effect."""
    qkv = torch.randn(1, 3, 3, 1, 264)
    with kernels.use_backend(causal_attention_qkv="auto", attention="reference"):
        reason = kernels.explain("causal_attention_qkv", qkv[..., :16]).reason
    assert reason == "auto: on a CPU the interpreter only serves tests"
    with kernels.use_backend(attention="triton"):
        assert kernels.explain("causal_attention_qkv", qkv[..., :256]).backend == "triton"
        with pytest.raises(RuntimeError, match="head dimensions up to 256, not 264"):
            kernels.causal_attention_qkv(qkv)
        with pytest.raises(RuntimeError, match="not float64"):
            kernels.causal_attention_qkv(qkv[..., :16].double())


def test_messages_name_the_packed_tensor() -> None:
    """A message about q, k or v, which the caller has not passed."""
    qkv = torch.randn(2, 5, 3, 2, 16)
    bad: dict[str, dict[str, Any]] = {
        "qkv has size 2 in dimension 2, expected 3 (B, T, 3, H, D)": {"qkv": qkv[:, :, :2]},
        "qkv has 4 dimensions, expected 5 (B, T, 3, H, D)": {"qkv": qkv[0]},
        "qkv has H=0, expected at least 1": {"qkv": qkv[:, :, :, :0]},
        "key_start has T=4, expected 5 (qkv's)": {
            "qkv": qkv,
            "key_start": torch.zeros(2, 4, dtype=torch.int32),
        },
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"^causal_attention_qkv: {re.escape(message)}$"):
            kernels.causal_attention_qkv(**arguments)
