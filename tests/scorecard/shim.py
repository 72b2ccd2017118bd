"""The preloaded library of shim.c: how it is compiled, and how a process arms it."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
KINDS = ("open", "write", "sync", "rename", "unlink", "mkdir", "rmdir", "truncate", "link", "chmod", "close")
MODES = ("off", "count", "kill-before", "kill-after", "fail", "fail-from", "short")
ERRORS = {
    **dict.fromkeys(KINDS, ("EIO",)),
    "open": ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EINTR"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "sync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": ("EIO", "ENOSPC", "EACCES"),
    "unlink": ("EIO", "EACCES"),
    "mkdir": ("EIO", "ENOSPC", "EACCES"),
    "truncate": ("EIO", "ENOSPC"),
    "chmod": ("EIO", "EACCES"),
}
NEEDS_SPACE = ("open", "write", "sync", "mkdir", "truncate")  # what a full disk refuses


@dataclass(frozen=True)
class Call:
    """One counted call.

    Attributes:
        number: Its number, from 1.
        kind: One of KINDS.
        inode: Of its file descriptor; 0 if it has none.
        path: In the watched folder.
    """

    number: int
    kind: str
    inode: int
    path: str

    def __str__(self) -> str:
        return f"call {self.number}, {self.kind} {self.path}"


@dataclass(frozen=True)
class Attack:
    """What happens at a call.

    Attributes:
        mode: One of MODES.
        call: The call that is attacked, or from which on all calls fail.
        error: The name of the errno of a call that fails.
        kinds: The kinds of calls that "fail-from" attacks.
    """

    mode: str
    call: Call
    error: str = "EIO"
    kinds: tuple[str, ...] = KINDS

    def __str__(self) -> str:
        shown = f"{self.mode} at {self.call}"
        return f"{shown}, {self.error}" if self.mode.startswith("fail") else shown


def arm(folder: Path, attack: Attack | None, trace: int = -1) -> None:
    """Attacks this process's calls in `folder`; None only counts them, and lists them in the file `trace`."""
    mode, number, code, mask = "count", 0, 0, 0
    if attack is not None:
        mode, number, code = attack.mode, attack.call.number, getattr(errno, attack.error)
        mask = sum(1 << KINDS.index(kind) for kind in attack.kinds)
    _library().shim_arm(
        os.fsencode(folder), MODES.index(mode), ctypes.c_long(number), code, ctypes.c_uint(mask), trace
    )


def disarm() -> None:
    """Ends the attack and the counting."""
    _library().shim_disarm()


def read_trace(path: Path) -> list[Call]:
    """The calls that `arm` listed in the file `path`."""
    fields = [line.split(" ", 2) for line in path.read_text("utf-8").splitlines()]
    return [Call(i, kind, int(inode), name) for i, (kind, inode, name) in enumerate(fields, start=1)]


def build(folder: Path) -> Path | None:
    """Compiles the library into `folder`; None if this machine cannot: see `obstacle`."""
    if obstacle():
        return None
    library = folder / "shim.so"
    compiler = shutil.which("cc") or "cc"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def obstacle() -> str:
    """Why the library cannot be compiled or preloaded here; "" if it can."""
    if not sys.platform.startswith("linux"):
        return f"not run: no LD_PRELOAD on {sys.platform}"
    return "" if shutil.which("cc") else "not run: no C compiler"


def preloaded() -> bool:
    """Whether this process was started with the library."""
    return hasattr(_library(), "shim_arm")


def spread(attacks: Sequence[Attack], number: int, seed: int) -> list[Attack]:
    """`number` of the attacks, evenly spread; the seed shifts them. All of them if there are fewer."""
    if number >= len(attacks):
        return list(attacks)
    shift = seed * 0.618 % 1
    return [attacks[int((i + shift) * len(attacks) / number)] for i in range(number)]


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
