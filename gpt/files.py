"""Files from outside: paths that the user types, files that may be damaged, downloads with a known hash."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from gpt.errors import InputError
from kernels.files import json_object, replacing

PATIENCE = 4.0  # seconds to wait for the first answer of a network
JSON_LIMIT = 1 << 28  # bytes of the largest JSON file that is read; a tokenizer.json may have megabytes
CHUNK = 1 << 20  # bytes of one read
# O_NONBLOCK: a FIFO does not wait for its writer. Windows has O_BINARY, and neither of the other two.
OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
Answer = TypeVar("Answer")


def user_path(text: str | os.PathLike[str], where: str) -> Path:
    """The path that a user typed, with `~` expanded. It may be missing.

    Args:
        text: What the user typed.
        where: What takes the path, as in "--data"; the error message begins with it.

    Raises:
        InputError: No file can have this path: it is empty, holds a NUL or a name that is too long, or begins
            with the home folder of a user that does not exist.
    """
    shown = os.fspath(text)
    if not shown:
        raise InputError(f"{where}: the path is empty, expected a file or a folder")
    try:
        path = Path(shown).expanduser()
        os.lstat(path)
    except RuntimeError as error:
        raise InputError(f"{where}: {shown!r} has no home folder, expected a path without ~") from error
    except ValueError as error:  # a NUL, or a surrogate that stands for no byte
        raise InputError(f"{where}: {shown!r} is not a path ({error})") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{where}: {shown[:80]!r} is not a path ({error.strerror})") from error
    return path


def open_regular(path: Path, where: str) -> IO[bytes]:
    """Opens a regular file, or a link to one, for reading. It never waits, as opening a FIFO would.

    Raises:
        InputError: The file is missing, cannot be read, or is a folder, a FIFO, a device or a socket.
    """
    try:
        handle = os.open(path, OPEN_FLAGS)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise InputError(f"{where}: {path} is a socket or a device, expected a regular file") from error
        raise InputError(f"{where}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{where}: {str(path)!r} is not a path ({error})") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = KINDS.get(stat.S_IFMT(mode), "not a file")
        raise InputError(f"{where}: {path} is {kind}, expected a regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path, where: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        InputError: The file cannot be opened (see `open_regular`) or read, or is larger.
    """
    with open_regular(path, where) as file:
        return read_limited(file, f"{where}: {path}", limit)


def read_limited(file: IO[bytes], where: str, limit: int) -> bytes:
    """The rest of `file`, which has at most `limit` bytes. Memory grows with what it has, not with `limit`.

    Raises:
        InputError: It cannot be read, or has more.
    """
    chunks = []
    left = limit + 1
    try:
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            chunks.append(chunk)
            left -= len(chunk)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from error
    if left <= 0:
        raise InputError(f"{where} has more than {limit:,} bytes, the most that is read")
    return b"".join(chunks)


def read_json(path: Path, where: str = "checkpoint") -> dict[str, Any]:
    """The JSON object in `path`.

    Args:
        path: The file.
        where: What reads it; the error message begins with it.

    Raises:
        InputError: The file cannot be read, or does not hold a JSON object.
    """
    content = read_regular(path, where, JSON_LIMIT)
    try:
        return json_object(content, path)
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
