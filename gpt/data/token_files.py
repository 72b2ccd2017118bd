"""Token ids on disk: the cache of tokenized text, and the `.bin` files of nanoGPT and llm.c."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from gpt.data.cache import open_cached, write_cached
from gpt.data.corpus import Corpus
from gpt.data.documents import Document
from gpt.data.tokenizers import END_OF_TEXT, Tokenizer, end_of_text
from gpt.errors import InputError
from gpt.files import open_regular, user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]
    Positions = NDArray[np.int64]

BIN_NAMES = {"train": "train.bin", "validation": "val.bin"}  # nanoGPT's names of the splits
LAYOUT = 2  # of a cached file
CHUNK = 1 << 20  # characters tokenized, or tokens looked through, at a time
HEADER = 256 * 4  # bytes of llm.c's header, whose first words are a magic number, a version, a number of ids
VERSIONS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # by magic number: the version, the dtype of the ids
SETTLED_NS = 2_000_000_000  # a file changed since then may change again without another time of change


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 if every id fits, else uint32."""
    import numpy as np

    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class Tokens(NamedTuple):
    """A tokenized corpus.

    Attributes:
        ids: (N,) the tokens for training, then those for validation.
        begins: The sorted positions at which documents begin.
        untrained: Sorted positions: the tokens before the first are trained on, those up to the second are
            not, and so on in turns.
        cut: How many tokens are for training.
    """

    ids: Ids
    begins: Positions
    untrained: Positions
    cut: int


def cached_tokens(corpus: Corpus, tokenizer: Tokenizer, identity: str, validation: Fraction) -> Tokens:
    """The tokens of all documents; read from the cache if it has them.

    The cached file has the ids, `untrained` and the end of each document as int64, and how many positions
    each of the two has, and the cut. Its hash is checked each time, and a damaged file is replaced. If the
    cache cannot be written, the tokens stay in memory.

    Args:
        corpus: The texts.
        tokenizer: Encodes them.
        identity: A hash of the texts, the tokenizer and `validation`, which names the file.
        validation: The share of the tokens that is for validation.
    """
    import numpy as np
    from tqdm import tqdm

    key = hashlib.sha256(f"{LAYOUT} {identity}".encode()).hexdigest()
    name, dtype = f"tokens/{key[:32]}.tokens", ids_dtype(tokenizer)
    limit = 32 * (corpus.size + corpus.count + 1)  # of a file; allows four ids for each byte of text

    def blocks() -> Iterator[bytes]:
        encoder = _Encoder(tokenizer)
        marks = []
        with tqdm(desc="tokenizing", total=corpus.count, unit=" documents", leave=False, delay=1) as bar:
            for part in corpus.parts():
                for document in part:
                    yield from (np.asarray(ids, dtype).tobytes() for ids in encoder.encode(document))
                    bar.update()
                marks.append(encoder.count)
        cut = marks[0] + split_at(marks[1] - marks[0], validation)
        yield encoder.untrained.tobytes() + encoder.ends.tobytes()
        yield np.asarray([len(encoder.untrained), len(encoder.ends), cut], np.int64).tobytes()

    cached = open_cached(name, limit)
    if cached is None and write_cached(name, blocks()):
        cached = open_cached(name, limit)
    if cached is None:
        content = np.frombuffer(b"".join(blocks()), np.uint8)
    else:
        content = np.asarray(np.memmap(cached.file, np.uint8, mode="r", shape=(cached.length,)))
        cached.file.close()

    def positions(begin: int, end: int) -> Positions:
        return np.frombuffer(content[begin:end].tobytes(), np.int64)

    last = len(content) - 3 * 8
    untrained, ends, cut = positions(last, len(content)).tolist()
    after_untrained = last - 8 * ends
    after_ids = after_untrained - 8 * untrained
    return Tokens(
        content[:after_ids].view(dtype),
        np.concatenate([np.zeros(1, np.int64), positions(after_untrained, last)[:-1]]),
        positions(after_ids, after_untrained),
        cut,
    )


