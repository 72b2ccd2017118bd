"""The words of the package: the field's own, in every tracked text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".ipynb", ".md", ".toml", ".svg", ".yml", ".yaml", ".txt"}
EXEMPT = {Path(__file__), ROOT / "CONTRIBUTING.md"}  # they list the words

# What to avoid, as a regular expression, and what to write instead.
WORDS = {
    r"\brooms?\b": "op family",
    r"\bthe house\b": "the package",
    r"\bmend(s|ed|ing)?\b": "fix, patch",
    r"\banew\b": "again, from scratch",
    r"\bdraws? the logits\b": "recomputes the logits",
    r"(?<!itertools\.)\bproducts?\b(?! of (the|two)\b)": "matmul; the package",
    r"\bmakers\b": "vendors",
    r"(?<!logits )(?<!platform\.)\bprocessor\b": "CPU",
    r"\bbehind\b": "after, past",
    r"\bat hand\b": "available, installed",
    r"\bstands?\b(?! for\b)": "is, sits, comes",
    r"\bfound\s*(:[^=\n]+)?=(?!=)": "a name that says what the variable holds",
    r"\bfor \(?([\w, ]+, )?found\b": "a name that says what the variable holds",
    r"(?<!\bthere )\bis no (?!longer\b|more\b|less\b)[a-z]": "is not a …",
    r"\b(deaf|lively|rivals?)\b": "what is meant",
    r"\bby hand\b": "manually",
    r"\bwhoever\b": "the code that …",
}
FILES = sorted(
    path
    for folder in (ROOT, *(ROOT / name for name in ("kernels", "gpt", "bench", "tests", ".ci", ".github")))
    for path in (folder.glob("*") if folder == ROOT else folder.rglob("*"))
    if path.is_file() and path.suffix in SUFFIXES and path not in EXEMPT
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_use_the_fields_words(path: Path) -> None:
    """A word that an engineer who never met this project has to guess at."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        for pattern, better in WORDS.items():
            match = re.search(pattern, line, re.IGNORECASE)
            assert match is None, (
                f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, expected {better}: {line.strip()}"
            )


@pytest.mark.parametrize(
    "line",
    [
        "the op family's room",
        "found = 3",
        "found: list[int] = []",
        "x is no tensor",
        "the token behind it",
        "a matrix product",
        "what the processor has",
    ],
)
def test_the_list_catches(line: str) -> None:
    """A pattern that matches nothing."""
    assert any(re.search(pattern, line, re.IGNORECASE) for pattern in WORDS)
