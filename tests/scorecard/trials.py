"""Runs the trials of a row in forked children: a hang, a crash or a leak ends one trial, not the row."""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from gpt.errors import ReportedError
from gpt.training import run_folder, trainer
from tests.scorecard.row import HANG, Outcome

SPARE = 256 << 20  # bytes that a trial may take besides twice its file
SPACE = 8 << 30  # bytes of address space that a child may add: an attack must not fill the machine
LONGEST = 2_000  # characters of a message, which may quote the input
# What a file that is only read must never cause; Python reports these calls to audit hooks.
CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn"}

ROOT = Path(__file__).parents[2]

Value = TypeVar("Value")
Say = Callable[[str], None]  # names the trial, before it starts
Attack = Callable[[int, Say], int | None]  # makes trial i; returns the bytes of its file


class Refused(str):
    """The message of a ReportedError."""


def answer(call: Callable[[], Value]) -> Value | Refused:
    """What call() returns, or the message with which it refuses.

    Raises:
        AssertionError: The message is not one line, or the exception is not a ReportedError.
    """
    try:
        return call()
    except ReportedError as error:
        message = Refused(error)
    except AssertionError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if ROOT in Path(frame.filename).parents] or frames)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        raise AssertionError(f"{type(error).__name__} at {place}: {str(error)[:200]}") from error
    assert len(message.splitlines()) == 1, (
        f"a message of {len(message.splitlines())} lines: {message[:200]!r}"
    )
    assert len(message) <= LONGEST, f"a message of {len(message)} characters: {message[:80]!r}"
    return message


def random_of(row: str, seed: int, trial: int) -> random.Random:
    """The random numbers of one trial, whatever other trials run."""
    return random.Random(f"{row} {seed} {trial}")


def run_trials(
    trials: int,
    attack: Attack,
    *,
    limit: float = HANG,
    spare: int = SPARE,
    alone: bool = False,
    forks: bool = False,
) -> Outcome:
    """Makes the attacks 0 to `trials` - 1 and counts those that fail.

    alone: each attack has its own child. forks: an attack may start processes.

    A trial fails if `attack` raises, takes more than `limit` seconds, ends its process, starts a program, or
    takes more memory than twice its file and `spare` bytes.
    """
    outcome = Outcome()
    first = 0
    while first < trials:
        last = first + 1 if alone else trials
        first = _run_child(first, last, attack, limit, spare, outcome, forks)
    return outcome


def _run_child(
    first: int, trials: int, attack: Attack, limit: float, spare: int, outcome: Outcome, forks: bool
) -> int:
    """Makes attacks from `first` on in one child; returns the first that is left."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            _serve(writer, first, trials, attack, spare, forks)
            status = 0
        finally:
            os._exit(status)

    os.close(writer)
    current, name, started = first, "", time.perf_counter()
    buffer, reason = b"", ""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while not reason:
            patience = max(0.0, started + limit + 1 - time.perf_counter())
            if not select.select([pipe], [], [], patience)[0]:
                reason = f"hangs: no end after {limit:g} s"
                os.kill(child, signal.SIGKILL)
                break
            chunk = pipe.read(1 << 16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                kind, _, text = line.decode("utf-8", "replace").partition(" ")
                if kind == "name":
                    name = text
                    continue
                seconds, _, failure = text.partition(" ")
                outcome.trials += 1
                outcome.slowest = max(outcome.slowest, float(seconds))
                if not failure and float(seconds) > limit:
                    failure = f"{float(seconds):.1f} s, expected at most {limit:g} s"
                if failure:
                    outcome.failures.append(f"trial {current}, {name}: {failure}")
                current, name, started = current + 1, "", time.perf_counter()
    _, status = os.waitpid(child, 0)
    if current >= trials:
        return trials
    if not reason:
        reason = f"ended its process ({_ending(status)})"
    outcome.trials += 1
    outcome.slowest = max(outcome.slowest, time.perf_counter() - started)
    outcome.failures.append(f"trial {current}, {name}: {reason}")
    return current + 1


def _serve(writer: int, first: int, trials: int, attack: Attack, spare: int, forks: bool) -> None:
    """The child: makes the attacks and writes a line when each begins and ends."""
    faulthandler.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quiet()
    _limit_address_space(SPACE)
    calls: list[str] = []
    if not forks:
        sys.addaudithook(lambda event, _: calls.append(event) if event in CODE else None)
    baseline = _peak()

    def say(name: str) -> None:
        os.write(writer, b"name " + ascii(name)[1:-1][:300].encode() + b"\n")

    for number in range(first, trials):
        failure, size = "", 0
        started = time.perf_counter()
        try:
            size = attack(number, say) or 0
        except AssertionError as error:
            failure = " ".join(str(error).split()) or "AssertionError"
        except BaseException as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = time.perf_counter() - started
        if calls:
            failure, calls[:] = f"runs code: {calls[0]}", []
        if (peak := _peak() - baseline) > 2 * size + spare and not failure:
            failure = f"takes {peak >> 20} MB for a file of {size >> 20} MB"
            baseline += peak
        os.write(writer, f"end {seconds:.6f} {ascii(failure)[1:-1][:600]}\n".encode())


def quiet() -> None:
    """Drops what this process prints."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _limit_address_space(extra: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * os.sysconf("SC_PAGE_SIZE") + extra
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _peak() -> int:
    """The most bytes of memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.WEXITSTATUS(status)}"


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal bit by bit: tensors, arrays, and dicts and sequences of them."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Environment variables, for the duration of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def quick_ends() -> Iterator[pytest.MonkeyPatch]:
    """While open, a training run draws no progress bar and no plot, and its sample has one token."""
    from tqdm import tqdm

    plain = tqdm.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "plot_log", lambda *_: None)
        patch.setattr(trainer, "SAMPLE_TOKENS", 1)
        patch.setattr(tqdm, "__init__", lambda self, *a, **k: plain(self, *a, **{**k, "disable": True}))
        yield patch
