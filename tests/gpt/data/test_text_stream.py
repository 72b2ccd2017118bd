"""Text from tokens while they are generated, up to a stop text."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from gpt.data.text_stream import Stopped, TextStream


class ByteTokenizer:
    """Tokens that are single bytes."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


@pytest.mark.parametrize("size", [1, 3, 99])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcabd", [], "abcabd"),
        ("abcabdx", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("xab", ["abc"], "xab"),
        ("aé東z", ["z"], "aé東"),
        ("xyz", ["yz", "z"], "x"),
    ],
)
def test_the_stream_ends_before_a_stop_text(text: str, stops: list[str], expected: str, size: int) -> None:
    """Part of a stop text written, text lost that only begins like one, or half a character written."""
    pieces: list[str] = []
    stream = TextStream(ByteTokenizer(), pieces.append, stops)  # type: ignore[arg-type]
    with suppress(Stopped):
        encoded = list(text.encode())
        for i in range(0, len(encoded), size):
            stream.token(torch.tensor(encoded[i : i + size]))
        stream.end()
    assert "".join(pieces) == expected
