"""Text from tokens while they are generated, up to a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from torch import Tensor

from gpt.data.tokenizers import Tokenizer


class Stopped(Exception):
    """The text has reached a stop text."""


class TextStream:
    """Writes generated tokens as text, in whole characters, up to the first of `stops`.

    Args:
        tokenizer: Decodes the tokens.
        write: Called with each new piece of the text.
        stops: The texts that end the stream; they are not written.
    """

    def __init__(
        self, tokenizer: Tokenizer, write: Callable[[str], object], stops: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.write, self.stops = tokenizer, write, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # not written yet, because it may be the beginning of a stop text

    def token(self, ids: Tensor) -> None:
        """Adds the next tokens, (1,) ids as `on_token` of `GPT.generate` gives them for one row.

        Raises:
            Stopped: The text has reached a stop text.
        """
        self._add(self._decoder.decode(self.tokenizer.decode_bytes(ids.tolist())))

    def end(self) -> None:
        """Writes the text that was held back."""
        self._add(self._decoder.decode(b"", True))
        self.write(self._held)
        self._held = ""

    def _add(self, text: str) -> None:
        self._held += text
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.write(self._held[: min(places)])
            self._held = ""
            raise Stopped

        begin = next(
            (i for i in range(len(self._held)) if any(s.startswith(self._held[i:]) for s in self.stops)),
            len(self._held),
        )
        self.write(self._held[:begin])
        self._held = self._held[begin:]
