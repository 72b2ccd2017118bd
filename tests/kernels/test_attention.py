"""Attention in Triton beyond the registry's cases.

In this order: gradients and strides, dropout, skipped tiles, backward's two forms, torch.library and
autocast, decoding, the reference on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.attention import SHORT
from kernels.registry import SPECS
from kernels.spec import Case, randn
from kernels.tuning import AttentionTiles, Tile
from kernels.verify import Oracle, run_case
from tests.kernels.attention_suite import assert_all_ok, assert_same_gradients

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.kernels

CAUSAL, DECODE = SPECS["causal_attention"], SPECS["decode_attention"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    with kernels.use_backend("triton"):
        yield


def case(
    b: int = 1,
    h: int = 2,
    tq: int = 37,
    d: int = 16,
    tk: int | None = None,
    hkv: int | None = None,
    **options: Any,
) -> Case:
    return Case({"B": b, "H": h, "Tq": tq, "Tk": tk or tq, "D": d, "Hkv": hkv or h}, options)


def inputs_of(chosen: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return CAUSAL.make_inputs(chosen, dtype, CPU, torch.Generator().manual_seed(0))


def assert_agrees(
    inputs: dict[str, Any], dtype: torch.dtype = torch.float32, gradients: tuple[str, ...] = ("q", "k", "v")
) -> None:
    results = run_case(CAUSAL.function, inputs, gradients)
    assert_all_ok(Oracle(CAUSAL, inputs, dtype, gradients).judge(results))


@pytest.mark.parametrize("gradients", [("q",), ("k",), ("v",), ("q", "v"), ("k", "v")], ids="".join)
def test_any_subset_of_gradients(gradients: tuple[str, ...]) -> None:
    """A backward that works only where all three gradients are needed, or that leaves one out."""
    assert_agrees(inputs_of(case(key_start="documents")), gradients=gradients)


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ones expanded": lambda out: torch.ones(()).expand(out.shape),
    "one head expanded": lambda out: torch.randn(1, 1, *out.shape[2:]).expand(out.shape),
    "one row expanded": lambda out: torch.randn(*out.shape[:2], 1, out.shape[3]).expand(out.shape),
    "transposed": lambda out: torch.randn(*out.shape[:2], out.shape[3], out.shape[2]).mT,
    "heads inside": lambda out: torch.randn(out.transpose(1, 2).shape).transpose(1, 2),
    "every other column": lambda out: torch.randn(*out.shape[:3], 2 * out.shape[3])[..., ::2],
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_strides_of_the_output_gradient(kind: str) -> None:
    """A backward that assumes the output's strides for the output's gradient."""
    inputs = inputs_of(case(b=2, h=3))
    assert_same_gradients([inputs[name] for name in "qkv"], GRADIENTS[kind](inputs["q"]))


def test_rowsums_of_the_output_gradient_are_float32() -> None:
    """dO * O computed in float16, where it overflows although no gradient does."""
    q, k, v = (0.01 * torch.randn(3, 1, 1, 20, 16)).half()
    leaves = [x.requires_grad_() for x in (q, k, v.detach() + 300)]
    out = kernels.causal_attention(*leaves)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, leaves, torch.full_like(out, 300)))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one batch expanded": lambda x: x[:1].expand(x.shape),
    "one head expanded": lambda x: x[:, :1].expand(x.shape),
    "every third row": lambda x: x.repeat_interleave(3, 2)[:, :, ::3],
    "offset": lambda x: torch.nn.functional.pad(x, (5, 2, 1, 0))[:, :, 1:, 5:-2],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_strides_of_the_inputs(kind: str) -> None:
    """A kernel that assumes a contiguous q, k or v."""
    inputs = inputs_of(case(b=2, h=2))
    for name in "qkv":
        assert_agrees(inputs | {name: VIEWS[kind](inputs[name])})


def test_no_output_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves part of an output uninitialised; here all memory is allocated as NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for chosen in (case(tq=33, tk=70, d=24, hkv=1), case(key_start="empty"), case(tq=1, d=8)):
            assert_agrees(inputs_of(chosen))
        inputs = DECODE.make_inputs(DECODE.cases[0], torch.float32, CPU, torch.Generator().manual_seed(0))
        assert torch.isfinite(kernels.decode_attention(**inputs)).all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    """A launch with an empty grid that fails, or keys without queries whose gradient stays uninitialised."""
    q, k, v = torch.randn(shape), *torch.randn(2, shape[0], shape[1], 7, shape[3])
    results = run_case(kernels.causal_attention, {"q": q, "k": k, "v": v}, ("q", "k", "v"))
    assert all(value is not None and not value.count_nonzero() for value in results.values())
    assert results["out"].shape == q.shape


def test_one_mask_in_forward_and_backward() -> None:
    """A backward with another dropout mask than its forward."""
    # With v the identity, the output is the softmax after dropout.
    q, k = torch.randn(2, 1, 2, 16, 16)
    v = torch.eye(16).expand(1, 2, 16, 16).clone().requires_grad_()
    dropped = kernels.causal_attention(q, k, v, dropout_p=0.5)
    assert 0.2 < (dropped.tril() == 0).float().mean() < 1
    grad = torch.randn_like(dropped)
    (dv,) = torch.autograd.grad(dropped, v, grad)
    torch.testing.assert_close(dv, dropped.detach().mT @ grad)


def test_a_seed_of_none_follows_torchs_generator() -> None:
    """A mask that ignores torch.manual_seed, or that is the same in every call."""
    inputs = inputs_of(case()) | {"dropout_p": 0.3}
    torch.manual_seed(5)
    first, second = (kernels.causal_attention(**inputs) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(kernels.causal_attention(**inputs), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_int_and_tensor_seeds_agree(seed: int) -> None:
    """An int seed that loses its sign or its high 32 bits."""
    inputs = inputs_of(case(tk=39)) | {"dropout_p": 0.3}
    assert torch.equal(
        kernels.causal_attention(**inputs, seed=seed),
        kernels.causal_attention(**inputs, seed=torch.tensor(seed, dtype=torch.int64)),
    )


def test_without_dropout_the_generator_is_unchanged() -> None:
    """A call without dropout that draws from torch's generator."""
    before = torch.get_rng_state()
    kernels.causal_attention(**inputs_of(case()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
# From Triton 3.9 on, max(-inf, NaN) is -inf in the interpreter, as on a GPU; then -inf - -inf is NaN.
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_tiles_outside_are_not_read() -> None:
    """Tiles outside a document that are read, so that documents cost as much as one long text."""
    # What a tile must not read is NaN: first keys and values in forward and dQ, then gradients in dK and dV.
    q, k, v = torch.randn(3, 1, 2, 128, 16)
    start = torch.where(torch.arange(128) < 64, 0, 64).to(torch.int32)[None]
    inputs = {"q": q, "k": k, "v": v, "key_start": start}
    expected = run_case(kernels.causal_attention, inputs, ("q", "k", "v"))
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, :, :64], poisoned_v[:, :, :64] = float("nan"), float("nan")
    results = run_case(kernels.causal_attention, inputs | {"k": poisoned_k, "v": poisoned_v}, ("q",))
    for name in ("out", "dq"):
        assert torch.equal(results[name][:, :, 64:], expected[name][:, :, 64:])

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    clean = torch.autograd.grad(kernels.causal_attention(*leaves, key_start=start), leaves, grad)
    grad[:, :, 64:] = float("nan")
    poisoned = torch.autograd.grad(kernels.causal_attention(*leaves, key_start=start), leaves, grad)
    for actual, unpoisoned in zip(poisoned, clean, strict=True):
        assert torch.equal(actual[:, :, :64], unpoisoned[:, :, :64])


@pytest.mark.parametrize("shape", [(2,), (2, 37)], ids=str)
@pytest.mark.parametrize("extreme", [-(2**31), 2**31 - 1])
def test_extreme_key_starts(shape: tuple[int, ...], extreme: int) -> None:
    """A key_start that overflows when it is rounded to a multiple of the tile."""
    inputs = inputs_of(case(b=2))
    start = torch.zeros(shape, dtype=torch.int32)
    start[..., -1] = extreme
    assert_agrees(inputs | {"key_start": start})


def test_a_scale_that_is_zero_in_float32() -> None:
    """A masked logit, -inf, that is multiplied by zero and becomes NaN."""
    assert_agrees(inputs_of(case(tk=60)) | {"scale": 1e-46})


def test_any_order_of_key_starts() -> None:
    """Tiles that are skipped as if key_start never decreased with the position."""
    start = torch.randint(-5, 150, (2, 130), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    assert_agrees(inputs_of(case(b=2, h=1, tq=130)) | {"key_start": start})
    assert_agrees(inputs_of(case(b=2, h=1, tq=130)) | {"key_start": start.sort(descending=True).values})
    assert_agrees(inputs_of(case(b=2, h=1, tq=130)) | {"key_start": start.T.contiguous().T})


ATOMIC_TILES = AttentionTiles(Tile(32, 16), Tile(32, 16), Tile(16, 32), Tile(32, 16), atomic=Tile(32, 16))


@pytest.fixture
def atomic_form(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the tuning table choose backward's atomic form; lists the backward kernels that are launched."""
    from kernels.attention import torch_op

    launched: list[str] = []
    attention_backward = torch_op.attention_backward

    def recorded(**arguments: Any) -> Any:
        launches = attention_backward(**arguments)
        launched.extend(launch.kernel.__name__ for launch in launches)
        return launches

    monkeypatch.setattr(torch_op, "attention_tiles", lambda *args, **options: ATOMIC_TILES)
    monkeypatch.setattr(torch_op, "attention_backward", recorded)
    return launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "chosen",
    [
        case(tq=70, d=40),
        case(tq=33, tk=66, hkv=1, key_start="documents"),
        case(dropout_p=0.2, seed=1, key_start="window"),
        case(layout="qkv"),
    ],
    ids=lambda c: c.id,
)
def test_the_atomic_form(chosen: Case, dtype: torch.dtype, atomic_form: list[str]) -> None:
    """Wrong gradients from the atomic form, or another form that runs in its place."""
    assert_agrees(inputs_of(chosen, dtype), dtype)
    assert atomic_form == [f"_attention_bwd_{name}_kernel" for name in ("delta", "dkdv", "convert")]


def test_determinism_is_honoured(atomic_form: list[str]) -> None:
    """Float atomics, in no fixed order, although deterministic=True or torch's own flag forbids them."""
    deterministic_kernels = [f"_attention_bwd_{name}_kernel" for name in ("dq", "dkdv")]
    inputs = inputs_of(case())
    run_case(kernels.causal_attention, inputs | {"deterministic": True}, ("q", "k", "v"))
    assert atomic_form == deterministic_kernels

    atomic_form.clear()
    torch.use_deterministic_algorithms(True)
    try:
        run_case(kernels.causal_attention, inputs, ("q", "k", "v"))
        assert atomic_form == deterministic_kernels
        atomic_form.clear()
        run_case(kernels.causal_attention, inputs | {"deterministic": False}, ("q", "k", "v"))
        assert atomic_form != deterministic_kernels
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_second_derivative_is_refused() -> None:
    """A second derivative that is silently zero."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 5, 16))
    (dq,) = torch.autograd.grad(kernels.causal_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^causal_attention: .*expected"):
        dq.sum().backward()


# torch.library, compile, autocast, devices ------------------------------------------------------------------


def _backward_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    seed: torch.Tensor | None,
    *needs: bool,
) -> tuple[Any, ...]:
    """The arguments of attention_backward; needs: need_dq, need_dkdv."""
    lse2 = torch.zeros(q.shape[:3])
    return torch.randn_like(q), q, k, v, torch.randn_like(q), lse2, start, seed, 0.25, 0.1, False, *needs


OPS = {
    "forward": lambda q, k, v, start, seed: (q, k, v, start, seed, 0.25, 0.1, False),
    "backward": lambda *inputs: _backward_arguments(*inputs, True, True),
    "backward of q": lambda *inputs: _backward_arguments(*inputs, True, False),
    "backward of keys": lambda *inputs: _backward_arguments(*inputs, False, True),
    "decode": lambda q, k, v, start, seed: (q, k, v, torch.tensor([9], dtype=torch.int32), None, 0.25),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "start-seed"])
def test_opcheck(name: str, options: bool) -> None:
    """A schema, a fake or an autograd registration that contradicts what the op does."""
    from kernels.attention import torch_op  # noqa: F401  registers the ops

    q, k, v = torch.randn(3, 1, 2, 9, 16)
    if name == "forward":
        q.requires_grad_()
    start, seed = (torch.zeros(1, dtype=torch.int32), torch.tensor(3)) if options else (None, None)
    torch.library.opcheck(
        getattr(torch.ops.fused_gpt, f"attention_{name.split()[0]}"), OPS[name](q, k, v, start, seed)
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_agrees_with_eager(backend: str) -> None:
    """A graph break, or a compiled call whose values, shapes or strides differ from the eager call's."""

    def step(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = kernels.causal_attention(q, k, v, dropout_p=0.2, seed=seed)
        cached = kernels.decode_attention(
            q[:, :, -1:].detach(), k.detach(), v.detach(), seed.to(torch.int32).reshape(1)
        )
        return out.transpose(1, 2).reshape(1, -1, 32), cached

    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 20, 16))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in (torch.tensor(7), torch.tensor(11)):
        outputs = [function(q, k, v, seed) for function in (step, compiled)]
        gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out, _ in outputs]
        for eager, actual in (*zip(*outputs, strict=True), *zip(*gradients, strict=True)):
            assert torch.equal(eager, actual)


