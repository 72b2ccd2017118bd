"""Stopping a run by SIGINT or SIGTERM, or when its time is up, without losing anything."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

import torch.distributed as dist

from gpt.errors import ReportedError

REPEATED = 5.0  # seconds in which torchrun passes on a signal that a scheduler sends to each process too


class Stopped(ReportedError):
    """Work that nothing needs in order to resume is to end. `Trainer.run` catches it."""

    exit_code = 130


class StopRequest:
    """Whether a process is to stop early: its length is the number of reasons, so it is false without one.

    Args:
        seconds: The time limit, which begins now; None for no limit.

    Attributes:
        signal: The first SIGINT or SIGTERM that has arrived, or 0.
        consequence: Returns, for the line on stderr, what the first signal makes the process do.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.signal = 0
        self.consequence: Callable[[], str] = lambda: "press Ctrl-C again to stop at once"
        self._noted = 0.0  # when the first signal arrived
        self._end = math.inf if seconds is None else monotonic() + seconds
        self._longest = 0.0  # of the saves, in seconds

    def __len__(self) -> int:
        return (self.signal != 0) + (monotonic() + self._longest >= self._end)

    def check(self, *_: object) -> None:
        """Raises Stopped if there is a reason to stop; also a callback that ignores its arguments."""
        if self:
            raise Stopped("stopped by a signal or the time limit")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Times a save in the block: the time limit leaves as much as the longest took, for the last one."""
        started = monotonic()
        yield
        self._longest = max(self._longest, monotonic() - started)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the signals that arrive in the block. A thread other than the main one receives none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        """The handler: notes the first signal, and ends the process at the second (exit code 130 or 143)."""
        now = monotonic()
        if not self.signal:
            self.signal, self._noted = number, now
            # Not print: the signal may have interrupted a print. It fails if stderr is closed or no file.
            with suppress(AttributeError, OSError, ValueError):
                os.write(sys.stderr.fileno(), f"\nstopping: {self.consequence()}\n".encode())
        elif number == self.signal and dist.is_torchelastic_launched() and now < self._noted + REPEATED:
            return
        elif number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        else:
            raise KeyboardInterrupt
