"""Two and four processes share a model by DDP and FSDP2; one process is the oracle. See parallel_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.parallel
from gpt import InputError, TrainConfig, Trainer
from gpt.training.distributed import Ranks
from tests.gpt.training.forks import needs_fork
from tests.gpt.training.parallel_ranks import DATA, ENGINES, RATE, TARGETS, UPDATE, SlowSaver, Update, update
from tests.gpt.training.ranks import without_noise
from tests.gpt.training.small_runs import CONFIG, make_model

pytestmark = needs_fork

ROOT = Path(__file__).parents[3]
Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the scenarios, by number of processes and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    # Not with -m: what is pickled would then belong to the module __main__.
    program = "import sys; from tests.gpt.training.parallel_ranks import main; main(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in (2, 4)
    }


def assert_close(actual: Update, expected: Update) -> None:
    """Equal up to the rounding of float32, as of sums in another order."""
    assert actual.losses == pytest.approx(expected.losses, rel=1e-6)
    assert actual.norms == pytest.approx(expected.norms, rel=1e-6)
    for ours, theirs in zip(actual.gradients, expected.gradients, strict=True):
        ulp = torch.finfo(torch.float32).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * ulp)
    for ours, theirs in zip(actual.parameters, expected.parameters, strict=True):
        # AdamW divides a gradient by its own size, so the rounding of a tiny one shows: 0.5% of two steps.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.005 * 2 * RATE)


@cache
def one_process(optimizer: str) -> Update:
    """The update of one process, with one micro-batch."""
    return update(len(TARGETS), replace(UPDATE, optimizer=optimizer))


@pytest.mark.parametrize("batch_size", [4, 1])
def test_an_update_does_not_depend_on_micro_batches(batch_size: int) -> None:
    """Micro-batches with equal weight, whatever the number of their targets."""
    assert_close(update(batch_size), one_process("adamw"))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_does_not_depend_on_ranks(results: Results, engine: str) -> None:
    """Ranks with equal weight whatever their targets, or a norm or an update of one rank's shards."""
    for size in (2, 4):
        first, *others = [rank["engines"][engine] for rank in results[size]]
        assert_close(first, one_process(ENGINES[engine].optimizer))
        for other in others:
            assert other.losses == first.losses
            assert other.norms == first.norms
            assert all(map(torch.equal, other.parameters, first.parameters))


def test_compiled_ranks_take_the_same_steps(results: Results) -> None:
    """Gradients that a compiled model leaves out of the sums, or a compiled block that is not sharded."""
    for rank in results[2]:
        plain_ddp, compiled_ddp, plain_fsdp, compiled_fsdp = rank["compiled"]
        assert_close(compiled_ddp, plain_ddp)
        assert_close(compiled_fsdp, plain_fsdp)


def test_fused_ops_take_the_same_steps(results: Results) -> None:
    """A kernel that reads the shard of a weight, or a tied head whose gradient lacks one of its two uses."""
    expected = update(len(TARGETS), model=make_model(DATA, dropout=0.0, qkv_bias=False))
    for rank in results[2]:
        for actual in rank["fused"]:
            assert_close(actual, expected)


def test_the_first_step_is_rounded_as_the_later_ones(results: Results) -> None:
    """Buckets that DDP arranges after the first step: a resumed run would then differ in its first step."""
    assert [rank["first_step"] for rank in results[4]] == [[True, True]] * 4


def test_gradients_are_summed_while_backward_goes_on(results: Results) -> None:
    """Sums that are started after the backward pass, or one for each micro-batch."""
    for rank in results[4]:
        for sums, started, ended in rank["overlap"]:
            assert sums == rank["overlap"][0][0] >= 4
            assert ended <= started == sums - 1


def test_sharded_blocks_compute_in_the_dtype_of_the_run(results: Results) -> None:
    """Weights that are gathered in float32 and cast after, or a loss that half precision changes more."""
    for rank in results[4]:
        dtypes, losses = rank["precision"]
        assert dtypes == {"Linear": torch.bfloat16, "Embedding": torch.float32}
        assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-3)


