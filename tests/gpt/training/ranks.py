"""The program that test_distributed.py runs: two processes that share a model, each with its own copy.

`python -m tests.gpt.training.ranks FOLDER FLAGS` imports torch once, and forks the ranks. They run all
scenarios and save their results in FOLDER; then two others run gpt.train with FLAGS.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DDP imports it; here, so that the forks need not do it
import torch.distributed as dist

from gpt import GPT, InputError, TrainConfig, Trainer, train
from gpt.data.dataset import TokenData
from gpt.errors import MachineError, NonFiniteError, ReportedError
from gpt.training import distributed, parallel
from gpt.training.distributed import ALONE, Ranks
from gpt.training.step import TrainStep
from gpt.weights import checkpoint
from gpt.weights.checkpoint import save_model
from tests.gpt.text import TEXT
from tests.gpt.training.forks import check_succeeded, fork_ranks, wait_for
from tests.gpt.training.small_runs import CONFIG, TINY, disk_full, make_batches, make_model, stop_at

PLAIN = replace(CONFIG, grad_accum=4)
MUON = replace(PLAIN, optimizer="muon")
RAGGED = ((32, 5, 0, 1), (7, 0, 20, 0))


def make_step(model: GPT, config: TrainConfig, ranks: Ranks) -> TrainStep:
    """The steps of `model`, which `ranks` take together."""
    forward = parallel.parallelize(model, torch.device("cpu"), config, ranks)
    return TrainStep(model, config, forward, ranks)


def steps(ranks: Ranks = ALONE, out: Path | None = None) -> list[Any]:
    """Loss, gradient norm and clipped gradients of two steps with learning rate 0."""
    model = make_model(TokenData.from_text(TEXT), dropout=0.0)
    step = make_step(model, replace(PLAIN, grad_clip=0.05), ranks)
    results = []
    for counts in RAGGED:
        result = step(list(ranks.share(make_batches(*counts))), rate=0.0)
        results.append((result.loss, result.gradient_norm, [p.grad.clone() for p in model.parameters()]))
    return results


def without_noise() -> GPT:
    """A model without dropout or key biases: AdamW would magnify the rounding noise of their gradient."""
    return make_model(TokenData.from_text(TEXT), dropout=0.0, qkv_bias=False)


def curve(ranks: Ranks, out: Path) -> Any:
    """A run without dropout, in which rank 1 starts with other parameters. Counts the saves of each rank."""
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
    return before, result, len(saved), {name: p.detach().clone() for name, p in model.named_parameters()}


def interrupted(ranks: Ranks, out: Path) -> Any:
    """A run with dropout: uninterrupted, then stopped by a signal to rank 1 alone, then resumed."""

    def run(name: str, data: TokenData, resume: bool = False) -> Any:
        torch.manual_seed(11)
        return Trainer(make_model(data), data, MUON, out=out / name, resume=resume, ranks=ranks).run()

    straight = run("straight", TokenData.from_text(TEXT))
    stopped = run("stopped", stop_at(TokenData.from_text(TEXT), 3, 1, signal.SIGTERM))
    return straight, stopped, run("stopped", TokenData.from_text(TEXT), resume=True)


def masks(ranks: Ranks, out: Path) -> Any:
    """The loss of one batch with this rank's dropout, and without dropout."""
    trainer = Trainer(make_model(TokenData.from_text(TEXT)), TokenData.from_text(TEXT), PLAIN, ranks=ranks)
    batch = make_batches(32)[0]
    losses = [trainer._step.loss(batch).item()]
    trainer.model.eval()
    return [*losses, trainer._step.loss(batch).item()]


def failures(ranks: Ranks, out: Path) -> list[Any]:
    """The class and message that each rank gets for errors of one rank."""

    def fail(rank: int, error: ReportedError) -> None:
        if ranks.rank == rank:
            raise error

    errors = []
    for attempt in (
        lambda: fail(1, InputError("from 1")),
        lambda: ranks.on_first(lambda: fail(0, MachineError("from 0"))),
        lambda: fail(1, NonFiniteError("nan")),
    ):
        with pytest.raises(ReportedError) as error, ranks.agreement():
            attempt()
        errors.append((type(error.value), str(error.value), error.value.shared))
    return errors


