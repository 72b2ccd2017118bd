"""One trial: a forked process that is attacked, the judgement of what it left, and the state of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.errors import ReportedError
from tests.scorecard.row import HANG

TIMES = ("seconds", "tokens_per_second", "mfu")  # entries that differ between two equal runs
ACCUSED = 99  # the exit code of a judge that raised AssertionError
VERDICT = "\nbroken promise: "  # precedes its message


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: `code` as a shell shows it, 128 + n after signal n."""

    code: int
    output: str
    errors: str
    hung: bool

    def check_reported(self, command: str = "") -> None:
        """Raises AssertionError unless the process succeeded, or reported its failure in one line.

        Args:
            command: The beginning of the line, as in "gpt.train". Warnings before it are accepted.
        """
        assert not self.hung, "it hung"
        assert "Traceback" not in self.errors, f"a traceback: {self.errors.strip().splitlines()[-1]}"
        assert self.code in (0, 2, 5), f"exit code {self.code}, expected 0, 2 or 5: {self.errors[-300:]}"
        if self.code:
            lines = [line for line in self.errors.splitlines() if line.startswith(f"{command}:")]
            lines = [line for line in lines if not line.startswith(f"{command}: warning:")]
            assert len(lines) == 1, f"{len(lines)} lines, expected one: {self.errors[-300:]!r}"


class Child:
    """A forked process that runs `act` with its output in files.

    Args:
        act: What it does; its exit code, or None for 0. A ReportedError is printed as a command prints it.
        log: Its output and errors go to files with this path and a suffix.
    """

    def __init__(self, act: Callable[[], int | None], log: Path) -> None:
        self._out, self._err = log.with_name(f"{log.name}.out"), log.with_name(f"{log.name}.err")
        sys.stdout.flush()
        sys.stderr.flush()
        self.started = time.perf_counter()
        self.pid = os.fork()
        if not self.pid:
            self._become(act)
        self._ended: Ended | None = None

    def _become(self, act: Callable[[], int | None]) -> None:
        for path, number in ((self._out, 1), (self._err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        code = 1
        try:
            code = act() or 0
        except ReportedError as error:
            print(f"child: {error}", file=sys.stderr)
            code = error.exit_code
        except AssertionError as error:
            print(VERDICT, error, sep="", file=sys.stderr)
            code = ACCUSED
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self._ended is None:
            os.kill(self.pid, number)

    def ended(self, within: float) -> bool:
        """Whether the process ends in this many seconds."""
        if self._ended is not None:
            return True
        handle = os.pidfd_open(self.pid)
        try:
            return bool(select.select([handle], [], [], within)[0])
        finally:
            os.close(handle)

    def wait(self, limit: float = HANG) -> Ended:
        """How it ended; it is killed after `limit` seconds."""
        if self._ended is None:
            hung = not self.ended(limit)
            if hung:
                os.kill(self.pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            output, errors = self._out.read_text("utf-8"), self._err.read_text("utf-8")
            self._ended = Ended(code if code >= 0 else 128 - code, output, errors, hung)
        return self._ended


def judge(act: Callable[[], object], log: Path, limit: float = HANG) -> None:
    """Runs `act` in a forked process, and raises the AssertionError that it raises, or any other failure."""
    ended = Child(lambda: act() and None, log).wait(limit)
    assert not ended.hung, "the judge hung"
    assert ended.code == 0, ended.errors.rpartition(VERDICT)[2][-600:]


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of each file below `folder`, by relative path; folders and locks have the hash "".

    Times of training and the hashes of files with times are left out.
    """
    return {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if ".damaged" not in str(path)
    }


def difference(actual: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """How two snapshots differ, in words; "" if they are equal."""
    words = []
    for label, names in (
        ("lacks", expected.keys() - actual.keys()),
        ("has a stray", actual.keys() - expected.keys()),
        ("has another", {n for n in actual.keys() & expected.keys() if actual[n] != expected[n]}),
    ):
        words += [f"{label} {', '.join(sorted(names)[:3])}"] if names else []
    return "; ".join(words)


def _digest(path: Path) -> str:
    if path.is_dir() or "lock" in path.name or path.name == "SHA256SUMS":
        return ""
    content = path.read_bytes()
    if path.name in ("state.json", "log.jsonl"):
        records = [_without_times(json.loads(line)) for line in _documents(path.name, content)]
        content = json.dumps(records).encode()
    if path.suffix == ".safetensors":
        content = _ordered_header(content)
    return hashlib.sha256(content).hexdigest()


def _ordered_header(content: bytes) -> bytes:
    """A safetensors file with a sorted header: the libraries write its metadata, also JSON, in any order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = header.get("__metadata__", {})
    header["__metadata__"] = {k: json.loads(v) if v.startswith("{") else v for k, v in metadata.items()}
    return json.dumps(header, sort_keys=True).encode() + content[end:]


def _documents(name: str, content: bytes) -> list[bytes]:
    return content.splitlines() if name == "log.jsonl" else [content]


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}