def test_a_sharded_run_equals_one_process(results: Results) -> None:
    """A rank with other weights or more evaluations; a sample of one shard; other data than one process."""
    records: list[dict[str, Any]] = []
    config = replace(CONFIG, grad_accum=4, eval_batches=5)
    expected = Trainer(without_noise(), DATA, config, on_log=records.append).run()
    actual, result, shapes = results[4][0]["whole_run"]
    for name in ("train_loss", "gradient_norm", "train_estimate", "validation_loss"):
        assert [r[name] for r in actual if name in r] == pytest.approx(
            [r[name] for r in records if name in r], rel=1e-5
        )
    whole_batches: list[dict[str, Any]] = []
    config = replace(CONFIG, batch_size=8, grad_accum=1)
    Trainer(without_noise(), DATA, config, on_log=whole_batches.append).run()
    losses = [[r["train_loss"] for r in log if "train_loss" in r] for log in (actual, whole_batches)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    assert result.sample == expected.sample
    assert [rank["whole_run"][1].sample for rank in results[4]] == [expected.sample] * 4
    assert shapes["blocks.0.ffn.up.weight"] == (16, 16)


def test_parameters_without_gradients_are_left(results: Results) -> None:
    """An engine that waits for the gradient of a frozen parameter, or that changes it."""
    assert [rank["frozen"] for rank in results[4]] == [True] * 4


def test_bench_times_every_lane(
    results: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A lane that takes no steps, a percentage of another lane, a save's two times mixed, or lost figures."""
    figures = results[2][0]["lanes"]
    assert tuple(figures.seconds) == bench.parallel.LANES
    assert min(figures.seconds.values()) > 0
    assert 0 <= figures.ended <= figures.started < figures.sums
    nbytes, blocked, complete = figures.saved
    assert nbytes > 3 * 4 * sum(p.numel() for p in without_noise().parameters())
    assert 0 < blocked <= complete - SlowSaver.WAIT

    seconds = dict(zip(bench.parallel.LANES, (0.1, 0.125, 0.12, 0.15, 0.1), strict=True))
    fixed = bench.parallel.Figures(seconds, (3 * 2**22, 0.5, 2.0), sums=4, started=3, ended=2)
    monkeypatch.setattr(bench.parallel, "_run", lambda *args: fixed)
    assert bench.parallel.main(["--json", str(tmp_path / "figures.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["apart", "125", "ms", "+25.0%"] in lines
    assert ["plain", "DDP", "120", "ms", "+20.0%", "-4.0%"] in lines
    assert ["ddp", "150", "ms", "+50.0%", "+20.0%", "+25.0%"] in lines
    assert ["fsdp", "100", "ms", "+0.0%", "-20.0%", "-16.7%"] in lines
    assert " ".join(lines[-2]) == (
        "fsdp: a checkpoint of 12.0 MiB blocks training for 500 ms, and is complete after 2.00 s"
    )
    assert lines[-1][:10] == ["DDP:", "3", "of", "4", "sums", "are", "started,", "2", "have", "ended,"]
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved["figures"]["seconds"] == seconds


@pytest.mark.parametrize(("parallel", "size"), [("fsdp", 3), ("ddp", 2), ("fsdp", 8)])
def test_shards_of_another_size_are_refused(parallel: str, size: int) -> None:
    """A device mesh that leaves ranks out, or a flag that is ignored."""
    config = TrainConfig(grad_accum=4, device="cpu", parallel=parallel, shard_size=size)
    with pytest.raises(InputError, match=f"shard_size is {size} with --parallel {parallel}, expected a div"):
        Ranks(size=4).check(config)


def test_one_process_ignores_the_engine() -> None:
    """A single process that needs a process group because of a flag of its run."""
    model = without_noise()
    Trainer(model, DATA, replace(UPDATE, parallel="fsdp"))
    assert type(model).__name__ == "GPT"
