"""log.jsonl: one JSON object for each record of a run. Whatever else it holds is counted and dropped."""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt.files import open_regular
from kernels.files import replacing

LONGEST = 1 << 20  # bytes of a line that may be a record
LOSSES = ("train_loss", "validation_loss", "bigram_loss")
SCALARS = (int, float, str, type(None))

Record = dict[str, Any]


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log, in order.

    Raises:
        InputError: The file cannot be read, or is not a regular file.
        OSError: Reading fails.
    """
    return (record for record in _lines(path) if isinstance(record, dict))


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record; values that are not finite become null. OSError if the file cannot be written."""

    def never_wait(name: str, flags: int) -> int:  # as opening a FIFO would
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)

    with open(path, "ab", opener=never_wait) as file:
        file.write(_line(record))


def rewrite(path: Path, change: Callable[[Iterator[Record]], Iterator[Record]]) -> None:
    """Replaces the records of a log by what `change` makes of them; a missing log has none.

    Lines that are not records are dropped, with a warning that counts them, and whatever else than a file is
    there is set aside.

    Raises:
        OSError: The file cannot be written. It stays as it was.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        mode = None
    if mode is None or not stat.S_ISREG(mode):
        if os.path.lexists(path):
            aside = _free_name(path)
            path.rename(aside)
            warnings.warn(f"out: {path} is not a file; set aside as {aside.name}", stacklevel=2)
        path.touch()

    dropped = 0

    def records() -> Iterator[Record]:
        nonlocal dropped
        for record in _lines(path):
            if isinstance(record, dict):
                yield record
            else:
                dropped += record

    with replacing(path) as file:
        for record in change(records()):
            file.write(_line(record))
    if dropped:
        warnings.warn(
            f"out: {path} had {dropped} line(s) that are not records of a run; dropped", stacklevel=2
        )


def _lines(path: Path) -> Iterator[Record | bool]:
    """Each line of a log: its record, else whether it counts as foreign.

    A line that a killed run wrote in part, the last one, does not, and neither does an empty one.
    """
    with open_regular(path, "out") as file:
        while line := file.readline(LONGEST):
            whole = line.endswith(b"\n")
            while not line.endswith(b"\n") and (rest := file.readline(LONGEST)):
                line, whole = b"?" + rest[-1:], rest.endswith(b"\n")
            content = line.strip(b"\0 \t\r\n")  # a crash of the machine may leave zeros
            record = _parse(content)
            yield bool(content) and whole if record is None else record


def _parse(content: bytes) -> Record | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(content.decode("utf-8"))
        step, losses = record["step"], [record.get(key) for key in LOSSES]
        [float(loss) for loss in losses if loss is not None]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    flat = all(
        isinstance(entry, SCALARS)
        for value in record.values()
        for entry in (value.values() if isinstance(value, dict) else (value,))
    )
    return record if flat and type(step) is int and step > 0 else None


def _free_name(path: Path) -> Path:
    """`path` with a suffix that no file has."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.aside-{number}")):
        number += 1
    return aside


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(record)) + "\n").encode()


def _finite(value: Any) -> Any:
    """`value` with None for every float that is not finite, because JSON has no NaN or infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
