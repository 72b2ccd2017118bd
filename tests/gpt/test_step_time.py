"""The prediction of a training step's time: its counts, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels
from gpt import GPT, GPTConfig, TrainConfig
from gpt import step_time as st
from gpt.data.dataset import Batch
from gpt.device import GPUS, find_gpu
from gpt.preflight import cases
from gpt.training.step import TrainStep
from kernels.registry import SPECS
from tests.gpt.test_host_work import Dispatches

GPT2 = GPTConfig.preset("gpt2")
H200 = find_gpu("h200")


def parts(config: GPTConfig, batch_size: int, grad_accum: int = 1) -> dict[str, st.Component]:
    """The components of a prediction by name."""
    return {part.name: part for part in st.predict(config, H200, batch_size, grad_accum).components}


def test_matmuls_have_the_flops_of_the_ops() -> None:
    """A second formula for the matmuls of an op that has drifted away from the op's own."""
    for config in (GPT2, GPTConfig(n_inner=1000, head_dim=32, vocab_size=512)):
        ops, by_name = dict(cases(config, 4, config.block_size, torch.float32)), parts(config, 4)
        flops = {
            op: sum(kernels.work(op, ops[op], torch.bfloat16, way).flops for way in ("forward", "backward"))
            for op in ("gelu_ffn", "linear_cross_entropy", "causal_attention_qkv")
        }
        ffn = by_name["up matmuls"].flops + by_name["down matmuls"].flops
        assert ffn == config.n_layer * flops["gelu_ffn"]
        padded = -(-config.vocab_size // 64) * 64
        assert by_name["head matmuls"].flops * config.vocab_size == flops["linear_cross_entropy"] * padded
        attention = by_name["attention forward"].flops + by_name["attention backward"].flops
        assert attention == config.n_layer * flops["causal_attention_qkv"]


def test_matmuls_are_those_of_the_model() -> None:
    """A linear layer that is left out, or counted twice: the matmuls do 6 operations per weight and token."""
    for preset in ("gpt2", "gpt2-xl", "char-gpu"):
        config = GPTConfig.preset(preset)
        by_name = parts(config, 2)
        model = GPT(config, device="meta")
        weights = sum(p.numel() for n, p in model.blocks.named_parameters() if p.ndim == 2)
        flops = sum(by_name[f"{name} matmuls"].flops for name in ("qkv", "proj", "up", "down"))
        assert flops == 6 * weights * 2 * config.block_size


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_every_fused_norm_is_counted(
    norm: str, final_norm: bool, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm whose bytes are missing, such as the last one."""
    sizes = {"vocab_size": 64, "block_size": 8, "n_layer": 3, "n_head": 2, "n_embd": 16}
    config = GPTConfig(**sizes, norm=norm, final_norm=final_norm, residual=residual, dropout=0.1)
    calls: dict[str, int] = {}

    def counting(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        calls[op] = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[op] += 1
            return function(*arguments, **options)

        return counted

    for op in ("layer_norm", "add_layer_norm", "dropout"):
        monkeypatch.setattr(kernels, op, counting(op, getattr(kernels, op)))
    model = GPT(config)
    model.dropout_seed = 1
    model(torch.zeros(1, 8, dtype=torch.int64))
    dropouts = calls.pop("dropout")
    assert st._norms(config) == {op: count for op, count in calls.items() if count}
    by_name = parts(config, 1)
    forward = by_name["norms forward"].bytes
    assert forward == 8 * 16 * (4 * calls["layer_norm"] + 14 * calls["add_layer_norm"])
    assert by_name["dropout forward"].bytes == 8 * 16 * 4 * dropouts


def test_bytes_of_the_norms_are_those_of_the_op() -> None:
    """A residual stream counted in bfloat16: it is float32 under autocast."""
    n, c = 4 * 1024, 768
    by_name = parts(GPT2, 4)
    assert by_name["norms forward"].bytes == n * c * (24 * (2 + 4 + 2 + 4 + 2) + 2 * 2)
    assert by_name["norms backward"].bytes == n * c * (24 * (2 + 2 + 2 + 2 * 4) + 3 * 2)


def test_a_component_takes_its_slower_resource() -> None:
    """A component bound by memory that is predicted from its FLOPs; an efficiency that multiplies."""
    compute = st.Component("c", 785 * 10**9, 10**6, 0.5, "")
    memory = st.Component("m", 10**6, 43 * 10**8, 0.8, "")
    prediction = st.Prediction(GPT2, H200, batch_size=64, grad_accum=1, components=(compute, memory))
    assert (prediction.bound(compute), prediction.bound(memory)) == ("FLOPs", "bytes")
    assert prediction.seconds_of(compute) == pytest.approx(2e-3)
    assert prediction.seconds_of(memory) == pytest.approx(1e-3 / 0.8)
    assert prediction.gpu_seconds == pytest.approx(3.25e-3 + prediction.gap_seconds)
    assert prediction.seconds == prediction.host_seconds  # 3 ms of work, but hundreds of operations to issue
    assert replace(prediction, captured=True).seconds == prediction.gpu_seconds
    seconds = 2.0
    assert prediction.mfu(seconds) == GPT2.flops_per_token() * 64 * 1024 / seconds / 989e12


def test_micro_batches_repeat_all_but_the_update() -> None:
    """AdamW counted for each micro-batch, or the addition of their gradients forgotten."""
    one, four = parts(GPT2, 3), parts(GPT2, 3, grad_accum=4)
    total = GPT2.parameter_counts()["total"]
    assert four.pop("accumulation").bytes == 3 * 3 * 4 * total
    assert four.keys() == one.keys()
    for name, part in one.items():
        factor = 1 if name in ("clipping", "AdamW") else 4
        assert (four[name].flops, four[name].bytes) == (factor * part.flops, factor * part.bytes), name


def test_more_work_takes_longer() -> None:
    """A size that a formula ignores."""
    base = GPTConfig(vocab_size=512, block_size=128, n_layer=2, n_head=2, n_embd=64, dropout=0.1)
    larger = {"vocab_size": 1024, "n_layer": 3, "n_embd": 128, "n_inner": 1024, "head_dim": 128}
    time = st.predict(base, H200, 4).gpu_seconds
    for name, value in larger.items():
        assert st.predict(replace(base, **{name: value}), H200, 4).gpu_seconds > time, name
    assert st.predict(replace(base, dropout=0.0), H200, 4).gpu_seconds < time
    assert st.predict(base, H200, 5).gpu_seconds > time
    untied = replace(base, tie_weights=False)
    assert st.predict(untied, H200, 4).gpu_seconds > time  # more parameters to update
    addition = 3 * 4 * base.vocab_size * base.n_embd  # of the two gradients of a tied embedding
    assert parts(base, 4)["embeddings"].bytes - parts(untied, 4)["embeddings"].bytes == addition


def test_no_gpu_is_predicted_above_its_peak() -> None:
    """A rate above what the vendor states, from a bandwidth or a peak in another unit."""
    for gpu in GPUS:
        prediction = st.predict(GPT2, gpu, 64)
        assert 0.2 < prediction.mfu(prediction.seconds) < 0.8, gpu.name
        assert 1e11 < gpu.bandwidth < 1e13


@pytest.mark.interpreter
def test_host_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of launches or operations that the model no longer has: update the constants."""
    from kernels.launch import Launch

    launches: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda self: launches.append(self.kernel.__name__))
    counts = {}
    for n_layer in (2, 3):
        model = GPT(vocab_size=64, block_size=16, n_layer=n_layer, n_head=2, n_embd=32, use_triton=True)
        idx = torch.randint(64, (2, 16))
        launches.clear()
        with Dispatches() as dispatches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(idx, idx)
            loss.backward()
        counts[n_layer] = len(launches), len(dispatches.launching())
    launches_per_layer, dispatches_per_layer = (counts[3][i] - counts[2][i] for i in (0, 1))
    assert launches_per_layer == st.LAUNCHES_PER_LAYER
    assert dispatches_per_layer == st.DISPATCHES_PER_LAYER
    assert counts[2][0] - 2 * launches_per_layer == st.LAUNCHES_OUTSIDE
    assert counts[2][1] - 2 * dispatches_per_layer == st.DISPATCHES_OUTSIDE


def test_the_work_of_the_update_is_counted() -> None:
    """Operations around the forward and backward passes of a step that the prediction leaves out."""
    model = GPT(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, use_triton=False)
    idx = torch.randint(64, (2, 16))
    step = TrainStep(model, TrainConfig(dtype="float32", device="cpu"))
    step([Batch(idx, idx, None)], 1e-3)  # creates AdamW's state
    with Dispatches() as whole:
        step.enqueue([Batch(idx, idx, None)], 1e-3)
    model.zero_grad()
    with Dispatches() as passes:
        model(idx, idx).backward()
    bookkeeping = sum("profiler" in name for name in whole.names)
    assert len(whole.launching()) - len(passes.launching()) - bookkeeping == st.DISPATCHES_OF_UPDATE


def test_work_is_the_specification() -> None:
    """`kernels.work` with FLOPs and bytes exchanged, or an error that names no valid op."""
    for spec in SPECS.values():
        case = spec.tagged("bench")[0]
        for direction in ("forward", "backward"):
            expected = spec.flops(case, direction), spec.bytes(case, torch.bfloat16, direction)
            assert kernels.work(spec.name, case, torch.bfloat16, direction) == expected
            assert kernels.work(spec.name, case, torch.bfloat16, direction).flops == expected[0]
    with pytest.raises(ValueError, match=r"^work: op is 'norm', expected one of causal_attention, "):
        kernels.work("norm", kernels.Case({}), torch.float32, "forward")
    with pytest.raises(ValueError, match=r"^work: direction is 'both', expected "):
        kernels.work("layer_norm", kernels.Case({}), torch.float32, "both")
