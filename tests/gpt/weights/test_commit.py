"""Folders that are replaced as a whole: at each file operation, a kill or an error loses nothing."""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from gpt.errors import InputError, MachineError, ReportedError
from gpt.weights import commit as commits
from gpt.weights.commit import discard, interrupted, present, recover, replaceable, undisturbed
from gpt.weights.hashes import verify

posix = pytest.mark.skipif(sys.platform == "win32", reason="os.fork and links are POSIX's")


class Killed(BaseException):
    """Ends a save at once: like every later file operation, it leaves the disk as it is."""


EIO = OSError(errno.EIO, "Input/output error")
FAULTS: dict[str, tuple[BaseException, float]] = {  # what is raised, and how often
    "kill": (Killed(), math.inf),
    "error": (EIO, 1),
    "errors": (EIO, math.inf),
    "interrupt": (KeyboardInterrupt(), 1),
}


def writer(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a").write_text(content)
        (folder / "b").write_text(content)

    return write


def commit(target: Path, write: Callable[[Path], None]) -> None:
    with commits.commit(target) as folder:
        write(folder)


def content(folder: Path | None) -> str:
    """The content of a folder that `writer` wrote; the folder must be whole."""
    assert folder is not None
    verify(folder)
    a, b = ((folder / name).read_text() for name in "ab")
    assert a == b
    return a


@contextmanager
def fault(name: str, first: int) -> Iterator[Callable[[], int]]:
    """Raises the fault at file operation `first`, or from it on; gives the number of operations so far."""
    error, times = FAULTS[name]
    count = 0

    def faulty(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if first <= count < first + times:
                raise error
            return operation(*args, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module, operation in (
            *((os, name) for name in ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "chmod")),
            (io, "open"),
        ):
            patch.setattr(module, operation, faulty(getattr(module, operation)))
        yield lambda: count


@pytest.mark.filterwarnings("ignore:.* is missing because a save was interrupted")
@pytest.mark.parametrize("exists", [True, False], ids=["replace", "create"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_loses_nothing(name: str, exists: bool, tmp_path: Path) -> None:
    """The only copy deleted before the new one is in place, half a folder under its name, or leftovers."""
    for first in itertools.count(1):
        target = tmp_path / str(first) / "model"
        target.parent.mkdir()
        if exists:
            commit(target, writer("old"))
        committed, operations = False, 0
        with suppress(ReportedError, KeyboardInterrupt, Killed), fault(name, first) as count:
            try:
                commit(target, writer("new"))
                committed = True
            finally:
                operations = count()

        folder = present(target, "test")
        if committed:
            assert content(target) == "new"
        elif exists:
            assert content(folder) == "old" or (name != "error" and content(folder) == "new")
        else:
            assert folder is None or content(folder) == "new"
        if name in ("error", "interrupt") and exists:
            assert folder == target

        commit(target, writer("next"))
        assert content(target) == "next"
        assert os.listdir(target.parent) == ["model"]
        if operations < first:
            break
    assert first > 20


@pytest.mark.parametrize("name", ["kill", "error"])
def test_a_fault_in_a_deletion_leaves_no_part(name: str, tmp_path: Path) -> None:
    """Part of a deleted folder that is still listed under its name, or that stays for ever."""
    for first in range(1, 9):
        target = tmp_path / str(first) / "model"
        commit(target, writer("old"))
        with suppress(OSError, Killed), fault(name, first):
            discard(target)
        assert not target.exists() or content(target) == "old"
        for path in interrupted(target.parent):
            recover(path)
        assert set(os.listdir(target.parent)) <= {"model"}


def test_a_reader_uses_the_copy_that_was_set_aside(tmp_path: Path) -> None:
    """A reader that renames folders, or that misses the only copy after a kill between two renames."""
    target = tmp_path / "model"
    commit(target, writer("old"))
    target.rename(tmp_path / ".replaced-model")
    for make in (lambda: None, target.mkdir):
        make()
        with pytest.warns(UserWarning, match="missing because a save was interrupted; using the copy"):
            assert content(present(target, "test")) == "old"
        assert (tmp_path / ".replaced-model").is_dir()
    recover(target)
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_copy_is_not_used_beside_its_replacement(tmp_path: Path) -> None:
    """The old content read again after a kill between the last rename and the deletion."""
    target = tmp_path / "model"
    commit(target, writer("old"))
    target.rename(tmp_path / ".replaced-model")
    target.mkdir()
    writer("new")(target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert present(target, "test") == target
        assert present(tmp_path / "nothing", "test") is None


@posix
def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    """A full disk reported as wrong input, or half a folder left on it."""

    def full(folder: Path) -> None:
        writer("half")(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    commit(tmp_path / "model", writer("old"))
    with pytest.raises(MachineError, match=r"cannot write .*model: No space left on device"):
        commit(tmp_path / "model", full)
    assert content(tmp_path / "model") == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_two_processes_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that deletes the unfinished folder of another process, or that waits for it for ever."""
    monkeypatch.setattr(commits, "PATIENCE", 0.1)
    commit(tmp_path / "model", writer("old"))
    with (
        FileLock(tmp_path / ".model.lock"),
        pytest.raises(InputError, match=r"another process is saving to .*model, expected only one"),
    ):
        commit(tmp_path / "model", writer("new"))
    commit(tmp_path / "other", writer("new"))
    assert content(tmp_path / "model") == "old"


@posix
def test_savers_of_one_folder_take_turns(tmp_path: Path) -> None:
    """Two processes that save to one folder at once, of which one fails or the result is a mixture."""
    target = tmp_path / "model"
    children = []
    for number in range(3):
        if not (child := os.fork()):
            try:
                for _ in range(4):
                    commit(target, writer(str(number)))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert content(target) in "012"
    assert os.listdir(tmp_path) == ["model"]


def test_only_what_a_save_wrote_is_replaceable(tmp_path: Path) -> None:
    """A save that deletes a user's file, even in a folder that an earlier save wrote."""
    target = tmp_path / "model"
    commit(target, writer("old"))
    assert replaceable(target, "test") == target
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\), expected a new or empty folder"):
        replaceable(target, "test")
    with pytest.raises(InputError, match=r"cannot read .*: Not a directory"):
        replaceable(target / "notes.txt", "test")
    (tmp_path / "empty").mkdir()
    assert replaceable(tmp_path / "empty", "test") == tmp_path / "empty"


@posix
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """A link to a folder on another disk that is replaced by the folder."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/model")
    for text in ("old", "new"):
        commit(replaceable(tmp_path / "link", "test"), writer(text))
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk/model") == "new"


@pytest.mark.parametrize("fails", [False, True])
def test_a_reader_beside_a_save_reads_one_save(fails: bool, tmp_path: Path) -> None:
    """A reader that meets files of two saves, or none between two renames."""
    target = tmp_path / "model"
    commit(target, writer("1"))
    reads: list[str] = []

    def read() -> str:
        first = (target / "a").read_text()
        reads.append(first)
        if len(reads) < 3:
            commit(target, writer(str(len(reads) + 1)))
            if fails:
                raise InputError("the weights are damaged")
        return first + (target / "b").read_text()

    assert undisturbed(target, read) == "33"
    assert reads == ["1", "2", "3"]


def test_damage_is_read_once(tmp_path: Path) -> None:
    """A damaged folder that nobody replaces, and that is read again and again."""
    commit(tmp_path / "model", writer("1"))
    reads = []

    def read() -> None:
        reads.append(1)
        raise InputError("the weights are damaged")

    with pytest.raises(InputError, match="damaged"):
        undisturbed(tmp_path / "model", read)
    assert len(reads) == 1
