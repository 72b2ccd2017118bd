"""What a user can get wrong, as one exception and one way to say it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave is wrong; the message is one line naming it, its value and what was
    expected."""


def unknown(where: str, name: object, valid: Iterable[str]) -> InputError:
    """The error for a name that is none of `valid`, with the nearest one."""
    nearest = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0)[0]
    return InputError(f"{where}: {name!r} is unknown, the nearest valid one is {nearest!r}")


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
