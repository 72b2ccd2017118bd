"""What the rows of races.py do in the worker: kills and signals at random times, two processes at once."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpt import eval, info, sample
from gpt.training.run_folder import LOG
from gpt.weights import checkpoint
from tests.scorecard.crash_operations import TINY, Cache, SaveCheckpoint, SaveHuggingFace, SaveOwn, Train
from tests.scorecard.crash_trials import Child, Ended, difference, judge, snapshot
from tests.scorecard.row import HANG, Outcome

STOPS = {  # how a shell shows the end by these signals, of which the second may come too late
    (signal.SIGINT,): (130,),
    (signal.SIGTERM,): (143,),
    (signal.SIGHUP,): (129,),
    (signal.SIGINT, signal.SIGINT): (130,),
    (signal.SIGTERM, signal.SIGTERM): (143,),
    (signal.SIGINT, signal.SIGTERM): (130, 143),
    (signal.SIGTERM, signal.SIGINT): (130, 143),
}


class SavingOften(Train):
    """A run that saves after every step."""

    name = "train"
    steps = 10

    def start(self, place: Path) -> int:
        flags = ["--max_steps", str(self.steps), "--checkpoint_interval", "1"]
        return self.train(place, *TINY, *flags, "--data", str(self.text))

    def read(self, place: Path, done: bool) -> None:
        if checkpoint.list_checkpoints(place / "run"):
            checkpoint.load_model(place / "run", use_triton=False)

    def check_whole(self, place: Path) -> None:
        """Raises AssertionError unless the run in `place` equals an undisturbed one."""
        gap = difference(snapshot(place), self.after)
        assert not gap, f"the whole run, compared with an undisturbed one, {gap}"

    def check_goes_on(self, place: Path) -> None:
        """Raises AssertionError unless going on ends as if nothing had happened."""
        code = self.go_on(place)
        assert code == 0, f"going on ended with exit code {code}"
        self.check_whole(place)


class _Chain:
    """A run that is stopped again and again, until it ends; then it is compared, and another one begins."""

    def __init__(self, folder: Path) -> None:
        self.run = SavingOften(folder / "run")
        self.place, self.log = folder / "place", folder / "log"
        assert self.run.after
        self.run.copy(self.place)
        started = time.perf_counter()
        assert self.start().wait(60).code == 0
        self.duration = time.perf_counter() - started
        self.run.copy(self.place)

    def start(self) -> Child:
        return Child(lambda: self.run.go_on(self.place), self.log)

    def ended(self, ended: Ended) -> None:
        """Compares a run that came to its end, and begins another one; else checks what a reader gets."""
        if ended.code == 0:
            self.run.check_whole(self.place)
            self.run.copy(self.place)
        else:
            judge(lambda: self.run.read(self.place, False), self.log, self.run.limit)

    def finish(self) -> None:
        """Goes on to the end."""
        judge(lambda: self.run.check_goes_on(self.place), self.log, self.run.limit)


def random_kills(trials: int, seed: int, folder: Path) -> Outcome:
    """Kills a run, which resumes after each kill, at random times."""
    chain, rng, outcome = _Chain(folder), random.Random(seed), Outcome()
    for i in range(trials):
        delay = rng.uniform(0, chain.duration)
        with outcome.trial(f"kill {i + 1}, after {delay:.3f} s", chain.run.limit):
            child = chain.start()
            if not child.ended(delay):
                child.send(signal.SIGKILL)
            ended = child.wait(chain.run.limit)
            assert ended.code in (0, 137), f"exit code {ended.code}: {ended.errors[-300:]}"
            chain.ended(ended)
    with outcome.trial("the run after the last kill", chain.run.limit):
        chain.finish()
    return outcome


def random_kills_saving(trials: int, seed: int, folder: Path) -> Outcome:
    """Kills a process that saves models, exports and checkpoints in a loop, at random times."""
    savers = [kind(folder / kind.__name__) for kind in (SaveOwn, SaveHuggingFace, SaveCheckpoint)]
    rng, outcome, log = random.Random(seed), Outcome(), folder / "log"
    for i in range(trials):
        saver = savers[i % len(savers)]
        place, delay = saver.folder / "place", rng.uniform(0, 0.3)
        with outcome.trial(f"{saver.name}: kill {i + 1}, after {delay:.3f} s"):
            saver.copy(place)
            child = Child(lambda saver=saver, place=place: _save_for_ever(saver, place), log)
            ready = place / "saving"
            while not ready.exists():
                assert not child.ended(0.002), "the process ended before it saved"
            child.ended(delay)
            child.send(signal.SIGKILL)
            ended = child.wait()
            assert ended.code == 137, f"exit code {ended.code}: {ended.errors[-300:]}"
            ready.unlink()
            judge(lambda saver=saver, place=place: _check_saved(saver, place), log)
    return outcome


def _save_for_ever(saver: SaveOwn | SaveCheckpoint, place: Path) -> None:
    (place / "saving").touch()
    for i in itertools.count(4):
        saver.save(place, i if isinstance(saver, SaveCheckpoint) else i % 2)


def _check_saved(saver: SaveOwn | SaveCheckpoint, place: Path) -> None:
    """Checks that a reader gets one of the states, and that the next save leaves no stray."""
    if isinstance(saver, SaveCheckpoint):
        newest = checkpoint.find_checkpoint(place)
        model = checkpoint.load_model(newest, use_triton=False)
        step = checkpoint.step_of(newest)
        assert bool((model.wte.weight == step).all()), "the weights of another step"
        saver.save(place, step + 1)
        hidden = [path.name for path in place.rglob(".*")]
        assert len(checkpoint.list_checkpoints(place)) == checkpoint.KEPT, "checkpoints are not pruned"
        assert not hidden, f"after the next save, the folder has a stray {hidden[0]}"
    else:
        saver.read(place, False)
        saver.settle(place)


def signals(trials: int, seed: int, folder: Path) -> Outcome:
    """Sends one or two signals to a run, which resumes afterwards, at random times."""
    chain, rng, outcome = _Chain(folder), random.Random(seed), Outcome()
    for i in range(trials):
        numbers = list(STOPS)[i % len(STOPS)]
        delay, pause = rng.uniform(0, chain.duration), rng.choice((0.0, rng.uniform(0, 0.1)))
        names = " and ".join(signal.Signals(number).name for number in numbers)
        with outcome.trial(f"{names} after {delay:.3f} s, {pause:.3f} s apart", chain.run.limit):
            child = chain.start()
            for number, wait in zip(numbers, (delay, pause), strict=False):
                if not child.ended(wait):
                    child.send(number)
            ended = child.wait(chain.run.limit)
            _check_stopped(ended, numbers)
            chain.ended(ended)
    with outcome.trial("the run after the last signal", chain.run.limit):
        chain.finish()
    return outcome


def _check_stopped(ended: Ended, numbers: tuple[int, ...]) -> None:
    """Raises AssertionError for a wrong exit code, or for more than lines of the command on stderr."""
    assert not ended.hung, "it hung"
    expected = (0, *STOPS[numbers])
    assert ended.code in expected, f"exit code {ended.code}, expected {expected[1]}: {ended.errors[-200:]}"
    assert "Traceback" not in ended.errors, f"a traceback: {ended.errors.strip().splitlines()[-1]}"
    lines = [line for line in ended.errors.splitlines() if line.startswith("gpt.train:")]
    assert len(lines) <= 1, f"{len(lines)} lines: {lines}"


def ctrl_c_at_start(trials: int, seed: int, folder: Path) -> Outcome:
    """Interrupts `python -m gpt.info` at random times from the first library of torch on."""
    rng, outcome = random.Random(seed), Outcome()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the command inherits that it is ignored
    for _ in range(trials):
        delay = rng.uniform(0, 2)
        with outcome.trial(f"SIGINT {delay:.3f} s later", limit=6 * HANG):
            info = [sys.executable, "-m", "gpt.info", "char-cpu"]
            command = subprocess.Popen(info, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while command.poll() is None and "libtorch" not in Path(f"/proc/{command.pid}/maps").read_text():
                time.sleep(0.01)
            time.sleep(delay)
            command.send_signal(signal.SIGINT)
            errors = command.communicate()[1]
            stopped = (0, 130, -signal.SIGINT)  # a shell shows the last one as 130 too
            assert command.returncode in stopped, f"exit code {command.returncode}: {errors[-300:]}"
            assert len(errors.splitlines()) <= 1, f"it printed {errors[-300:]}"
    return outcome


def two_trainers(trials: int, seed: int, folder: Path) -> Outcome:
    """Starts two trainers with one --out, together or while the first is suspended."""
    return _two(trials, seed, folder, resume=False)


def two_resumes(trials: int, seed: int, folder: Path) -> Outcome:
    """Resumes one run twice, together or while the first is suspended."""
    return _two(trials, seed, folder, resume=True)


def _two(trials: int, seed: int, folder: Path, *, resume: bool) -> Outcome:
    run, rng, outcome = SavingOften(folder / "run"), random.Random(seed), Outcome()
    place, stopped = folder / "place", folder / "stopped"
    assert run.after
    run.copy(stopped)
    newest = 0
    if resume:
        child = Child(lambda: run.start(stopped), folder / "log")
        while not (stopped / "run" / "checkpoints" / "step-3").exists():
            assert not child.ended(0.001), "the run ended before it was stopped"
        child.send(signal.SIGTERM)
        assert child.wait().code == 143
        newest = checkpoint.step_of(checkpoint.find_checkpoint(stopped / "run"))
    for i in range(trials):
        kind, delay = ("suspended in progress", "together", "suspended early")[i % 3], rng.uniform(0, 0.1)
        with outcome.trial(f"{kind}, {delay:.3f} s apart", 3 * run.limit):
            run.before = stopped
            run.copy(place)
            act = (lambda: run.train(place, "--resume")) if resume else (lambda: run.start(place))
            first = Child(act, folder / "first")
            while kind == "suspended in progress" and not _has_begun(place, newest):
                assert not first.ended(0.001), "the first process ended too early"
            first.ended(delay)
            if kind != "together":
                first.send(signal.SIGSTOP)
            second = Child(act, folder / "second")
            if kind != "together":
                second.wait(run.limit)
                first.send(signal.SIGCONT)
            ended = {child.pid: child.wait(run.limit) for child in (first, second)}
            _check_one_won(ended, in_turn=kind != "suspended in progress")
            run.check_whole(place)
    return outcome


def _has_begun(place: Path, step: int) -> bool:
    """Whether the run in `place` has begun its log, or has a checkpoint of a step after `step`."""
    if not step:
        return (place / "run" / LOG).exists()
    return any(checkpoint.step_of(path) > step for path in checkpoint.list_checkpoints(place / "run"))


def _check_one_won(ended: dict[int, Ended], *, in_turn: bool) -> None:
    """Raises AssertionError unless one process succeeds, and the other one names it, or its checkpoints.

    Args:
        ended: By process id.
        in_turn: One may have begun to write after the other one ended. It then resumes what is whole.
    """
    for end in ended.values():
        end.check_reported("gpt.train")
    codes = sorted(end.code for end in ended.values())
    if in_turn and codes == [0, 0]:
        return
    assert codes == [0, 2], f"exit codes {codes}, expected 0 and 2"
    (winner,) = (pid for pid, end in ended.items() if end.code == 0)
    (message,) = (end.errors.strip() for end in ended.values() if end.code == 2)
    named = str(winner) in message or "holds the checkpoints of a run" in message
    assert named, f"the loser does not name process {winner}: {message[-300:]}"


def reader_beside_trainer(trials: int, seed: int, folder: Path) -> Outcome:
    """Samples, evaluates and describes a run, at random times while it trains and prunes."""
    run, rng, outcome = SavingOften(folder / "run"), random.Random(seed), Outcome()
    run.steps = 400
    place, log = folder / "place", folder / "log"
    text, out = str(run.text), str(place / "run")
    commands: list[tuple[str, Callable[[], int]]] = [
        (
            "gpt.sample",
            lambda: sample.main(["--checkpoint", out, "--max_new_tokens", "2"]),
        ),
        ("gpt.eval", lambda: eval.main(["--checkpoint", out, "--data", text])),
        ("gpt.info", lambda: info.main([out])),
    ]
    trainer: Child | None = None
    for i in range(trials):
        if trainer is None or trainer.ended(0):
            run.copy(place)
            trainer = Child(lambda: run.start(place), log)
            while not checkpoint.list_checkpoints(place / "run"):
                assert not trainer.ended(0.01), "the trainer ended before its first checkpoint"
        name, command = commands[i % len(commands)]
        trainer.ended(rng.uniform(0, 0.05))
        with outcome.trial(f"{name}, reader {i + 1}"):
            ended = Child(command, folder / "reader").wait()
            ended.check_reported(name)
            assert ended.code == 0, f"exit code {ended.code}: {ended.errors.strip()[-300:]}"
    if trainer is not None:
        trainer.send(signal.SIGKILL)
        trainer.wait()
    return outcome


def two_cache_builders(trials: int, seed: int, folder: Path) -> Outcome:
    """Tokenizes one text into one cache in two processes at once."""
    cache, rng, outcome = Cache(folder / "cache"), random.Random(seed), Outcome()
    place = folder / "place"
    for i in range(trials):
        delay = rng.uniform(0, 0.02)
        with outcome.trial(f"pair {i + 1}, {delay:.4f} s apart"):
            cache.copy(place)
            first = Child(lambda: cache.act(place), folder / "first")
            first.ended(delay)
            second = Child(lambda: cache.act(place), folder / "second")
            for ended in (first.wait(), second.wait()):
                assert ended.code == 0, f"exit code {ended.code}: {ended.errors[-300:]}"
            judge(lambda: cache.settle(place), folder / "log")
    return outcome


def exporter_beside_reader(trials: int, seed: int, folder: Path) -> Outcome:
    """Loads a model, at random times while another process replaces it again and again."""
    savers = [kind(folder / kind.__name__) for kind in (SaveOwn, SaveHuggingFace)]
    rng, outcome = random.Random(seed), Outcome()
    for saver in savers:
        place = saver.folder / "place"
        saver.copy(place)
        writer = Child(lambda saver=saver, place=place: _save_for_ever(saver, place), folder / "writer")
        for i in range(max(1, trials // len(savers))):
            writer.ended(rng.uniform(0, 0.02))
            with outcome.trial(f"{saver.name}, reader {i + 1}"):
                assert not writer.ended(0), "the writer ended"
                judge(lambda saver=saver, place=place: saver.read(place, False), folder / "reader")
        writer.send(signal.SIGKILL)
        writer.wait()
    return outcome
