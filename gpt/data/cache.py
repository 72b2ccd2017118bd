"""Files of the cache folder that end with a hash of their name and content, so that damage is noticed."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

from gpt.errors import InputError
from gpt.files import open_regular
from kernels.files import cache_folder, replacing

HASH_BYTES = 32
BLOCK = 1 << 20  # bytes hashed at a time


class Cached(NamedTuple):
    """An open file of the cache, and the length of its content, without the hash."""

    file: IO[bytes]
    length: int


def open_cached(name: str, limit: int) -> Cached | None:
    """Opens a file of the cache and checks its hash, which reads all of it.

    The file may be replaced under its name later: the caller keeps what was checked. A write into the file
    itself, while it is mapped, is not noticed.

    Args:
        name: The path below the cache folder.
        limit: The most bytes that the content can have. A larger file is damaged, and is not read.

    Returns:
        The file, at its beginning. None if there is no such file, and, after one UserWarning, if it is
        damaged or cannot be read.
    """
    try:
        path = cache_folder() / name
    except OSError:
        return None
    if not os.path.lexists(path):
        return None
    try:
        file = open_regular(path, "cache")
    except InputError as error:
        warnings.warn(f"{error}; it is computed again", stacklevel=2)
        return None
    try:
        length = os.fstat(file.fileno()).st_size - HASH_BYTES
        if 0 <= length <= limit and _hash(name, file, length) == file.read(HASH_BYTES):
            file.seek(0)
            return Cached(file, length)
        problem = "is damaged or from another version"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    file.close()
    warnings.warn(f"cache: {path} {problem}; it is computed again", stacklevel=2)
    return None


def write_cached(name: str, blocks: Iterable[bytes]) -> bool:
    """Writes a file of the cache; False, after one UserWarning, if the cache cannot be written.

    Args:
        name: The path below the cache folder.
        blocks: The content.
    """
    hashed = hashlib.sha256(name.encode())
    path = Path(name)
    try:
        path = cache_folder() / name
        with replacing(path) as file:
            for block in blocks:
                hashed.update(block)
                file.write(block)
            file.write(hashed.digest())
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"cache: cannot write {path}: {reason}; the next start computes it again", stacklevel=2)
        return False
    return True


def _hash(name: str, file: IO[bytes], length: int) -> bytes:
    """The hash of `name` and of the next `length` bytes of `file`."""
    hashed = hashlib.sha256(name.encode())
    while length > 0 and (block := file.read(min(length, BLOCK))):
        hashed.update(block)
        length -= len(block)
    return hashed.digest()
