"""--time_limit: a run that ends in time, saved, and goes on when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt import InputError, TrainConfig, train
from gpt.cli import convert, field_types
from gpt.data.dataset import Batch, TokenData
from gpt.training.run_folder import RunFolder
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, TINY, read_log, run, without_times

STEP = 10.0  # seconds


class Clock:
    """Replaces the clock of the time limit: it moves only in calls of functions that `passes` returns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls take so long."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
    monkeypatch.setattr("gpt.training.run_folder.plot_log", lambda *_: None)
    clock = Clock()
    monkeypatch.setattr("gpt.training.signals.monotonic", clock)
    return clock


def timed(clock: Clock, step: float = STEP, window: float = 0.0) -> TokenData:
    """Data whose training batches, and windows of the final evaluation, take so many seconds."""
    data = TokenData.from_text(TEXT)
    draw, windows = data.batch, data.windows

    def batch(stream: Any, *args: Any, **kwargs: Any) -> Batch:
        taken = step if stream == "train" and kwargs["micro_step"] == 0 else 0
        return clock.passes(taken / 2, draw)(stream, *args, **kwargs)  # drawn twice in a step

    data.batch = batch  # type: ignore[method-assign]
    data.windows = lambda *args: map(clock.passes(window, lambda x: x), windows(*args))  # type: ignore
    return data


def test_a_run_ends_when_its_time_is_up(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that is ignored, that leaves no time to save, or a resume that differs or has no time left."""
    straight = run(timed(clock), tmp_path / "straight")
    out, config = tmp_path / "run", replace(CONFIG, time_limit="35s")
    first = run(timed(clock), out, config)
    assert (first.step, first.out_of_time, first.signal, first.validation_loss) == (4, True, None, None)
    assert first.checkpoint == out / "checkpoints/step-4"

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", clock.passes(20, RunFolder.save))
        second = run(timed(clock), out, replace(config, time_limit="65s"), resume=True)
    assert second.step == 7  # 20 s for steps 5 and 6, 20 s for their checkpoint, 10 s for step 7, 20 s left

    last = run(timed(clock), out, config, resume=True)
    assert (last.step, last.out_of_time) == (8, False)
    assert replace(last, checkpoint=None) == replace(straight, checkpoint=None)
    assert without_times(read_log(out)) == without_times(read_log(tmp_path / "straight"))


def test_the_final_evaluation_ends_in_time(clock: Clock, tmp_path: Path) -> None:
    """A final evaluation that goes on when the time is up."""
    config = replace(CONFIG, time_limit="100s")
    result = run(timed(clock, window=9.0), tmp_path, config)
    assert (result.step, result.out_of_time, result.validation_loss) == (8, True, None)
    assert run(timed(clock), tmp_path, config, resume=True).validation_loss is not None


def test_the_command_ends_with_0(
    clock: Clock, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A job that counts as failed because its time is up, or that does not say how to go on."""
    monkeypatch.setattr(TokenData, "batch", clock.passes(1800, TokenData.batch))
    out = tmp_path / "run"
    flags = ["--max_steps", "9", "--time_limit", "1h30m", "--data", text, "--out", str(out)]
    assert train.main([*TINY, *flags]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == f"time limit reached at step 2, saved in {out / 'checkpoints/step-2'}"
    assert second.startswith("go on with: ")
    assert second.endswith(f"-m gpt.train --out {out} --resume")


def test_times_are_understood() -> None:
    """A limit of another length than what is written, or a text that is not a time."""
    for text, seconds in {"3h": 10800, "90m": 5400, "45s": 45, "1h30m": 5400, "1h1m1s": 3661}.items():
        assert TrainConfig(time_limit=text).time_limit_seconds == seconds
    for text in ("", "0s", "3", "h", "3x", "-1h", "1.5h", "30m1h", "1h ", "٣h"):
        with pytest.raises(InputError, match=r"^TrainConfig: time_limit is .*, expected a time, as in 1h30m"):
            TrainConfig(time_limit=text)
    assert convert("--time_limit", field_types(TrainConfig)["time_limit"], "none") is None
