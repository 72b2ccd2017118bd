"""SHA256SUMS: the hash of every other file of a folder, in the format of `sha256sum -c`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from gpt.errors import InputError
from gpt.files import open_regular, read_regular

SUMS = "SHA256SUMS"
_LIMIT = 1 << 20  # bytes of the largest SHA256SUMS that is read
_CHUNK = 1 << 18  # bytes that are hashed at once
_LINE = re.compile(rb"^([0-9a-f]{64}) [ *]([^\n]+)$", re.MULTILINE)


def list_folder(folder: Path, where: str) -> list[str]:
    """The sorted names in a folder; InputError if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{where}: cannot read {folder}: {error.strerror}") from error


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS for the files in `folder`."""
    names = sorted(set(os.listdir(folder)) - {SUMS})
    digests = {name: _digest(folder / name, "checkpoint") for name in names}
    (folder / SUMS).write_bytes(_text(digests))


def listed_files(folder: Path, where: str = "checkpoint") -> dict[str, str]:
    """The hash of each file that the SHA256SUMS in `folder` lists; damaged lines are left out."""
    lines = _LINE.findall(read_regular(folder / SUMS, where, _LIMIT))
    return {os.fsdecode(name): digest.decode() for digest, name in lines}


def verify(folder: Path, names: Collection[str] | None = None) -> None:
    """Checks that the folder holds exactly the files of its SHA256SUMS, with their hashes.

    Args:
        folder: A checkpoint.
        names: The files to hash; None for all. The names of the others are checked, not their content.

    Raises:
        InputError: It does not. The message names the file.
    """
    listed = listed_files(folder)
    if _text(listed) != read_regular(folder / SUMS, "checkpoint", _LIMIT):
        raise InputError(f"checkpoint: {folder / SUMS} is damaged")
    actual = set(list_folder(folder, "checkpoint")) - {SUMS}
    if missing := sorted(listed.keys() - actual):
        raise InputError(f"checkpoint: {folder} lacks {_shown(missing[0])}, which its {SUMS} lists")
    if extra := sorted(actual - listed.keys()):
        raise InputError(f"checkpoint: {folder} has {_shown(extra[0])}, which its {SUMS} does not list")

    for name, expected in listed.items():
        if names is None or name in names:
            digest = _digest(folder / name, "checkpoint")
            if digest != expected:
                raise InputError(
                    f"checkpoint: {folder / name} is damaged: sha256 {digest[:12]}…, expected "
                    f"{expected[:12]}…"
                )


def verify_listed(file: Path, where: str) -> None:
    """Checks `file` against the SHA256SUMS beside it, if there is one that lists it.

    Raises:
        InputError: The hash differs: the file is damaged, or was changed after the export.
    """
    if not os.path.lexists(file.parent / SUMS):
        return
    expected = listed_files(file.parent, where).get(file.name)
    if expected is not None and _digest(file, where) != expected:
        raise InputError(
            f"{where}: {file} is not the file that {SUMS} beside it lists; if the change is intended, remove "
            f"{file.parent / SUMS}"
        )


def _digest(path: Path, where: str) -> str:
    """The SHA-256 of a regular file."""
    digest = hashlib.sha256()
    with open_regular(path, where) as file:
        try:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise InputError(f"{where}: cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _text(digests: Mapping[str, str]) -> bytes:
    """The content of a SHA256SUMS."""
    return b"".join(f"{digests[name]}  ".encode() + os.fsencode(name) + b"\n" for name in sorted(digests))


def _shown(name: str) -> str:
    """A file name as a message shows it, in one line."""
    return name if name.isprintable() else ascii(name)
