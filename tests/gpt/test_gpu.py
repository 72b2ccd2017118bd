"""The whole model on a GPU.

Gradients, generation and preflight come first: .ci/compiled runs them too. The tests of captured decoding,
synchronisation, resumed runs, training and preflight's time need a real GPU.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import kernels
from gpt import GPT, GPTConfig, TokenData, TrainConfig, Trainer
from gpt.data.dataset import Batch
from gpt.decoding import Decoder
from gpt.files import read_json
from gpt.preflight import preflight
from gpt.training import parallel
from gpt.training.step import PendingStep, StepResult, TrainStep
from gpt.weights.tensors import read_tensors
from kernels.registry import SPECS
from kernels.tolerance import compare
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, make_model

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
VOCABULARY = 50304
SMALL = {"vocab_size": 131, "block_size": 48, "n_layer": 2, "n_head": 4, "n_embd": 64}


def step_results(
    use_triton: bool, dtype: torch.dtype, autocast: torch.dtype | None = None, **settings: Any
) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one training step of a small model; parameters in `dtype`.

    The second row of tokens starts with padding, and some targets are ignored.
    """
    torch.manual_seed(0)
    model = GPT(**SMALL | settings, use_triton=use_triton, device=DEVICE).to(dtype)
    model.dropout_seed = 11
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(131, (2, 41), generator=generator).to(DEVICE)
    targets = idx.roll(-1, 1)
    targets[:, ::7] = -100
    mask = torch.ones_like(idx)
    mask[1, :9] = 0
    targets[1, :9] = -100

    with nullcontext() if autocast is None else torch.autocast("cuda", autocast):
        loss = model(idx, targets, attention_mask=mask)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"bias": False, "activation": "gelu"}], ids=str)
def test_a_training_step_equals_the_references(settings: dict[str, Any]) -> None:
    """Kernels that are right alone but wrong in the model: strides, saved tensors, masks, padding."""
    actual, reference = (step_results(use, torch.float32, **settings) for use in (True, False))
    exact = step_results(False, torch.float64, **settings)
    for name, value in exact.items():
        verdict = compare(name, actual[name], reference[name], value, dtype=torch.float32, scale=1.0)
        assert verdict.ok, str(verdict)


def test_a_bfloat16_training_step_is_as_close_as_the_references() -> None:
    """A cast under autocast that the references do not have, or one in the wrong place."""
    actual, reference = (step_results(use, torch.float32, torch.bfloat16) for use in (True, False))
    exact = step_results(False, torch.float64)
    for name, value in exact.items():
        verdict = compare(name, actual[name], reference[name], value, dtype=torch.bfloat16, scale=1.0)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("settings", [{}, {"n_head": 2, "bias": False}], ids=str)
