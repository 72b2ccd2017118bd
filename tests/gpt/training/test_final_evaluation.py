"""The end of a run: the last checkpoint comes first, then the final evaluation, which can be repeated."""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gpt import GPT, Trainer
from gpt.data.dataset import Batch, TokenData
from gpt.training.trainer import TrainResult
from gpt.weights import checkpoint
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, read_log, run, stop_at, without_times

PATIENT = replace(CONFIG, max_steps=9, eval_interval=1, patience=2)


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 4)


def fail(*_: object) -> None:
    raise RuntimeError("a defect")


def terminate(*_: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def after(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `first`, and then returns what `then` returns."""
    return lambda *args, **kwargs: (first(), then(*args, **kwargs))[1]


def windows(data: TokenData, do: Callable[[], None]) -> Callable[..., Iterator[Batch]]:
    """The windows of `data`, with `do` called between the first and the second."""

    def draw(*args: Any) -> Iterator[Batch]:
        batches = TokenData.windows(data, *args)
        yield next(batches)
        do()
        yield next(batches)
        pytest.fail("the evaluation goes on")

    return draw


def resume_at_the_end(out: Path, config: Any = CONFIG) -> TrainResult:
    """Resumes a run that has no step left."""
    data = TokenData.from_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_queue_step", lambda *_: pytest.fail("a step is taken"))
        return run(data, out, config, resume=True)


@pytest.mark.parametrize("when", ["evaluation", "bigram", "sample"])
@pytest.mark.parametrize("what", [fail, terminate])
def test_an_interrupted_end_is_repeated(
    what: Callable[..., None],
    when: str,
    data: TokenData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Steps that are lost because the end fails, a signal that waits for the end, or another final record."""
    straight = run(data, tmp_path / "straight")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if when == "evaluation":
            patch.setattr(data, "windows", windows(data, what))
        elif when == "bigram":
            draw = data._pairs
            patch.setattr(
                data, "_pairs", lambda split: after(what, draw)(split) if split == "train" else draw(split)
            )
        else:
            patch.setattr(GPT, "generate", after(what, GPT.generate))
        if what is fail:
            with pytest.raises(RuntimeError, match="a defect"):
                run(data, out)
        else:
            result = run(data, out)
            assert (result.step, result.signal, result.validation_loss) == (8, signal.SIGTERM, None)
            assert result.checkpoint == out / "checkpoints/step-8"
            assert (
                "\nstopping: the final evaluation is skipped; --resume repeats it" in capfd.readouterr().err
            )
    assert checkpoint.find_checkpoint(out).name == "step-8"
    assert [record["step"] for record in read_log(out)] == [*range(1, 9)]
    assert ("final" in read_log(out)[-1]) == (when == "sample")

    resumed = resume_at_the_end(out)
    assert replace(resumed, checkpoint=None) == replace(straight, checkpoint=None)
    assert without_times(read_log(out)) == without_times(read_log(tmp_path / "straight"))


def test_the_final_evaluation_reads_a_part(data: TokenData, tmp_path: Path) -> None:
    """A cap without effect, that reads the beginning alone, or that the bigram baseline does not have."""
    config = replace(CONFIG, final_eval_batches=3, max_steps=1)  # of 19 batches of 2 windows of 16 tokens
    result = run(data, tmp_path, config)
    batches = list(data.windows("validation", 2, 16, 3))
    starts = [0, 96, 192, 304, 400, 496]
    tokens = data.tokens("validation")
    windows = [(tokens[i : i + 16].tolist(), tokens[i + 1 : i + 17].tolist()) for i in starts]
    assert [(b.inputs[i].tolist(), b.targets[i].tolist()) for b in batches for i in range(2)] == windows

    record = read_log(tmp_path)[-1]
    assert (record["validation_tokens"], record["validation_share"]) == (96, 6 / 38)
    assert (result.validation_tokens, result.validation_share) == (96, 6 / 38)
    model = checkpoint.load_model(tmp_path, device="cpu").eval()
    losses = [model(batch.inputs, batch.targets).item() for batch in batches]
    assert record["validation_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    counts = Counter(pairwise(data.tokens("train").tolist()))
    firsts = Counter(data.tokens("train")[:-1].tolist())
    probabilities = [
        (counts[a, b] + 1) / (firsts[a] + data.tokenizer.vocab_size)
        for inputs, targets in windows
        for a, b in zip(inputs, targets, strict=True)
    ]
    expected = -sum(map(math.log, probabilities)) / len(probabilities)
    assert record["bigram_loss"] == pytest.approx(expected, rel=1e-12)

    whole = run(data, tmp_path, replace(config, final_eval_batches=None), resume=True)
    assert (whole.validation_tokens, whole.validation_share) == (len(tokens) - 1, 1.0)
    assert whole.bigram_loss == data.bigram_loss()


def test_a_run_that_patience_ended_stays_at_its_end(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that takes more steps when only its final evaluation is left."""
    losses = iter([2.0, 3.0, 2.5])
    monkeypatch.setattr(Trainer, "estimate", lambda self, split: 0.0 if split == "train" else next(losses))
    with monkeypatch.context() as patch:
        patch.setattr(data, "windows", windows(data, terminate))
        assert run(data, tmp_path, PATIENT).step == 3
    assert resume_at_the_end(tmp_path, PATIENT).validation_loss is not None
    assert [record.get("final") for record in read_log(tmp_path)] == [None, None, True]


def test_a_signal_in_the_last_step_skips_the_final_evaluation(tmp_path: Path) -> None:
    """A final evaluation of hours after a signal that was received before it."""
    data = stop_at(TokenData.from_text(TEXT), 7)
    data.windows = windows(data, lambda: pytest.fail("a second batch"))  # type: ignore[method-assign]
    result = run(data, tmp_path)
    assert (result.step, result.signal) == (8, signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_ends_the_process(
    number: int, error: type[BaseException], data: TokenData, tmp_path: Path
) -> None:
    """A second SIGTERM that exits with the code of Ctrl-C, or that leaves signal handlers or the lock."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    draw = data.batch

    def batch(stream: Any, *args: Any, **kwargs: Any) -> Batch:
        if kwargs["step"] == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(number)
        return draw(stream, *args, **kwargs)

    data.batch = batch  # type: ignore[method-assign]
    with pytest.raises(error) as raised:
        run(data, tmp_path)
    if error is SystemExit:
        assert raised.value.code == 143  # type: ignore[attr-defined]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoint.find_checkpoint(tmp_path).name == "step-4"
    assert run(TokenData.from_text(TEXT), tmp_path, resume=True).step == 8
