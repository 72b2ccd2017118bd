"""Folders that are replaced as a whole: after a crash, the old content or the new content is complete.

`commit` writes the new folder under a hidden name, renames the old folder aside, renames the new one in, and
only then deletes the old one. If it is killed, one of these folders may remain beside the folder NAME:

- `.unfinished-NAME`: part of a folder, to be deleted.
- `.replaced-NAME`: a whole folder, and the only copy if NAME is missing.

The lock is `.NAME.lock`, which remains after a kill too, unlocked.

A reader uses the folder that `present` returns, and renames nothing; `undisturbed` lets it read again where
the folder is replaced meanwhile. The next `commit` to NAME cleans up.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from gpt.errors import InputError, ReportedError, cannot_write
from gpt.files import user_path
from gpt.weights.hashes import SUMS, list_folder, listed_files, write_sums

PATIENCE = 60.0  # seconds to wait for another process that saves to the same folder
REPEATS = 20  # of a reader whose folder is replaced
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"
Content = TypeVar("Content")
_LEFTOVER = re.compile(r"\.(?:unfinished|replaced)-(.+)|\.(.+)\.lock", re.DOTALL)


def present(path: Path, where: str) -> Path | None:
    """`path`, or the copy that a killed save left aside, with a warning; None if there is neither.

    Raises:
        InputError: The path cannot be looked up, because of permissions for example.
    """
    missing = _is_missing(path, where)
    if missing and path.name and os.path.isdir(aside := _hidden(_REPLACED, path)):
        warnings.warn(
            f"{path} is missing because a save was interrupted; using the copy that it replaces, {aside}",
            stacklevel=2,
        )
        return aside
    return path if os.path.lexists(path) else None


def undisturbed(path: str | os.PathLike[str], read: Callable[[], Content]) -> Content:
    """What read() returns, read again where `path`, or a folder in it, was replaced or changed meanwhile.

    Without this, a reader beside a process that saves could meet files of two saves, none between two
    renames, or a checkpoint that the run removes because it has newer ones.
    """
    for _ in range(REPEATS):
        before = _identity(path)
        try:
            content = read()
        except ReportedError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return content
    return read()


def _identity(path: str | os.PathLike[str]) -> list[tuple[str, int, int]] | None:
    """What tells a folder, and the folders in it, from those that replace them; None if there is none."""
    try:
        folder = os.path.expanduser(path)
        with os.scandir(folder) as entries:
            inner = {entry.name: entry.stat() for entry in entries if entry.is_dir()}
        stats = sorted({"": os.stat(folder), **inner}.items())
    except (OSError, ValueError):
        return None
    return [(name, status.st_ino, status.st_ctime_ns) for name, status in stats]  # a rename sets st_ctime


def interrupted(folder: Path) -> list[Path]:
    """The folders in `folder` to which a save was interrupted; they may be missing."""
    names = list_folder(folder, "checkpoint") if os.path.isdir(folder) else []
    leftovers = [match for match in map(_LEFTOVER.fullmatch, names) if match]
    return [folder / name for name in sorted({match[1] or match[2] for match in leftovers})]


def replaceable(directory: str | os.PathLike[str], where: str) -> Path:
    """The folder that a save to `directory` creates or replaces; a link is followed.

    Raises:
        InputError: It is not a folder, or holds files that `commit` did not write.
    """
    target = Path(os.path.realpath(user_path(directory, where)))
    if not os.path.lexists(target):
        return target
    names = list_folder(target, where)
    listed = listed_files(target) if SUMS in names else {}
    if extra := [name for name in names if name not in listed and name != SUMS]:
        raise InputError(
            f"{where}: {target} holds other files ({extra[0]}), expected a new or empty folder, or one that "
            "a save wrote"
        )
    return target


@contextmanager
def commit(target: Path) -> Generator[Path]:
    """Creates or replaces the folder `target` atomically, with what the block writes and SHA256SUMS.

    Gives an empty folder to write in, which replaces `target` at the end of the block, once it is complete
    and on the disk. If the block raises, `target` stays as it was. The block may end in another thread.

    Raises:
        InputError: The path is wrong, or cannot be written to. `target` stays as it was.
        MachineError: The disk is full, or fails. `target` stays as it was.
    """
    with _reported(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _recover(target)
            try:
                unfinished = _hidden(_UNFINISHED, target)
                unfinished.mkdir()
                yield unfinished
                _complete(unfinished)
                _exchange(target)
            finally:
                with suppress(OSError):
                    _recover(target)


def recover(target: Path) -> None:
    """Puts back the folder that an interrupted save set aside, if it is the only copy; deletes leftovers.

    Raises:
        InputError, MachineError: As in `commit`.
    """
    with _reported(target), _locked(target):
        _recover(target)


def _recover(target: Path) -> None:
    unfinished, replaced = _hidden(_UNFINISHED, target), _hidden(_REPLACED, target)
    shutil.rmtree(unfinished, ignore_errors=True)
    if os.path.isdir(replaced):
        replaced.rename(target if _is_missing(target, "checkpoint") else unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)


def discard(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a crash leaves no part of it under its name."""
    unfinished = _hidden(_UNFINISHED, folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def _hidden(prefix: str, target: Path) -> Path:
    return target.with_name(prefix + target.name)


def _is_missing(path: Path, where: str) -> bool:
    """Whether there is nothing at `path`, or an empty folder."""
    try:
        os.stat(path)
        return os.path.isdir(path) and not os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        raise InputError(f"{where}: cannot read {path}: {error.strerror}") from error


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Turns the errors of the file system, and of the lock, into errors that a command reports."""
    try:
        yield
    except Timeout as error:
        raise InputError(f"checkpoint: another process is saving to {target}, expected only one") from error
    except OSError as error:
        raise cannot_write("checkpoint", target, error) from error


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keeps other processes from saving to `target`. The kernel holds the lock, so a kill frees it."""
    path = target.with_name(f".{target.name}.lock")
    with FileLock(path, timeout=PATIENCE, thread_local=False):
        try:
            yield
        finally:
            with suppress(OSError):  # filelock acquires again if its file was deleted meanwhile
                path.unlink()


def _complete(folder: Path) -> None:
    """Writes the hashes of the files in `folder`, and flushes it to the disk."""
    write_sums(folder)
    mode = (folder / SUMS).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes files that only their owner can read
        _flush(path)
    _flush(folder)


def _exchange(target: Path) -> None:
    """Renames the old folder aside and the new one in; on any failure, the old one is put back."""
    unfinished, replaced = _hidden(_UNFINISHED, target), _hidden(_REPLACED, target)
    try:
        if os.path.lexists(target):
            target.rename(replaced)
        unfinished.rename(target)
        _flush(target.parent)
    except BaseException:
        if os.path.isdir(replaced) and not os.path.isdir(unfinished):
            target.rename(unfinished)
        raise  # `recover` puts the old one back


def _flush(path: Path) -> None:
    """Calls fsync on a file or folder; Windows cannot do so on one that is open for reading."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
