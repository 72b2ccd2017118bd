"""log.jsonl with lines and files that no run writes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpt import InputError
from gpt.data.dataset import TokenData
from gpt.training import run_log
from gpt.training.plot import plot_log
from tests.gpt.training.small_runs import CONFIG, read_log, run, without_times

FOREIGN = {
    "byte": b"\xff\xfe",
    "text": b"epoch 3",
    "no step": b'{"train_loss": 1.0}',
    "step of text": b'{"step": "1"}',
    "true as step": b'{"step": true}',
    "negative step": b'{"step": -1}',
    "list": b"[1, 2]",
    "loss of text": b'{"step": 1, "train_loss": "low"}',
    "huge loss": b'{"step": 1, "train_loss": 1' + b"0" * 400 + b"}",
    "huge digits": b'{"step": 1' + b"0" * 5000 + b"}",
    "nesting": b'{"step": 1, "a": ' + b"[" * 100_000,
    "nested entry": b'{"step": 1, "a": {"b": {"c": {}}}}',
    "zeros within": b'{"step": 1,\0\0 "a": 2}',
    "long": b"x" * (3 * run_log.LONGEST + 7),
}
GOOD = [{"step": step, "train_loss": 1 / step, "gradient_norms": {"wte": 0.1}} for step in (1, 2, 3)]


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)


@pytest.mark.parametrize("kind", FOREIGN)
def test_records_around_a_foreign_line_are_kept(kind: str, tmp_path: Path) -> None:
    """A traceback, a lost record after the line, a line that stays, or one that is dropped in silence."""
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(record).encode() for record in GOOD]
    path.write_bytes(b"\n".join([lines[0], FOREIGN[kind], lines[1], b"\0\0" + lines[2], b'{"step": 4, "se']))
    assert list(run_log.read_log(path)) == GOOD
    plot_log(path, tmp_path / "loss.png")
    with pytest.warns(
        UserWarning, match=r"log\.jsonl had 1 line\(s\) that are not records of a run; dropped"
    ):
        run_log.rewrite(path, lambda records: records)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines)


def test_a_whole_log_is_rewritten_without_a_warning(tmp_path: Path) -> None:
    """A warning for a log whose last line a kill has cut, or for a log that is missing or empty."""
    path = tmp_path / "log.jsonl"
    for content in (b"", b'{"step": 1}\n\n{"st', b'{"step": 1}'):
        path.write_bytes(content)
        run_log.rewrite(path, lambda records: records)
        assert path.read_bytes() == (b'{"step": 1}\n' if content else b"")
    path.unlink()
    run_log.rewrite(path, lambda records: records)
    assert path.read_bytes() == b""
    plot_log(path, tmp_path / "loss.png")


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs are POSIX's")
@pytest.mark.parametrize("kind", ["folder", "FIFO", "endless", "loop"])
def test_something_else_than_a_file_is_set_aside(kind: str, tmp_path: Path) -> None:
    """A run that waits for ever or ends in a traceback because its log is not a file."""
    path = tmp_path / "log.jsonl"
    {
        "folder": path.mkdir,
        "FIFO": lambda: os.mkfifo(path),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    (tmp_path / "log.jsonl.aside-1").touch()
    with pytest.raises(InputError):
        list(run_log.read_log(path))
    if kind == "FIFO":
        with pytest.raises(OSError, match="No such device or address"):
            run_log.append(path, GOOD[0])
    with pytest.warns(UserWarning, match=r"log\.jsonl is not a file; set aside as log\.jsonl\.aside-2"):
        run_log.rewrite(path, lambda records: records)
    run_log.append(path, GOOD[0])
    assert list(run_log.read_log(path)) == GOOD[:1]
    assert os.path.lexists(tmp_path / "log.jsonl.aside-2")


def test_a_run_resumes_with_a_damaged_log(data: TokenData, tmp_path: Path) -> None:
    """A log with a foreign byte that blocks the resume, or that loses the records of the run."""
    config = replace(CONFIG, decay_steps=8)
    straight = run(data, tmp_path / "straight", config)
    run(data, tmp_path / "run", replace(config, max_steps=4))
    log = tmp_path / "run/log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b"\xff\n" + b"".join(lines[1:3]) + b"oops\n" + lines[3])
    with pytest.warns(UserWarning, match=r"had 2 line\(s\) that are not records"):
        resumed = run(data, tmp_path / "run", config, resume=True)
    assert replace(resumed, checkpoint=None) == replace(straight, checkpoint=None)
    steps = [record["step"] for record in without_times(read_log(tmp_path / "run"))]
    assert steps == [1, 2, 3, 5, 6, 7, 8]  # the final record of the shorter run is dropped


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names of files are text")
@pytest.mark.parametrize("name", ["bytes-\udcff", r"a$\frac$b"])
def test_any_folder_has_a_loss_curve(name: str, tmp_path: Path) -> None:
    """A name that a font cannot draw, or that is taken for a formula, and ends the run in a traceback."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2, "train_loss": 1.5}\n')
    plot_log(folder / "log.jsonl", folder / "loss.png")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
