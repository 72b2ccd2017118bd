"""The cache folder, and the atomic replacement of files."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from kernels import files
from kernels.files import cache_folder, read_json, replacing, write_json


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in the home folder although an environment variable names another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FUSED_GPT_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "fused-gpt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fused-gpt"
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"


def test_without_a_home_folder_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError where the code that uses the cache expects an OSError."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "FUSED_GPT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="no home folder, set FUSED_GPT_CACHE"):
        cache_folder()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A failed write that truncates the file, or that does not delete its partial file."""
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"a": 1})

    def stop_halfway() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        stop_halfway()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_files_of_killed_writers_are_deleted(tmp_path: Path) -> None:
    """Hidden files that pile up with each kill, or the file of a live writer or a user that is deleted."""
    path, kept = tmp_path / "log.jsonl", tmp_path / ".log.jsonl.swp"
    kept.write_text("an editor's")
    command = [sys.executable, "-c", WRITER, files.__file__, str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    (left_over,) = set(tmp_path.iterdir()) - {kept}
    write_json(path, {"a": 1})
    assert left_over.exists()

    child.kill()
    child.communicate()
    assert left_over.exists()
    write_json(tmp_path / "other.json", {"a": 2})
    assert set(tmp_path.iterdir()) == {kept, path, tmp_path / "other.json"}


WRITER = """
import runpy, sys, time
from pathlib import Path

with runpy.run_path(sys.argv[1])["replacing"](Path(sys.argv[2])) as file:
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_threads_do_not_share_an_unfinished_file(tmp_path: Path) -> None:
    """Two writers of one process that mix their contents, or delete each other's file."""
    path = tmp_path / "a.json"

    def write(i: int) -> None:
        for _ in range(20):
            write_json(path, {"a": [i] * 1000})
            assert len(set(read_json(path)["a"])) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_sweep_does_not_take_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hidden file that another writer deletes between its creation and its lock, so that it is lost."""
    lock, sweeps = files._lock, 0

    def late(file: IO[bytes], *, wait: bool) -> bool:
        nonlocal sweeps
        if wait and sweeps == 0:
            sweeps += 1
            files._delete_left_over(tmp_path)
        return lock(file, wait=wait)

    monkeypatch.setattr(files, "_lock", late)
    write_json(tmp_path / "a.json", {"a": 1})
    assert sweeps == 1
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file after a power cut: the new name was on the disk, and its content was not."""
    path, events = tmp_path / "a.json", []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(handle: int) -> None:
        events.append(os.fstat(handle).st_size)
        fsync(handle)

    def record_replace(self: Path, target: Path) -> Path:
        events.append(target)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_json(path, {"a": 1})
    assert events == [path.stat().st_size, path]


def test_json_is_written_with_the_given_options(tmp_path: Path) -> None:
    """A wrong indent, a wrong escape of a character, or a missing last newline."""
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    assert path.read_text("utf-8") == '{"\\u00e9": 1}\n'
    write_json(path, {"é": 1}, indent=1, ensure_ascii=False)
    assert path.read_text("utf-8") == '{\n "é": 1\n}\n'
    assert read_json(path) == {"é": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000])
def test_files_without_a_json_object_are_refused(content: bytes, tmp_path: Path) -> None:
    """A damaged file that raises an exception other than ValueError, or that is read as an object."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json (is not JSON|holds a \w+, expected a JSON object)"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
def test_only_regular_files_of_a_sensible_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO whose writer is waited for, a device that never ends, or a file that takes all memory."""
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "fifo.json", tmp_path / "zero.json"):
        with pytest.raises(ValueError, match="is not a regular file"):
            read_json(path)
    monkeypatch.setattr(files, "JSON_LIMIT", 8)
    write_json(tmp_path / "a.json", {"a": 11})
    with pytest.raises(ValueError, match="more than 8 bytes"):
        read_json(tmp_path / "a.json")
