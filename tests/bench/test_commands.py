"""The command lines: each completes without a GPU, and rejects bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.__main__ as whole
import bench.command
import bench.generate
import bench.measure
import bench.safety
import bench.train
from bench import cases
from bench.attention import BENCH
from bench.command import command
from bench.contestants import OURS, REFERENCE
from bench.engine import find_bench
from bench.measure import Clock, Timing
from bench.record import Report, load
from gpt.cli import run_command
from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import IGNORED
from gpt.device import find_gpu
from gpt.model import GPT
from gpt.step_time import predict
from kernels import dispatch
from tests.bench.reports import MACHINE

ROOT = Path(__file__).parents[2]
TINY = GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=16)


def train_command(path: Path, *flags: str) -> int:
    quick = ["--quick", "--device", "cpu", "--json", str(path)]
    return run_command("bench.train", bench.train.main, [*quick, *flags])


def generate_command(path: Path, *flags: str) -> int:
    quick = ["--quick", "--device", "cpu", "--json", str(path)]
    return run_command("bench.generate", bench.generate.main, [*quick, *flags])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every bench fast, and has no kernel interpreted."""
    monkeypatch.setattr(bench.measure, "MIN_SAMPLES", 1)
    monkeypatch.setattr(bench.measure, "MAX_SETS", 2)
    monkeypatch.setattr(bench.measure, "MAX_SAMPLES", 2)
    monkeypatch.setattr(cases, "CPU_WORK", 10**6)
    monkeypatch.setattr(bench.command, "CPU_BUDGET", "0.001s")  # without --quick, which has none
    monkeypatch.setattr(dispatch, "interpreting", False)
    monkeypatch.setattr(GPTConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(bench.measure.Ceilings, "copy", lambda self: 1e10)
    monkeypatch.setattr(bench.measure.Ceilings, "matmul", lambda self, m, n, k, dtype: 1e11)


@pytest.mark.usefixtures("small")
def test_a_bench_runs_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bench that needs a GPU, does not say that it has none, or writes a file that is not a report."""
    path = tmp_path / "attention.json"
    flags = ["--quick", "--device", "cpu", "--json", str(path), "--plot", "--profile", "--out", str(tmp_path)]
    assert command(BENCH, flags) == 0
    out = capsys.readouterr().out
    assert "no GPU was found" in out
    assert "the rows `reference` are what this package runs on a CPU" in out
    assert "× reference" in out
    assert "fused-gpt · fused-gpt, deterministic: unavailable: tensors on cpu need TRITON_INTERPRET=1" in out
    assert "flash-attn · flash-attn 3 · " in out
    assert "Traceback" not in out
    report = load(path)
    assert report.complete
    assert report.machine.kind == "cpu"
    assert {row.direction for row in report.find(op="causal_attention", contestant=REFERENCE)} == {
        "both",
        "forward",
        "backward",
    }
    assert {row.direction for row in report.find(op="decode_attention", contestant=REFERENCE)} == {"forward"}
    assert {row.status for row in report.find(contestant=OURS)} == {"unavailable"}
    assert report.find(contestant="SDPA math")[0].status == "measured"
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "attention-trace.json").read_text("utf-8"))["traceEvents"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", ["norm", "ffn", "loss"])
def test_the_other_families_run_without_a_gpu(family: str, tmp_path: Path) -> None:
    """A contestant of an op family that the engine cannot call."""
    path = tmp_path / f"{family}.json"
    assert command(find_bench(family), ["--quick", "--device", "cpu", "--json", str(path)]) == 0
    rows = load(path).rows
    assert {row.op for row in rows if row.status == "measured"} == {
        spec.name for spec in find_bench(family).specs
    }
    assert not [row for row in rows if row.status in ("wrong", "failed")]
    assert family != "loss" or [
        row for row in rows if row.contestant == "whole logits" and row.status == "measured"
    ]


@pytest.mark.usefixtures("small")
def test_whole_models_run_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure for training or decoding that is missing or not computed by its documented formula."""
    path = tmp_path / "train.json"
    assert train_command(path) == 0
    ours, plain = load(path).rows
    assert (ours.contestant, plain.contestant) == (OURS, "plain PyTorch")
    assert ours.tokens == plain.tokens == 12 * 16
    parameters = TINY.parameter_counts()["total"] - 16 * 16
    assert ours.flops == (6 * parameters + 12 * 1 * 2 * 8 * 16) * 12 * 16
    assert ours.limit == pytest.approx(ours.flops / 1e11)
    assert "no vendor's peak is known" in capsys.readouterr().out
    path = tmp_path / "generate.json"
    assert generate_command(path) == 0
    first, decode = load(path).find(contestant=OURS, status="measured")
    assert (first.direction, decode.direction) == ("first token", "decode")
    assert decode.bytes == (parameters + 2 * 1 * 16 * (4 + 4)) * 4
    assert "B1" in decode.case.split("-")


NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.bias is True and config.n_head == 2
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        print("number of parameters: 0.00M")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.mark.usefixtures("small")
def test_nanogpt_is_timed_from_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nanoGPT missing from the run; a traceback for a folder that is not a checkout of it."""
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    path = tmp_path / "train.json"
    assert train_command(path, "--nanogpt", str(tmp_path)) == 0
    assert [row.contestant for row in load(path).rows if row.status == "measured"] == [
        OURS,
        bench.train.PLAIN,
        "nanoGPT",
    ]
    assert "number of parameters" not in capsys.readouterr().out
    assert train_command(path, "--nanogpt", str(tmp_path / "none")) == 2
    assert (
        "has no model.py, expected a checkout of https://github.com/karpathy/nanoGPT"
        in capsys.readouterr().err
    )
    (tmp_path / "model.py").write_text("", encoding="utf-8")
    assert train_command(path, "--nanogpt", str(tmp_path)) == 2
    assert "has no GPT and GPTConfig" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_generation_of_other_lengths_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other lengths than the flags ask for; lengths beyond the block size; --no_cache that uses the cache."""
    path = tmp_path / "generate.json"
    flags = ["--prompt_tokens", "5", "--no_cache", "--new_tokens"]
    generate, cached = GPT.generate, []

    def recorded(self: GPT, *args: Any, use_cache: bool, **options: Any) -> torch.Tensor:
        cached.append(use_cache)
        return generate(self, *args, use_cache=use_cache, **options)

    monkeypatch.setattr(GPT, "generate", recorded)
    assert generate_command(path, *flags, "10") == 0
    rows = load(path).find(status="measured")
    assert {"T5", "new10"} <= set(rows[0].case.split("-"))
    assert {OURS, bench.generate.NO_CACHE} <= {row.contestant for row in rows}
    assert set(cached) == {True, False}
    assert generate_command(path, *flags, "11") == 2
    assert "are 17 tokens, expected at least one of each and at most 16 together" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_wrong_model_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens per second reported for a model whose kernels are wrong."""
    loss = bench.train.TrainStep.loss

    def differing(self: bench.train.TrainStep, batch: Any, forward: Any = None) -> torch.Tensor:
        return loss(self, batch, forward) * (1.0 if self._model.use_triton is False else 1.5)

    monkeypatch.setattr(bench.train.TrainStep, "loss", differing)
    path = tmp_path / "train.json"
    assert train_command(path) == 1
    assert [(row.status, row.seconds is None) for row in load(path).rows] == [
        ("wrong", True),
        ("measured", False),
    ]
    monkeypatch.setattr(bench.generate, "_disagreement", lambda *_: "logits differ")
    path = tmp_path / "generate.json"
    assert generate_command(path) == 1
    assert [(r.status, r.reason) for r in load(path).find(contestant=OURS)] == [("wrong", "logits differ")]


@pytest.mark.usefixtures("small")
def test_cases_beyond_the_budget_are_listed(tmp_path: Path) -> None:
    """A budget that is ignored, or that drops cases without a note."""
    path = tmp_path / "norm.json"
    flags = ["--device", "cpu", "--budget", "0.001s", "--contestants", "reference", "--json", str(path)]
    assert command(find_bench("norm"), flags) == 0
    report = load(path)
    assert len({(row.op, row.case) for row in report.rows}) == 1
    (dropped,) = [note for note in report.notes if note.startswith("left out for the budget")]
    assert "add_layer_norm" in dropped


@pytest.mark.usefixtures("small")
def test_a_bench_on_a_cpu_has_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m bench.attention`, as the README has it, that takes half an hour on a CPU."""
    assert command(find_bench("norm"), ["--device", "cpu", "--contestants", "reference"]) == 0
    assert "left out for the budget: add_layer_norm" in capsys.readouterr().out


def bad(run: Callable[[list[str]], int], *cases: tuple[list[str], str]) -> list[object]:
    return [pytest.param(run, arguments, message, id=" ".join(arguments)) for arguments, message in cases]


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        *bad(
            lambda a: command(BENCH, a),
            (["--quik"], "nearest valid one is '--quick'"),
            (["--op", "causal"], "nearest valid one is 'causal_attention' (of causal_attention, "),
            (["--contestants", "flash_attn"], "nearest valid one is 'flash-attn'"),
            (["--contestants", "flash-attn"], "flash-attn cannot run: not installed"),
            (["--dtype", "bf17"], "expected auto|fp32|fp16|bf16|fp64"),
            (["--device", "tpu"], "device is 'tpu'"),
            (["--device", "meta"], "device is 'meta', expected cpu or cuda"),
            (["--budget", "soon"], "expected a duration"),
            (["attention"], "unexpected argument"),
        ),
        *bad(
            lambda a: run_command("bench", whole.main, a),
            (["atention"], "nearest valid one is 'attention'"),
            (["--budget", "0"], "expected a duration"),
            (["--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
            (["--qick"], "nearest valid one is '--quick'"),
        ),
        *bad(
            lambda a: run_command("bench.train", bench.train.main, a),
            (["--preset", "gpt3"], "'gpt3' is unknown"),
            (["--batch_size", "-3"], "--batch_size is -3"),
        ),
        *bad(
            lambda a: run_command("bench.generate", bench.generate.main, a),
            (["--batch_size", "1", "x"], "--batch_size is 'x'"),
        ),
        *bad(
            lambda a: run_command("bench.safety", bench.safety.main, a),
            (["--op", "norm_layer"], "nearest valid one is 'layer_norm'"),
            ([], "no GPU was found"),
        ),
    ],
)
def test_bad_input_is_one_line(
    run: Callable[[list[str]], int], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback or a help page, or a run that starts in spite of a wrong flag."""
    if torch.cuda.is_available() and message == "no GPU was found":
        pytest.skip("there is a GPU")
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "clock:" not in captured.out


def test_the_baseline_has_the_same_loss() -> None:
    """A baseline that is faster because it computes something else."""
    idx, targets = torch.randint(TINY.vocab_size, (2, 3, 16))
    targets[0, :5] = IGNORED
    model = GPT(TINY)
    torch.testing.assert_close(bench.train.whole_logits(model, idx, targets), model(idx, targets))


@pytest.mark.parametrize(
    ("device", "dtype", "predicted"),
    [
        ("NVIDIA H200", torch.bfloat16, True),
        ("NVIDIA H200", torch.float32, False),
        ("NVIDIA H20", torch.bfloat16, False),
    ],
)
def test_a_prediction_is_called_one(
    device: str, dtype: torch.dtype, predicted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction that reads as a measurement or is for another GPU; a baseline padded silently."""
    report = Report("bench.train", replace(MACHINE, device=device))
    clock = Clock(torch.device("cpu"))
    clock.on_gpu = True
    monkeypatch.setattr(bench.train, "_enter", lambda build, clock: bench.train.Entrant(problem="not built"))
    monkeypatch.setattr(bench.train, "_peak", lambda clock, report, dtype: 1e15)
    monkeypatch.setattr(bench.train, "autocast_dtype", lambda name, device: dtype)
    config = GPTConfig()
    train = TrainConfig(batch_size=64)
    list(bench.train.run(config, train, clock, report, seconds=0.1, quick=True))

    assert "vocabulary: fused-gpt 50,257, plain PyTorch padded to 50,304" in report.notes
    times = predict(config, find_gpu("H200"), 64)
    expected = (
        f"fused-gpt, predicted and not measured: {1e3 * times.gpu_seconds:.1f} ms of the GPU and "
        f"{1e3 * times.host_seconds:.1f} ms of the host for a step (gpt.info shows the components)"
    )
    assert [note for note in report.notes if "predicted" in note] == [expected] * predicted


@pytest.mark.usefixtures("small")
def test_results_are_written_before_the_baseline_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped while the baseline compiles leaves a file without the times of this package."""
    path = tmp_path / "train.json"
    enter, seen = bench.train._enter, []

    def entering(build: Any, clock: Any) -> Any:
        if path.exists():
            seen.append([(row.contestant, row.status) for row in load(path).rows])
        clock.on_gpu = False
        entrant = enter(build, clock)
        clock.on_gpu = True
        return entrant

    monkeypatch.setattr(bench.train, "_enter", entering)
    monkeypatch.setattr(
        bench.train,
        "interleave",
        lambda lanes, clock, seconds: dict.fromkeys(lanes, Timing(1.0, 1.0, 1.0, 5)),
    )
    assert train_command(path) == 0
    assert seen == [[(OURS, "measured")]]
    assert [row.status for row in load(path).rows] == ["measured", "measured"]
    assert load(path).complete
