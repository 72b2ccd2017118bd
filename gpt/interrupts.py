"""Ctrl-C in a command: one line and exit code 130, whenever it comes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = "stopped by Ctrl-C"


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end this process at once, with one line and exit code 130.

    `python -m gpt.…` needs that while it imports modules and while the interpreter shuts down, where a
    KeyboardInterrupt is a traceback. Within `keyboard_interrupts` Ctrl-C raises KeyboardInterrupt; one that
    Python ignores, because a finalizer raised it, ends the process too. A process that ignores Ctrl-C, as one
    that a script started with `&`, goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    report = sys.unraisablehook

    def end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            _leave(signal.SIGINT, None)
        report(unraisable)

    signal.signal(signal.SIGINT, _leave)
    sys.unraisablehook = end_if_interrupted


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt in the block, also after `exit_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, _: object) -> None:
    with suppress(OSError):
        os.write(2, f"gpt: {INTERRUPTED}\n".encode())
    os._exit(128 + number)
