"""Two and four processes that share models by DDP and FSDP2: what test_parallel.py runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo  # these are imported here, so that the forks need not do it
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from torch import Tensor, nn

import bench.parallel
from gpt import GPT, TrainConfig, Trainer
from gpt.data.dataset import IGNORED, Batch, TokenData
from gpt.training import distributed, parallel
from gpt.training.distributed import ALONE, Ranks
from gpt.training.saver import Saver
from gpt.training.step import DrawnBatches
from tests.gpt.text import TEXT
from tests.gpt.training.forks import check_succeeded, fork_ranks
from tests.gpt.training.ranks import make_step, without_noise
from tests.gpt.training.small_runs import CONFIG, make_model

DATA = TokenData.from_text(TEXT)
TARGETS = (16, 1, 0, 7, 16, 0, 3, 11)  # of the sequences of a step
RATE = 1e-3
UPDATE = replace(CONFIG, warmup_steps=0, grad_clip=0.05, max_steps=100)
ENGINES = {
    "ddp": UPDATE,
    "fsdp": replace(UPDATE, parallel="fsdp"),
    "hybrid": replace(UPDATE, parallel="fsdp", shard_size=2),
    "muon": replace(UPDATE, parallel="fsdp", optimizer="muon"),
    "checkpointed": replace(UPDATE, parallel="fsdp", checkpoint_activations=True),
}


class Update(NamedTuple):
    """The losses and gradient norms of two steps, the first gradients, and the parameters at the end."""

    losses: list[float]
    norms: list[float]
    gradients: list[Tensor]
    parameters: list[Tensor]


def full(t: Tensor) -> Tensor:
    """A copy of `t`, gathered if it is sharded."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def draw(batch_size: int, number: int) -> Batch:
    """Micro-batch `number` of a step with len(TARGETS) sequences, which have ragged targets."""
    generator = torch.Generator().manual_seed(5)
    inputs, targets = torch.randint(5, (2, len(TARGETS), 16), generator=generator)
    for row, count in zip(targets, TARGETS, strict=True):
        row[count:] = IGNORED
    rows = slice(number * batch_size, (number + 1) * batch_size)
    return Batch(inputs[rows], targets[rows])


