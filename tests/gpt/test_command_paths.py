"""Paths that a user may type by mistake, in every flag that takes one: one line, and exit code 2."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt import GPT, CharTokenizer, InputError, eval, info, sample, train
from gpt.weights.checkpoint import save_model
from tests.gpt.models import SMALL
from tests.gpt.training.small_runs import TINY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the paths and permissions are Linux's")

Main = Callable[[list[str]], int]
TRAIN = [*TINY, "--max_steps", "1", "--device", "cpu"]
# Flag -> the command and its other arguments; {} is the path, and TEXT and MODEL are files that exist.
FLAGS: dict[str, tuple[Main, list[str]]] = {
    "--out": (train.main, [*TRAIN, "--data", "TEXT", "--out", "{}"]),
    "--data": (train.main, [*TRAIN, "--out", "OUT", "--data", "{}"]),
    "--tokenizer": (train.main, [*TRAIN, "--data", "TEXT", "--out", "OUT", "--tokenizer", "{}"]),
    "--init": (train.main, [*TRAIN, "--data", "TEXT", "--out", "OUT", "--init", "{}"]),
    "--config": (train.main, [*TRAIN, "--data", "TEXT", "--out", "OUT", "--config", "{}"]),
    "sample --checkpoint": (sample.main, ["--device", "cpu", "--checkpoint", "{}"]),
    "--prompt_file": (sample.main, ["--device", "cpu", "--checkpoint", "MODEL", "--prompt_file", "{}"]),
    "eval --checkpoint": (eval.main, ["--device", "cpu", "--data", "TEXT", "--checkpoint", "{}"]),
    "eval --data": (eval.main, ["--device", "cpu", "--checkpoint", "MODEL", "--data", "{}"]),
    "info": (info.main, ["{}"]),
    "--json": (info.main, ["gpt2", "--gpu", "h200", "--json", "{}"]),
}
PATIENCE = 60.0  # seconds; one row trains, and a busy machine is slow
# What --out creates, and what --json replaces.
WRITTEN = {"--out": ("bytes",), "--json": ("bytes", "dangling", "self-link", "unreadable-file")}
PATHS = {
    "unreadable-file": "secret.txt",
    "unreadable-folder": "secret",
    "in-an-unreadable-folder": "secret/x",
    "file-as-parent": "file/x",
    "long": "n" * 300,
    "bytes": "x/\udcff\udcfe",
    "NUL": "a\0b",
    "nobody": "~nosuchuser/x",
    "homeless": "~/x",
    "dangling": "dangling",
    "self-link": "loop",
    "beyond-a-self-link": "loop/x",
    "empty": "",
    "FIFO": "fifo",
    "socket": "socket",
    "device": "zero",
}


def _fail(number: int, frame: object) -> None:
    pytest.fail(f"still waiting after {PATIENCE} s")


class _Capabilities(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


@pytest.fixture
def permissions() -> Iterator[None]:
    """Makes permissions apply to root as to everyone, by setting two capabilities of the thread aside."""
    if os.geteuid() != 0:
        yield
        return
    libc, header, data = ctypes.CDLL(None), _Capabilities(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(ctypes.byref(header), data) == 0
    effective = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), data) == 0
    yield
    data[0] = effective
    assert libc.capset(ctypes.byref(header), data) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(GPT(SMALL), folder, CharTokenizer("theca \n"))
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path, permissions: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with what PATHS names."""
    monkeypatch.chdir(tmp_path)
    for name in ("secret", "file", "TEXT"):
        (tmp_path / name).mkdir() if name == "secret" else (tmp_path / name).write_text("the cat " * 500)
    (tmp_path / "secret" / "x").write_text("the cat")
    (tmp_path / "secret.txt").write_text("the cat")
    for name, target in (
        ("dangling", "nowhere"),
        ("loop", "loop"),
        ("zero", "/dev/zero"),
        ("MODEL", model),
    ):
        (tmp_path / name).symlink_to(target)
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name in ("secret", "secret.txt"):
        (tmp_path / name).chmod(0)
    before = signal.signal(signal.SIGALRM, _fail)
    yield tmp_path
    signal.signal(signal.SIGALRM, before)
    for name in ("secret", "secret.txt"):
        (tmp_path / name).chmod(0o700)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_wrong_path_is_one_line(
    flag: str,
    kind: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback, a wait for a FIFO or a device without end, or another exit code than that of bad input."""
    if kind == "homeless":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    main, arguments = FLAGS[flag]
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)  # SIGALRM ends what waits
    try:
        code = main([argument.format(PATHS[kind]) for argument in arguments])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    error = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"\s*\d+%|$", line)]
    if kind in WRITTEN.get(flag, ()):
        assert (code, error) == (0, [])
        return
    assert code == 2
    assert len(error) == 1
    assert re.match(r"gpt\.(train|sample|eval|info): ", error[0])
    assert "Errno" not in error[0]


def test_a_folder_of_runs_is_named(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--checkpoint runs` answered with the files that a folder of weights has."""
    for name in ("1", "2"):
        shutil.copytree(model, folder / "runs" / name / "checkpoints" / "step-1")
        os.utime(folder / "runs" / name / "checkpoints", (0, int(name) % 2))  # 1 is the newest
    commands = [FLAGS[flag] for flag in ("--init", "sample --checkpoint", "eval --checkpoint", "info")]
    commands.append((train.main, [*TRAIN, "--data", "TEXT", "--out", "{}", "--resume"]))
    for main, arguments in commands:
        for path, message in (
            ("runs", "runs holds 2 runs, expected one of them, as in runs/1"),
            ("runs/2/checkpoints", "runs/2/checkpoints holds the checkpoints of a run, expected runs/2"),
        ):
            assert main([argument.format(path) for argument in arguments]) == 2
            error = capsys.readouterr().err
            assert error.endswith(f": {message}\n")
            assert error.count("\n") == 1

    with pytest.raises(InputError, match="runs/3 does not exist; runs holds 2 runs, expected one of them"):
        GPT.from_pretrained("runs/3")
    with pytest.raises(InputError, match=r"does not exist; runs/2/checkpoints holds .*, expected runs/2$"):
        GPT.from_pretrained("runs/2/checkpoints/step-7")
    shutil.rmtree(folder / "runs" / "1")
    with pytest.raises(InputError, match="runs holds a run, expected runs/2"):
        GPT.from_pretrained("runs")
