"""Two runs that want one folder: the lock, and the numbers of folders."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt import InputError, Trainer, train
from gpt.data.dataset import TokenData
from gpt.training.run_folder import LOCK, RunFolder
from gpt.weights import checkpoint
from tests.gpt.training.small_runs import CONFIG, TINY, make_model, run

SHORT = replace(CONFIG, max_steps=1)
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_is_refused(data: TokenData, tmp_path: Path) -> None:
    """Two runs that mix their logs and checkpoints, or a message that does not name the holder."""
    run(data, tmp_path, SHORT)
    first = Trainer(make_model(data), data, CONFIG, out=tmp_path, resume=True)
    before = contents(tmp_path)
    words = rf"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}, expected a folder"
    for _ in range(2):
        with pytest.raises(InputError, match=words):
            Trainer(make_model(data), data, CONFIG, out=tmp_path, resume=True)
    assert contents(tmp_path) == before
    assert checkpoint.load_model(tmp_path, device="cpu").config == first.model.config
    assert first.run().step == CONFIG.max_steps


def test_a_second_run_in_an_empty_folder_is_refused(data: TokenData, tmp_path: Path) -> None:
    """A folder that two runs may share until the first one has a checkpoint."""
    first, second = (Trainer(make_model(data), data, SHORT, out=tmp_path / "run") for _ in range(2))
    first.claim()
    with pytest.raises(InputError, match="is in use by process"):
        second.run()
    with pytest.raises(InputError, match="is in use by process"):
        Trainer(make_model(data), data, SHORT, out=tmp_path / "run")
    first.run()
    with pytest.raises(InputError, match="holds the checkpoints of a run"):
        second.run()


def test_the_lock_ends_with_the_run(data: TokenData, tmp_path: Path) -> None:
    """A folder that stays locked after a run, a failed start, or a trainer that nothing refers to."""
    run(data, tmp_path, SHORT)
    with pytest.raises(InputError, match="n_layer is 2") as error:
        Trainer(make_model(data, n_layer=2), data, CONFIG, out=tmp_path, resume=True)
    assert error.traceback  # which keeps the failed trainer alive
    trainer = Trainer(make_model(data), data, CONFIG, out=tmp_path, resume=True)
    del trainer
    assert run(data, tmp_path, resume=True).step == CONFIG.max_steps


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl is POSIX's")
def test_a_killed_process_frees_the_lock(text: str, tmp_path: Path, capsys: Any) -> None:
    """A lock that a killed run leaves for ever, or a command that resumes beside a running one."""
    out = tmp_path / "run"
    flags = ["--data", text, "--out", str(out)]
    assert train.main([*TINY, *flags, "--max_steps", "1"]) == 0
    (out / LOCK).write_text("process 12 on there\n")
    capsys.readouterr()
    with subprocess.Popen([sys.executable, "-c", HOLDER, out / LOCK], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = contents(out)
        assert train.main(["--out", str(out), "--resume", "--max_steps", "2"]) == 2
        assert capsys.readouterr() == (
            "",
            f"gpt.train: out: {out} is in use by process 12 on there, expected a folder that no other run "
            "writes to\n",
        )
        assert contents(out) == before
        holder.send_signal(signal.SIGKILL)
    assert train.main(["--out", str(out), "--resume", "--max_steps", "2"]) == 0


def test_a_holder_may_sign_late(tmp_path: Path) -> None:
    """A message without a process, in the moment between taking the lock and writing which process has it."""
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock()
    (tmp_path / LOCK).write_text("proc")
    writing = threading.Timer(0.2, (tmp_path / LOCK).write_text, ["process 12 on there\n"])
    writing.start()
    with pytest.raises(InputError, match="is in use by process 12 on there, expected"):
        second.lock()
    writing.join()
    first.release()


def test_a_number_belongs_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs without --out that choose the same folder because they start at the same time."""
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder(), RunFolder()]
    assert {folder.path for folder in folders} == {Path("runs/1")}
    assert [folder.claim(new=True) for folder in folders] == [Path("runs/1"), Path("runs/2")]


def test_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback for a lock file that is not a file, or a file system without locks that no run can use."""
    (tmp_path / "odd" / LOCK).mkdir(parents=True)
    with pytest.raises(InputError, match=r"out: cannot write .*\.lock: Is a directory"):
        RunFolder(tmp_path / "odd").lock()

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        RunFolder(tmp_path).lock()
