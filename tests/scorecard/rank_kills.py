"""What the rows of killed ranks do in the worker: one of two is killed at a random time; the run goes on."""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import time
from pathlib import Path

import torch._dynamo  # DDP and FSDP2 import it, too late for the forks
import torch.distributed.fsdp  # noqa: F401
from matplotlib.figure import Figure

from gpt import train
from gpt.training import lost_ranks
from gpt.weights import checkpoint
from tests.scorecard.crash_operations import TEXT, TINY, save_curves
from tests.scorecard.crash_trials import Child, Ended, difference, judge, snapshot
from tests.scorecard.row import Outcome

RANKS = 2
STEPS = 10
FLAGS = f"--grad_accum {RANKS} --max_steps {STEPS} --checkpoint_interval 1 --dropout 0.1"
ANSWERS, TIMEOUT = 1.0, "15"  # seconds; a run has 10 and half an hour
LIMIT = 60.0  # seconds that both ranks may take to end


class Pair:
    """A run in two processes, as torchrun starts them; nothing ends one when the other has ended."""

    def __init__(self, parallel: str, folder: Path) -> None:
        self.parallel, self.folder = parallel, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.text = folder / "text.txt"
        self.text.write_text(TEXT)
        started = time.perf_counter()
        ends = self.wait(self.start(folder / "undisturbed"))
        self.duration = time.perf_counter() - started
        assert [end.code for end in ends] == [0] * RANKS, ends
        self.after = snapshot(folder / "undisturbed")

    def start(self, out: Path) -> list[Child]:
        """Starts the run, or goes on with it, in the folder `out`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [
            Child(functools.partial(self._train, out, rank, port), self.folder / f"rank-{rank}")
            for rank in range(RANKS)
        ]

    def _train(self, out: Path, rank: int, port: str) -> int:
        variables = {
            **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(RANKS)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "FUSED_GPT_RANK_TIMEOUT": TIMEOUT,
            "FUSED_GPT_CACHE": str(self.folder / "cache"),
        }
        os.environ.update(variables)
        lost_ranks.ANSWERS = ANSWERS
        Figure.savefig = save_curves  # drawing takes half of the time of such a run
        flags = [*TINY, *FLAGS.split(), "--parallel", self.parallel, "--data", str(self.text)]
        return train.main([*flags, "--out", str(out), "--resume", "auto"])

    @staticmethod
    def wait(ranks: list[Child]) -> list[Ended]:
        return [rank.wait(LIMIT) for rank in ranks]


def ddp(trials: int, seed: int, folder: Path) -> Outcome:
    """Kills a rank of a run whose ranks each have the whole model."""
    return _kills("ddp", trials, seed, folder)


def fsdp(trials: int, seed: int, folder: Path) -> Outcome:
    """Kills a rank of a run whose ranks share the model."""
    return _kills("fsdp", trials, seed, folder)


def _kills(parallel: str, trials: int, seed: int, folder: Path) -> Outcome:
    """Kills a rank in each trial, which goes on with the run of the one before, until that run has ended."""
    pair, rng, outcome = Pair(parallel, folder), random.Random(seed), Outcome()
    runs = kills = 0
    for i in range(trials):
        out = folder / f"run-{runs}"
        victim, saving = rng.randrange(RANKS), rng.random() < 0.5
        delay = rng.uniform(0, 0.005) if saving else rng.uniform(0, pair.duration)
        step = rng.randint(1, STEPS // 2)
        moment = f"{1000 * delay:.1f} ms into a save" if saving else f"after {delay:.2f} s"
        with outcome.trial(f"kill {i + 1}, of rank {victim}, {moment}", 2 * LIMIT):
            ranks = pair.start(out)
            if saving:
                _wait_for_save(ranks, out, step)
            ranks[victim].ended(delay)
            ranks[victim].send(signal.SIGKILL)
            newest = _newest(out)
            ends = pair.wait(ranks)
            kills += _check_ends(ends, victim)
            judge(functools.partial(_check_newest, out, newest), folder / "judge", LIMIT)
            if ends[0].code == 0 or i == trials - 1:
                _check_rest(pair, out)
                runs += 1
    outcome.worst = f"{kills} kills before the end of a run, {runs} runs compared"
    return outcome


def _newest(out: Path) -> int:
    """The step of the newest checkpoint that other processes see; 0 without one."""
    return max(map(checkpoint.step_of, checkpoint.list_checkpoints(out)), default=0)


def _wait_for_save(ranks: list[Child], out: Path, steps: int) -> None:
    """Returns when the run is writing a checkpoint `steps` steps after its start, or has ended."""
    first = _newest(out)
    while not any(rank.ended(0) for rank in ranks):
        if _newest(out) >= min(first + steps - 1, STEPS - 1) and any(out.glob("checkpoints/.*")):
            return
        time.sleep(0.0005)


def _check_ends(ends: list[Ended], victim: int) -> bool:
    """Whether the kill came in time; then the other rank must name the killed one, or AssertionError."""
    assert not any(end.hung for end in ends), f"a rank hangs: {ends}"
    other = ends[1 - victim]
    assert "Traceback" not in other.errors, f"a traceback: {other.errors[-500:]}"
    if ends[victim].code == 0 or other.code == 0:
        return False
    assert other.code == 5, f"exit code {other.code}, expected 5: {other.errors[-500:]}"
    lines = [line for line in other.errors.splitlines() if line.startswith("gpt.train: rank ")]
    assert len(lines) == 1, f"{len(lines)} lines name a rank: {other.errors[-500:]}"
    assert lines[0].startswith(f"gpt.train: rank {victim} "), f"another rank is named: {lines[0]}"
    return True


def _check_newest(out: Path, newest: int) -> None:
    """Raises AssertionError unless the checkpoints that existed before the kill, or later ones, are whole."""
    if newest:
        for folder in checkpoint.list_checkpoints(out):
            checkpoint.verify(folder)
        assert _newest(out) >= newest, f"step {newest} was saved, and the newest is step {_newest(out)}"
        checkpoint.load_model(out, use_triton=False)


def _check_rest(pair: Pair, out: Path) -> None:
    """Raises AssertionError unless the run, resumed, ends as the undisturbed one, bit for bit."""
    ends = pair.wait(pair.start(out))
    assert [end.code for end in ends] == [0] * RANKS, f"going on ended with {ends}"
    gap = difference(snapshot(out), pair.after)
    assert not gap, f"the whole run, compared with an undisturbed one, {gap}"
