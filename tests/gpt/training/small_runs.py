"""A small model, micro-batches and settings for the tests that train."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch

from gpt import GPT, GPTConfig, TokenData, TrainConfig, Trainer
from gpt.data.dataset import IGNORED, Batch
from gpt.training.trainer import TrainResult

CONFIG = TrainConfig(
    max_steps=8,
    batch_size=2,
    grad_accum=2,
    learning_rate=1e-2,
    min_lr=1e-3,
    warmup_steps=2,
    eval_interval=3,
    eval_batches=2,
    checkpoint_interval=2,
    log_interval=1,
    dtype="float32",
    device="cpu",
)

FLAGS = (
    "--n_layer 1 --n-head 2 --n_embd 16 --block_size=16 "
    "--batch_size 4 --eval_batches 1 --device cpu --warmup_steps 2"
)
TINY = FLAGS.split()  # a small run of gpt.train
TIMES = ("seconds", "tokens_per_second", "mfu")


def make_model(data: TokenData, **fields: Any) -> GPT:
    torch.manual_seed(7)
    shape = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.2}
    return GPT(GPTConfig(**{"vocab_size": data.tokenizer.vocab_size, **shape, **fields}), device="cpu")


def make_batches(*counts: int) -> list[Batch]:
    """One micro-batch of 2 rows of 16 tokens for each count; the count is its number of targets."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for count in counts:
        inputs, targets = torch.randint(5, (2, 2, 16), generator=generator)
        targets.view(-1)[count:] = IGNORED
        batches.append(Batch(inputs, targets))
    return batches


def run(data: TokenData, out: Path, config: TrainConfig = CONFIG, resume: bool = False) -> TrainResult:
    """Trains the small model in the folder `out`."""
    torch.manual_seed(11)
    return Trainer(make_model(data), data, config, out=out, resume=resume).run()


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log records without the entries that differ between two equal runs."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def disk_full(*args: object) -> None:
    """Replaces a function that writes: the disk is full."""
    raise OSError(28, "No space left on device")


class Interrupting(TokenData):
    """Sends a signal to this process when the training batch of one micro-step is first drawn."""

    at: tuple[int, int] | None = None
    number = signal.SIGINT

    def batch(self, stream: Any, *args: Any, **kwargs: Any) -> Batch:
        if stream == "train" and self.at == (kwargs["step"], kwargs["micro_step"]):
            self.at = None
            signal.raise_signal(self.number)
        return super().batch(stream, *args, **kwargs)


def stop_at(data: TokenData, step: int, micro_step: int = 0, number: int = signal.SIGINT) -> TokenData:
    """`data`, changed to interrupt the training at a micro-step."""
    data.__class__ = Interrupting
    data.at, data.number = (step, micro_step), number  # type: ignore[attr-defined]
    return data
