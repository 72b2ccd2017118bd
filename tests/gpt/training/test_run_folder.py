"""The folder of a run: its checks, its log, and the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt import InputError, Trainer
from gpt.data.dataset import TokenData
from gpt.errors import MachineError
from gpt.files import read_json
from gpt.training import run_log
from gpt.training.run_folder import RunFolder
from gpt.weights import checkpoint
from gpt.weights.hashes import write_sums
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, disk_full, make_model, read_log, run, without_times


def test_resume_from_an_older_checkpoint(data: TokenData, tmp_path: Path) -> None:
    """A log that repeats steps, or a damaged checkpoint that stays the newest."""
    run(data, tmp_path / "straight")
    run(data, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-8/state.json").write_text("{}")
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"step": 9, "sec')
    with pytest.warns(UserWarning, match="step-6, which is not the newest"):
        run(data, tmp_path / "run", resume=True)
    assert without_times(read_log(tmp_path / "run")) == without_times(read_log(tmp_path / "straight"))
    assert (tmp_path / "run/checkpoints/step-8/SHA256SUMS").read_text().count("\n") == 5


def test_one_random_state_per_process_is_required(data: TokenData, tmp_path: Path) -> None:
    """A single random state whose entries are counted as processes."""
    run(data, tmp_path, replace(CONFIG, max_steps=1))
    folder = tmp_path / "checkpoints/step-1"
    state = read_json(folder / checkpoint.STATE)
    (folder / checkpoint.STATE).write_text(json.dumps(state | {"rng": state["rng"][0]}))
    write_sums(folder)
    with pytest.raises(InputError, match=r"state\.json: rng is .*, expected a list"):
        Trainer(make_model(data), data, CONFIG, out=tmp_path, resume=True)


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)


@pytest.mark.parametrize("change", ["text", "model", "no checkpoint"])
def test_resume_requires_the_same_text_and_model(change: str, data: TokenData, tmp_path: Path) -> None:
    """A run that continues with another text or model than it began with."""
    if change != "no checkpoint":
        run(data, tmp_path, replace(CONFIG, max_steps=1))
    other = TokenData.from_text(TEXT[::-1]) if change == "text" else data
    model = make_model(data, n_layer=2) if change == "model" else make_model(data)
    words = {
        "text": "the text or the tokenizer is not",
        "model": "n_layer is 2, expected 1 as in",
        "no checkpoint": "no checkpoint",
    }
    with pytest.raises(InputError, match=words[change]):
        Trainer(model, other, CONFIG, out=tmp_path, resume=True)


def test_non_finite_numbers_are_null(tmp_path: Path) -> None:
    """A log that is not JSON: it contains NaN or Infinity."""
    RunFolder(tmp_path).append_log(
        {"step": 1, "train_loss": math.nan, "gradient_norm": math.inf, "gradient_norms": {"wte": -math.inf}}
    )
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "train_loss": None,
        "gradient_norm": None,
        "gradient_norms": {"wte": None},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_requires_the_same_optimizer(optimizer: str, data: TokenData, tmp_path: Path) -> None:
    """One optimizer's averages loaded as the momentum of another."""
    run(data, tmp_path, replace(CONFIG, max_steps=1, optimizer=optimizer))
    other = replace(CONFIG, optimizer="muon" if optimizer == "adamw" else "adamw")
    with pytest.raises(InputError, match=r"optimizer\.safetensors has for .* the state of another optimizer"):
        run(data, tmp_path, other, resume=True)


def test_an_unsuitable_folder_is_refused(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that overwrites another one, or that fails later because the disk is full."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is not a folder"):
        Trainer(make_model(data), data, CONFIG, out=tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot write .*below: Not a directory"):
        Trainer(make_model(data), data, CONFIG, out=tmp_path / "file" / "below").run()
    run(data, tmp_path / "run", replace(CONFIG, max_steps=1))
    lines = read_log(tmp_path / "run")
    with pytest.raises(InputError, match="run holds the checkpoints of a run, expected --resume"):
        run(data, tmp_path / "run")
    assert read_log(tmp_path / "run") == lines
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="has 0 MB free, expected"):
        Trainer(make_model(data), data, CONFIG, out=tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can write everywhere")
def test_an_unwritable_folder_is_refused(data: TokenData, tmp_path: Path) -> None:
    """A read-only folder that is noticed only at the first checkpoint."""
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write to"):
        Trainer(make_model(data), data, CONFIG, out=tmp_path / "out")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_disk_that_fills_during_a_run(
    what: str, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, a lost checkpoint, an unreadable log, or a run that cannot go on with more space."""
    straight = run(data, tmp_path / "straight")
    append, written = run_log.append, []

    def fill(path: Path, record: Any) -> None:
        written.append(record)
        if len(written) == 6:
            with path.open("ab") as file:
                file.write(b'{"step": 6, "sec')
            disk_full()
        append(path, record)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if what == "log":
            patch.setattr(run_log, "append", fill)
        else:
            run(data, out, replace(CONFIG, max_steps=4, decay_steps=8))
            patch.setattr(checkpoint, "write_tensors", disk_full)
        with pytest.raises(MachineError, match=rf"cannot write {out}.*: No space left on device"):
            run(data, out, resume=what == "checkpoint")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-2", "step-4"]
    assert run(data, out, resume=True).validation_loss == straight.validation_loss
    if what == "log":
        assert without_times(read_log(out)) == without_times(read_log(tmp_path / "straight"))
