"""Weights, moments and losses that are not finite: never saved, and the run goes on from before them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import InputError, Trainer, train
from gpt.data.dataset import TokenData
from gpt.errors import NonFiniteError
from gpt.training.evaluator import Evaluator, MeanLoss
from gpt.weights import checkpoint
from gpt.weights.tensors import read_tensors
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, TINY, make_model, read_log, run, without_times


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)


def spoil_weight(trainer: Trainer) -> None:
    trainer.model.blocks[0].ln_1.weight.data[3] = math.nan


def spoil_moment(trainer: Trainer) -> None:
    trainer._step.tensors()["wpe.weight/exp_avg_sq"][0, 0] = math.inf


def spoil_loss(trainer: Trainer) -> None:
    trainer.model.wte.weight.data.fill_(3e38)


@pytest.mark.parametrize(
    ("last", "spoil", "words"),
    [
        (6, spoil_weight, "the model: blocks.0.ln_1.weight holds "),
        (8, spoil_moment, "the optimizer: wpe.weight/exp_avg_sq holds "),
        (8, spoil_loss, "the loss after the step is nan"),
    ],
)
def test_a_state_that_is_not_finite_is_not_saved(
    last: int, spoil: Any, words: str, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poisoned newest checkpoint, a success, or an error without tensor, step, batch or a way to go on."""
    straight = run(TokenData.from_text(TEXT), tmp_path / "straight")
    out = tmp_path / "my run"
    trainer = Trainer(make_model(data), data, CONFIG, out=out)
    finish_step = Trainer._finish_step

    def spoiled(self: Trainer) -> Any:
        result = finish_step(self)
        if self.step == last:
            spoil(self)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_step", spoiled)
        with pytest.raises(
            NonFiniteError, match=rf"^step {last}: {words}.*; not saved, its batch is in "
        ) as error:
            trainer.run()
    assert str(error.value).endswith(f" python -m gpt.train --out '{out}' --resume_from step-{last - 2}")
    kept = read_tensors(out / f"non-finite-step-{last}.safetensors")
    expected = data.batch("train", 2, 16, seed=CONFIG.seed, step=last - 1, micro_step=1)
    assert torch.equal(kept["1/inputs"], expected.inputs)
    assert checkpoint.find_checkpoint(out).name == f"step-{last - 2}"
    resumed = run(data, out, resume=True)
    assert replace(resumed, checkpoint=None) == replace(straight, checkpoint=None)


def test_a_final_loss_that_is_not_finite_is_an_error(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diverged run that reports success."""
    monkeypatch.setattr(Evaluator, "_mean_loss", lambda *_: MeanLoss(math.nan, 1))
    with pytest.raises(
        NonFiniteError, match=r"^step 8: the final validation loss is nan; to go on from an ear"
    ):
        run(data, tmp_path)
    assert "final" not in read_log(tmp_path)[-1]


def test_a_run_resumes_from_a_chosen_checkpoint(text: str, tmp_path: Path, capsys: Any) -> None:
    """A checkpoint that cannot be chosen, later ones that are lost, or an error without the right names."""
    out = tmp_path / "run"
    flags = ["--max_steps", "6", "--checkpoint_interval", "2", "--log_interval", "1"]
    assert train.main([*TINY, *flags, "--data", text, "--out", str(out)]) == 0
    log = without_times(read_log(out))
    for name in ("step-5", "5", "../run"):
        assert train.main(["--out", str(out), "--resume_from", name]) == 2
        assert re.search(
            rf"resume: {out} has no checkpoint '{name}', expected one of step-2, step-4, step-6\n",
            capsys.readouterr().err,
        )
    assert train.main(["--out", str(out), "--resume_from", "step-2"]) == 0
    assert without_times(read_log(out)) == log
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert [name for name in names if re.fullmatch(r"step-\d+", name)] == ["step-2", "step-4", "step-6"]
    assert sum(name.startswith(("step-4.", "step-6.")) for name in names) == 2
    (out / "checkpoints/step-2/state.json").write_text("{}")
    assert train.main(["--out", str(out), "--resume_from", "step-2"]) == 2
    assert "state.json is damaged" in capsys.readouterr().err


def test_resume_auto_starts_or_goes_on(text: str, tmp_path: Path, capsys: Any) -> None:
    """A restart that ends because there is no checkpoint yet, or that begins the run again."""
    out = tmp_path / "run"
    flags = [*TINY, "--data", text, "--resume", "auto"]
    for steps in ("2", "4"):
        assert train.main([*flags, "--max_steps", steps, "--out", str(out), "--log_interval", "1"]) == 0
    assert [record["step"] for record in read_log(out)] == [1, 3, 4]
    assert json.loads((out / "checkpoints/step-4/state.json").read_text())["tokens"] == 4 * 64
    capsys.readouterr()
    assert train.main(flags) == 2
    assert "--resume: --out is not given" in capsys.readouterr().err
    with pytest.raises(InputError, match="has no checkpoint 'step-9', expected one of step-2, step-4"):
        Trainer(
            make_model(TokenData.from_text(TEXT)), TokenData.from_text(TEXT), CONFIG, out=out, resume="step-9"
        )
