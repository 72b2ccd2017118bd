"""Asynchronous copies and matmuls that finish as late as a module allows, for ttsem.

ttsem runs an asynchronous operation where it is issued, and ignores waits. Here, shared memory that a copy
will fill holds NaN until a wait names the copy, and so does the result of a matmul, which reads its
operands only then. A wait that names too few operations changes the results, and so does a copy into a
buffer that a matmul still reads. Importing this module replaces these operations in the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ttsem.ops import OPS

_dot = OPS["ttng.warp_group_dot"]
Operation = Callable[[], None]  # finishes an operation


class Pending:
    """The operations of one program that no wait has named yet, oldest first."""

    def __init__(self) -> None:
        self.copies: list[Operation] = []  # since the last commit
        self.groups: list[list[Operation]] = []  # committed copies
        self.matmuls: list[Operation] = []

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def finish_copies(self, left: int) -> None:
        """Finishes all groups of copies but the last `left`; copies that were not committed form a group."""
        if self.copies:
            self.commit()
        while len(self.groups) > left:
            for operation in self.groups.pop(0):
                operation()

    def finish_matmuls(self, left: int) -> None:
        """Finishes all matmuls but the last `left`."""
        while len(self.matmuls) > left:
            self.matmuls.pop(0)()


def _pending(interp: Any) -> Pending:
    if getattr(interp, "pending_program", None) != interp.program_id:
        interp.pending_program, interp.pending = interp.program_id, Pending()
    return interp.pending


def _fill(array: np.ndarray) -> None:
    """NaN, or the largest integer; bfloat16 is stored as its bits, of which the largest integer is NaN."""
    array[...] = np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max


def _copy(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    memory = args[1].data
    mask = np.asarray(args[2], bool) if len(args) > 2 else None
    other = np.asarray(args[3]) if len(args) > 3 else None
    values = interp.memory.load(np.asarray(args[0], dtype=np.int64), mask, other, memory.dtype)

    def finish() -> None:
        memory[...] = values

    _fill(memory)
    _pending(interp).copies.append(finish)
    return [np.zeros((), dtype=np.int8) for _ in op.result_types]


def _commit(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    _pending(interp).commit()
    return [np.zeros((), dtype=np.int8) for _ in op.result_types]


def _wait(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    _pending(interp).finish_copies(int(op.attrs["num"]))
    return [np.zeros((), dtype=np.int8) for _ in op.result_types]


def _matmul(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    pending = _pending(interp)
    if op.attrs["isAsync"] is not True:
        pending.finish_matmuls(0)
        return _dot(interp, op, args)
    result = np.empty_like(np.asarray(args[2]))

    def finish() -> None:
        result[...] = _dot(interp, op, args)[0]

    _fill(result)
    pending.matmuls.append(finish)
    return [result]


def _matmul_wait(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    _pending(interp).finish_matmuls(int(op.attrs["pendings"]))
    return list(args[: len(op.result_types)])


OPS |= {
    "ttg.async_copy_global_to_local": _copy,
    "ttg.async_commit_group": _commit,
    "ttg.async_wait": _wait,
    "ttng.warp_group_dot": _matmul,
    "ttng.warp_group_dot_wait": _matmul_wait,
}
