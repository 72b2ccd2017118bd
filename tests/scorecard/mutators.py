"""Damage to files: changed bytes, changed JSON values, and other things in the place of a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "\x00",
    "a" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "nan",
    "1",
    [],
    [[]],
    [1, "a", None],
    {},
    {"a": {}},
    {"": 0},
)


def _span(content: bytes, rng: Random, most: int = 256) -> tuple[int, int]:
    begin = rng.randrange(len(content) + 1)
    return begin, min(len(content), begin + rng.randint(1, most))


def flip_bits(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 9, 10, 32, 34, 48, 57, 127, 128, 255))
    return bytes(changed)


def zero_block(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + bytes(end - begin) + content[end:]


def truncate(content: bytes, rng: Random) -> bytes:
    return content[: rng.choice((rng.randrange(len(content)), len(content) - 1, min(8, len(content) - 1)))]


def extend(content: bytes, rng: Random) -> bytes:
    return content + rng.choice((b"\0", b"\n", b"}", b" ", rng.randbytes(rng.randint(1, 64)), content[:64]))


def swap_blocks(content: bytes, rng: Random) -> bytes:
    size = rng.randint(1, max(1, len(content) // 4))
    a = rng.randrange(max(1, len(content) - 2 * size + 1))
    b = rng.randrange(a + size, max(a + size + 1, len(content) - size + 1))
    return (
        content[:a]
        + content[b : b + size]
        + content[a + size : b]
        + content[a : a + size]
        + content[b + size :]
    )


def delete_block(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + content[end:]


def duplicate_block(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:end] + content[begin:end] + content[end:]


def other_content(content: bytes, rng: Random) -> bytes:
    return rng.choice((bytes(len(content)), rng.randbytes(len(content)), b"\xff" * len(content)))


def empty(content: bytes, rng: Random) -> bytes:
    return b""


CONTENT: tuple[Mutator, ...] = (
    flip_bits,
    flip_bits,
    set_bytes,
    zero_block,
    truncate,
    extend,
    swap_blocks,
    delete_block,
    duplicate_block,
    other_content,
    empty,
)


def json_value(content: bytes, rng: Random) -> bytes:
    """One value, or one key, of a JSON text replaced by another one."""
    text = content.decode("utf-8")
    lines = text.splitlines(keepends=True) if text.count("\n{") else [text]
    chosen = rng.randrange(len(lines))
    try:
        value = json.loads(lines[chosen])
    except ValueError:
        return set_bytes(content, rng)
    lines[chosen] = json.dumps(_replaced(value, rng)) + "\n"
    return "".join(lines).encode("utf-8", "surrogatepass")


def _replaced(value: Any, rng: Random) -> Any:
    """`value` with one entry, at any depth, replaced, renamed or removed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice(HOSTILE)
    key = rng.choice(list(value) if isinstance(value, dict) else list(range(len(value))))
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    action = rng.random()
    if action < 0.1:
        del changed[key]
    elif action < 0.2 and isinstance(changed, dict):
        changed[rng.choice(("", "x", "\ud800", key + " "))] = changed.pop(key)
    elif action < 0.3 and isinstance(changed, list):
        changed.append(changed[key])
    else:
        changed[key] = _replaced(changed[key], rng)
    return changed


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _self_link(path: Path) -> None:
    path.symlink_to(path.name)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _dangling(path: Path) -> None:
    path.symlink_to("missing")


def _folder(path: Path) -> None:
    path.mkdir()


def _absent(path: Path) -> None:
    pass


PLACES: tuple[Callable[[Path], None], ...] = (_absent, _fifo, _folder, _self_link, _endless, _dangling)


def damage(path: Path, rng: Random, other: Path | None = None) -> str:
    """Changes the file at `path`, and says how.

    Args:
        path: A regular file.
        rng: Chooses the damage.
        other: A valid file of the same kind, with other content.
    """
    content = path.read_bytes()
    chance = rng.random()
    if chance < 0.12:
        place = rng.choice(PLACES)
        path.unlink()
        place(path)
        return place.__name__.strip("_")
    if chance < 0.2 and other is not None and other.read_bytes() != content:
        shutil.copyfile(other, path)
        return "another valid file"
    if chance < 0.25:
        neighbours = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path]
        neighbours = [p for p in neighbours if p.read_bytes() != content]
        if neighbours:
            neighbour = rng.choice(neighbours)
            path.write_bytes(neighbour.read_bytes())
            return f"the content of {neighbour.name}"
    mutators = (json_value, *CONTENT) if path.suffix in (".json", ".jsonl") else CONTENT
    while True:
        mutator = json_value if json_value in mutators and rng.random() < 0.4 else rng.choice(CONTENT)
        changed = mutator(content, rng) if content else rng.randbytes(8)
        if changed != content:
            path.write_bytes(changed)
            return mutator.__name__
