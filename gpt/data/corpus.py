"""Where text comes from: Python's standard library, tiny Shakespeare, or the user's files."""

from __future__ import annotations

import functools
import glob
import hashlib
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gpt.errors import InputError
from gpt.files import verified_file
from kernels.files import cache_folder

STDLIB, SHAKESPEARE = "stdlib", "shakespeare"
STDLIB_CHARACTERS = 4_000_000  # more than a first run on two cores reads
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Document(NamedTuple):
    """One text of a corpus, read when asked for; reading checks that it is UTF-8 text and not empty."""

    name: str
    read: Callable[[], str]


def open_corpus(sources: Iterable[str]) -> list[Document]:
    """The documents of `sources`: "stdlib", "shakespeare", files, folders (all files below, sorted) and
    globs.

    Raises:
        InputError: A source is missing, or holds no file. Reading raises it for what is empty, binary or not
            UTF-8.
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
        InputError: With the path, and the byte where it stops being text.
    """
    try:
        content = path.read_bytes()
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
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (
            file
            for file in path.rglob("*")
            if not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
    elif glob.has_magic(source):
        below = (Path(match) for match in glob.glob(str(path), recursive=True))
    else:
        raise InputError(
            f"data: {source} does not exist, expected {STDLIB}, {SHAKESPEARE}, a file, a folder or a glob"
        )
    files = sorted(file for file in below if file.is_file())
    if not files:
        raise InputError(f"data: {source} holds no file, expected at least one of UTF-8 text")
    return files


def _shakespeare() -> str:
    place = cache_folder() / "tinyshakespeare.txt"
    try:
        return verified_file([place], SHAKESPEARE_URL, SHAKESPEARE_SHA256).decode("utf-8")
    except OSError as error:
        raise InputError(
            f"data: cannot download {SHAKESPEARE_URL} ({error}), expected a network, that file as {place}, "
            "or --data PATH"
        ) from error


@functools.cache
def _stdlib() -> list[Document]:
    """The running Python's documentation topics and top-level modules, in printable ASCII.

    A hash of the name orders them, so that the last tenth, the validation split, resembles the rest.
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
