"""Training in two processes, compared with one process, and under `torchrun`. They run ranks.py."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import InputError, TrainConfig, Trainer
from gpt.data.dataset import TokenData
from gpt.errors import MachineError, NonFiniteError
from gpt.files import read_json
from gpt.training import distributed
from gpt.training.distributed import Ranks, join
from gpt.training.run_folder import LOCK
from gpt.weights import checkpoint
from gpt.weights.tensors import read_tensors
from tests.gpt.text import TEXT
from tests.gpt.training.forks import needs_fork
from tests.gpt.training.ranks import MUON, PLAIN, steps, without_noise
from tests.gpt.training.small_runs import make_model, read_log

ROOT = Path(__file__).parents[3]
SHAPE = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 "
    "--batch_size 4 --eval_batches 2 --device cpu --use_triton false"
)
TINY = SHAPE.split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

pytestmark = needs_fork


class Pair:
    """Runs ranks.py, which forks two processes; keeps their results, and how gpt.train ended in each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = folder / "text.txt"
        text.write_text(TEXT)
        program = [sys.executable, "-m", "tests.gpt.training.ranks", str(folder)]
        wrong = [*TINY, "--data", str(text), "--grad_accum", "3", "--out", str(folder / "wrong")]
        environment = os.environ | ENVIRONMENT | {"FUSED_GPT_CACHE": str(folder / "cache")}
        done = subprocess.run(
            [*program, *wrong], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        self.commands = json.loads((folder / "command.json").read_text())
        self.results = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]

    def __call__(self, scenario: str) -> list[Any]:
        """The result of a scenario on each rank."""
        return [results[scenario] for results in self.results]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def test_nothing_keeps_the_process_group(pair: Pair) -> None:
    """A group whose threads run while the interpreter exits, which now and then aborts a process."""
    assert pair("group lives") == [False, False]


def test_steps_weigh_the_targets_of_all_ranks(pair: Pair) -> None:
    """Ranks with equal weight whatever their targets, or gradients averaged or clipped before the sum."""
    expected = steps()
    for actual in pair("steps"):
        for (loss, norm, gradients), (one_loss, one_norm, one_gradients) in zip(
            actual, expected, strict=True
        ):
            assert loss == pytest.approx(one_loss, rel=1e-6)
            assert norm == pytest.approx(one_norm, rel=1e-5)
            for gradient, one_gradient in zip(gradients, one_gradients, strict=True):
                torch.testing.assert_close(gradient, one_gradient, rtol=1e-4, atol=1e-7)
    for first, second in zip(*pair("steps"), strict=True):
        assert first[:2] == second[:2]
        assert all(map(torch.equal, first[2], second[2]))


def test_a_run_equals_one_process(pair: Pair, tmp_path: Path) -> None:
    """Other micro-batches, one of them twice, unequal parameters, or an incomplete evaluation."""
    trainer = Trainer(without_noise(), TokenData.from_text(TEXT), PLAIN, out=tmp_path)
    before = trainer.evaluate("validation")
    result = trainer.run()
    actual, expected = read_log(pair.folder / "curve"), read_log(tmp_path)
    assert [record["step"] for record in actual] == [record["step"] for record in expected]
    for name in ("tokens", "learning_rate", "bigram_loss"):
        assert [record.get(name) for record in actual] == [record.get(name) for record in expected]
    for name in ("train_loss", "gradient_norm", "train_estimate", "validation_loss"):
        assert [r[name] for r in actual if name in r] == pytest.approx(
            [r[name] for r in expected if name in r], rel=1e-5
        )
    (first, second) = pair("curve")
    assert first[0] == second[0] == pytest.approx(before, rel=1e-6)
    assert first[1] == second[1]
    assert first[1].bigram_loss == result.bigram_loss
    assert all(torch.equal(p, second[3][name]) for name, p in first[3].items())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(first[3][name], p, rtol=1e-4, atol=1e-5)


def test_only_rank_0_writes(pair: Pair) -> None:
    """A file that two processes write at once, or a log with every step twice."""
    first, second = pair("curve")
    assert (first[2], second[2]) == (4, 0)
    out = pair.folder / "curve"
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "checkpoints",
        "log.jsonl",
        "loss.png",
        "sample.txt",
    ]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-4", "step-6", "step-8"]
    assert [record["step"] for record in read_log(out)] == [*range(1, 9)]
    assert (out / "sample.txt").read_text() == second[1].sample + "\n"


