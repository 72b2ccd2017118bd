"""What a run shows while it goes on: `on_log`, TensorBoard's scalars, and a profile of a few steps."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import InputError, Trainer
from gpt.data.dataset import TokenData
from gpt.errors import MachineError
from gpt.training.profile import LAST, StepProfile
from gpt.training.tensorboard import TensorBoard
from tests.gpt.training.small_runs import CONFIG, disk_full, make_model, read_log

SHORT = replace(CONFIG, max_steps=3, grad_accum=1, eval_batches=1, eval_interval=2)


def test_on_log_is_called_with_each_record(data: TokenData, tmp_path: Path) -> None:
    """A record of the log that is not passed on, or one that the callable can change."""
    records: list[dict[str, Any]] = []

    def on_log(record: dict[str, Any]) -> None:
        records.append(json.loads(json.dumps(record)))
        record["gradient_norms"] = record.clear()

    Trainer(make_model(data), data, SHORT, out=tmp_path, on_log=on_log).run()
    *steps, final = records
    last = steps[-1] | final
    assert [*steps[:-1], last] == read_log(tmp_path)
    assert final["final"] is True


def test_an_error_in_on_log_ends_the_run(data: TokenData, tmp_path: Path) -> None:
    """A callable that fails without anyone seeing it, or a record that is lost with it."""

    def on_log(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise ConnectionError("the service is away")

    with pytest.raises(ConnectionError):
        Trainer(make_model(data), data, SHORT, out=tmp_path, on_log=on_log).run()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_tensorboard_has_the_numbers_of_the_log(data: TokenData, tmp_path: Path) -> None:
    """A number that is left out, or a resumed run whose steps are there twice."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(SHORT, tensorboard=True)
    for resume in (False, "step-2"):
        Trainer(make_model(data), data, config, out=tmp_path, resume=resume).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = read_log(tmp_path)
    for name in ("train_loss", "learning_rate", "seconds", "tokens"):
        scalars = [(e.step, e.value) for e in events.Scalars(name)]
        assert scalars == [(r["step"], pytest.approx(r[name])) for r in records]
    norms = [e.value for e in events.Scalars("gradient_norms/blocks.0")]
    assert norms == pytest.approx([r["gradient_norms"]["blocks.0"] for r in records])
    assert {"validation_loss", "bigram_loss", "gradient_norm"} < set(events.Tags()["scalars"])
    assert not {"step", "final", "mfu"} & set(events.Tags()["scalars"])


def test_a_disk_that_is_full_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of TensorBoard's writer."""
    writer = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    monkeypatch.setattr(writer.SummaryWriter, "flush", disk_full)
    with pytest.raises(MachineError, match=r"^tensorboard: cannot write .*: No space left on device$"):
        TensorBoard(tmp_path, 1)({"step": 1, "train_loss": 2.0})


@pytest.mark.parametrize(
    ("setting", "out", "message"),
    [
        ("tensorboard", True, r"^tensorboard: the package is not installed, expected it \(pip install "),
        ("tensorboard", False, "^Trainer: tensorboard is True without out, expected a folder"),
        ("profile", False, "^Trainer: profile is True without out, expected a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    setting: str, out: bool, message: str, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains and then fails, or that drops what was asked for."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        Trainer(make_model(data), data, replace(SHORT, **{setting: True}), out=folder if out else None)
    assert not folder.exists()


def test_a_profile_is_written(data: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace that is not JSON, that holds other steps than it says, or a table without times."""
    config = replace(SHORT, max_steps=7, profile=True, eval_interval=7, checkpoint_interval=7, log_interval=7)
    result = Trainer(make_model(data), data, config, out=tmp_path).run()
    assert result.step == 7
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 3
    printed = capsys.readouterr().out.splitlines()
    end = printed.index(f"wrote {tmp_path / 'trace.json'}")
    assert printed[end - 11].split() == ["share", "ms", "calls", "op"]
    assert all("%" in line and len(line) <= 80 for line in printed[end - 10 : end])


@pytest.mark.parametrize(("steps", "written"), [(2, False), (4, True), (LAST + 3, True)])
def test_a_run_may_end_within_its_profile(steps: int, written: bool, tmp_path: Path) -> None:
    """A run that is too short or is stopped, and loses its trace or fails."""
    with StepProfile(tmp_path / "trace.json", torch.device("cpu")) as profile:
        for _ in range(steps):
            profile.next_step()
            torch.ones(3).sum()
    assert (tmp_path / "trace.json").exists() == written
