"""The errors that commands report in one line: wrong input, values that are not finite, a failing machine."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from typing import ClassVar

# Errors of a file system that the user can correct by naming another path or changing permissions.
_USERS_FAULT = {
    errno.EACCES,
    errno.EEXIST,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
}
LONGEST_VALUE, LONGEST_REASON = 200, 500  # characters of a value and of a library's reason in a message
MOST_LISTED = 12  # names that a message lists
SIMILAR = 0.5  # of 1: the least similarity, by difflib, of a name that a message suggests


class ReportedError(Exception):
    """An error that a command prints in one line, without a traceback, before it ends with `exit_code`."""

    exit_code: ClassVar[int]
    shared = False  # True where all processes of a run raise it together


class InputError(ReportedError, ValueError):
    """Input from the user is wrong. The message is one line: "where: name is value, expected …"."""

    exit_code = 2


class NonFiniteError(ReportedError, ArithmeticError):
    """A loss, a gradient, a weight or the state of an optimizer is infinite or NaN. The message names it."""

    exit_code = 4


class MachineError(ReportedError, RuntimeError):
    """The machine cannot go on: its disk is full, a file system fails, memory is exhausted."""

    exit_code = 5


def shown(value: object) -> str:
    """A value in a message. Python cannot print deep nesting and very long integers; long texts are cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


def unknown(where: str, name: object, valid: Iterable[str], listed: str = "") -> InputError:
    """The error for a name that is not in `valid`: it suggests the most similar one, and lists a few names.

    `listed` says instead where the names are listed, as in "that --help lists".
    """
    names = {valid_name.lstrip("-"): valid_name for valid_name in valid}
    few = f"of {', '.join(names.values())}" if len(names) <= MOST_LISTED and not listed else ""
    cutoff = SIMILAR if few or listed else 0
    nearest = difflib.get_close_matches(str(name).lstrip("-")[:100], names, n=1, cutoff=cutoff)
    if not nearest:
        return InputError(f"{where}: {name!r} is unknown, expected one {few or listed}")
    others = f" ({few})" if few else ""
    return InputError(f"{where}: {name!r} is unknown, the nearest valid one is {names[nearest[0]]!r}{others}")


def cannot_write(where: str, path: str | os.PathLike[str], error: OSError) -> InputError | MachineError:
    """The error for a path that could not be written.

    It is an InputError where the path or its permissions are wrong, and a MachineError where the disk is full
    or fails.
    """
    return _kind(error)(f"{where}: cannot write {os.fspath(path)}: {error.strerror or error}")


def system_error(error: OSError) -> InputError | MachineError:
    """The error for an OSError that nothing else explains, such as one of stdout on a full disk."""
    where = "output" if error.filename is None else repr(error.filename)
    return _kind(error)(f"{where}: {error.strerror or first_line(error)}")


def _kind(error: OSError) -> type[InputError] | type[MachineError]:
    named = re.search(r"\(os error (\d+)\)", str(error))  # libraries in Rust state it in their text alone
    number = int(named[1]) if error.errno is None and named else error.errno
    return InputError if number in _USERS_FAULT else MachineError


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, cut if it is long; the name of its type if it is empty."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."
