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
    import numpy as np

    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def cached_tokens(documents: Sequence[Document], tokenizer: Tokenizer, stem: Path) -> tuple[Ids, Positions]:
    """The tokens of all documents and where each begins: from the cache, made first where it has none."""
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
    except (OSError, ValueError, EOFError):  # not there yet, or damaged: made anew
        ends = [0]
    try:
        with replacing(tokens_file) as file:
            for ids in _tokenize(documents, tokenizer, ends):
                file.write(np.asarray(ids, dtype).tobytes())
        with replacing(ends_file) as file:
            np.save(file, np.asarray(ends, np.int64))
        return read()
    except OSError:  # a full or read-only cache: the tokens stay in memory
        ends = [0]
        chunks = [np.asarray(ids, dtype) for ids in _tokenize(documents, tokenizer, ends)]
        return np.concatenate(chunks), np.asarray(ends[:-1], np.int64)


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer, ends: list[int]) -> Iterator[list[int]]:
    """Ids in chunks, with progress when it takes long; appends to `ends` where each document ends."""
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
    """Pieces of `text` and where they begin.

    A cut is between a character and a newline, which GPT-2's split never joins, so the ids are those of the
    whole text.
    """
    cut = re.compile(r"(?<=\S)(?=\n)")
    start = 0
    while len(text) - start > CHUNK and (end := cut.search(text, start + CHUNK)):
        yield start, text[start : end.start()]
        start = end.start()
    yield start, text[start:]


def bin_files(sources: Sequence[str]) -> list[Path]:
    """nanoGPT's files, where `sources` names them: [train.bin, val.bin] of a folder that holds train.bin, or
    one .bin file.

    Raises:
        InputError: A folder without val.bin, or .bin files beside other sources.
    """
    paths = [Path(source).expanduser() for source in sources]
    if len(paths) == 1 and (paths[0] / "train.bin").is_file():
        if not (paths[0] / "val.bin").is_file():
            raise InputError(f"data: {paths[0]} holds train.bin without val.bin, expected both")
        return [paths[0] / "train.bin", paths[0] / "val.bin"]
    if any(path.suffix == ".bin" for path in paths) and len(paths) > 1:
        raise InputError(
            f"data: {' '.join(sources)} has .bin files among others, expected one, or the folder of "
            "train.bin and val.bin"
        )
    return [path for path in paths if path.suffix == ".bin"]


def map_bin(path: Path) -> Ids:
    """The ids in a file of raw little-endian uint16.

    Raises:
        InputError: It is missing, empty, or of an odd size.
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
    """A hash of each file's size, beginning and end: enough to tell corpora apart without reading them
    whole."""
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            hashed.update(f"{size} ".encode() + file.read(CHUNK))
            file.seek(max(0, size - CHUNK))
            hashed.update(file.read())
    return hashed.hexdigest()


def document_begins(ids: Ids, tokenizer: Tokenizer) -> Positions:
    """Where documents begin: at 0, and behind each end of text.

    Raises:
        InputError: The tokenizer has no such token.
    """
    import numpy as np

    end = getattr(tokenizer, "special_tokens", {}).get(END_OF_TEXT)
    if end is None:
        raise InputError(f"data: pack_documents with .bin files, expected a tokenizer that has {END_OF_TEXT}")
    found = [np.flatnonzero(ids[i : i + CHUNK] == end) + i + 1 for i in range(0, len(ids), CHUNK)]
    return np.concatenate([np.zeros(1, np.int64), *found])
