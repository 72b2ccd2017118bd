"""All documents of a corpus: read once for their hash, and again to train a tokenizer or to be tokenized."""

from __future__ import annotations

import hashlib
import warnings
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from gpt.data.documents import Document, NotText
from gpt.data.tokenizers import END_OF_TEXT
from gpt.errors import InputError

if TYPE_CHECKING:
    from gpt.data.sources import Source


NO_HASH = 1 << 64  # above all hashes of 64 bits


class Corpus:
    """The documents of `sources`. Making it reads all of them, one document in memory at a time.

    Files of a folder or glob that have no text are left out, and one warning counts them.

    Args:
        sources: The files, in order.
        validation: The share of the rows that are for validation: those whose text has the highest hashes,
            so that equal rows are in the same split, whatever their order.
        characters: Collect the distinct characters.

    Attributes:
        sha256: A hash of all documents, in hexadecimal digits.
        count, size: How many documents there are, and their bytes in UTF-8.
        characters: The distinct characters, if they are collected.

    Raises:
        InputError: A source cannot be read, or there is no text.
    """

    def __init__(self, sources: Sequence[Source], validation: Fraction, *, characters: bool) -> None:
        self.count = self.size = 0
        self.characters: set[str] = set()
        self._sources: list[tuple[Source, bytes]] = []  # each with a hash of its documents
        hashed, hashes_of_rows = hashlib.sha256(), array("Q")
        for source in sources:
            hashed_source, rows, count = hashlib.sha256(), 0, self.count
            try:
                for document in source.read():
                    rows += 1
                    if not document.pieces:
                        continue
                    digest, size = document.digest()
                    hashed.update(digest)
                    hashed_source.update(digest)
                    self.count += 1
                    self.size += size
                    if source.rows:
                        hashes_of_rows.append(_number(digest))
                    if characters:
                        self.characters.update(*(piece.text for piece in document.pieces))
            except NotText as error:
                if source.listing is None or rows:
                    raise
                source.listing.left_out.append((error.kind, error.reason))
                continue
            self._sources.append((source, hashed_source.digest()))
            if empty := rows - (self.count - count):
                warnings.warn(
                    f"data: skipped {empty:,} of {rows:,} rows of {source.name}: empty", stacklevel=2
                )
        self.sha256 = hashed.hexdigest()
        self._threshold = _lowest_for_validation(hashes_of_rows, validation)
        self._report(sources)

    def _report(self, sources: Sequence[Source]) -> None:
        """Says what is left out; InputError if a folder or glob, or the corpus, is left without text."""
        used = {source.listing for source, _ in self._sources}
        for listing in dict.fromkeys(source.listing for source in sources):
            if listing is not None and listing.left_out:
                if listing not in used:
                    raise InputError(
                        f"data: {listing.source} holds no text, expected at least one file with UTF-8 text; "
                        f"skipped {listing}"
                    )
                warnings.warn(f"data: skipped {listing}", stacklevel=2)
        if not self.count:
            raise InputError(f"data: {self._sources[0][0].name} has no text, expected at least one document")

    def parts(self) -> Iterator[Iterator[Document]]:
        """The documents in three parts: rows for training, files without rows, and rows for validation.

        Raises:
            InputError: A source has changed since it was first read.
        """
        rows = [entry for entry in self._sources if entry[0].rows]
        files = [entry for entry in self._sources if not entry[0].rows]
        limit = self._threshold
        yield (row for row, number in self._again(rows) if number < limit)
        yield (document for document, _ in self._again(files))
        validation = rows if limit < NO_HASH else []
        yield (row for row, number in self._again(validation) if number >= limit)

    def texts(self) -> Iterator[str]:
        """The text of all pieces of all documents, to train a tokenizer on, without <|endoftext|>."""
        for document, _ in self._again(self._sources):
            for piece in document.pieces:
                yield from piece.text.split(END_OF_TEXT)

    def _again(self, sources: Sequence[tuple[Source, bytes]]) -> Iterator[tuple[Document, int]]:
        """The documents of `sources` and their hashes, each source compared with what it was before."""
        for source, sha256 in sources:
            hashed = hashlib.sha256()
            for document in _documents(source):
                digest, _ = document.digest()
                hashed.update(digest)
                yield document, _number(digest)
            if hashed.digest() != sha256:
                raise InputError(f"data: {source.name} changed while it was read, expected a finished file")


def _documents(source: Source) -> Iterator[Document]:
    """The documents of a source that are not empty."""
    return (document for document in source.read() if document.pieces)


def _number(digest: bytes) -> int:
    """The first 64 bits of a hash."""
    return int.from_bytes(digest[:8], "big")


def _lowest_for_validation(hashes: array[int], share: Fraction) -> int:
    """The lowest of the highest hashes, which are about `share` of all, at least one if there are several."""
    import numpy as np

    count = max(round(len(hashes) * share), 1) if share and len(hashes) > 1 else 0
    return int(np.sort(hashes)[-count]) if count else NO_HASH