def test_speed_counts_all_ranks(pair: Pair) -> None:
    """Tokens per second of one process instead of all."""
    for earlier, later in itertools.pairwise(read_log(pair.folder / "curve")):
        seconds = later["seconds"] - earlier["seconds"]
        assert later["tokens_per_second"] == pytest.approx(4 * 2 * 16 / seconds)


def test_a_resumed_run_is_equal_bit_by_bit(pair: Pair) -> None:
    """A signal to one process that leaves the others waiting, or a resume with another rank's dropout."""
    for straight, stopped, resumed in pair("interrupted"):
        assert (stopped.step, stopped.signal) == (4, signal.SIGTERM)
        assert replace(resumed, checkpoint=None) == replace(straight, checkpoint=None)
    last = [pair.folder / name / "checkpoints/step-8" for name in ("straight", "stopped")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        straight, stopped = (read_tensors(folder / name) for folder in last)
        assert all(torch.equal(straight[key], stopped[key]) for key in straight)
    states = [read_json(folder / "state.json")["rng"] for folder in last]
    assert states[0] == states[1]
    assert states[0][0] != states[0][1]


def test_another_number_of_processes_can_resume(pair: Pair, tmp_path: Path) -> None:
    """A resume that needs the same number of processes, or other random numbers without a warning."""
    data = TokenData.from_text(TEXT)
    source = pair.folder / "straight/checkpoints/step-8"
    shutil.copytree(source, tmp_path / "checkpoints/step-8")
    draws = []
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"saved by 2 process\(es\) and --parallel ddp and continues with 1 "
        ):
            trainer = Trainer(make_model(data), data, replace(MUON, max_steps=9), out=tmp_path, resume=True)
        draws.append(torch.rand(3))
        step, parameters = trainer.step, dict(trainer.model.named_parameters())
        del trainer  # which holds the lock of the folder
    assert torch.equal(*draws)
    assert step == 8
    saved = read_tensors(source / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in parameters.items())


def test_each_rank_has_its_own_dropout_masks(pair: Pair) -> None:
    """The same dropout masks on every rank, which correlates the micro-batches of a step."""
    (first, plain), (second, also_plain) = pair("masks")
    assert plain == also_plain
    assert first != second


def test_an_error_of_one_rank_is_raised_by_all(pair: Pair) -> None:
    """A process that waits for another one that has failed."""
    errors = [(InputError, "from 1", True), (MachineError, "from 0", True), (NonFiniteError, "nan", True)]
    assert pair("failures") == [errors] * 2
    first, second = pair("failing_trainer")
    assert first == second
    assert "file-1 is not a folder" in first[0]
    assert "No space left on device" in first[1]
    assert not (pair.folder / "free").exists()


def test_ranks_with_other_settings_are_refused(pair: Pair) -> None:
    """Ranks that train together although they differ in a flag, text, seed or weights, and exit with 0."""
    first, second = pair("different")
    assert first == second
    assert first.pop("equal") == ""
    words = {
        "seed": "rank 1: seed is 2, expected 1337 as on rank 0",
        "batch_size": "rank 1: batch_size is 8, expected 4 as on rank 0",
        "data": "rank 1: the hash of text and tokenizer is ",
        "tokenizer": "rank 1: vocab_size is ",
        "config": "rank 1: beta1 is 0.9, expected 0.8 as on rank 0",
        "strict": "rank 1: strict is True, expected False as on rank 0",
        "pack_documents": "rank 1: pack_documents is True, expected False as on rank 0",
        "init": "rank 1: the hash of the weights of init is ",
    }
    for name, message in first.items():
        assert message.startswith(words.pop(name)), message
    assert not words


def test_a_non_finite_loss_of_one_rank_stops_all(pair: Pair) -> None:
    """A step that only one rank skips, or kept batches that are not the failed ones."""
    (message, same), (also, also_same) = pair("non_finite")
    assert message == also
    assert re.match(
        r"step 1: the loss is (inf|nan); stopped before it changed anything, its batch is in", message
    )
    assert same
    assert also_same
    kept = read_tensors(pair.folder / "inf/non-finite-step-1.safetensors")
    assert {key.split("/")[0] for key in kept} == {"0", "1", "2", "3"}
    assert pair("overflow") == [(0.5, True)] * 2