def update(
    batch_size: int, config: TrainConfig = UPDATE, ranks: Ranks = ALONE, model: GPT | None = None
) -> Update:
    """Two steps of AdamW on the sequences of `draw`, cut into micro-batches of `batch_size`."""
    with patch("torch.compile", partial(torch.compile, backend="eager")):
        step = make_step(without_noise() if model is None else model, config, ranks)
        numbers = list(ranks.share(range(len(TARGETS) // batch_size)))
        batches = DrawnBatches(partial(draw, batch_size), numbers)
        first = step(batches, rate=RATE)
        gradients = [full(p.grad) for p in step.names if p.grad is not None]
        second = step(batches, rate=RATE)
    return Update(
        [first.loss, second.loss],
        [first.gradient_norm, second.gradient_norm],
        gradients,
        [full(p) for p in step.names],
    )


def fused(ranks: Ranks = ALONE) -> list[Update]:
    """The updates of the Triton kernels with DDP and FSDP2."""
    updates = []
    for name in ("ddp", "fsdp"):
        model = make_model(DATA, dropout=0.0, qkv_bias=False)
        model.use_triton = True
        updates.append(update(2, ENGINES[name], ranks, model))
    return updates


def engines(ranks: Ranks) -> dict[str, Update]:
    """The update of each engine; the run of all ranks has one micro-batch of two sequences for each rank."""
    return {name: update(2, config, ranks) for name, config in ENGINES.items()}


def compiled(ranks: Ranks) -> list[Update]:
    """The updates of DDP and FSDP2 with and without torch.compile, which divides DDP's graph at buckets."""
    with patch.object(parallel, "BUCKET_MB", 1):  # the smallest that torch.compile takes
        return [
            update(
                2, replace(ENGINES[name], compile=compile), ranks, make_model(DATA, dropout=0.0, n_embd=256)
            )
            for name in ("ddp", "fsdp")
            for compile in (False, True)
        ]


def first_step(ranks: Ranks) -> list[bool]:
    """Whether the gradients of equal steps are equal bit for bit, with DDP and small buckets."""
    model = make_model(DATA, dropout=0.0, n_layer=3, n_embd=32)
    step = make_step(model, replace(UPDATE, grad_clip=0.0), ranks)
    batches = DrawnBatches(partial(draw, 2), [ranks.rank])
    gradients = []
    for _ in range(3):
        step(batches, rate=0.0)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return [all(map(torch.equal, gradients[0], later)) for later in gradients[1:]]


def overlap(ranks: Ranks) -> list[tuple[int, int, int]]:
    """What bench.parallel counts of DDP's sums, in steps with one and two micro-batches on each rank."""
    model = make_model(DATA, dropout=0.0, n_layer=3, n_embd=32)
    step = make_step(model, UPDATE, ranks)
    batches = [draw(1, n) for n in ranks.share(range(8))]
    step(batches, rate=1e-3)
    return [bench.parallel.overlap(partial(step, batches[:n], rate=1e-3)) for n in (1, 2)]


def precision(ranks: Ranks) -> Any:
    """The dtypes that a block and the root compute with under FSDP2 in bfloat16, and the losses."""
    dtypes: dict[str, torch.dtype] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        dtypes[type(module).__name__] = module.weight.dtype  # type: ignore[assignment, union-attr]

    losses = {}
    for name in ("ddp", "fsdp"):
        config = replace(ENGINES[name], dtype="bfloat16")
        model = without_noise()
        model.blocks[0].ffn.up.register_forward_hook(note)
        model.wte.register_forward_hook(note)
        losses[name] = update(2, config, ranks, model).losses
    return dtypes, losses


def whole_run(ranks: Ranks) -> Any:
    """A run under FSDP2 with uneven evaluations; ranks but the first begin with other weights."""
    records: list[dict[str, Any]] = []
    config = replace(CONFIG, grad_accum=4, parallel="fsdp", eval_batches=5)
    model = without_noise()
    if ranks.rank:
        nn.init.ones_(model.wte.weight)
    trainer = Trainer(model, DATA, config, on_log=records.append, ranks=ranks)
    local = {name: p.to_local().shape for name, p in trainer.model.named_parameters()}  # type: ignore[operator]
    return records, trainer.run(), local


def frozen(ranks: Ranks) -> bool:
    """Whether FSDP2 and DDP leave parameters without gradients as they are, and train the others."""
    kept = []
    for name in ("ddp", "fsdp"):
        model = without_noise()
        model.wpe.weight.requires_grad_(False)
        before = [p.detach().clone() for p in model.parameters()]
        update(2, ENGINES[name], ranks, model)
        equal = [torch.equal(full(p), b) for p, b in zip(model.parameters(), before, strict=True)]
        kept.append(equal.count(True) == 1)
    return all(kept)


class SlowSaver(Saver):
    """A saver that needs WAIT seconds more to complete what is being saved."""

    WAIT = 0.3

    def finish(self) -> None:
        if self._saving is not None:
            time.sleep(self.WAIT)
        super().finish()


def lanes(ranks: Ranks) -> bench.parallel.Figures:
    """What bench.parallel measures, with a slow saver."""
    options = bench.parallel.Options(steps=1, batch_size=2)
    with patch.object(bench.parallel, "Saver", SlowSaver):
        return bench.parallel._measure(options, without_noise().config, ranks)


SCENARIOS: dict[int, Sequence[Callable[[Ranks], Any]]] = {
    2: (engines, compiled, fused, lanes),
    4: (engines, first_step, overlap, precision, whole_run, frozen),
}


def run(size: int, folder: Path, rank: int) -> None:
    """Runs the scenarios of `size` processes as one of them."""
    parallel.BUCKET_MB = 0.004  # type: ignore[assignment]  # so small that the model needs several buckets
    with distributed.join() as ranks:
        results = {scenario.__name__: scenario(ranks) for scenario in SCENARIOS[size]}
    torch.save(results, folder / f"{size}-{rank}.pt")


def main(folder: str) -> None:
    """Forks the processes. Rank R of N saves its results in N-R.pt in `folder`."""
    out = Path(folder)
    for size in SCENARIOS:
        check_succeeded(fork_ranks(partial(run, size, out), size, out / f"{size}"))
