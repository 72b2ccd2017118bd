"""The text to train on: Python's standard library, tiny Shakespeare, or the user's files."""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import os
import stat
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gpt.errors import InputError
from gpt.files import KINDS, open_regular, user_path, verified_file
from kernels.files import cache_folder

STDLIB, SHAKESPEARE = "stdlib", "shakespeare"
STDLIB_CHARACTERS = 4_000_000  # more than the default run reads
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Document(NamedTuple):
    """One text of a corpus. `read` loads it, and raises InputError if it is empty or not UTF-8 text."""

    name: str
    read: Callable[[], str]

    def expecting(self, sha256: bytes) -> Document:
        """This document, whose `read` also raises InputError if the text does not have this hash."""

        def read() -> str:
            text = self.read()
            if hashlib.sha256(text.encode("utf-8")).digest() != sha256:
                raise InputError(f"data: {self.name} changed while it was read, expected a finished file")
            return text

        return Document(self.name, read)


def open_corpus(sources: Iterable[str]) -> list[Document]:
    """The documents of `sources`.

    Args:
        sources: "stdlib", "shakespeare", files, folders (all files in them, sorted) and globs.

    Raises:
        InputError: A source does not exist or has no files, or no source is given.
    """
    documents: list[Document] = []
    for source in sources:
        if source == STDLIB:
            documents += _stdlib()
        elif source == SHAKESPEARE:
            documents.append(Document(SHAKESPEARE, _shakespeare))
        else:
            documents += [Document(str(path), functools.partial(read_text, path)) for path in _files(source)]
    if not documents:
        raise InputError(f"data: no source given, expected {STDLIB}, {SHAKESPEARE} or paths")
    return documents


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: The file cannot be read, is empty, or is not UTF-8 text. The message names the path and
            the first wrong byte.
    """
    with open_regular(path, "data") as file:
        try:
            content = file.read()
        except OSError as error:
            raise InputError(f"data: cannot read {path}: {error.strerror}") from error
    if not content:
        raise InputError(f"data: {path} is empty, expected UTF-8 text")
    if (offset := content.find(b"\0")) >= 0:
        raise InputError(f"data: {path} is binary (a NUL at byte {offset}), expected UTF-8 text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data: {path} is not UTF-8 at byte {error.start} (0x{content[error.start]:02x})"
        ) from error


def _files(source: str) -> list[Path]:
    """The files of a path or glob, sorted.

    Of a folder, these are all files below it, except hidden ones. A link to a folder is followed, unless that
    folder has been entered already.
    """
    path = user_path(source, "data")
    mode = _mode(path)
    if mode is None and not glob.has_magic(source):
        raise InputError(
            f"data: {source} does not exist, expected {STDLIB}, {SHAKESPEARE}, a file, a folder or a glob"
        )
    if mode is not None and not stat.S_ISDIR(mode):
        return [path]

    entries = _matches(path) if mode is None else [e for folder in _folders([path]) for e in _visible(folder)]
    files, others = [], []
    for entry in sorted(set(entries)):
        mode = _mode(entry) or 0
        if stat.S_ISREG(mode):
            files.append(entry)
        elif not stat.S_ISDIR(mode):
            others.append(f"{entry} is {KINDS.get(stat.S_IFMT(mode), 'missing')}")
    if others:
        warnings.warn(
            f"data: {len(others)} files of {source} cannot be text and are left out; {others[0]}",
            stacklevel=2,
        )
    if not files:
        raise InputError(f"data: {source} holds no files, expected at least one with UTF-8 text")
    return files


def _matches(pattern: Path) -> Iterable[Path]:
    """The files and folders that match a glob; `**` is the folders below, each of them once."""
    places: Iterable[Path] = [Path(pattern.anchor)]
    parts = pattern.relative_to(pattern.anchor).parts
    for part in (*parts, "*") if parts[-1] == "**" else parts:
        folders = [place for place in places if stat.S_ISDIR(_mode(place) or 0)]
        if part == "**":
            places = _folders(folders)
        elif glob.has_magic(part):
            hidden = part.startswith(".")
            entries = (entry for folder in folders for entry in _visible(folder, hidden=hidden))
            places = [entry for entry in entries if fnmatch.fnmatch(entry.name, part)]
        else:
            places = [folder / part for folder in folders if os.path.lexists(folder / part)]
    return places


def _folders(roots: Iterable[Path]) -> list[Path]:
    """`roots` and the folders below, each of them once. Names that pass through a link come last."""
    folders: dict[tuple[int, int], Path] = {}
    links = deque(roots)
    while links:
        below = [links.popleft()]
        while below:
            folder = below.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in folders:
                continue
            folders[status.st_dev, status.st_ino] = folder
            for entry in _visible(folder):
                if stat.S_ISDIR(_mode(entry) or 0):
                    (links if entry.is_symlink() else below).append(entry)
    return list(folders.values())


def _visible(folder: Path, *, hidden: bool = False) -> list[Path]:
    """The entries of a folder, sorted, without hidden ones, or hidden ones alone."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"data: cannot read {folder}: {error.strerror}") from error
    return [folder / name for name in sorted(names) if name.startswith(".") == hidden]


def _mode(path: Path) -> int | None:
    """The kind of file that `path` is, links followed; None if nothing has this name.

    Raises:
        InputError: It cannot be told, or the path is a link to nothing.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
        raise InputError(f"data: {path} is a link to {os.readlink(path)}, which does not exist") from None
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from error


def _shakespeare() -> str:
    place: str | Path = "tinyshakespeare.txt in the cache"
    try:
        place = cache_folder() / "tinyshakespeare.txt"
        return verified_file([place], SHAKESPEARE_URL, SHAKESPEARE_SHA256).decode("utf-8")
    except OSError as error:
        raise InputError(
            f"data: cannot download {SHAKESPEARE_URL} ({error}), expected a network, that file as {place}, "
            "or --data PATH"
        ) from error


@functools.cache
def _stdlib() -> list[Document]:
    """Documentation topics and top-level modules of the running Python that are printable ASCII.

    They are ordered by a hash of their names, so that the last tenth, the validation split, resembles the
    rest.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    texts = {f"topics/{name}": text.translate(_TYPOGRAPHY) for name, text in topics.items()}
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        texts[path.name] = path.read_text("utf-8", errors="replace")

    chosen: list[Document] = []
    length = 0
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = texts[name]
        if (
            text.isascii()
            and text.replace("\n", "").isprintable()
            and 0 < len(text) <= STDLIB_CHARACTERS - length
        ):
            chosen.append(Document(name, functools.partial(str, text)))
            length += len(text)
    if not chosen:
        raise InputError(
            f"data: no standard library sources in {sysconfig.get_path('stdlib')}, expected --data PATH"
        )
    return chosen


_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "°": " degrees", "ß": "ss"}
)