def split_at(count: int, validation: Fraction) -> int:
    """How many of `count` tokens are for training if the share `validation` is not."""
    return math.floor(count * (1 - validation))


class _Encoder:
    """Encodes documents and notes what the cached file has besides the ids.

    A document ends with the tokenizer's end-of-text token, if it has one. Where the text has the name of that
    token, it is the token, and ends a document too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.end_of_text = tokenizer, end_of_text(tokenizer)
        self.count = 0
        self.ends = array("q")
        self.untrained = array("q")

    def encode(self, document: Document) -> Iterator[list[int]]:
        """Yields the ids of `document` in chunks."""
        for piece in document.pieces:
            for start, chunk in _chunks(piece.text):
                try:
                    ids = self.tokenizer.encode(chunk, special=True)
                except InputError as error:
                    raise InputError(f"{document.where}, from character {start}: {error}") from error
                yield self._note(ids, piece.trained)
        if not self.ends or self.ends[-1] != self.count:
            if self.end_of_text is None:
                self.ends.append(self.count)
            else:
                yield self._note([self.end_of_text], document.pieces[-1].trained)

    def _note(self, ids: list[int], trained: bool) -> list[int]:
        """Notes that `ids` follow; returns them."""
        if trained == (len(self.untrained) % 2 == 1):
            self.untrained.append(self.count)
        if self.end_of_text is not None:
            self.ends.extend(self.count + i + 1 for i, token in enumerate(ids) if token == self.end_of_text)
        self.count += len(ids)
        return ids


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    """Pieces of `text` and their positions.

    Each cut is before a newline that follows a non-space character. GPT-2's pre-tokenization never joins
    these two, so the pieces have the same ids as the whole text.
    """
    cut = re.compile(r"(?<=\S)(?=\n)")
    start = 0
    while len(text) - start > CHUNK and (end := cut.search(text, start + CHUNK)):
        yield start, text[start : end.start()]
        start = end.start()
    yield start, text[start:]


def bin_files(sources: Sequence[str]) -> list[Path]:
    """nanoGPT's files in `sources`: train.bin and val.bin of a folder, or one .bin file; else [].

    Raises:
        InputError: A folder has train.bin but no val.bin, or .bin files are mixed with other sources.
    """
    paths = [user_path(source, "data") for source in sources]
    train, validation = BIN_NAMES.values()
    if len(paths) == 1 and os.path.lexists(paths[0] / train):
        if not os.path.lexists(paths[0] / validation):
            raise InputError(f"data: {paths[0]} holds {train} without {validation}, expected both")
        return [paths[0] / train, paths[0] / validation]
    if any(path.suffix == ".bin" for path in paths) and len(paths) > 1:
        raise InputError(
            f"data: {' '.join(sources)} has .bin files among other sources, expected one .bin file, or a "
            "folder of them"
        )
    return [path for path in paths if path.suffix == ".bin"]


class BinForm(NamedTuple):
    """Where the ids of a .bin file are: after `header` bytes, `number` of them, of `dtype`."""

    header: int
    dtype: str
    number: int


def bin_form(begin: bytes, size: int, path: Path) -> BinForm:
    """The form of a .bin file of `size` bytes that begins with `begin`.

    It is nanoGPT's, raw little-endian uint16 ids, or llm.c's, a header and uint16 or uint32 ids.

    Raises:
        InputError: The file is empty, has a part of an id, or is not what its header states.
    """
    import numpy as np

    magic, version, count = np.frombuffer(begin[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic not in VERSIONS:
        if not size or size % 2:
            raise InputError(f"data: {path} has {size} bytes, expected uint16 ids, two bytes each")
        return BinForm(0, "<u2", size // 2)

    known, dtype = VERSIONS[magic]
    if version != known:
        raise InputError(f"data: {path} has llm.c's header of version {version}, expected {known}")
    expected = HEADER + count * np.dtype(dtype).itemsize
    if count < 1 or size != expected:
        raise InputError(
            f"data: {path} has {size} bytes, expected {expected}, as its header states {count} ids"
        )
    return BinForm(HEADER, dtype, count)


def read_at(file: IO[bytes], position: int, size: int, path: Path) -> bytes:
    """Up to `size` bytes of a file, from `position`; InputError if they cannot be read."""
    try:
        file.seek(position)
        return file.read(size)
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from error


class Content(NamedTuple):
    """What reading all of a .bin file shows: the SHA-256, and the largest id with its first position."""

    sha256: str
    largest: int
    position: int


def open_bin(path: Path) -> tuple[Ids, Content]:
    """Maps a .bin file; reads all of it, unless an earlier start has done so.

    The result is cached under the file's device, inode, size and times of change, whatever its path. The
    kernel sets the last of these times, so a changed file is read again even if its modification time was put
    back. What this misses: damage by the disk, a change through a memory map that the file system has not
    recorded yet, and a change while the run goes on.

    Raises:
        InputError: The file is missing, not a regular file, not of a known form (see `bin_form`), or changes
            while it is read.
    """
    import numpy as np

    with open_regular(path, "data") as file:
        status = os.fstat(file.fileno())
        form = bin_form(read_at(file, 0, HEADER, path), status.st_size, path)
        ids = np.asarray(np.memmap(file, form.dtype, mode="r", offset=form.header))
        key = (*_unread_identity(status), *([form.dtype] if form.header else []))
        name = f"bins/{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
        if (cached := open_cached(name, limit=1 << 12)) is not None:
            with cached.file:
                return ids, Content(**json.loads(cached.file.read(cached.length)))

        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
        content = _read_bin(file, path, form)
        if _unread_identity(os.fstat(file.fileno())) != _unread_identity(status):
            raise InputError(f"data: {path} changed while it was read, expected a finished file")
    if settled:
        write_cached(name, [json.dumps(content._asdict()).encode()])
    return ids, content


def _unread_identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file and its content from others without reading it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_bin(file: IO[bytes], path: Path, form: BinForm) -> Content:
    """Reads all ids of a .bin file, with a progress bar after a second."""
    import numpy as np
    from tqdm import tqdm

    width = np.dtype(form.dtype).itemsize
    hashed, largest, position = hashlib.sha256(), -1, -1
    with tqdm(
        desc=f"reading {path.name}",
        total=form.number * width,
        unit="B",
        unit_scale=True,
        leave=False,
        delay=1,
    ) as bar:
        for start in range(0, form.number, CHUNK):
            block = read_at(file, form.header + start * width, CHUNK * width, path)
            ids = np.frombuffer(block, form.dtype, len(block) // width)
            hashed.update(block)
            if len(ids) and (highest := int(ids.max())) > largest:
                largest, position = highest, start + int(ids.argmax())
            bar.update(len(block))
    return Content(hashed.hexdigest(), largest, position)


def check_id(i: int, position: int, vocab_size: int, source: str) -> None:
    """Raises InputError if id `i`, at `position` of `source`, is not in the vocabulary."""
    if not 0 <= i < vocab_size:
        raise InputError(
            f"data: {source} has id {i} at position {position}, expected 0 to {vocab_size - 1} (the "
            f"tokenizer's vocab_size is {vocab_size})"
        )


def separator(tokenizer: Tokenizer) -> int:
    """The id after which the next document begins in .bin files.

    Raises:
        InputError: The tokenizer has no end-of-text token.
    """
    end = end_of_text(tokenizer)
    if end is None:
        raise InputError(
            f"data: pack_documents needs {END_OF_TEXT} in .bin files, expected a tokenizer that has it"
        )
    return end


def document_begins(ids: Ids, tokenizer: Tokenizer) -> Positions:
    """The positions at which documents begin: 0, and after each end-of-text token; see `separator`."""
    import numpy as np

    end = separator(tokenizer)
    begins = [np.flatnonzero(ids[i : i + CHUNK] == end) + i + 1 for i in range(0, len(ids), CHUNK)]
    return np.concatenate([np.zeros(1, np.int64), *begins])
