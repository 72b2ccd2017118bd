"""Token ids on disk: the cache of tokenized text, and nanoGPT's `.bin` files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from gpt.data.cache import open_cached, write_cached
from gpt.data.corpus import Document
from gpt.data.tokenizers import END_OF_TEXT, Tokenizer
from gpt.errors import InputError
from gpt.files import open_regular, user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]
    Positions = NDArray[np.int64]

BIN_NAMES = {"train": "train.bin", "validation": "val.bin"}  # nanoGPT's names of the splits
CHUNK = 1 << 20  # characters tokenized, or tokens looked through, at a time
SETTLED_NS = 2_000_000_000  # a file changed since then may change again without another time of change


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 if every id fits, else uint32."""
    import numpy as np

    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def cached_tokens(
    documents: Sequence[Document], tokenizer: Tokenizer, identity: str, text_bytes: int
) -> tuple[Ids, Positions]:
    """The tokens of all documents, and the position at which each begins; read from the cache if it has them.

    The cached file has the ids of all documents, then the end of each document as int64. Its hash is checked
    each time, and a damaged file is replaced. If the cache cannot be written, the tokens stay in memory.

    Args:
        documents: The texts.
        tokenizer: Encodes them.
        identity: A hash of the texts and the tokenizer, which names the file.
        text_bytes: The length of all texts in UTF-8.
    """
    import numpy as np

    name, dtype = f"tokens/{identity[:32]}.tokens", ids_dtype(tokenizer)
    limit = 16 * (text_bytes + len(documents))  # of a file; allows four ids for each byte of text

    def blocks() -> Iterator[bytes]:
        ends: list[int] = []
        for ids in _tokenize(documents, tokenizer, ends):
            yield np.asarray(ids, dtype).tobytes()
        yield np.asarray(ends, np.int64).tobytes()

    cached = open_cached(name, limit)
    if cached is None and write_cached(name, blocks()):
        cached = open_cached(name, limit)
    if cached is None:
        content = np.frombuffer(b"".join(blocks()), np.uint8)
    else:
        content = np.asarray(np.memmap(cached.file, np.uint8, mode="r", shape=(cached.length,)))
        cached.file.close()

    cut = len(content) - 8 * len(documents)
    ends = np.frombuffer(content[cut:].tobytes(), np.int64)
    return content[:cut].view(dtype), np.concatenate([np.zeros(1, np.int64), ends[:-1]])


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer, ends: list[int]) -> Iterator[list[int]]:
    """Yields the ids in chunks, with a progress bar after a second; appends each document's end to `ends`."""
    from tqdm import tqdm

    count = 0
    for document in tqdm(documents, desc="tokenizing", unit=" documents", leave=False, delay=1):
        text = document.read()
        for start, chunk in _chunks(text):
            try:
                ids = tokenizer.encode(chunk)
            except InputError as error:
                raise InputError(f"data: {document.name}, from character {start}: {error}") from error
            count += len(ids)
            yield ids
        ends.append(count)


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
            f"data: {' '.join(sources)} has .bin files among other sources, expected one .bin file, or "
            f"the folder of {train} and {validation}"
        )
    return [path for path in paths if path.suffix == ".bin"]


class Content(NamedTuple):
    """What reading all of a .bin file shows: the SHA-256, and the largest id with its first position."""

    sha256: str
    largest: int
    position: int


def open_bin(path: Path) -> tuple[Ids, Content]:
    """Maps a file of raw little-endian uint16 ids; reads all of it, unless an earlier start has done so.

    The result is cached under the file's device, inode, size and times of change, whatever its path. The
    kernel sets the last of these times, so a changed file is read again even if its modification time was put
    back. What this misses: damage by the disk, a change through a memory map that the file system has not
    recorded yet, and a change while the run goes on.

    Raises:
        InputError: The file is missing, not a regular file, empty, has an odd number of bytes, or changes
            while it is read.
    """
    import numpy as np

    with open_regular(path, "data") as file:
        status = os.fstat(file.fileno())
        if not status.st_size or status.st_size % 2:
            raise InputError(f"data: {path} has {status.st_size} bytes, expected uint16 ids, two bytes each")
        ids = np.asarray(np.memmap(file, "<u2", mode="r"))
        key = _unread_identity(status)
        name = f"bins/{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
        if (cached := open_cached(name, limit=1 << 12)) is not None:
            with cached.file:
                return ids, Content(**json.loads(cached.file.read(cached.length)))

        file.seek(0)
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
        content = _read_bin(file, path, status.st_size)
        if _unread_identity(os.fstat(file.fileno())) != key:
            raise InputError(f"data: {path} changed while it was read, expected a finished file")
    if settled:
        write_cached(name, [json.dumps(content._asdict()).encode()])
    return ids, content


def _unread_identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file and its content from others without reading it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_bin(file: IO[bytes], path: Path, size: int) -> Content:
    """Reads all of a .bin file, with a progress bar after a second."""
    import numpy as np
    from tqdm import tqdm

    hashed, largest, position, count = hashlib.sha256(), -1, -1, 0
    with tqdm(
        desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, leave=False, delay=1
    ) as bar:
        try:
            while len(block := file.read(2 * CHUNK)) > 1:
                hashed.update(block)
                ids = np.frombuffer(block, "<u2", len(block) // 2)
                if (highest := int(ids.max())) > largest:
                    largest, position = highest, count + int(ids.argmax())
                count += len(ids)
                bar.update(len(block))
        except OSError as error:
            raise InputError(f"data: cannot read {path}: {error.strerror}") from error
    return Content(hashed.hexdigest(), largest, position)


def check_id(i: int, position: int, vocab_size: int, source: str) -> None:
    """Raises InputError if id `i`, at `position` of `source`, is not in the vocabulary."""
    if not 0 <= i < vocab_size:
        raise InputError(
            f"data: {source} has id {i} at position {position}, expected 0 to {vocab_size - 1} (the "
            f"tokenizer's vocab_size is {vocab_size})"
        )


def document_begins(ids: Ids, tokenizer: Tokenizer) -> Positions:
    """The positions at which documents begin: 0, and after each end-of-text token.

    Raises:
        InputError: The tokenizer has no end-of-text token.
    """
    import numpy as np

    end = getattr(tokenizer, "special_tokens", {}).get(END_OF_TEXT)
    if end is None:
        raise InputError(
            f"data: pack_documents needs {END_OF_TEXT} in .bin files, expected a tokenizer that has it"
        )
    begins = [np.flatnonzero(ids[i : i + CHUNK] == end) + i + 1 for i in range(0, len(ids), CHUNK)]
    return np.concatenate([np.zeros(1, np.int64), *begins])
