"""Files of the whole project: the cache folder, and files that replace their predecessor atomically."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JSON_LIMIT = 1 << 24  # bytes of the largest JSON file that is read
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.unfinished")


def cache_folder() -> Path:
    """`$FUSED_GPT_CACHE`, else `$XDG_CACHE_HOME/fused-gpt`, else `~/.cache/fused-gpt`; it may be missing.

    Raises:
        FileNotFoundError: No variable is set, and the user has no home folder.
    """
    if named := os.environ.get("FUSED_GPT_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-gpt"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "the user has no home folder, set FUSED_GPT_CACHE") from None


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Gives a binary file that replaces `path` when the block ends; if the block raises, `path` stays as is.

    Missing parent folders are created. The content is written beside `path`, into a hidden file that no other
    writer shares, and is on the disk before that file is renamed: neither a reader nor a power cut sees half
    a file. The writer locks its hidden file. The kernel frees the lock when a process is killed, so hidden
    files without a lock are left over; those in the folder are deleted first.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_left_over(path.parent)
    file = _create_unfinished(path.parent)
    unfinished = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows does not rename an open file
            unfinished.replace(path)  # before the lock is freed
    finally:
        unfinished.unlink(missing_ok=True)


def _create_unfinished(folder: Path) -> IO[bytes]:
    """A new, locked file in `folder`."""
    while True:
        file = (folder / f".{secrets.token_hex(8)}.unfinished").open("xb")
        _lock(file, wait=True)
        if os.path.exists(file.name):
            return file
        file.close()  # another writer deleted it before it was locked


def _delete_left_over(folder: Path) -> None:
    """Deletes the hidden files in `folder` whose writers no longer run."""
    with suppress(OSError):
        for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
            with suppress(OSError), (folder / name).open("r+b") as file:
                if _lock(file, wait=False):
                    (folder / name).unlink()


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    """Whether `file` is now locked. It is not if another holds the lock, or if the system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_json(path: Path, content: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> None:
    """Replaces `path` atomically with `content` as JSON in UTF-8, ending with a newline.

    Args:
        path: The file to write.
        content: What `json.dumps` accepts.
        indent, ensure_ascii: As in `json.dumps`.

    Raises:
        OSError: The folder or the file cannot be written.
        TypeError, ValueError: `content` cannot be written as JSON; `path` stays as it was.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, a regular file of at most `JSON_LIMIT` bytes.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: The file is not a regular one, too large, or does not hold a JSON object in UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")  # opening a FIFO would wait for its writer
    with path.open("rb") as file:
        text = file.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path} has more than {JSON_LIMIT:,} bytes, the most that is read")
    return json_object(text, path)


def json_object(content: bytes, place: object) -> dict[str, Any]:
    """The JSON object in `content`, read from `place`, a file or a line; ValueError if it is not one."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds a {type(value).__name__}, expected a JSON object")
    return value
