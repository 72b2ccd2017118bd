"""`GPT.fit`: epochs over a DataLoader, with the trainer's step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch
from gpt.device import pick_device
from gpt.errors import InputError, shown
from gpt.model import GPT, Callback
from gpt.training.step import PendingStep, TrainStep


class EarlyStopping:
    """A callback that ends `fit` when the validation loss stops improving; without one, the training loss.

    Args:
        patience: Stop after this many epochs in a row without an improvement.
        min_delta: The smallest decrease of the loss that counts as an improvement.

    Raises:
        InputError: patience is below 1, or min_delta is negative.
    """

    def __init__(self, patience: int = 1, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise InputError(
                f"EarlyStopping: patience is {patience} and min_delta {min_delta}, expected >= 1 and >= 0"
            )
        self.patience, self.min_delta = patience, min_delta

    def __call__(self, model: GPT, epoch: int) -> bool:
        """True to stop after `epoch`."""
        losses = model.validation_loss or model.train_loss
        best, epochs_since_best = math.inf, 0
        for loss in losses:
            if loss < best - self.min_delta:
                best, epochs_since_best = loss, 0
            else:
                epochs_since_best += 1
        return epochs_since_best >= self.patience


def fit(
    model: GPT,
    train_loader: Iterable[Sequence[Tensor]],
    valid_loader: Iterable[Sequence[Tensor]] | None,
    *,
    num_epoch: int,
    learning_rate: float,
    callbacks: Sequence[Callback] | Callback,
) -> None:
    """Implements `GPT.fit`, which documents the arguments."""
    if num_epoch < 1:
        raise InputError(f"fit: num_epoch is {num_epoch}, expected at least 1")
    for name, loader in {"train_loader": train_loader, "valid_loader": valid_loader}.items():
        if num_epoch > 1 and isinstance(loader, Iterator):
            raise InputError(
                f"fit: {name} is a {type(loader).__name__}, which ends after one epoch, expected a list or a "
                f"DataLoader for {num_epoch} epochs"
            )
    callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    for callback in callbacks:
        if not callable(callback) or isinstance(callback, type):
            raise InputError(
                f"fit: callbacks has {shown(callback)}, expected functions of (model, epoch), such as "
                "EarlyStopping()"
            )
    config = TrainConfig(learning_rate=learning_rate, min_lr=0.0)
    model.to(pick_device(config.device))
    step = TrainStep(model, config)

    model.train_loss, model.validation_loss = [], []
    for epoch in range(1, num_epoch + 1):
        model.train()
        model.train_loss.append(_mean(_train(step, learning_rate, _batches(train_loader))))
        if valid_loader is not None:
            model.eval()
            losses = ((step.evaluate(batch).item(), batch) for batch in _batches(valid_loader))
            model.validation_loss.append(_mean(losses))
        stops = [callback(model, epoch) for callback in callbacks]
        if any(stops):
            break
    model.eval()


def _train(step: TrainStep, rate: float, batches: Iterable[Batch]) -> Iterator[tuple[float, Batch]]:
    """Trains on each batch, and yields its loss after the next step is queued."""
    queued: tuple[PendingStep, Batch] | None = None
    for batch in batches:
        pending = step.enqueue([batch], rate)
        if queued is not None:
            yield queued[0].result().loss, queued[1]
        queued = pending, batch
    if queued is not None:
        yield queued[0].result().loss, queued[1]


def _batches(loader: Iterable[Sequence[Any]]) -> Iterator[Batch]:
    """The loader's pairs as batches.

    Raises:
        InputError: The loader gives something else than a pair of tensors.
    """
    for pair in loader:
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(t, Tensor) for t in pair)
        ):
            raise InputError(
                f"fit: the loader gave a {type(pair).__name__}, expected two tensors (inputs, targets)"
            )
        yield Batch(*pair)


def _mean(losses: Iterable[tuple[float, Batch]]) -> float:
    """The mean loss over all targets.

    Raises:
        InputError: There are no targets.
    """
    total, count = 0.0, 0
    for loss, batch in losses:
        targets = int((batch.targets != IGNORED).sum())
        total, count = total + loss * targets, count + targets
    if not count:
        raise InputError("fit: the loader gave no targets, expected at least one")
    return total / count
