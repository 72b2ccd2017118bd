"""Files kept between runs: where they live, and downloads that are checked by hash and give up soon."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_folder() -> Path:
    """`$FUSED_GPT_CACHE`, else `fused-gpt` in the user's cache folder."""
    if named := os.environ.get("FUSED_GPT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-gpt"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` once it is complete; on an error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def verified_file(places: Sequence[Path], url: str, sha256: str) -> bytes:
    """The bytes whose hash is `sha256`: from the first of `places` that has them, else from `url`, kept in
    the last place.

    Raises:
        OSError: No place has them and the network does not answer, or answers with something else.
    """
    for place in places:
        if place.is_file() and hashlib.sha256(content := place.read_bytes()).hexdigest() == sha256:
            return content
    content = _fetch(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"what came has sha256 {hashlib.sha256(content).hexdigest()}, expected {sha256}")
    try:
        with replacing(places[-1]) as file:
            file.write(content)
    except OSError:
        pass  # an unwritable cache costs the next run a download
    return content


def _fetch(url: str, patience: float = 4.0) -> bytes:
    """The bytes at `url`. The wait is on a thread because looking up a name knows no timeout."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=patience))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=patience)
    except queue.Empty:
        raise TimeoutError(f"no answer in {patience:g} s") from None
    if isinstance(answer, OSError):
        raise OSError(getattr(answer, "reason", answer)) from answer
    with answer:
        content: bytes = answer.read()
    return content
