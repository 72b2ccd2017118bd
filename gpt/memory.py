"""The memory that this process can still get, and the message for memory that is exhausted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpt.errors import MachineError

ROOT = Path("/")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
EXHAUSTED = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate|ALLOC_FAILED",
    re.IGNORECASE,
)
REQUESTED = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) (bytes|[KMGTPE]iB)", re.IGNORECASE)
FREE = re.compile(r"of which ([\d.]+) (bytes|[KMGTPE]iB) is free")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Free(NamedTuple):
    """Bytes that can still be allocated, and what limits them, as in "free on this machine"."""

    bytes: int
    where: str


def free_memory(root: Path = ROOT) -> Free | None:
    """What the tightest limit leaves: the machine's, a control group's (of a container) or the process's.

    Args:
        root: The folder with proc and sys.

    Returns:
        None if the system states no limit. Systems without /proc state the memory that they have in total.
    """
    return min(_limits(root), default=None)


def exhausted(error: BaseException, lower: str = "") -> MachineError | None:
    """The error in one line for `error`, if it says that memory is exhausted; else None.

    Args:
        error: A MemoryError, or an error of torch or of a C library in its own words.
        lower: The flags that lower the memory, as in "--batch_size", or "".
    """
    text = str(error)
    if not isinstance(error, MemoryError) and not EXHAUSTED.search(text):
        return None
    requested, free = REQUESTED.search(text), FREE.search(text)
    left = free_memory() if free is None and "CUDA" not in text else None
    parts = [
        "" if requested is None else f"{show_bytes(_bytes(requested))} requested",
        "" if free is None else f"{show_bytes(_bytes(free))} free on the GPU",
        "" if left is None else f"{show_bytes(left.bytes)} {left.where}",
    ]
    sizes = ", ".join(filter(None, parts))
    advice = f", expected less (lower {lower})" if lower else ""
    return MachineError(f"memory is exhausted{sizes and ': '}{sizes}{advice}")


def _limits(root: Path) -> Iterator[Free]:
    status, limits = _text(root / "proc/self/status"), _text(root / "proc/self/limits")
    available = re.search(r"^MemAvailable: +(\d+) kB", _text(root / "proc/meminfo"), re.M)
    if available:
        yield Free(int(available[1]) * 1024, "free on this machine")
    elif hasattr(os, "sysconf"):
        yield Free(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of this machine")

    most = re.search(r"^Max address space +(\d+)", limits, re.M)
    size = re.search(r"^VmSize:\s+(\d+) kB", status, re.M)
    if most and size:
        yield Free(max(0, int(most[1]) - int(size[1]) * 1024), "free below the limit of ulimit -v")

    for folder, (limit_name, used_name, cache_name) in _control_groups(root):
        limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
        cache = re.search(rf"^{cache_name} (\d+)", _text(folder / "memory.stat"), re.M)
        if limit.isdecimal() and used.isdecimal():
            kept = int(used) - (int(cache[1]) if cache else 0)  # the kernel drops cached files first
            yield Free(max(0, int(limit) - kept), f"free below the limit of the control group {folder}")


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's control group and of those around it, and the names of their files."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = base.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        while folder.is_relative_to(base):
            yield folder, V1 if controllers else V2
            folder = folder.parent


def _text(path: Path) -> str:
    """The content of a file of the kernel; "" if there is none."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _bytes(match: re.Match[str]) -> float:
    return float(match[1]) * 1024 ** [unit.lower() for unit in UNITS].index(match[2].lower())


def show_bytes(size: float) -> str:
    """A number of bytes as in "1.5 GiB"."""
    power = 0
    while size >= 1024 and power < len(UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:,.{1 if power else 0}f} {UNITS[power]}"
