"""The program that test_faults.py runs once: it imports torch, and forks for each rank of each scenario.

`python -m tests.gpt.training.faults FOLDER` writes the exit codes and the output of all ranks to FOLDER.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it, too late for the forks
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt import train
from gpt.data.dataset import TokenData
from gpt.training import lost_ranks, trainer
from gpt.weights import checkpoint
from tests.gpt.text import TEXT
from tests.gpt.training.forks import fork_ranks
from tests.scorecard.crash_operations import save_curves

FLAGS = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 2 --grad_accum 6 --eval_batches 1"
FLAGS += " --device cpu --use_triton false --max_steps 8 --eval_interval 4 --checkpoint_interval 2"
LIMIT = 30.0


def lines(errors: str) -> list[str]:
    """The lines of stderr with which a rank reports an error; warnings are left out."""
    reports = [line for line in errors.splitlines() if line.startswith("gpt.train: ")]
    return [line for line in reports if not line.startswith("gpt.train: warning: ")]


def nothing() -> None:
    """What most ranks do before they train."""


def at_step(step: int, action: Callable[[], Any]) -> None:
    """Calls `action` when the first batch of a step is drawn."""
    plain = TokenData.batch

    def batch(self: TokenData, stream: Any, *args: Any, **kwargs: Any) -> Any:
        if stream == "train" and kwargs["step"] == step:
            TokenData.batch = plain  # type: ignore[method-assign]
            action()
        return plain(self, stream, *args, **kwargs)

    TokenData.batch = batch  # type: ignore[method-assign]


def send(number: int, times: int = 1) -> None:
    """Sends signals to this process."""
    for _ in range(times):
        os.kill(os.getpid(), number)


class Scenario:
    """Runs gpt.train in forked processes, one per rank, without torchrun.

    Args:
        folder: Where the run and the output go.
        size: The number of ranks.
        variables: More of the environment.
    """

    def __init__(self, folder: Path, size: int, **variables: str) -> None:
        self.folder, self.size, self.variables = folder, size, variables

    def run(self, actions: dict[int, Callable[[], Any]], *flags: str) -> list[dict[str, Any]]:
        """How the ranks end; `actions` are called first. A rank that is left after LIMIT is killed."""
        ranks = fork_ranks(
            lambda rank: self._train(actions.get(rank, nothing), flags),
            self.size,
            self.folder,
            **self.variables,
        )
        end = time.monotonic() + LIMIT
        while sum(rank.ended(0.02) for rank in ranks) < self.size - (self._stopped(actions)):
            if time.monotonic() > end:
                break
        for rank in ranks:
            if not rank.ended(0):
                rank.send(signal.SIGKILL)
        return [asdict(rank.wait()) for rank in ranks]

    @staticmethod
    def _stopped(actions: dict[int, Callable[[], Any]]) -> int:
        return sum(action is hang for action in actions.values())

    def _train(self, action: Callable[[], Any], flags: tuple[str, ...]) -> int:
        lost_ranks.ANSWERS = 2.0
        action()
        return train.main([*FLAGS.split(), "--out", str(self.folder / "run"), *flags])


def hang() -> None:
    """Stops this process in the fourth step."""
    at_step(3, lambda: send(signal.SIGSTOP))


def killed() -> None:
    """Kills this process in the fourth step."""
    at_step(3, lambda: send(signal.SIGKILL))


def fails() -> None:
    """Raises what nobody expects in the fourth step."""
    at_step(3, lambda: 1 // 0)


def terminated() -> None:
    """What Slurm and torchrun do: two signals to each process."""
    at_step(3, lambda: send(signal.SIGTERM, times=2))


def other_triton() -> None:
    """Another version of triton."""
    train.version = lambda package: "9.9"


def other_python() -> None:
    """Another version of Python, of which the last number does not count."""
    platform.python_version_tuple = lambda: ("9", "9", "0")


def _steps(out: Path) -> list[int]:
    folders = checkpoint.list_checkpoints(out)
    for folder in folders:
        checkpoint.verify(folder)
    return [checkpoint.step_of(folder) for folder in folders]


def restarted(folder: Path, step: int, *flags: str, size: int = 2) -> dict[str, Any]:
    """A run under torchrun's agent, whose last rank is killed in a step of the first attempt."""
    for path in [*folder.glob("begun-*"), *folder.glob("rank-*")]:
        path.unlink()
    folder.mkdir(exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
    with suppress(ChildFailedError):
        elastic_launch(config, _worker)(str(folder), step, [*FLAGS.split(), *flags])
    (out,) = (folder / "runs").iterdir()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    begun = [(path.name, int(path.read_text())) for path in sorted(folder.glob("begun-*"))]
    reports = [lines(path.read_text()) for path in sorted(folder.glob("rank-*-2"))]
    return {
        "out": out.name,
        "steps": _steps(out),
        "final": log[-1].get("final"),
        "begun": begun,
        "reports": reports,
    }


def _worker(folder: str, step: int, flags: list[str]) -> None:
    os.chdir(folder)
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    last = int(rank) == int(os.environ["WORLD_SIZE"]) - 1
    for handle in (1, 2):
        os.dup2(os.open(f"rank-{rank}-{attempt}-{handle}", os.O_WRONLY | os.O_CREAT), handle)
    first: list[int] = []
    plain = TokenData.batch

    def batch(self: TokenData, stream: Any, *args: Any, **kwargs: Any) -> Any:
        if stream == "train" and not first:
            first.append(kwargs["step"])
            Path(f"begun-{attempt}-{rank}").write_text(str(kwargs["step"]))
        if stream == "train" and (attempt, kwargs["step"]) == ("0", step) and last:
            send(signal.SIGKILL)
        return plain(self, stream, *args, **kwargs)

    TokenData.batch = batch  # type: ignore[method-assign]
    if code := train.main(flags):
        raise SystemExit(code)


def main(folder: Path) -> None:
    """Runs all scenarios."""
    torch.set_num_threads(1)
    os.environ["FUSED_GPT_CACHE"] = str(folder / "cache")
    text = folder / "text.txt"
    text.write_text(TEXT)
    trainer.SAMPLE_TOKENS = 1
    Figure.savefig = save_curves
    data = ("--data", str(text))
    results: dict[str, Any] = {
        "restart": restarted(folder / "restart", 3, *data),
        "restart from": restarted(
            folder / "restart", 7, "--out", "runs/1", "--resume_from", "step-4", "--max_steps", "8"
        ),
        "refused": restarted(folder / "restart", 3, *data, "--out", "runs/1"),
        "alone": restarted(folder / "alone", 3, *data, size=1),
        "hang": Scenario(folder / "hang", 3, FUSED_GPT_RANK_TIMEOUT="3").run({1: hang}, *data),
        "kill": Scenario(folder / "kill", 3).run({0: killed}, *data),
        "bug": Scenario(folder / "bug", 2).run({1: fails}, *data),
        "terminated": Scenario(folder / "terminated", 2, TORCHELASTIC_RUN_ID="x").run(
            {0: terminated, 1: terminated}, *data
        ),
        "timeout": Scenario(folder / "timeout", 2, FUSED_GPT_RANK_TIMEOUT="soon").run({}, *data),
        "triton": Scenario(folder / "triton", 2).run({1: other_triton}, *data),
        "Python": Scenario(folder / "python", 2).run({1: other_python}, *data),
        "file": Scenario(folder / "file", 2, TORCHELASTIC_ERROR_FILE=str(folder / "error.json")).run(
            {}, *data, "--grad_accum", "3"
        ),
    }
    results["steps"] = {name: _steps(folder / name / "run") for name in ("hang", "kill", "bug", "terminated")}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