def test_a_late_non_finite_loss_stops_all(pair: Pair) -> None:
    """A rank that names another step, or that updates in the step after the failed one."""
    (message, *first), (also, *second) = pair("late")
    assert message == also
    assert message.startswith("step 3: the loss is nan; stopped before it changed anything")
    assert first == second == [2, True]


def test_bad_input_is_reported_once(pair: Pair) -> None:
    """One error line per process, a wrong exit code, or a folder created before the check."""
    first, second = pair.commands
    assert [first["code"], second["code"]] == [2, 2]
    assert second["output"] == second["errors"] == ""
    assert not first["output"].startswith("model")
    error = first["errors"]
    assert error.splitlines()[-1].startswith("gpt.train: grad_accum is 3, expected a multiple of 2")
    assert error.count("gpt.train") == 1
    assert not (pair.folder / "wrong").exists()


def test_each_process_needs_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that share one GPU."""
    second = Ranks(rank=1, size=2, local_rank=1, local_size=2)
    second.check(TrainConfig(grad_accum=2, device="cpu"))
    with pytest.raises(InputError, match="device is 'cuda:0', expected cpu or cuda: process 1 uses cuda:1"):
        second.check(TrainConfig(grad_accum=2, device="cuda:0"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(
            InputError, match="--nproc_per_node is 2, expected at most 1, the GPUs of this machine"
        ):
            second.check(TrainConfig(grad_accum=2, device=device))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    second.check(TrainConfig(grad_accum=2, device="cuda"))


def test_one_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process that requires torchrun's environment variables."""
    for size in (None, "1"):
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with join() as ranks:
            assert ranks == Ranks()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("text", ["0", "00", "-1", "1.5", "", " 5", "1" * 11])
def test_a_timeout_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout of zero, which ends every run, or one that overflows."""
    monkeypatch.setenv(distributed.TIMEOUT, text)
    with pytest.raises(InputError, match=r"FUSED_GPT_RANK_TIMEOUT is .*, expected seconds, as in 1800"):
        distributed._timeout()
    monkeypatch.setenv(distributed.TIMEOUT, "60")
    assert distributed._timeout().total_seconds() == 60


def test_torchrun_stops_and_saves(tmp_path: Path) -> None:
    """A command that fails under torchrun, prints everything twice, or does not save on SIGTERM."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "gpt.train",
        *TINY,
    ]
    command += [
        "--data",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "run"),
        "--grad_accum",
        "2",
        "--eval_interval",
        "5",
    ]
    with subprocess.Popen(
        [*command, "--max_steps", "1000000"],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        begun = list(itertools.takewhile(lambda line: not line.startswith("step "), process.stdout))
        process.send_signal(signal.SIGTERM)
        printed, shown = process.communicate(timeout=60)
    assert sum(line.startswith("model: ") for line in begun) == 1, shown
    assert "float32 on cpu, 2 processes" in "".join(begun) or "bfloat16 on cpu, 2 processes" in "".join(begun)
    step = int(re.search(r"stopped at step (\d+), saved in ", printed)[1])
    assert printed.count("stopped at step") == 1
    assert (
        f"run --nproc_per_node 2 -m gpt.train --out {tmp_path / 'run'} --resume" in printed.splitlines()[-1]
    )
    assert checkpoint.find_checkpoint(tmp_path / "run").name == f"step-{step}"
    assert "SIGKILL" not in shown


@pytest.mark.slow
def test_restarted_ranks_go_on(tmp_path: Path) -> None:
    """A killed rank after which torchrun's restart finds the folder locked, or begins the run again."""
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["--max-restarts", "1", "-m", "gpt.train", *TINY, "--data", str(tmp_path / "text.txt")]
    flags = ["--out", str(out), "--resume", "auto", "--grad_accum", "2", "--eval_interval", "20"]
    with subprocess.Popen(
        [*launch, *command, *flags, "--max_steps", "200"],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        list(itertools.takewhile(lambda line: not line.startswith("step 40:"), process.stdout))
        os.kill(int((out / LOCK).read_text().split()[1]), signal.SIGKILL)
        printed, shown = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    evaluated = [int(step) for step in re.findall(r"^step (\d+):", printed, re.MULTILINE)]
    assert evaluated[-1] == 200
    assert printed.count("model: ") == 1
    steps = [record["step"] for record in read_log(out)]
    assert steps == sorted(set(steps))
    assert read_log(out)[-1]["final"]