def test_cached_generation_equals_uncached(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode kernel that reads the wrong keys, or padding, while the cache grows past one tile."""
    monkeypatch.setattr("gpt.decoding.captures", lambda device: False)
    torch.manual_seed(0)
    model = GPT(**SMALL | settings, use_triton=True, device=DEVICE)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(2)  # untrained blocks change so little that tokens would repeat
    idx = torch.randint(131, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(idx)
    mask[1, :4] = 0
    options = {"do_sample": False, "attention_mask": mask}
    cached = model.generate(idx, 24, **options)
    assert torch.equal(cached, model.generate(idx, 24, use_cache=False, **options))
    model.use_triton = False
    assert torch.equal(cached, model.generate(idx, 24, **options))
    assert cached[:, 9:].unique().numel() > 8


def test_preflight_accepts_correct_kernels() -> None:
    """A preflight whose child process checks nothing, or that fails correct kernels."""
    config = GPTConfig(**SMALL, dropout=0.1)
    report = preflight(config, DEVICE, 2, 24, torch.bfloat16, torch.float32, use_cache=False)
    assert report.ok, str(report)
    assert sorted(report.checked) == sorted(set(SPECS) - {"causal_attention"})  # the model takes packed qkv


FILTERS = {"top_k": 200, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1, "stop_tokens": [7, 11]}


def decoding_model(use_triton: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT("gpt2", use_triton=use_triton, device=DEVICE, n_layer=3, block_size=128)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(2)  # untrained blocks change so little that tokens would repeat
    return model


@pytest.mark.driver("CUDA graphs")
@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("batch", [3, 9])  # fused ops of decoding, and modules
@pytest.mark.parametrize("settings", [{"do_sample": False}, {}, FILTERS], ids=["greedy", "plain", "filters"])
def test_captured_decoding_equals_eager(
    use_triton: bool, batch: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that replays a stale length, position, token or random state, or that reads padding."""
    model, idx = decoding_model(use_triton), torch.randint(50257, (batch, 20), device=DEVICE)
    mask = torch.ones_like(idx)
    mask[1, :7] = 0

    def run() -> tuple[list[torch.Tensor], torch.Tensor]:
        """Three generations, with the weights changed in place, and the random state after them."""
        generator, ids = torch.Generator(DEVICE).manual_seed(1), []
        for factor in (1.0, 1.0, 2.0):
            with torch.no_grad():
                model.blocks[0].ffn.up.weight.mul_(factor)
            ids.append(model.generate(idx, 100, attention_mask=mask, generator=generator, **settings))
        with torch.no_grad():
            model.blocks[0].ffn.up.weight.div_(2)
        return ids, generator.get_state()

    captured, state = run()
    again, _ = run()  # by kept graphs only
    monkeypatch.setattr("gpt.decoding.captures", lambda device: False)
    eager, eager_state = run()
    assert all(map(torch.equal, captured, eager))
    assert all(map(torch.equal, again, eager))
    assert torch.equal(state, eager_state)
    assert captured[0][:, 20:].unique().numel() > 20
    assert captured[2].shape != captured[1].shape or not torch.equal(captured[2], captured[1])


@pytest.mark.driver("CUDA graphs")
def test_torchs_own_generator_decodes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that leaves torch's generator where it was, so that each call draws the same tokens."""
    model, idx = decoding_model(True), torch.randint(50257, (1, 20), device=DEVICE)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [model.generate(idx, 40) for _ in range(3)]

    captured = run()
    monkeypatch.setattr("gpt.decoding.captures", lambda device: False)
    assert all(map(torch.equal, captured, run()))
    assert not torch.equal(captured[1], captured[2])


@pytest.mark.driver("CUDA graphs and their memory")
def test_a_kept_graph_outlives_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second capture; memory of a graph that other work overwrites; an order of streams that is lost."""
    model, prompts = decoding_model(True), torch.randint(50257, (3, 2, 20), device=DEVICE)
    captured, capture = [], Decoder._capture
    monkeypatch.setattr(Decoder, "_capture", lambda self, *a: captured.append(1) or capture(self, *a))
    with monkeypatch.context() as patch:
        patch.setattr("gpt.decoding.captures", lambda device: False)
        expected = [model.generate(idx, 60, do_sample=False) for idx in prompts]

    def check(idx: torch.Tensor, ids: torch.Tensor) -> None:
        assert torch.equal(model.generate(idx, 60, do_sample=False), ids)

    check(prompts[0], expected[0])
    torch.cuda.empty_cache()
    scratch = [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(20)]
    check(prompts[1], expected[1])
    del scratch
    assert len(captured) == 1
    ids = [model.generate(idx, 60, do_sample=False) for idx in prompts]  # queued one after the other
    assert all(map(torch.equal, ids, expected))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(2):
        with torch.cuda.stream(stream):
            check(prompts[2], expected[2])
        check(prompts[1], expected[1])
    assert len(captured) == 2
    before = torch.cuda.memory_allocated()
    model.clear_cache()
    assert torch.cuda.memory_allocated() < before
    check(prompts[0], expected[0])
    assert len(captured) == 3


def synchronizations(model: GPT, idx: torch.Tensor, new: int, stop_tokens: list[int] | None) -> list[Path]:
    """The source file of each synchronisation with the GPU in `generate`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # this call warns too, that it is a prototype
        try:
            model.generate(idx, new, top_k=50, top_p=0.9, repetition_penalty=1.1, stop_tokens=stop_tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [Path(warning.filename) for warning in caught if "called a synchronizing" in str(warning.message)]


@pytest.mark.driver("torch's check for synchronisations needs a CUDA context")
@pytest.mark.parametrize(
    "stop_tokens", [None, [50256], list(range(50200, 50257))], ids=["free", "stop", "stops"]
)
def test_tokens_do_not_synchronise(stop_tokens: list[int] | None) -> None:
    """A synchronisation for each token although nothing reads the token."""
    model = GPT("gpt2", use_triton=True, device=DEVICE, n_layer=2)
    idx = torch.randint(50000, (2, 16), device=DEVICE)
    synchronizations(model, idx, 4, stop_tokens)  # compiles, and captures the graph
    few, many = (synchronizations(model, idx, new, stop_tokens) for new in (5, 40))
    assert many == few
    assert len(few) == (2 if stop_tokens else 0)  # stop tokens to the GPU, and the length back


@pytest.mark.driver("the random state and the matmuls of a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_resumed_run_is_bitwise_equal(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that loses the GPU's random state or the loss scale, or a nondeterministic sample."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 30)
    data, config = TokenData.from_text(TEXT), replace(CONFIG, decay_steps=8, device="cuda", dtype=dtype)

    def run(name: str, steps: int, *, resume: bool = False) -> None:
        model = make_model(data)
        model.use_triton = False
        Trainer(model, data, replace(config, max_steps=steps), out=tmp_path / name, resume=resume).run()

    torch.use_deterministic_algorithms(True)
    try:
        run("straight", 8)
        run("stopped", 4)
        run("stopped", 8, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    folders = [tmp_path / name / "checkpoints/step-8" for name in ("straight", "stopped")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        straight, stopped = (read_tensors(folder / file) for folder in folders)
        assert all(torch.equal(straight[key], stopped[key]) for key in straight)
    straight, stopped = (read_json(folder / "state.json") for folder in folders)
    assert (straight["rng"], straight["scaler"]) == (stopped["rng"], stopped["scaler"])


@pytest.mark.driver("pinned memory, and two devices")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fit_takes_batches_on_cpu_and_gpu(device: str) -> None:
    """A loader with batches on the GPU, where nothing can be pinned."""
    model = GPT(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=32, use_triton=False)
    idx = torch.randint(64, (2, 16), device=device)
    model.fit([(idx, idx)] * 4, num_epoch=2)
    assert model.train_loss[1] < model.train_loss[0]


def batches(steps: int, batch: int = 8, length: int = 512) -> list[Batch]:
    """A Markov chain that a model can learn: each token is one of four that its predecessor decides."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(VOCABULARY, (steps, batch), generator=generator)]
    for choices in torch.randint(4, (length, steps, batch), generator=generator):
        tokens.append((tokens[-1] * 31 + choices * 7 + 3) % 509)
    return [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in torch.stack(tokens, 2)]


def model_124m(use_triton: bool) -> GPT:
    torch.manual_seed(0)
    return GPT("gpt2", vocab_size=VOCABULARY, use_triton=use_triton, device=DEVICE)


def smoothed_losses(use_triton: bool, data: list[Batch], window: int = 20) -> torch.Tensor:
    """The losses of a step on each batch, averaged over `window` steps, with a warm-up of 100 steps."""
    step = TrainStep(model_124m(use_triton), TrainConfig(dtype="bfloat16"))
    losses = [step([batch], rate=3e-4 * min(1, (i + 1) / 100)).loss for i, batch in enumerate(data)]
    return torch.tensor(losses).unfold(0, window, window).mean(1)


@pytest.mark.driver("200 steps of a 124M model")
def test_training_curves_equal_the_references() -> None:
    """A kernel whose error biases training, at a realistic size in bfloat16.

    Without the warm-up, training is chaotic: references whose weights differ by 1e-6 are 0.69 apart. With it,
    they are 0.005 apart, kernels and references 0.009, and another seed 0.1 (H200, 2026-11-26).
    """
    data = batches(200)
    kernels, references = smoothed_losses(True, data), smoothed_losses(False, data)
    assert references[-1] < 0.2 * references[0]
    assert (kernels - references).abs().max() < 0.05


@pytest.mark.driver("a 124M model")
def test_gradients_are_as_close_as_the_references() -> None:
    """A kernel whose gradients are worse than PyTorch's in bfloat16, in the layers of a realistic model."""
    (batch,) = batches(1)

    def gradients(use_triton: bool, *, mixed: bool) -> dict[str, torch.Tensor]:
        model = model_124m(use_triton)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            loss = model(batch.inputs.to(DEVICE), batch.targets.to(DEVICE))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    exact = gradients(False, mixed=False)
    actual, reference = (gradients(use, mixed=True) for use in (True, False))
    for name, expected in exact.items():
        error, allowed = ((g[name] - expected).norm().item() for g in (actual, reference))
        assert error <= 1.25 * allowed, f"{name}: {error:.2e}, the reference's {allowed:.2e}"


def queue_steps(step: TrainStep, data: list[Batch]) -> list[PendingStep]:
    """Queues one step of two micro-batches for each pair in `data`, with a falling rate."""
    return [step.enqueue(data[i : i + 2], rate=1e-3 / (i + 1)) for i in range(0, len(data), 2)]


@pytest.mark.driver("the dispatch keys of CUDA tensors")
def test_ops_are_called_without_the_dispatcher() -> None:
    """Tensors on a GPU that do not count as plain, so that each call takes the dispatcher."""
    x, weight = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((4, 64), (64,)))
    y = kernels.layer_norm(x, weight)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "layer_norm_forwardBackward"


@pytest.mark.driver("CUDA graphs")
@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "bfloat16"), ("muon", "float16")])
def test_captured_training_equals_eager(
    use_triton: bool, optimizer: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that replays a stale rate, batch, weight or dropout mask, or that cannot be captured."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    data = batches(12, batch=4, length=128)

    def train(no_capture: bool) -> tuple[list[StepResult | float], list[torch.Tensor]]:
        """The results of the steps and of evaluations after them, and the parameters."""
        torch.manual_seed(0)
        model = GPT(
            "gpt2", vocab_size=VOCABULARY, n_layer=2, dropout=0.1, use_triton=use_triton, device=DEVICE
        )
        config = TrainConfig(optimizer=optimizer, dtype=dtype, no_capture=no_capture)
        step = TrainStep(model, config)
        results = [pending.result() for pending in queue_steps(step, data)]
        model.eval()
        losses = [step.evaluate(batch).item() for batch in data[:4]]
        for graph in (step._graph, step._evaluation):
            assert (graph is None or graph._graph is None) == no_capture
        return [*results, *losses], [p.detach() for p in model.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        captured, eager = train(False), train(True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert captured[0] == eager[0]
    assert all(map(torch.equal, captured[1], eager[1]))


@pytest.mark.driver("torch's check for synchronisations needs a CUDA context")
@pytest.mark.parametrize("no_capture", [False, True])
@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "bfloat16"), ("muon", "float16")])
def test_training_does_not_synchronise(no_capture: bool, optimizer: str, dtype: str) -> None:
    """A host that synchronises for a loss, a norm or a scale before it queues the next step."""
    model = GPT("gpt2", vocab_size=VOCABULARY, n_layer=2, use_triton=True, device=DEVICE)
    step = TrainStep(model, TrainConfig(optimizer=optimizer, dtype=dtype, no_capture=no_capture))
    data = batches(16, batch=4, length=128)
    queue_steps(step, data[:6])  # compiles, and captures the graph
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = queue_steps(step, data[6:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.result().loss > 0 for p in pending)


@pytest.mark.driver("a time")
def test_preflight_is_quick() -> None:
    """A preflight that delays the first step by over fifteen seconds, or that fails on this GPU."""
    report = preflight(
        GPTConfig.preset("gpt2"), DEVICE, 8, 1024, torch.bfloat16, torch.float32, use_cache=False
    )
    assert report.ok, str(report)
    assert report.seconds < 15


@pytest.mark.driver("NCCL")
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_run_on_nccl(engine: str, dtype: str) -> None:
    """An engine, an optimizer on shards or a norm over them that NCCL or the fused kernels do not take."""
    data = batches(3, batch=4, length=128)
    config = TrainConfig(dtype=dtype, parallel=engine)

    def losses(*, grouped: bool) -> list[float]:
        torch.manual_seed(0)
        model = GPT("gpt2", vocab_size=VOCABULARY, n_layer=2, use_triton=True, device=DEVICE)
        forward = None
        if grouped and engine == "fsdp":
            parallel._shard(model, DEVICE, config, size=1, copies=1)
        elif grouped:
            forward = parallel._replicate(model)
        step = TrainStep(model, config, forward)
        step._sharded = grouped and engine == "fsdp"
        return [step([batch], rate=1e-3).loss for batch in data]

    expected = losses(grouped=False)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        actual = losses(grouped=True)
    finally:
        dist.destroy_process_group()
    assert actual == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-2)
