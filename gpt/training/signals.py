"""Stopping a run by SIGINT or SIGTERM without losing anything."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gpt.errors import ReportedError


class Stopped(ReportedError):
    """A signal asks to end work that nothing needs in order to resume. `Trainer.run` catches it."""

    exit_code = 130


class StopSignals:
    """The SIGINT and SIGTERM that a process has received."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def check(self, *_: object) -> None:
        """Raises Stopped if there is a signal; also a callback that ignores its arguments."""
        if self.received:
            raise Stopped("stopped by a signal")

    def note(self, number: int, _: object) -> None:
        """The handler: notes the first signal, and ends the process at the second (exit code 130 or 143)."""
        if not self.received:
            self.received.append(number)
        elif number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        else:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Notes the signals that arrive during the block. A thread other than the main one receives none."""
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