def different(ranks: Ranks, out: Path) -> dict[str, str]:
    """The error for each way in which rank 1 starts gpt.train with other settings; "" if it runs."""
    config, other = out / "config.toml", out / "other.txt"
    config.write_text("[train]\nmax_steps = 1\nseed = 1337\n")
    (out / f"{ranks.rank}.toml").write_text(f"[train]\nbeta1 = 0.{8 + ranks.rank}\n")
    other.write_text(TEXT[::-1])
    for seed in range(2):
        model = make_model(TokenData.from_text(TEXT))
        with torch.no_grad():
            model.wte.weight.add_(seed)
        if not ranks.rank:
            save_model(model, out / f"init-{seed}", TokenData.from_text(TEXT).tokenizer)
    ranks.gather(None)

    folder = out / "different"
    flags = [*TINY, "--grad_accum", "2", "--max_steps", "1", "--data", str(out / "text.txt")]
    plain = [*flags, "--out", str(folder)]
    weights = [*plain[plain.index("--batch_size") :], "--init"]
    errors = {}
    for name, first, second in (
        ("seed", plain, [*plain, "--seed", "2"]),
        ("batch_size", plain, [*plain, "--batch_size", "8"]),
        ("data", plain, [*plain, "--data", str(other)]),
        ("tokenizer", plain, [*plain, "--tokenizer", "bpe"]),
        ("config", [*plain, "--config", str(out / "0.toml")], [*plain, "--config", str(out / "1.toml")]),
        ("strict", plain, [*plain, "--strict"]),
        ("pack_documents", plain, [*plain, "--pack_documents"]),
        ("init", [*weights, str(out / "init-0")], [*weights, str(out / "init-1")]),
        ("equal", plain, [*plain, "--config", str(config)]),
    ):
        try:
            train._run(second if ranks.rank else first, ranks)
        except InputError as error:
            errors[name] = f"{error}" if error.shared and not folder.exists() else "not shared, or late"
        else:
            errors[name] = ""
    return errors


def failing_trainer(ranks: Ranks, out: Path) -> list[str]:
    """The errors for a folder that rank 1 cannot use, and for a checkpoint that rank 0 cannot write."""
    data, messages = TokenData.from_text(TEXT), []
    (out / f"file-{ranks.rank}").write_text("")
    with pytest.raises(InputError) as error:
        Trainer(
            make_model(data), data, PLAIN, out=out / "file-1" if ranks.rank else out / "free", ranks=ranks
        )
    messages.append(str(error.value))
    trainer = Trainer(make_model(data), data, PLAIN, out=out / "full", ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        if not ranks.rank:
            patch.setattr(checkpoint, "write_tensors", disk_full)
        with pytest.raises(MachineError) as error:
            trainer.run()
    return [*messages, str(error.value)]


def non_finite(ranks: Ranks, out: Path) -> Any:
    """An infinite loss on rank 1 alone: the message, and whether the parameters stay the same."""
    data = TokenData.from_text(TEXT)
    trainer = Trainer(make_model(data), data, PLAIN, out=out / "inf", ranks=ranks)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if ranks.rank:
        trainer.model.register_forward_hook(lambda module, args, loss: loss * math.inf)
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    return str(error.value), all(map(torch.equal, before, trainer.model.parameters()))


def late(ranks: Ranks, out: Path) -> Any:
    """A NaN on rank 1 in the third step, read one step late: the message, and whether anything changes."""
    data = TokenData.from_text(TEXT)
    config = replace(MUON, log_interval=100, eval_interval=100, checkpoint_interval=100)
    trainer = Trainer(make_model(data), data, config, out=out / "late", ranks=ranks)
    trainer._ahead = 1
    factor, before = torch.ones(()), []
    draw, model = data.batch, trainer.model

    def batch(stream: Any, *args: Any, **kwargs: Any) -> Any:
        if stream == "train":
            if kwargs["step"] == 2 and not before:
                before.extend(t.clone() for t in (*model.parameters(), *trainer._step.tensors().values()))
            factor.fill_(math.nan if ranks.rank and kwargs["step"] == 2 else 1)
        return draw(stream, *args, **kwargs)

    data.batch = batch  # type: ignore[method-assign]
    model.register_forward_hook(lambda module, args, loss: loss * factor)
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    after = (*model.parameters(), *trainer._step.tensors().values())
    return str(error.value), trainer.step, all(map(torch.equal, before, after))


def overflow(ranks: Ranks, out: Path) -> Any:
    """A float16 gradient that overflows on rank 1 alone: the scale, and whether the parameters stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.training.step.autocast_dtype", lambda name, device: torch.float16)
        model = make_model(TokenData.from_text(TEXT), dropout=0.0)
        step = make_step(model, PLAIN, ranks)
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
    different,
    failing_trainer,
    non_finite,
    late,
    overflow,
)


def run(folder: Path, rank: int) -> None:
    """Runs all scenarios as one of the ranks."""
    parallel.BUCKET_MB = 0.004  # so small that the model needs several buckets
    with distributed.join() as ranks:
        group = weakref.ref(dist.group.WORLD)
        results: dict[str, Any] = {scenario.__name__: scenario(ranks, folder) for scenario in SCENARIOS}
    results["group lives"] = group() is not None
    torch.save(results, folder / f"rank-{rank}.pt")


def main(folder: Path, argv: list[str]) -> None:
    """Forks the ranks for all scenarios, then for gpt.train."""
    check_succeeded(fork_ranks(partial(run, folder), 2, folder / "output"))
    ends = wait_for(fork_ranks(lambda rank: train.main(argv), 2, folder / "command"))
    (folder / "command.json").write_text(json.dumps(list(map(asdict, ends))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
