"""The checkpoint with the lowest validation loss, which is kept besides the newest ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gpt import InputError, Trainer, sample
from gpt.data.dataset import TokenData
from gpt.training.run_folder import RunFolder
from gpt.weights import checkpoint
from tests.gpt.training.small_runs import CONFIG, make_model, run

LOSSES = (3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1, 2.1)  # the best is that of step 2
EVERY_STEP = replace(CONFIG, eval_interval=1, checkpoint_interval=1, keep_best=True)


@pytest.fixture(autouse=True)
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
    monkeypatch.setattr("gpt.training.run_folder.plot_log", lambda *_: None)
    monkeypatch.setattr(
        Trainer, "estimate", lambda self, split: 0.0 if split == "train" else LOSSES[self.step - 1]
    )


def kept(out: Path) -> Sequence[str]:
    return [folder.name for folder in checkpoint.list_checkpoints(out)]


def test_the_best_checkpoint_is_kept(data: TokenData, tmp_path: Path) -> None:
    """A best checkpoint that a save, a resume or the end removes, or a pointer that a resume loses."""
    run(data, tmp_path, EVERY_STEP)
    assert kept(tmp_path) == ["step-2", "step-6", "step-7", "step-8"]
    assert checkpoint.find_best_checkpoint(tmp_path).name == "step-2"
    assert checkpoint.find_checkpoint(tmp_path).name == "step-8"

    trainer = Trainer(make_model(data), data, EVERY_STEP, out=tmp_path, resume="step-6")
    trainer.run()
    assert kept(tmp_path) == ["step-2", "step-6", "step-7", "step-8"]
    assert checkpoint.find_best_checkpoint(tmp_path).name == "step-2"

    run(data, tmp_path, replace(EVERY_STEP, keep_best=False), resume=True)
    assert kept(tmp_path) == ["step-6", "step-7", "step-8"]
    with pytest.raises(InputError, match="does not hold the best checkpoint of a run"):
        checkpoint.find_best_checkpoint(tmp_path)


def test_an_improvement_is_saved_between_checkpoints(data: TokenData, tmp_path: Path) -> None:
    """A best loss whose weights are lost because no checkpoint was due, or extra saves without keep_best."""
    config = replace(EVERY_STEP, checkpoint_interval=100)
    run(data, tmp_path / "patient", replace(config, keep_best=None, patience=9))
    assert kept(tmp_path / "patient") == ["step-1", "step-2", "step-8"]
    run(data, tmp_path / "plain", replace(config, keep_best=None))
    assert kept(tmp_path / "plain") == ["step-8"]


def test_a_kill_before_the_old_checkpoints_are_removed(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed after a save whose next start removes the best checkpoint, or keeps all others."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "discard", lambda folder: None)
        run(data, tmp_path, replace(EVERY_STEP, max_steps=7))
    assert len(kept(tmp_path)) == 7
    RunFolder(tmp_path).prepare(7, keep_final=True, best=2)
    assert kept(tmp_path) == ["step-2", "step-5", "step-6", "step-7"]


def test_a_sample_of_the_best_checkpoint(
    data: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--which without effect, another checkpoint in place of a damaged best one, or one of no run."""
    run(data, tmp_path, replace(EVERY_STEP, learning_rate=0.5, min_lr=0.1))
    best = tmp_path / "checkpoints/step-2"
    capsys.readouterr()

    def text(place: Path, which: str) -> str:
        flags = ["--which", which, "--max_new_tokens", "40", "--device", "cpu"]
        assert sample.main(["--checkpoint", str(place), *flags]) == 0
        return capsys.readouterr().out

    assert text(tmp_path, "best") == text(best, "newest") != text(tmp_path, "newest")
    assert sample.main(["--checkpoint", str(best), "--which", "best"]) == 2
    assert f"{best} does not hold the best checkpoint of a run" in capsys.readouterr().err
    (best / checkpoint.MODEL).write_bytes(b"damaged")
    assert sample.main(["--checkpoint", str(tmp_path), "--which", "best"]) == 2
    assert f"{best / checkpoint.MODEL} is damaged" in capsys.readouterr().err
    assert text(tmp_path, "newest")
