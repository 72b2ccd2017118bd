"""Files from outside: JSON that may be damaged, and downloads with a known hash and a time limit."""

from __future__ import annotations

import hashlib
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import kernels.files
from gpt.errors import InputError
from kernels.files import replacing

PATIENCE = 4.0  # seconds to wait for the first answer of a network
Answer = TypeVar("Answer")


def read_json(path: Path, where: str = "checkpoint") -> dict[str, Any]:
    """The JSON object in `path`.

    Args:
        path: The file.
        where: What reads it; the error message begins with it.

    Raises:
        InputError: The file cannot be read, or does not hold a JSON object.
    """
    try:
        return kernels.files.read_json(path)
    except OSError as error:
        raise InputError(f"{where}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What ask() returns or raises, given up after `seconds`.

    It runs on a thread, because resolving a host name has no time limit. The thread of an `ask` that is given
    up goes on in the background and does not keep the process alive.

    Raises:
        TimeoutError: `ask` has not returned in time.
    """
    answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def verified_file(places: Sequence[Path], url: str, sha256: str) -> bytes:
    """The content whose hash is `sha256`: from the first of `places` that has it, else from `url`.

    A download is kept in the last place.

    Raises:
        OSError: No place has the content, and the network does not answer or gives other content.
    """
    for place in places:
        if place.is_file() and hashlib.sha256(content := place.read_bytes()).hexdigest() == sha256:
            return content

    content = _fetch(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"the download has sha256 {hashlib.sha256(content).hexdigest()}, expected {sha256}")
    try:
        with replacing(places[-1]) as file:
            file.write(content)
    except OSError:
        pass  # without a writable cache, the next run downloads the file again
    return content


def _fetch(url: str) -> bytes:
    """The bytes at `url`; OSError with a short reason if there are none."""
    try:
        response = within(PATIENCE, lambda: urllib.request.urlopen(url, timeout=PATIENCE))
    except urllib.error.URLError as error:
        raise OSError(error.reason) from error
    with response:
        content: bytes = response.read()
    return content
