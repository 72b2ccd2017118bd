"""`model.fit`: epochs over a DataLoader, with the step of the trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.model import GPT, Callback
from gpt.training.step import TrainStep


class EarlyStopping:
    """A callback that ends `fit` when the loss has not improved for a while.

    It watches the validation loss, or the training loss where there is none.

    Args:
        patience: Epochs in a row without improvement after which to stop.
        min_delta: What a loss must fall by to count as improved.
    """

    def __init__(self, patience: int = 1, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise InputError(
                f"EarlyStopping: patience is {patience} and min_delta {min_delta}, expected >= 1 and >= 0"
            )
        self.patience, self.min_delta = patience, min_delta

    def __call__(self, model: GPT, epoch: int) -> bool:
        """Whether to stop after `epoch`."""
        losses = model.validation_loss or model.train_loss
        best, worse = math.inf, 0
        for loss in losses:
            best, worse = (loss, 0) if loss < best - self.min_delta else (best, worse + 1)
        return worse >= self.patience


def fit(
    model: GPT,
    train_loader: Iterable[Sequence[Tensor]],
    valid_loader: Iterable[Sequence[Tensor]] | None,
    *,
    num_epoch: int,
    learning_rate: float,
    callbacks: Sequence[Callback],
) -> None:
    """`GPT.fit`, where the arguments are documented."""
    if num_epoch < 1:
        raise InputError(f"fit: num_epoch is {num_epoch}, expected at least 1")
    config = TrainConfig(learning_rate=learning_rate, min_lr=0.0)
    model.to(pick_device(config.device))
    step = TrainStep(model, config)
    model.train_loss, model.validation_loss = [], []
    for epoch in range(1, num_epoch + 1):
        model.train()
        model.train_loss.append(
            _mean((step([batch], learning_rate).loss, batch) for batch in _batches(train_loader))
        )
        if valid_loader is not None:
            model.eval()
            with torch.no_grad():
                model.validation_loss.append(
                    _mean((step.loss(batch).item(), batch) for batch in _batches(valid_loader))
                )
        stops = [callback(model, epoch) for callback in callbacks]
        if any(stops):
            break
    model.eval()


def _batches(loader: Iterable[Sequence[Any]]) -> Iterator[Batch]:
    for pair in loader:
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(t, Tensor) for t in pair)
        ):
            raise InputError(
                f"fit: the loader gave a {type(pair).__name__}, expected (inputs, targets), two tensors"
            )
        yield Batch(*pair)


def _mean(losses: Iterable[tuple[float, Batch]]) -> float:
    """The mean over all targets."""
    total, count = 0.0, 0
    for loss, batch in losses:
        targets = int((batch.targets != IGNORED).sum())
        total, count = total + loss * targets, count + targets
    if not count:
        raise InputError("fit: the loader gave no targets, expected at least one batch with some")
    return total / count
