"""Several processes against one: what two say to one another, and `torchrun`. The processes run ranks.py."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import InputError, TrainConfig, Trainer
from gpt.data.dataset import TokenData
from gpt.training.distributed import Ranks, join
from gpt.weights import checkpoint
from tests.gpt.text import TEXT
from tests.gpt.training.ranks import MUON, PLAIN, steps, without_noise
from tests.gpt.training.small_runs import make_model, read_log

ROOT = Path(__file__).parents[3]
SHAPE = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 "
    "--batch_size 4 --eval_batches 2 --device cpu --use_triton false"
)
TINY = SHAPE.split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


class Pair:
    """Two processes that have run: what they found, said and returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = folder / "text.txt"
        text.write_text(TEXT)
        with socket.socket() as first, socket.socket() as second:
            for s in (first, second):
                s.bind(("127.0.0.1", 0))
            ports = {"MASTER_PORT": str(first.getsockname()[1]), "SECOND_PORT": str(second.getsockname()[1])}
        common = (
            os.environ
            | ENVIRONMENT
            | ports
            | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        )
        wrong = [*TINY, "--data", str(text), "--grad_accum", "3", "--out", str(folder / "wrong")]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.gpt.training.ranks", str(folder), *wrong],
                cwd=ROOT,
                env=common
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "FUSED_GPT_CACHE": str(folder / "cache")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            self.said = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        self.codes = [process.returncode for process in processes]
        files = [folder / f"rank-{rank}.pt" for rank in range(2)]
        assert all(file.exists() for file in files), self.said
        self.found = [torch.load(file, weights_only=False) for file in files]

    def __call__(self, scenario: str) -> list[Any]:
        """What each rank found."""
        return [found[scenario] for found in self.found]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def test_steps_weigh_the_targets_of_all_ranks(pair: Pair) -> None:
    """Ranks that count the same, however few targets they have, gradients averaged or clipped before they are
    summed."""
    expected = steps()
    for found in pair("steps"):
        for (loss, norm, gradients), (one_loss, one_norm, one_gradients) in zip(found, expected, strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-6)
            assert norm == pytest.approx(one_norm, rel=1e-5)
            for ours, theirs in zip(gradients, one_gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(*pair("steps"), strict=True):
        assert ours[:2] == theirs[:2]
        assert all(map(torch.equal, ours[2], theirs[2]))


def test_a_run_is_that_of_one_process(pair: Pair, tmp_path: Path) -> None:
    """A step that takes other micro-batches, or one of them twice; parameters that differ; a part of an
    evaluation left out."""
    trainer = Trainer(without_noise(), TokenData.from_text(TEXT), PLAIN, out=tmp_path)
    before = trainer.evaluate("validation")
    result = trainer.run()
    ours, theirs = read_log(pair.folder / "curve"), read_log(tmp_path)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for name in ("tokens", "learning_rate", "bigram_loss"):
        assert [record.get(name) for record in ours] == [record.get(name) for record in theirs]
    for name in ("train_loss", "gradient_norm", "train_estimate", "validation_loss"):
        assert [r[name] for r in ours if name in r] == pytest.approx(
            [r[name] for r in theirs if name in r], rel=1e-5
        )
    (first, second) = pair("curve")
    assert first[0] == second[0] == pytest.approx(before, rel=1e-6)
    assert first[1] == second[1]
    assert first[1].bigram_loss == result.bigram_loss
    assert all(torch.equal(p, second[3][name]) for name, p in first[3].items())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(first[3][name], p, rtol=1e-4, atol=1e-5)


def test_rank_0_writes(pair: Pair) -> None:
    """A file that two processes write at the same time, or a log with every step twice."""
    first, second = pair("curve")
    assert (first[2], second[2]) == (4, 0)
    out = pair.folder / "curve"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "log.jsonl",
        "loss.png",
        "sample.txt",
    ]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-4", "step-6", "step-8"]
    assert [record["step"] for record in read_log(out)] == [*range(1, 9)]
    assert (out / "sample.txt").read_text() == second[1].sample + "\n"


def test_speed_counts_all_ranks(pair: Pair) -> None:
    """Tokens per second, or a share of the peak, of one process where all have worked."""
    for earlier, later in itertools.pairwise(read_log(pair.folder / "curve")):
        seconds = later["seconds"] - earlier["seconds"]
        assert later["tokens_per_second"] == pytest.approx(4 * 2 * 16 / seconds)


