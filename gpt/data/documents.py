"""A document: one text of a corpus, in pieces that are predicted or only read."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A part of a document. A piece that is not trained on is read by the model, but is not a target."""

    text: str
    trained: bool = True
