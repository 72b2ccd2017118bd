"""Files from outside: paths as typed, files of any kind, damaged JSON, and downloads with a known hash."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import time
import tracemalloc
import urllib.error
from pathlib import Path

import pytest

from gpt import InputError, files
from gpt.errors import MachineError, ReportedError, cannot_write

URL = "https://example.org/file"
CONTENT = b"content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_within_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that drops packets and blocks the first run."""
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: time.sleep(5))
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.05 s"):
        files.verified_file([], URL, SHA256)


def test_within_passes_on_the_result_and_the_error() -> None:
    """A result or an exception that is lost between threads."""
    assert files.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        files.within(5, lambda: 1 // 0)


def test_a_refused_connection_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that shows `<urlopen error …>` instead of the reason."""

    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError(OSError("Network is unreachable"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(OSError, match=r"^Network is unreachable$"):
        files.verified_file([], URL, SHA256)


def test_a_download_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's error page that is taken for the file."""
    monkeypatch.setattr(files, "_fetch", lambda url: b"<html>")
    with pytest.raises(OSError, match=f"expected {SHA256}"):
        files.verified_file([tmp_path / "x"], URL, SHA256)
    assert not list(tmp_path.iterdir())


def test_a_verified_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is downloaded again each time, or a damaged one that is used."""
    places = [tmp_path / "damaged", tmp_path / "cache" / "file"]
    places[0].write_bytes(b"other")
    monkeypatch.setattr(files, "_fetch", lambda url: CONTENT)
    assert files.verified_file(places, URL, SHA256) == CONTENT
    assert places[1].read_bytes() == CONTENT

    monkeypatch.setattr(files, "_fetch", lambda url: pytest.fail("downloaded again"))
    assert files.verified_file(places, URL, SHA256) == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "checkpoint: cannot read .*file.json: No such file"),
        ("{", "checkpoint: .*file.json is not JSON"),
        ("[1]", "checkpoint: .*file.json holds a list, expected a JSON object"),
    ],
)
def test_read_json_names_the_file(content: str | None, message: str, tmp_path: Path) -> None:
    """A damaged file that raises an error of Python's, which names no file."""
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    with pytest.raises(InputError, match=message):
        files.read_json(tmp_path / "file.json")


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the paths are POSIX's")


@POSIX
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the path is empty"),
        ("~nosuchuser/x", "'~nosuchuser/x' has no home folder"),
        *(
            (f"{name}", r"is not a path \(.*embedded null")
            for name in ("\0a", "a\0b", "a/\0", "~\0", "~a\0/b")
        ),
        ("\ud800", "is not a path .*surrogates not allowed"),
        ("n" * 300, "is not a path .File name too long"),
        ("n/" * 3000, "is not a path .File name too long"),
        ("loop/x", "is not a path .Too many levels"),
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_a_path_that_no_file_can_have_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError, RuntimeError or OSError of Python's, which a command shows as a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=f"^--out: .*{message}") as caught:
        files.user_path(text, "--out")
    assert len(str(caught.value)) < 200


@POSIX
def test_a_tilde_without_a_home_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError where HOME is not set and the user has no entry in the password file."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for text in ("~", "~/x"):
        with pytest.raises(InputError, match=r"^--out: '~.*' has no home folder, expected a path without ~"):
            files.user_path(text, "--out")


@POSIX
def test_a_path_may_be_missing_and_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder, undecodable bytes, a dangling link or a file as parent, refused too early."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    for name in ("new/folder", "\udcff\udcfe", "file/x", "dangling", "self", " "):
        assert files.user_path(f"~/{name}", "--out") == tmp_path / name


def make(kind: str, path: Path) -> None:
    """Creates something at `path` that is not a file that can be read."""
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind != "missing":
        path.symlink_to({"self link": path.name, "dangling link": "nowhere"}.get(kind, kind))


@POSIX
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot read .*: No such file or directory"),
        ("dangling link", "cannot read .*: No such file or directory"),
        ("self link", "cannot read .*: Too many levels of symbolic links"),
        ("folder", "is a folder, expected a regular file"),
        ("FIFO", "is a FIFO, expected a regular file"),
        ("socket", "is a socket or a device, expected a regular file"),
        ("/dev/zero", "is a character device, expected a regular file"),
        ("/dev/tty", "(is a character device|is a socket or a device), expected a regular file"),
    ],
)
def test_only_a_regular_file_is_opened(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO that waits for ever, a device that never ends, or an OSError that no command reports."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make(kind, Path("x"))
    with pytest.raises(InputError, match=rf"^--config: .*{message}"):
        files.open_regular(Path("x"), "--config")


@POSIX
@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 300, "file/x"])
def test_an_impossible_name_is_not_opened(name: str, tmp_path: Path) -> None:
    """A ValueError or OSError for a name that a file's content gave."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--config: "):
        files.open_regular(tmp_path / name, "--config")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_may_not_be_read_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PermissionError as a traceback. It is simulated, because root may read every file."""

    def refuse(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=rf"^--config: cannot read .*f: {os.strerror(number)}$"):
        files.read_regular(tmp_path / "f", "--config", 10)


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    """A file without end that fills the memory, a limit that is off by one, or memory as for the limit."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    assert files.read_regular(path, "--config", 1000) == b"x" * 1000
    with pytest.raises(InputError, match=r"^--config: .* has more than 999 bytes, the most that is read"):
        files.read_regular(path, "--config", 999)

    tracemalloc.start()
    files.read_regular(path, "--config", 1 << 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * files.CHUNK


def test_a_file_that_shrinks_or_fails_while_it_is_read(tmp_path: Path) -> None:
    """A read that fails after the file was opened, as a traceback."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    with files.open_regular(path, "--config") as file:
        path.unlink()
        assert files.read_limited(file, "--config", 10) == b"x" * 10
    with (
        Path(os.devnull).open("wb") as write_only,
        pytest.raises(InputError, match=r"^--config cannot be read"),
    ):
        files.read_limited(write_only, "--config", 10)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EACCES, "Permission denied"), InputError),
        (OSError(errno.EROFS, "Read-only file system"), InputError),
        (OSError(errno.ENOTDIR, "Not a directory"), InputError),
        (OSError(errno.EILSEQ, "Invalid or incomplete multibyte or wide character"), InputError),
        (OSError(errno.ENOSPC, "No space left on device"), MachineError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), MachineError),
        (OSError(errno.EIO, "Input/output error"), MachineError),
        (OSError("I/O error: Permission denied (os error 13)"), InputError),
        (OSError("I/O error: No space left on device (os error 28)"), MachineError),
        (OSError("unknown"), MachineError),
    ],
    ids=str,
)
def test_a_full_disk_is_not_bad_input(error: OSError, kind: type[ReportedError]) -> None:
    """An exit code that tells the user to change the input when the disk is full, or the reverse."""
    reported = cannot_write("checkpoint", Path("out/x"), error)
    assert type(reported) is kind
    assert str(reported) == f"checkpoint: cannot write out/x: {error.strerror or error}"
