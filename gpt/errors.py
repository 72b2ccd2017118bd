"""The exception for wrong input from the user, and the form of its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input from the user is wrong. The message is one line: "where: name is value, expected …"."""


def unknown(where: str, name: object, valid: Iterable[str]) -> InputError:
    """The error for a name that is not in `valid`; it suggests the most similar valid name."""
    nearest = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0)[0]
    return InputError(f"{where}: {name!r} is unknown, the nearest valid one is {nearest!r}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
