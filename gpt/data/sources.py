"""What --data names: Python's standard library, tiny Shakespeare, or the user's files."""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import itertools
import os
import stat
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gpt.data.documents import Document, Piece
from gpt.data.formats import ROWS, read_documents
from gpt.data.saved_datasets import saved_shards
from gpt.errors import InputError
from gpt.files import KINDS, user_path, verified_file
from kernels.files import cache_folder

STDLIB, SHAKESPEARE = "stdlib", "shakespeare"
HIDDEN = "hidden"
STDLIB_CHARACTERS = 4_000_000  # more than the default run reads
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(eq=False)
class Listing:
    """What a folder or glob holds, and what of it is left out.

    Attributes:
        source: The folder or glob.
        entries: The files in it, and the hidden entries, whose contents are not listed.
        left_out: (kind, reason) of each entry without text: ("empty", "a.txt is empty").
    """

    source: str
    entries: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """How many entries are left out, by kind, and the first of them."""
        left_out = sorted(self.left_out, key=lambda entry: entry[0] == HIDDEN)
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in Counter(kind for kind, _ in left_out).items())
        return (
            f"{len(left_out):,} of {self.entries:,} files of {self.source}: {kinds}; first: {left_out[0][1]}"
        )


class Source(NamedTuple):
    """A file to read.

    Attributes:
        name: Its name relative to what the user gave, which is the same on another machine.
        read: Gives its documents, one at a time.
        rows: Whether each document is a row of the file.
        listing: The folder or glob that it was found in; None if the user named the file.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    rows: bool = False
    listing: Listing | None = None

    def place(self) -> tuple[bool, bytes]:
        """Sorts files with rows before other files, and each by a hash of their names."""
        return not self.rows, hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).digest()


def open_sources(
    sources: Iterable[str], *, text_field: str = "text", keep_newlines: bool = False
) -> list[Source]:
    """The files of `sources`, in the order of `Source.place`: the end of the list resembles the rest.

    Args:
        sources: "stdlib", "shakespeare", files, folders (all files in them), globs, and data sets that
            Hugging Face `datasets` saved.
        text_field, keep_newlines: As in `read_documents`.

    Raises:
        InputError: A source does not exist or has no files, or no source is given.
    """
    files: list[Source] = []
    for source in sources:
        if source == STDLIB:
            files += _stdlib()
        elif source == SHAKESPEARE:
            files.append(Source(SHAKESPEARE, lambda: _plain(SHAKESPEARE, _shakespeare())))
        else:
            listing, paths = _list(source)
            for path, name in paths:
                read = functools.partial(
                    read_documents, path, text_field=text_field, keep_newlines=keep_newlines
                )
                files.append(Source(name, read, path.suffix in ROWS, listing))
    if not files:
        raise InputError(f"data: no source given, expected {STDLIB}, {SHAKESPEARE} or paths")
    return sorted(files, key=Source.place)


def _list(source: str) -> tuple[Listing | None, list[tuple[Path, str]]]:
    """The files of a path or glob with their relative names, sorted, and the listing that they are from.

    Of a folder, these are all files below it, except hidden ones and `__pycache__`. A link to a folder is
    followed, unless that folder has been entered already.
    """
    path = user_path(source, "data")
    mode = _mode(path)
    if mode is None and not glob.has_magic(source):
        raise InputError(
            f"data: {source} does not exist, expected {STDLIB}, {SHAKESPEARE}, a file, a folder or a glob"
        )
    if mode is not None and not stat.S_ISDIR(mode):
        return None, [(path, path.name)]
    if mode is not None and (shards := saved_shards(path)):
        return None, [(shard, shard.name) for shard in shards]

    listing = Listing(source)
    if mode is None:
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        entries = list(_matches(path))
    else:
        base, folders = path, _folders([path])
        entries = [entry for folder in folders for entry in _visible(folder)]
        hidden = [entry for folder in folders for entry in _visible(folder, hidden=True)]
        listing.left_out += [(HIDDEN, f"{entry} is hidden") for entry in hidden]

    files = []
    for entry in sorted(set(entries)):
        mode = _mode(entry) or 0
        if stat.S_ISREG(mode):
            files.append((entry, entry.relative_to(base).as_posix()))
        elif not stat.S_ISDIR(mode):
            kind = KINDS.get(stat.S_IFMT(mode), "missing")
            listing.left_out.append(("not regular files", f"{entry} is {kind}"))
    listing.entries = len(files) + len(listing.left_out)
    if not files:
        raise InputError(f"data: {source} holds no files, expected at least one with UTF-8 text")
    return listing, files


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
    """The entries of a folder, sorted, without hidden ones and `__pycache__`, or these alone."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"data: cannot read {folder}: {error.strerror}") from error
    return [
        folder / name for name in sorted(names) if (name.startswith(".") or name == "__pycache__") == hidden
    ]


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


def _plain(name: str, text: str) -> list[Document]:
    return [Document(f"data: {name}", [Piece(text)])]


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
def _stdlib() -> list[Source]:
    """Documentation topics and top-level modules of the running Python that are printable ASCII."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    texts = {f"topics/{name}": text.translate(_TYPOGRAPHY) for name, text in topics.items()}
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        texts[path.name] = path.read_text("utf-8", errors="replace")

    chosen: list[Source] = []
    length = 0
    sources = [Source(name, functools.partial(_plain, name, text)) for name, text in texts.items()]
    for source in sorted(sources, key=Source.place):
        text = texts[source.name]
        if (
            text.isascii()
            and text.replace("\n", "").isprintable()
            and 0 < len(text) <= STDLIB_CHARACTERS - length
        ):
            chosen.append(source)
            length += len(text)
    if not chosen:
        raise InputError(
            f"data: no standard library sources in {sysconfig.get_path('stdlib')}, expected --data PATH"
        )
    return chosen


_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "°": " degrees", "ß": "ss"}
)