def test_autocast() -> None:
    """An output that does not have autocast's dtype, or gradients that do not have the inputs' dtype."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 20, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.causal_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3


def test_strided_lengths_and_key_starts_of_decoding() -> None:
    """cache_len or key_start that is read as if it were contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 2, 1, 16), (3, 2, 40, 16), (3, 2, 40, 16)
    q, k, v = (randn(shape, torch.float32, CPU, generator) for shape in shapes)
    lengths = torch.tensor([[40, 0], [7, 0], [23, 0]], dtype=torch.int32)
    starts = torch.tensor([[3, 99], [0, 99], [11, 99]], dtype=torch.int32)
    actual = kernels.decode_attention(q, k, v, lengths[:, 0], key_start=starts[:, 0])
    expected = kernels.reference.decode_attention(q, k, v, lengths[:, 0], key_start=starts[:, 0])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_decoding_agrees(**changes: torch.Tensor) -> None:
    """decode_attention agrees with its reference at an unusual scale, with the keys split into two parts."""
    q, k, v = torch.randn(3, 3, 1, 40, 16)
    lengths = torch.tensor([40, 1, 23], dtype=torch.int32)
    inputs = {"q": q[:, :, :2], "k_cache": k, "v_cache": v, "cache_len": lengths, "scale": 0.7} | changes
    actual = kernels.decode_attention(**inputs)
    torch.testing.assert_close(actual, kernels.reference.decode_attention(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [(0, 0), (-6, -6), (6, 6), (-6, 6), (6, -6)], ids=str)
def test_decoding_at_any_level_of_the_logits(levels: tuple[int, int]) -> None:
    """A scale that is ignored, or a part whose share of the softmax underflows or overflows."""
    q, k = torch.randn(3, 1, 2, 16) + 6, torch.randn(3, 1, 40, 16)
    k[:, :, :32] += levels[0]
    k[:, :, 32:] += levels[1]
    assert_decoding_agrees(q=q, k_cache=k)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 64])
