"""Which reads are ordered after the writes that they read, because atomics of a launch order its programs.

ttsem executes the programs of a launch one after another, and takes every read of what another program has
written for a race. Here an atomic with acquire and release semantics orders: what a program did before its
atomic happens before what another does after a later atomic at the same address.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# (program, "r", "w", "s" or "a", operation, addresses, bytes per element, values), in the order of execution
Access = tuple[Any, str, str, np.ndarray, int, Any]
ACQUIRE_RELEASE = "sem = 4 :"  # in the text of an atomic of Triton's IR
Clock = dict[Any, int]  # program -> the last of its accesses that happens before


def without_ordered_reads(log: list[Access] | None) -> list[Access] | None:
    """The accesses without the reads that atomics order after each write by another program."""
    if not log or not any(kind == "a" for _, kind, *_ in log):
        return log
    writes = [
        (place, entry[0], entry[3], entry[3].min(), entry[3].max())
        for place, entry in enumerate(log)
        if entry[1] in "ws"
    ]
    clocks: dict[Any, Clock] = {}  # program -> what happens before its next access
    released: dict[int, Clock] = {}  # address of an atomic -> what happens before the next atomic there
    kept = []
    for place, entry in enumerate(log):
        program, kind, operation, addresses = entry[:4]
        clock = clocks.setdefault(program, {})
        if kind == "a" and ACQUIRE_RELEASE in operation:
            for address in addresses.tolist():
                _merge(clock, released.setdefault(address, {}))
                _merge(released[address], clock | {program: place})
        if kind == "r":
            ordered, racing = (np.zeros(addresses.shape, dtype=bool) for _ in range(2))
            first, last = addresses.min(), addresses.max()
            for written, other, targets, lowest, highest in writes:
                if other != program and lowest <= last and first <= highest:
                    touched = np.isin(addresses, targets)
                    before = written <= clock.get(other, -1)
                    ordered |= touched & before
                    racing |= touched & (not before)
            if (ordered & ~racing).any():
                keep = ~ordered | racing
                if not keep.any():
                    continue
                entry = (*entry[:3], addresses[keep], *entry[4:])
        kept.append(entry)
    return kept


def _merge(clock: Clock, other: Clock) -> None:
    for program, place in other.items():
        clock[program] = max(place, clock.get(program, -1))
