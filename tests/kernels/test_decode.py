"""The fused ops of a decoded token beyond the registry's cases: layouts, lengths, memory, torch.library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels
from kernels.registry import SPECS
from kernels.spec import Case
from tests.kernels.decode_suite import (
    CHECKS,
    KINDS,
    MUTANTS,
    SIZES,
    assert_agrees,
    assert_argmax,
    inputs_of,
    logits_of,
    stays_inside,
)
from tests.memory import in_a_fork
from tests.planting import planted

pytestmark = pytest.mark.kernels
BLOCK, HEAD, EMBEDDING, ARGMAX = (
    SPECS[f"decode_{name}"] for name in ("block", "head", "embedding", "argmax")
)


def triton(inputs: dict[str, Any]) -> torch.Tensor:
    with kernels.use_backend(decode="triton"):
        return kernels.decode_block(**inputs)


@pytest.mark.parametrize("name", CHECKS)
def test_unusual_arguments(name: str) -> None:
    """A stride, a mask, a clamp or an option that a kernel ignores."""
    CHECKS[name](None)


@pytest.mark.parametrize("batch", range(1, 9))
def test_every_batch(batch: int) -> None:
    """Sequences that share results, or that are lost, where their number is not a power of two."""
    assert_agrees("decode_head", inputs_of(HEAD, {"B": batch, "C": 17, "V": 5}))


def test_tokens_written_one_after_another_are_attended_to() -> None:
    """A cache that is written in another slot than the next token reads."""
    inputs = inputs_of(BLOCK, SIZES | {"Tmax": 5})
    other = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    for length in range(1, 4):
        inputs["cache_len"] = torch.full((3,), length, dtype=torch.int32)
        inputs["x"] = torch.randn(3, 20, generator=torch.Generator().manual_seed(length))
        expected = kernels.reference.decode_block(**inputs | other)
        torch.testing.assert_close(triton(inputs), expected, rtol=1e-4, atol=1e-4)
    for name, cache in other.items():
        torch.testing.assert_close(inputs[name], cache, rtol=1e-4, atol=1e-4)


def test_repeats_are_bitwise_equal() -> None:
    """Counters that keep the last call's value, or parts that are joined in the order of their arrival."""
    inputs = inputs_of(BLOCK, SIZES, key_start="padding")
    first = triton(inputs)
    for _ in range(2):
        assert torch.equal(triton(inputs), first)


def test_only_the_newest_slot_is_written() -> None:
    """A write beside the slot of the newest key, or an unwritten slot that is read."""
    inputs = inputs_of(BLOCK, SIZES)
    for row, length in enumerate(inputs["cache_len"].tolist()):
        for name in ("k_cache", "v_cache"):
            inputs[name][row, :, length - 1 :] = torch.nan
    assert torch.isfinite(triton(inputs)).all()
    for row, length in enumerate(inputs["cache_len"].tolist()):
        for name in ("k_cache", "v_cache"):
            written = inputs[name][row].isnan().logical_not().all(-1)  # (Hkv, Tmax)
            assert written.sum(-1).tolist() == [length, length]
            assert written[:, :length].all()


@pytest.mark.interpreter
@pytest.mark.parametrize("join", [1, 2, 4])
def test_any_number_of_parts_of_the_keys(join: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is lost, or a tile of queries that uses another's counter."""
    from kernels.decode import torch_op

    monkeypatch.setattr(torch_op, "attention_decode_splits", lambda *args: join)
    assert_agrees("decode_block", inputs_of(BLOCK, SIZES, key_start="padding"))


@pytest.mark.interpreter
def test_no_access_past_the_end_of_a_tensor() -> None:
    """An out-of-bounds load that a masked store hides, or an out-of-bounds store."""
    assert in_a_fork(lambda: stays_inside(None)) == ""


@pytest.mark.interpreter
def test_tokens_outside_the_vocabulary_read_its_ends() -> None:
    """A token that makes the kernel read past its table."""
    weight, position = torch.randn(5, 8), torch.zeros(2, 8)
    token, lengths = torch.tensor([-3, 2**40]), torch.ones(2, dtype=torch.int32)
    with kernels.use_backend(decode="triton"):
        x = kernels.decode_embedding(token, lengths, weight, position)
    assert torch.equal(x, weight[[0, 4]])


@pytest.mark.interpreter
@pytest.mark.parametrize("spec", [EMBEDDING, BLOCK, HEAD, ARGMAX], ids=lambda spec: spec.name)
def test_opcheck(spec: Any) -> None:
    """A wrong fake, or a write to a cache that the schema does not declare."""
    inputs = inputs_of(spec, spec.tagged("small")[0].sizes)
    with kernels.use_backend(decode="triton"):
        spec.function(**inputs)  # registers the op
    op = getattr(torch.ops.fused_gpt, spec.name).default
    defaults = {"key_start": None, "scale": 0.25, "eps": 1e-5, "approximate": "tanh"}
    schema = {a.name: a.kwarg_only for a in op._schema.arguments}
    given = {name: {**defaults, **inputs}[name] for name in schema}
    positional = tuple(given[name] for name, keyword in schema.items() if not keyword)
    torch.library.opcheck(op, positional, {name: given[name] for name, keyword in schema.items() if keyword})


@pytest.mark.interpreter
def test_compiled_code_keeps_the_order_of_the_writes() -> None:
    """A compiled graph that reads a cache before the block has written it."""

    def step(x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **rest: Any) -> tuple[Any, Any]:
        before = k_cache.sum()
        y = kernels.decode_block(x, k_cache, v_cache, **rest)
        return kernels.decode_block(y, k_cache, v_cache, **rest), k_cache.sum() - before

    results = []
    with kernels.use_backend(decode="triton"):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)):
            results.append(function(**inputs_of(BLOCK, SIZES)))
    torch.compiler.reset()
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ARGMAX.dtypes, ids=str)
@pytest.mark.parametrize("batch", [1, 2, kernels.DECODE_BATCH])
def test_argmax_is_that_of_torch(batch: int, dtype: torch.dtype) -> None:
    """An order of the logits that is not torch's, in a dtype, or where one row's stride does not matter."""
    for kind in KINDS:
        assert_argmax(logits_of(kind, batch, 70, dtype))
    assert_argmax(logits_of("ties", 70, batch, dtype).T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ARGMAX.dtypes, ids=str)
