"""The files that --data names: folders, globs, links, and what is not a readable text."""

from __future__ import annotations

import errno
import glob
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from gpt import InputError
from gpt.data.sources import open_sources
from tests.gpt.data.loading import joined, load, write
from tests.gpt.text import TEXT


def names(source: object, below: Path) -> list[str]:
    return sorted(os.path.relpath(path, below) for path in paths(source))


def paths(source: object) -> list[str]:
    """The files that `source` names."""
    documents = [document for file in open_sources([str(source)]) for document in file.read()]
    return [document.where.removeprefix("data: ") for document in documents]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """d/a.txt, d/s/b.txt, d/s/t/c.txt, d/.hidden/x.txt, d/s/.y.txt."""
    folder = tmp_path / "d"
    (folder / "s" / "t").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write(folder, a="a")
    write(folder / "s", **{"b": "b", ".y": "y"})
    write(folder / "s" / "t", c="c")
    write(folder / ".hidden", x="x")
    return folder


PATTERNS = "** **/* **/*.txt * */* */** **/t/* s/**/*.txt [as]* .*/* */.y* **/.y.txt s/?.txt */../a.txt"


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_globs_match_what_glob_matches(pattern: str, tree: Path) -> None:
    """A pattern with another meaning than Python's glob gives it."""
    expected = {path for path in glob.glob(str(tree / pattern), recursive=True) if os.path.isfile(path)}
    if expected:
        assert set(paths(tree / pattern)) == expected
    else:
        with pytest.raises(InputError, match="holds no files"):
            open_sources([str(tree / pattern)])


@pytest.mark.parametrize("source", ["", "**", "**/*.txt"])
def test_links_are_followed_once(source: str, tree: Path) -> None:
    """A walk that never ends where links lead back, that skips a linked folder, or reads a folder twice."""
    for i in range(8):
        (tree / f"a{i}").symlink_to(".")
        (tree / "s" / f"up{i}").symlink_to("..")
    outside = tree.parent / "outside"
    outside.mkdir()
    write(outside, z="z")
    (tree / "a link").symlink_to(outside)
    (tree / "s" / "another link").symlink_to(outside)
    assert names(tree / source, tree) == ["a link/z.txt", "a.txt", "s/b.txt", "s/t/c.txt"]


def test_an_unreadable_folder_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subfolder without permission that is left out without a word."""
    listdir = os.listdir

    def refuse(folder: Any) -> list[str]:
        if Path(folder).name == "t":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    for source in (tree, tree / "**", tree / "*" / "*" / "*.txt"):
        with pytest.raises(InputError, match=rf"^data: cannot read {tree}/s/t: Permission denied$"):
            open_sources([str(source)])


def test_an_unreadable_file_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback for a file without permission, or for a disk that fails."""
    open_file = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if Path(path).name == "b.txt":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=rf"^data: cannot read {tree}/s/b\.txt: Permission denied$"):
        load(tree)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * 300, "is not a path"),
        ("x" * 300 + "/*", "is not a path"),
        ("a\0b", "is not a path"),
        ("~nosuchuser/x", "has no home folder"),
        ("~nosuchuser/*", "has no home folder"),
        ("", "the path is empty"),
        ("missing", "does not exist"),
        ("a file/below", "does not exist"),
        ("dangling", "dangling is a link to nowhere, which does not exist"),
        ("loop", "Too many levels of symbolic links"),
        ("folder", "dangling is a link to nowhere, which does not exist"),
        ("folder/*", "dangling is a link to nowhere, which does not exist"),
    ],
)
def test_odd_paths_are_refused_in_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, or a file that is left out, for a path that no text can be read from."""
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text(TEXT)
    Path("folder").mkdir()
    Path("folder", "text").write_text(TEXT)
    for link in (Path("dangling"), Path("folder", "dangling")):
        link.symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=message) as caught:
        load(source)
    assert str(caught.value).startswith("data: ")
    assert "\n" not in str(caught.value)


def test_undecodable_names_are_read(tmp_path: Path) -> None:
    """A name that is not UTF-8 but a valid name on Linux, refused or read with a traceback."""
    folder = os.fsencode(tmp_path)
    try:
        with open(folder + b"/\xff.txt", "w") as file:
            file.write(TEXT)
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    assert joined(load(os.fsdecode(folder + b"/\xff.txt"))) == TEXT
    assert joined(load(tmp_path)) == TEXT
    assert joined(load(tmp_path / "*.txt")) == TEXT


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
def test_what_cannot_be_text_is_left_out_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO whose writer is waited for, or a device that never ends."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text=TEXT)
    os.mkfifo("fifo")
    Path("zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.warns(
            UserWarning, match=r"skipped 3 of 4 files of \.: 3 not regular files; first: fifo is a FIFO"
        ) as caught:
            assert joined(load(".")) == TEXT
    assert len(caught) == 1
    for name, kind in (("fifo", "a FIFO"), ("zero", "a character device"), ("socket", "a socket")):
        with pytest.raises(InputError, match=rf"^data: .*{name}.* {kind}"):
            load(name)


def test_a_project_folder_is_read(tmp_path: Path) -> None:
    """A folder of a real project that is refused for a file without text, or left out without a count."""
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / ".git").mkdir()
    files = {
        "a.py": TEXT[:50].encode(),
        "empty/__init__.py": b"",
        "mark.txt": b"\xef\xbb\xbf",
        "b.png": b"\x89PNG\0",
        "latin.txt": b"na\xefve",
        "log.jsonl": b'{"step": 1}\n',
        "broken.jsonl": b"{",
        ".git/config": b"[core]",
        ".gitignore": b"*",
        "__pycache__/a.pyc": b"\0\0",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    kinds = {"2 empty", "1 binary", "1 not UTF-8", "2 without rows of text"}
    for source, count, expected in (
        (tmp_path, "9 of 10", kinds | {"3 hidden"}),
        (tmp_path / "**", "6 of 7", kinds),
    ):
        line = rf"data: skipped {count} files of {re.escape(str(source))}: (.*); first: .*"
        with pytest.warns(UserWarning, match=line) as caught:
            assert joined(load(source)) == TEXT[:50]
        (listed,) = [re.fullmatch(line, str(warning.message)) for warning in caught]
        assert listed
        assert set(listed[1].split(", ")) == expected


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    """A traceback, or a run on nothing, where all files of a folder are skipped."""
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        InputError, match=r"holds no text, .*; skipped 1 of 1 .*: 1 empty; first: .*a\.txt is"
    ):
        load(tmp_path)


def test_marks_and_newlines_are_normalised(tmp_path: Path) -> None:
    """A byte-order mark or carriage returns among the tokens, or dropped although they are asked for."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one\\r\\ntwo\\rthree\\r\\n"}\n')
    for name in ("a.txt", "b.jsonl"):
        assert joined(load(tmp_path / name)) == "one\ntwo\rthree\n"
        assert joined(load(tmp_path / name, keep_newlines=True)) == "one\r\ntwo\rthree\r\n"
