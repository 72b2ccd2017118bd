"""How a command ends: its exit code, its one line on stderr, and what Ctrl-C and a closed stdout do."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gpt import InputError
from gpt.cli import LONGEST_LINE, run_command
from gpt.errors import MachineError, NonFiniteError
from gpt.interrupts import exit_on_interrupt, keyboard_interrupts

ROOT = Path(__file__).parents[2]
# Becomes the command in its arguments, which does not ignore Ctrl-C, also where the tests run with `&`.
UNIGNORED = "import os, signal, sys; signal.signal(2, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the signals and devices are POSIX's")


def ending(error: BaseException) -> Callable[[Sequence[str]], int]:
    """A command that raises `error`."""

    def command(argv: Sequence[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a is 1,\nexpected 2"), 2, "a is 1, expected 2"),
        (InputError("cannot read \udcff\x1b[2J\0"), 2, r"cannot read \udcff\x1b[2J\x00"),
        (NonFiniteError("loss is nan"), 4, "loss is nan"),
        (MachineError("cannot write"), 5, "cannot write"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "output: No space left on device"),
        (OSError(errno.EIO, "Input/output error", "x"), 5, "'x': Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "'/x': Permission denied"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, several lines, a line that changes the terminal, or a full disk as bad input."""
    assert run_command("fruit", ending(error), []) == code
    assert capsys.readouterr() == ("", f"fruit: {line}\n")


def test_a_long_message_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A megabyte of an argument on the terminal."""
    run_command("fruit", ending(InputError("x" * 10**6)), [])
    assert len(capsys.readouterr().err) < LONGEST_LINE + 20


def test_warnings_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """A warning with the path and source line of the code that gave it."""

    def command(argv: Sequence[str]) -> int:
        warnings.warn("slow\nhere", stacklevel=1)
        return len(argv)

    assert run_command("fruit", command, ["x", "y"]) == 2
    assert capsys.readouterr().err == "fruit: warning: slow here\n"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    """A bug that is shown as wrong input."""
    with pytest.raises(type(error)):
        run_command("fruit", ending(error), [])


def test_a_second_sigterm_and_help_are_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code that is lost in a SystemExit."""
    assert run_command("fruit", ending(SystemExit(143)), []) == 143
    assert run_command("fruit", ending(SystemExit()), []) == 0
    assert capsys.readouterr() == ("", "")


def test_a_path_that_is_not_text_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A UnicodeEncodeError after a run whose folder has undecodable bytes in its name."""

    def command(argv: Sequence[str]) -> int:
        print(*argv)
        return 0

    assert run_command("fruit", command, ["out/\udcff"]) == 0
    assert capsys.readouterr().out == "out/\\udcff\n"


@POSIX
@pytest.mark.parametrize("flush", [False, True])
def test_a_full_stdout_is_the_machines_failure(
    flush: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output that is lost with exit code 0, a traceback, or a second error when the interpreter flushes."""

    def command(argv: Sequence[str]) -> int:
        print("apple", flush=flush)
        return 0

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_command("fruit", command, []) == 5
        print("lost", flush=True)
    assert capsys.readouterr().err == "fruit: output: No space left on device\n"


@POSIX
def test_a_closed_pipe_ends_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback in `gpt.info … | head`, or a second error when the interpreter flushes."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run_command("fruit", lambda argv: print("apple") or 0, []) == 141
        print("lost", flush=True)
    assert capsys.readouterr().err == ""


def test_closed_streams(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Output that nobody sees with exit code 0, or errors printed between the lines of the output."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert run_command("fruit", lambda argv: 0, []) == 5
    assert capsys.readouterr().err == "fruit: stdout is closed, expected a terminal, a file or a pipe\n"

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert run_command("fruit", ending(InputError("wrong")), []) == 2
        assert isinstance(sys.stderr, io.TextIOWrapper)
        sys.stderr.close()
    assert capsys.readouterr().out == ""


@POSIX
@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (("-m", "gpt.train"), "gpt: stopped by Ctrl-C"),
        (("-mgpt.sample", "--greedy"), "gpt: stopped by Ctrl-C"),
        (("-c", "import gpt"), "KeyboardInterrupt"),
    ],
    ids=["command", "joined", "library"],
)
def test_ctrl_c_while_torch_is_imported(arguments: tuple[str, ...], last: str, tmp_path: Path) -> None:
    """A traceback of a command, or a handler that `import gpt` installs in a program of its user."""
    interrupted = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    (tmp_path / "torch.py").write_text(interrupted, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", UNIGNORED, sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert lines[-1] == last
    if last != "KeyboardInterrupt":
        assert (done.returncode, len(lines)) == (130, 1)


@POSIX
def test_ctrl_c_is_a_keyboard_interrupt_within_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that Ctrl-C ends before it removes its temporary files, or an interrupt that is lost."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(os, "write", lambda handle, line: len(line))
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    try:
        exit_on_interrupt()
        with pytest.raises(KeyboardInterrupt), keyboard_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert codes == []
        signal.raise_signal(signal.SIGINT)
        assert codes == [130]

        class Finalized:
            def __del__(self) -> None:
                raise KeyboardInterrupt

        Finalized()
        assert codes == [130, 130]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """A background job of a script that Ctrl-C for the script ends."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
