"""Files of the whole project: the cache folder, and files that replace their predecessor atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_folder() -> Path:
    """`$FUSED_GPT_CACHE`, else `$XDG_CACHE_HOME/fused-gpt`, else `~/.cache/fused-gpt`; it may be missing."""
    if named := os.environ.get("FUSED_GPT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-gpt"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Gives a binary file that replaces `path` when the block ends; if the block raises, `path` stays as is.

    Missing parent folders are created. The content is written beside `path`, under a hidden name that
    contains the process id, so a reader never sees half a file and two processes never share one.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
    """The JSON object in `path`.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: The content is not a JSON object in UTF-8.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
