"""Token ids on disk: the cache of tokenized text, and nanoGPT's `.bin` files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.data.corpus import Document
from gpt.data.tokenizers import END_OF_TEXT, Tokenizer
from gpt.errors import InputError
from kernels.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]
    Positions = NDArray[np.int64]

BIN_NAMES = {"train": "train.bin", "validation": "val.bin"}  # nanoGPT's names of the splits
CHUNK = 1 << 20  # characters tokenized, or tokens looked through, at a time


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 if every id fits, else uint32."""
    import numpy as np

    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def cached_tokens(documents: Sequence[Document], tokenizer: Tokenizer, stem: Path) -> tuple[Ids, Positions]:
    """The tokens of all documents, and the position at which each begins; read from the cache if it has them.

    Args:
        documents: The texts.
        tokenizer: Encodes them.
        stem: The path in the cache, without a suffix.
    """
    import numpy as np

    dtype = ids_dtype(tokenizer)
    tokens_file, ends_file = stem.with_suffix(".tokens"), stem.with_suffix(".npy")

    def read() -> tuple[Ids, Positions]:
        ends: Positions = np.load(ends_file, allow_pickle=False)
        if tokens_file.stat().st_size != ends[-1] * dtype.itemsize:
            raise OSError(f"{tokens_file} is truncated")
        return np.asarray(np.memmap(tokens_file, dtype, mode="r")), ends[:-1]

    try:
        return read()
    except (OSError, ValueError, EOFError):  # not in the cache, or damaged: tokenize
        ends = [0]
    try:
        with replacing(tokens_file) as file:
            for ids in _tokenize(documents, tokenizer, ends):
                file.write(np.asarray(ids, dtype).tobytes())
        with replacing(ends_file) as file:
            np.save(file, np.asarray(ends, np.int64))
        return read()
    except OSError:  # the cache is full or read-only: keep the tokens in memory
        ends = [0]
        chunks = [np.asarray(ids, dtype) for ids in _tokenize(documents, tokenizer, ends)]
        return np.concatenate(chunks), np.asarray(ends[:-1], np.int64)


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
    paths = [Path(source).expanduser() for source in sources]
    train, validation = BIN_NAMES.values()
    if len(paths) == 1 and (paths[0] / train).is_file():
        if not (paths[0] / validation).is_file():
            raise InputError(f"data: {paths[0]} holds {train} without {validation}, expected both")
        return [paths[0] / train, paths[0] / validation]
    if any(path.suffix == ".bin" for path in paths) and len(paths) > 1:
        raise InputError(
            f"data: {' '.join(sources)} has .bin files among other sources, expected one .bin file, or "
            f"the folder of {train} and {validation}"
        )
    return [path for path in paths if path.suffix == ".bin"]


def map_bin(path: Path) -> Ids:
    """The ids in a file of raw little-endian uint16, memory-mapped.

    Raises:
        InputError: The file is missing, empty, or has an odd number of bytes.
    """
    import numpy as np

    try:
        size = path.stat().st_size
        if not size or size % 2:
            raise InputError(f"data: {path} has {size} bytes, expected uint16 ids, two bytes each")
        return np.asarray(np.memmap(path, "<u2", mode="r"))
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from error


def bin_identity(files: Sequence[Path]) -> str:
    """A hash of each file's size, beginning and end, which identifies a corpus without reading all of it."""
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            hashed.update(f"{size} ".encode() + file.read(CHUNK))
            file.seek(max(0, size - CHUNK))
            hashed.update(file.read())
    return hashed.hexdigest()


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
