"""What the crash rows do in the worker: each attack on each operation, and what must hold after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.scorecard import shim
from tests.scorecard.crash_operations import (
    Cache,
    Finish,
    Operation,
    Resume,
    SaveCheckpoint,
    SaveHuggingFace,
    SaveOwn,
    SaveTokenizer,
    Train,
    WriteJson,
    list_calls,
)
from tests.scorecard.crash_trials import Child, judge
from tests.scorecard.row import Outcome
from tests.scorecard.shim import Attack, Call

Run = Callable[[int, int, Path], Outcome]


def kills(calls: Sequence[Call]) -> Iterator[Attack]:
    """A kill before and after each call."""
    for call in calls:
        yield Attack("kill-before", call)
        yield Attack("kill-after", call)


def faults(calls: Sequence[Call]) -> Iterator[Attack]:
    """Each error of each call, each write cut short, and a disk that is full or fails from each call on."""
    for call in calls:
        for error in shim.ERRORS[call.kind]:
            yield Attack("fail", call, error)
        if call.kind == "write":
            yield Attack("short", call)
        yield Attack("fail-from", call, "ENOSPC", shim.NEEDS_SPACE)
        yield Attack("fail-from", call, "EIO")


def _row(list_attacks: Callable[[Sequence[Call]], Iterator[Attack]], *operations: type[Operation]) -> Run:
    """The row that makes these attacks on these operations."""

    def run(trials: int, seed: int, folder: Path) -> Outcome:
        os.environ["FUSED_GPT_CACHE"] = str(folder / "cache")
        made = [make(folder / make.__name__) for make in operations]
        attacks = [
            (operation, attack)
            for operation in made
            for attack in list_attacks(list_calls(operation, operation.folder / "place", operation.act))
        ]
        outcome = Outcome()
        for operation, attack in shim.spread(attacks, trials, seed):
            with outcome.trial(f"{operation.name}: {attack}", operation.limit):
                _try(operation, attack)
        return outcome

    return run


def _try(operation: Operation, attack: Attack) -> None:
    """One trial; AssertionError for a promise that is broken."""
    place, log = operation.folder / "place", operation.folder / "log"
    operation.copy(place)

    def attacked() -> int | None:
        shim.arm(place, attack)
        code = operation.act(place)
        shim.disarm()
        return code

    ended = Child(attacked, log).wait(operation.limit)
    if attack.mode.startswith("kill"):
        assert ended.code in (0, 137), f"exit code {ended.code}, expected a kill: {ended.errors[-300:]}"
    else:
        ended.check_reported(operation.command)
        cleaning = attack.call.kind in ("unlink", "rmdir") or ".unfinished" in attack.call.path
        if attack.mode != "fail-from" and not (cleaning and ended.code == 0):
            strays = _hidden(place) - _hidden(operation.before)
            assert not strays, f"it left {min(strays)}"

    def reads_and_goes_on() -> None:
        operation.read(place, ended.code == 0)
        operation.settle(place)

    judge(reads_and_goes_on, log, operation.limit)


def _hidden(folder: Path) -> set[str]:
    """The hidden files and folders below `folder`, without locks."""
    return {str(path.relative_to(folder)) for path in folder.rglob(".*") if "lock" not in path.name}


kill_save = _row(kills, SaveOwn, SaveHuggingFace, SaveCheckpoint)
kill_train = _row(kills, Train)
kill_resume = _row(kills, Resume, Finish)
kill_files = _row(kills, Cache, SaveTokenizer, WriteJson)
fail_save = _row(faults, SaveOwn, SaveHuggingFace, SaveCheckpoint)
fail_train = _row(faults, Train)
fail_resume = _row(faults, Resume, Finish)
fail_files = _row(faults, Cache, SaveTokenizer, WriteJson)


def sync_before_rename(trials: int, seed: int, folder: Path) -> Outcome:
    """Checks before each rename that what was written is on the disk; each rename is a trial.

    Renames in a folder that has its final name only later are left out: that rename is the one that counts.
    """
    os.environ["FUSED_GPT_CACHE"] = str(folder / "cache")
    outcome = Outcome()
    for make in (SaveOwn, SaveHuggingFace, SaveCheckpoint, Train, Cache, SaveTokenizer):
        operation = make(folder / make.__name__)
        unsynced: dict[int, str] = {}
        for call in list_calls(operation, operation.folder / "place", operation.act):
            if call.kind in ("write", "truncate") and not call.path.endswith(APPENDED):
                unsynced[call.inode] = call.path
            elif call.kind == "sync":
                unsynced.pop(call.inode, None)
            elif call.kind == "rename" and ".unfinished" not in call.path:
                with outcome.trial(f"{operation.name}: {call}"):
                    assert not unsynced, f"{', '.join(unsynced.values())} is not synced"
    return outcome


APPENDED = ("/log.jsonl", ".lock")  # files that change under their own names


def every_call(trials: int, seed: int, folder: Path) -> Outcome:
    """Checks that the library counts each of the calls by which Python changes files."""
    outcome = Outcome()
    place = folder / "place"
    place.mkdir()
    trace = folder / "trace"

    def change() -> None:
        shim.arm(place, None, os.open(trace, os.O_WRONLY | os.O_CREAT))
        _change_everything(place)
        shim.disarm()

    for _ in range(trials):
        with outcome.trial("every call"):
            judge(change, folder / "log")
            kinds = " ".join(call.kind for call in shim.read_trace(trace))
            assert kinds == CHANGES, f"it counted {kinds}, expected {CHANGES}"
    return outcome


CHANGES = (
    "mkdir open write write write truncate sync sync chmod close chmod rename link link "
    "unlink unlink unlink rmdir"
)


def _change_everything(place: Path) -> None:
    """Makes the CHANGES, some relative to a folder's descriptor, as shutil.rmtree does."""
    folder, a, b = place / "d", place / "d" / "a", place / "d" / "b"
    folder.mkdir()
    handle = os.open(a, os.O_WRONLY | os.O_CREAT)
    os.write(handle, b"1234")
    os.pwrite(handle, b"5", 0)
    os.writev(handle, [b"6", b"7"])
    os.ftruncate(handle, 2)
    os.fsync(handle)
    os.fdatasync(handle)
    os.fchmod(handle, 0o600)
    os.close(handle)
    a.chmod(0o644)
    a.rename(b)
    os.link(b, a)
    os.symlink(b, folder / "c")
    a.unlink()
    shutil.rmtree(folder)