@pytest.mark.parametrize("v", [4096, 20483])
def test_argmax_is_that_of_torch_in_tiles_of_a_gpu(v: int, dtype: torch.dtype) -> None:
    """Equal logits, or NaN, in different threads, warps and unrolled tiles."""
    for kind in KINDS:
        assert_argmax(logits_of(kind, 1, v, dtype, torch.device("cuda")))
    assert_argmax(logits_of("ties", 3, v, dtype, torch.device("cuda")))


@pytest.mark.parametrize(
    ("spec", "sizes", "reason"),
    [
        (BLOCK, SIZES | {"B": 9}, "the kernel takes up to 8 sequences, not 9"),
        (BLOCK, SIZES | {"D": 257}, "the kernel takes head dimensions up to 256, not 257"),
        (HEAD, {"B": 1, "C": 16385, "V": 2}, r"the kernel takes C in \[1, 16384\], not 16385"),
        (ARGMAX, {"B": 1, "V": 0}, r"the kernel takes V in \[1, 1073741824\], not 0"),
    ],
)
def test_explain_gives_the_limits(spec: Any, sizes: dict[str, int], reason: str) -> None:
    """A call that a kernel cannot take, and that reaches it."""
    inputs = inputs_of(spec, sizes)
    with kernels.use_backend(decode="triton"), pytest.raises(RuntimeError, match=f"honoured: {reason}$"):
        kernels.explain(spec.name, **inputs)


def test_gradients_are_refused() -> None:
    """A training step that silently gets no gradient."""
    inputs = inputs_of(BLOCK, SIZES)
    inputs["up_bias"].requires_grad_()
    message = "^decode_block: up_bias requires a gradient, expected inference"
    with pytest.raises(RuntimeError, match=message):
        kernels.decode_block(**inputs)
    with torch.no_grad():
        kernels.decode_block(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_weight": torch.zeros(20, 47)}, "proj_weight has HD=47, expected a multiple of 12"),
        ({"proj_weight": torch.zeros(20, 36)}, "k_cache has Hkv=2, expected a divisor of 3"),
        ({"qkv_weight": torch.zeros(95, 20), "qkv_bias": None}, "qkv_weight has R=95, expected 96"),
    ],
)
def test_head_counts_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    """Projections for other heads than the cache's."""
    with pytest.raises(ValueError, match=f"^decode_block: {message}"):
        kernels.decode_block(**inputs_of(BLOCK, SIZES) | change)


def test_autocast_changes_nothing() -> None:
    """A reference that computes in the autocast dtype, and so cannot write the caches."""
    inputs = inputs_of(BLOCK, SIZES)
    with kernels.use_backend("reference"):
        expected = kernels.decode_block(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kernels.decode_block(**inputs), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("the norm's bias is scaled", "block"),
        ("written one slot late", "block"),
        ("one counter is set", "parts"),
        ("the last tile of equals", "argmax"),
        ("-0.0 is below 0.0", "argmax"),
    ],
)
def test_likely_bugs_are_caught(name: str, check: str) -> None:
    """A bug that changes results only where a cache, a counter or a bias is not what it is by default."""
    with planted("decode", MUTANTS[name]), pytest.raises(AssertionError):
        CHECKS[check](None)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    """A mask, a clamp, a stride or a step of the computation whose loss no check catches."""

    def run() -> None:
        for check in (*CHECKS.values(), stays_inside):
            check(None)

    with planted("decode", MUTANTS[name]):
        assert in_a_fork(run) != ""


@pytest.mark.gpu
@pytest.mark.driver("CUDA graphs")
def test_a_graph_can_be_replayed() -> None:
    """Counters that are zero in the first replay only, or an allocation that a graph cannot hold."""
    inputs = BLOCK.make_inputs(
        Case({"B": 1, "C": 768, "H": 12, "Tmax": 1024, "D": 64, "I": 3072}),
        torch.bfloat16,
        torch.device("cuda"),
        torch.Generator("cuda").manual_seed(0),
    )
    expected = triton(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton(inputs)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