def test_any_number_of_parts_of_the_keys(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is lost, counted twice or joined wrongly, or more parts than tiles of keys."""
    from kernels.attention import torch_op

    monkeypatch.setattr(torch_op, "attention_decode_splits", lambda *args: splits)
    assert_decoding_agrees(key_start=torch.tensor([5, 0, 20], dtype=torch.int32))


def test_lengths_outside_the_cache() -> None:
    """A length past the cache's end that is read beyond it, or a negative length."""
    assert_decoding_agrees(cache_len=torch.tensor([57, -7, 0], dtype=torch.int32))


@pytest.mark.parametrize("extreme", [-(2**31), -7, 2**31 - 1])
def test_extreme_key_starts_of_decoding(extreme: int) -> None:
    """Keys before the cache that are read, or a key_start that overflows when it is rounded to tiles."""
    assert_decoding_agrees(key_start=torch.tensor([extreme, 3, extreme], dtype=torch.int32))


def test_unwritten_slots_of_a_cache_are_not_read() -> None:
    """Slots of a cache past its length, here NaN, that enter the sums of a part of the keys."""
    k, v = torch.randn(2, 3, 2, 40, 16)
    lengths = torch.tensor([39, 7, 23], dtype=torch.int32)
    q = torch.randn(3, 2, 2, 16)
    clean = kernels.decode_attention(q, k, v, lengths)
    for row, length in enumerate(lengths):
        k[row, :, length:], v[row, :, length:] = float("nan"), float("nan")
    assert torch.equal(kernels.decode_attention(q, k, v, lengths), clean)


@pytest.mark.interpreter
@pytest.mark.parametrize("autocast", [False, True])
def test_a_cpu_computes_few_keys_of_bfloat16_in_float32(autocast: bool) -> None:
    """torch's bfloat16 attention, which is slow on a CPU, or an autocast that undoes the cast to float32."""
    for keys, exact in ((SHORT, True), (SHORT + 1, False)):
        q, k, v = (torch.randn(1, 2, keys, 16).bfloat16() for _ in range(3))
        with kernels.use_backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = kernels.causal_attention(*((q.float(), k.float(), v.float()) if autocast else (q, k, v)))
        expected = kernels.reference.causal_attention(q.float(), k.float(), v.float())
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected.bfloat16()) == exact


@pytest.mark.parametrize(("width", "copied"), [(43, True), (48, False)])
def test_the_reference_aligns_rows_for_torchs_gpu_kernels(
    width: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strides at which torch's kernels fault on a GPU, so that every later call fails; or a needless copy."""
    passed: list[torch.Tensor] = []
    q = torch.randn(1, 2, 8, width, dtype=torch.bfloat16)[..., :40]
    with monkeypatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, *args, **options: passed.extend((q, k, v))
        )
        patch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda")))
        kernels.reference.causal_attention(q, q, q)
    assert len(passed) == 3
    for x in passed:
        assert torch.equal(x, q)
        assert (x is not q) == copied
        assert all(stride % 8 == 0 for stride in x.stride()[:-1])
