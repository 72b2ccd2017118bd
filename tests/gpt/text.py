"""A small text with some structure, for tests that train or tokenize."""

from __future__ import annotations

import random

SENTENCE = "the cat and a dog sat on his old red mat while it rained in the town of Ur"


def make_text(characters: int, seed: int = 0) -> str:
    """Lines of words, some of them quoted, exactly `characters` long."""
    rng = random.Random(seed)
    lines: list[str] = []
    while sum(map(len, lines)) < characters:
        words = " ".join(rng.choices(SENTENCE.split(), k=rng.randint(3, 9)))
        lines.append(f'"{words.capitalize()}."\n' if rng.random() < 0.2 else f"{words}\n")
    return "".join(lines)[:characters]


TEXT = make_text(6000)