def test_a_stopped_run_goes_on_bit_by_bit(pair: Pair) -> None:
    """A signal to one process that leaves the others waiting, or dropout that goes on with the masks of
    another rank."""
    for straight, stopped, resumed in pair("interrupted"):
        assert (stopped.step, stopped.signal) == (4, signal.SIGTERM)
        assert replace(resumed, checkpoint=None) == replace(straight, checkpoint=None)
    last = [pair.folder / name / "checkpoints/step-8" for name in ("straight", "stopped")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        straight, stopped = (checkpoint.read_tensors(folder / name) for folder in last)
        assert all(torch.equal(straight[key], stopped[key]) for key in straight)
    states = [checkpoint.read_json(folder / "state.json")["rng"] for folder in last]
    assert states[0] == states[1]
    assert states[0][0] != states[0][1]


def test_another_number_of_processes_goes_on(pair: Pair, tmp_path: Path) -> None:
    """A run that can only be resumed on the machine that it began on, or a change of its random numbers that
    nobody is told."""
    data = TokenData.from_text(TEXT)
    source = pair.folder / "straight/checkpoints/step-8"
    shutil.copytree(source, tmp_path / "checkpoints/step-8")
    draws = []
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"saved by 2 process\(es\) and goes on with 1"):
            trainer = Trainer(make_model(data), data, replace(MUON, max_steps=9), out=tmp_path, resume=True)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    assert trainer.step == 8
    saved = checkpoint.read_tensors(source / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in trainer.model.named_parameters())


def test_masks_differ(pair: Pair) -> None:
    """The same dropout on every rank, which makes a step's micro-batches less independent than they look."""
    (first, plain), (second, also_plain) = pair("masks")
    assert plain == also_plain
    assert first != second


def test_an_error_of_one_is_raised_by_all(pair: Pair) -> None:
    """A process that waits for one that has failed."""
    assert pair("failures") == [["from 1", "from 0"]] * 2
    first, second = pair("failing_trainer")
    assert first == second
    assert "file-1 is not a folder" in first[0]
    assert "No space left on device" in first[1]
    assert not (pair.folder / "free").exists()


def test_what_is_not_finite_on_one_stops_all(pair: Pair) -> None:
    """Parameters that differ from then on, or the batch of another rank kept."""
    (message, same), (also, also_same) = pair("non_finite")
    assert message == also
    assert re.match(
        r"step 1: the loss is (inf|nan); stopped before it changed anything, its batch is in", message
    )
    assert same
    assert also_same
    kept = checkpoint.read_tensors(pair.folder / "inf/non-finite-step-1.safetensors")
    assert {key.split("/")[0] for key in kept} == {"0", "1", "2", "3"}
    assert pair("overflow") == [(0.5, True)] * 2


def test_bad_input_is_said_once(pair: Pair) -> None:
    """A line for each process, another exit code, or a folder that was made before the check."""
    assert pair.codes == [2, 2]
    (printed, error), silence = pair.said
    assert silence == ("", "")
    assert not printed.startswith("model")
    assert error.splitlines()[-1].startswith("gpt.train: grad_accum is 3, expected a multiple of 2")
    assert error.count("gpt.train") == 1
    assert not (pair.folder / "wrong").exists()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on one GPU."""
    second = Ranks(rank=1, size=2, local_rank=1, local_size=2)
    second.check(TrainConfig(grad_accum=2, device="cpu"))
    with pytest.raises(InputError, match="device is 'cuda:0', expected cpu or cuda: process 1 has cuda:1"):
        second.check(TrainConfig(grad_accum=2, device="cuda:0"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match="--nproc_per_node is 2, expected at most 1, the GPUs here"):
            second.check(TrainConfig(grad_accum=2, device=device))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    second.check(TrainConfig(grad_accum=2, device="cuda"))


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process that needs what torchrun sets."""
    for size in (None, "1"):
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with join() as ranks:
            assert ranks == Ranks()
        assert not torch.distributed.is_initialized()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_torchrun(tmp_path: Path) -> None:
    """A command that does not start under torchrun, says everything twice, or is killed by SIGTERM before it
    has saved."""
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
