"""A document: one text of a corpus, in pieces that are predicted or only read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from gpt.errors import InputError


class Piece(NamedTuple):
    """A part of a document. A piece that is not trained on is read by the model, but is not a target."""

    text: str
    trained: bool = True


class Document(NamedTuple):
    """A file of text, or a row of a file; a plain text is one piece that is trained on.

    `where` begins messages about the document: "data: FILE", or "data: FILE:LINE".
    """

    where: str
    pieces: Sequence[Piece]

    def digest(self) -> tuple[bytes, int]:
        """The SHA-256 of the document and its bytes in UTF-8. That of a plain text is that of its bytes.

        Raises:
            InputError: The text has a lone surrogate, which no bytes express.
        """
        try:
            contents = [piece.text.encode("utf-8") for piece in self.pieces]
        except UnicodeEncodeError as error:
            raise InputError(
                f"{self.where} has the lone surrogate U+{ord(error.object[error.start]):04X} at character "
                f"{error.start}, expected Unicode text"
            ) from None
        hashes = [hashlib.sha256(content).digest() for content in contents]
        if len(self.pieces) > 1 or not self.pieces[0].trained:
            flags = [bytes([piece.trained]) for piece in self.pieces]
            joined = b"".join(part for pair in zip(hashes, flags, strict=True) for part in pair)
            hashes = [hashlib.sha256(joined).digest()]
        return hashes[0], sum(map(len, contents))


class NotText(InputError):
    """A file without text that can be trained on. A folder with it is read without it.

    Args:
        kind: Such files in one word or two, for a count of them: "empty", "binary".
        reason: The file and what is wrong with it.
        expected: What is expected instead.
    """

    def __init__(self, kind: str, reason: str, expected: str) -> None:
        super().__init__(f"data: {reason}, expected {expected}")
        self.kind, self.reason = kind, reason
