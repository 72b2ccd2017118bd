"""What each of two processes does for test_distributed.py: `python -m tests.gpt.training.ranks FOLDER` and
flags of gpt.train."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import GPT, InputError, Trainer, train
from gpt.data.dataset import TokenData
from gpt.training import distributed
from gpt.training.distributed import ALONE, Ranks
from gpt.training.step import NonFiniteError, TrainStep
from gpt.weights import checkpoint
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, disk_full, make_batches, make_model, stop_at

PLAIN = replace(CONFIG, grad_accum=4)
MUON = replace(PLAIN, optimizer="muon")
RAGGED = ((32, 5, 0, 1), (7, 0, 20, 0))


def steps(ranks: Ranks = ALONE, out: Path | None = None) -> list[Any]:
    """Of steps that change nothing the loss, the norm and the clipped gradients."""
    model = make_model(TokenData.from_text(TEXT), dropout=0.0)
    step = TrainStep(model, replace(PLAIN, grad_clip=0.05), ranks=ranks)
    found = []
    for counts in RAGGED:
        result = step(list(ranks.share(make_batches(*counts))), rate=0.0)
        found.append((result.loss, result.gradient_norm, [p.grad.clone() for p in model.parameters()]))
    return found


def without_noise() -> GPT:
    """No dropout, and no bias of the keys: its gradient is nothing but rounding, which AdamW magnifies."""
    return make_model(TokenData.from_text(TEXT), dropout=0.0, qkv_bias=False)


def curve(ranks: Ranks, out: Path) -> Any:
    """A run without dropout; rank 1 begins with other parameters, and counts what it saves."""
    model = without_noise()
    if ranks.rank:
        torch.nn.init.ones_(model.wte.weight)
    saved = []
    commit = checkpoint.commit
    checkpoint.commit = lambda *args: saved.append(args) or commit(*args)
    trainer = Trainer(model, TokenData.from_text(TEXT), PLAIN, out=out / "curve", ranks=ranks)
    before = trainer.evaluate("validation")
    result = trainer.run()
    checkpoint.commit = commit
    return before, result, len(saved), dict(model.named_parameters())


def interrupted(ranks: Ranks, out: Path) -> Any:
    """A run with dropout, straight and stopped by a signal that rank 1 alone receives."""

    def run(name: str, data: TokenData, resume: bool = False) -> Any:
        torch.manual_seed(11)
        return Trainer(make_model(data), data, MUON, out=out / name, resume=resume, ranks=ranks).run()

    straight = run("straight", TokenData.from_text(TEXT))
    stopped = run("stopped", stop_at(TokenData.from_text(TEXT), 3, 1, signal.SIGTERM))
    return straight, stopped, run("stopped", TokenData.from_text(TEXT), resume=True)


def masks(ranks: Ranks, out: Path) -> Any:
    """The loss of one batch with this rank's dropout, and without."""
    trainer = Trainer(make_model(TokenData.from_text(TEXT)), TokenData.from_text(TEXT), PLAIN, ranks=ranks)
    batch = make_batches(32)[0]
    losses = [trainer._step.loss(batch).item()]
    trainer.model.eval()
    return [*losses, trainer._step.loss(batch).item()]


def failures(ranks: Ranks, out: Path) -> list[str]:
    """What each rank hears of errors that one of them has."""

    def fail(rank: int) -> None:
        if ranks.rank == rank:
            raise InputError(f"from {rank}")

    found = []
    for attempt in (lambda: fail(1), lambda: ranks.on_first(lambda: fail(0))):
        with pytest.raises(InputError) as error, ranks.agreement():
            attempt()
        found.append(str(error.value))
    return found


def failing_trainer(ranks: Ranks, out: Path) -> list[str]:
    """A folder that one rank cannot use, and a checkpoint that rank 0 cannot write."""
    data, found = TokenData.from_text(TEXT), []
    (out / f"file-{ranks.rank}").write_text("")
    with pytest.raises(InputError) as error:
        Trainer(
            make_model(data), data, PLAIN, out=out / "file-1" if ranks.rank else out / "free", ranks=ranks
        )
    found.append(str(error.value))
    trainer = Trainer(make_model(data), data, PLAIN, out=out / "full", ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        if not ranks.rank:
            patch.setattr(checkpoint, "write_tensors", disk_full)
        with pytest.raises(InputError) as error:
            trainer.run()
    return [*found, str(error.value)]


def non_finite(ranks: Ranks, out: Path) -> Any:
    """Where the loss of rank 1 alone is infinite: the message, and whether parameters changed."""
    data = TokenData.from_text(TEXT)
    trainer = Trainer(make_model(data), data, PLAIN, out=out / "inf", ranks=ranks)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if ranks.rank:
        trainer._step._forward = lambda *args, **kwargs: trainer.model(*args, **kwargs) * math.inf
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    return str(error.value), all(map(torch.equal, before, trainer.model.parameters()))


def overflow(ranks: Ranks, out: Path) -> Any:
    """float16 whose gradient overflows on rank 1 alone: the scale, and whether parameters changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.training.step.autocast_dtype", lambda name, device: torch.float16)
        model = make_model(TokenData.from_text(TEXT), dropout=0.0)
        step = TrainStep(model, PLAIN, ranks=ranks)
        before, scale = [p.detach().clone() for p in model.parameters()], step.scaler.get_scale()
        if ranks.rank:
            model.wpe.weight.register_hook(lambda g: g * math.inf)
        step(make_batches(32), rate=1.0)
        return step.scaler.get_scale() / scale, all(map(torch.equal, before, model.parameters()))


SCENARIOS: tuple[Callable[[Ranks, Path], Any], ...] = (
    steps,
    curve,
    interrupted,
    masks,
    failures,
    failing_trainer,
    non_finite,
    overflow,
)


def main(folder: Path, argv: list[str]) -> int:
    """All of the above, in a file for each rank; then the command line, whose exit code this is."""
    distributed.BUCKET = 1000  # the model takes several
    with distributed.join() as ranks:
        found = {scenario.__name__: scenario(ranks, folder) for scenario in SCENARIOS}
        torch.save(found, folder / f"rank-{ranks.rank}.pt")
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
