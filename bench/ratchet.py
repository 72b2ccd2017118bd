"""The recorded figures of the gated builds, in a table for each version of Triton: they may not get worse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.gates import Compiled, from_json, to_json
from gpt.errors import InputError
from gpt.files import read_json
from kernels.files import replacing

TABLES = Path(__file__).parent / "results" / "aot"
GROWTH = 1.05  # the instructions of a loop, over those recorded


def table(version: str) -> Path:
    """The table of a version of Triton; it may be missing."""
    return TABLES / f"{version.partition('+')[0]}.json"


def load(path: Path, name: str) -> list[Compiled]:
    """Reads the rows of a table, or of a saved report.

    Raises:
        InputError: The file is unreadable, or is not a report of bench.aot.
    """
    content = read_json(path, name)
    try:
        return [from_json(row) for row in content["builds"]]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a report of bench.aot: {error}") from error


def save(path: Path, version: str, rows: Iterable[Compiled]) -> None:
    """Writes a table: a line for each build, without the figures that are 0.

    Raises:
        InputError: The file cannot be written.
    """
    lines = ",\n".join(json.dumps(to_json(row, short=True)) for row in rows)
    try:
        with replacing(path) as file:
            file.write(f'{{"triton": "{version}", "builds": [\n{lines}\n]}}\n'.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def worse(row: Compiled, recorded: Mapping[str, Compiled]) -> str:
    """What is worse than in the recorded figures, or ""; a build without figures may be anything."""
    old = recorded.get(row.id)
    if old is None:
        return ""
    texts = []
    if row.programs < old.programs:
        texts.append(f"programs {old.programs} -> {row.programs}")
    if len(row.loops) != len(old.loops):
        texts.append(f"loops {len(old.loops)} -> {len(row.loops)}")
    for n, (before, after) in enumerate(zip(old.loops, row.loops, strict=False), 1):
        if after.instructions > GROWTH * before.instructions:
            texts.append(f"instructions of loop {n} {before.instructions} -> {after.instructions}")
        if row.hgmma and row.warps >= 8 and after.barriers < before.barriers:
            texts.append(f"barriers of loop {n} {before.barriers} -> {after.barriers}")
    return f"recorded figures: {', '.join(texts)}" if texts else ""
