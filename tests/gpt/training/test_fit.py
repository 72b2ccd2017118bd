"""`GPT.fit`, and the callbacks that end it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from gpt import GPT, InputError
from gpt.errors import NonFiniteError
from gpt.training.fit import EarlyStopping


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fit use float32 on a CPU with bfloat16 too, because the losses are compared with float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)


def documented() -> GPT:
    """A model with the arguments that simple-llm documents."""
    return GPT(
        vocab_size=11,
        max_seq_len=8,
        emb_size=16,
        num_heads=2,
        head_size=8,
        num_layers=1,
        dropout=0.0,
        device="cpu",
    )


def loader(rows: int = 24, batch_size: int = 8) -> DataLoader[Any]:
    """Rows in which each token is the previous one plus 1."""
    tokens = (torch.arange(rows)[:, None] + torch.arange(9)) % 11
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=batch_size)


def mean_loss(model: GPT, batches: DataLoader[Any]) -> float:
    logits = torch.cat([model(x) for x, _ in batches]).flatten(0, 1)
    return F.cross_entropy(logits, torch.cat([y for _, y in batches]).flatten()).item()


def test_losses_fall_and_are_kept() -> None:
    """A fit that does not learn, loses its loss history, or leaves the model in training mode."""
    model = documented()
    first = mean_loss(model, loader())
    model.fit(loader(), loader(5), num_epoch=30, learning_rate=1e-2)
    assert len(model.train_loss) == len(model.validation_loss) == 30
    assert model.train_loss[-1] < 0.3 < first
    assert model.validation_loss[-1] == pytest.approx(mean_loss(model, loader(5)), rel=1e-4)
    assert not model.training
    model.fit(loader(), num_epoch=2)
    assert len(model.train_loss) == 2
    assert model.validation_loss == []


def test_the_device_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that stays on the CPU although there is a GPU."""
    model, picked, moved = documented(), torch.device("cpu", 0), []
    monkeypatch.setattr("gpt.training.fit.pick_device", lambda name: picked if name is None else None)
    monkeypatch.setattr(GPT, "to", lambda self, device: moved.append(device))
    model.fit(loader())
    assert moved == [picked]


def test_dropout_is_on_in_training_only() -> None:
    """Validation with dropout, or training without dropout after a validation."""
    modes: list[tuple[bool, bool]] = []
    model = documented()
    model.register_forward_pre_hook(
        lambda module, inputs: modes.append((module.training, torch.is_grad_enabled()))
    )
    model.fit(loader(8), loader(8), num_epoch=2)
    assert modes == [(True, True), (False, False)] * 2


def test_uneven_batches_are_weighted_by_targets() -> None:
    """A mean over batches in which a smaller last batch has the same weight as the others."""
    model = documented()
    model.fit(loader(9, 8), loader(9, 8), learning_rate=1e-12)
    assert model.validation_loss[0] == pytest.approx(mean_loss(model, loader(9, 8)), rel=1e-5)
    assert model.train_loss[0] == pytest.approx(model.validation_loss[0], rel=1e-4)


def test_callbacks_run_after_each_epoch() -> None:
    """A callback that is not called, is called too late, or does not end the training."""
    calls: list[tuple[int, int]] = []

    def stop_at_three(model: GPT, epoch: int) -> bool:
        calls.append((epoch, len(model.train_loss)))
        return epoch == 3

    model = documented()
    model.fit(
        loader(), num_epoch=9, callbacks=[stop_at_three, lambda model, epoch: calls.append((epoch, -1))]
    )
    assert calls == [(1, 1), (1, -1), (2, 2), (2, -1), (3, 3), (3, -1)]
    assert len(model.train_loss) == 3


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops"),
    [
        ([3.0, 2.0, 2.5], 1, 0.0, [False, False, True]),
        ([3.0, 2.0, 2.5, 1.9, 1.9, 1.9], 2, 0.0, [False, False, False, False, False, True]),
        ([3.0, 2.95, 2.9], 1, 0.1, [False, True, True]),
        ([3.0, float("nan")], 1, 0.0, [False, True]),
    ],
)
def test_early_stopping(losses: list[float], patience: int, min_delta: float, stops: list[bool]) -> None:
    """A stop after an improvement, or no stop without one."""
    model = documented()
    stopping = EarlyStopping(patience, min_delta)
    actual = []
    for epoch in range(1, len(losses) + 1):
        model.train_loss = losses[:epoch]
        actual.append(stopping(model, epoch))
    assert actual == stops
    model.validation_loss = [1.0]
    assert stopping(model, 1) is False


def test_one_callback_needs_no_list() -> None:
    """fit(callbacks=EarlyStopping()) that fails after the first epoch."""
    model = documented()
    model.fit(loader(8), num_epoch=3, callbacks=lambda model, epoch: epoch == 2)
    assert len(model.train_loss) == 2


def test_what_cannot_work_is_refused_before_an_epoch() -> None:
    """An epoch that is trained before a callback or an exhausted iterator fails."""
    model, pairs = documented(), list(loader(8))
    for arguments, words in (
        ({"callbacks": EarlyStopping}, r"callbacks has <class .*such as EarlyStopping\(\)"),
        ({"callbacks": ["stop"]}, "callbacks has 'stop'"),
        (
            {"train_loader": (pair for pair in pairs)},
            "train_loader is a generator, which ends after one epoch",
        ),
        ({"valid_loader": iter(pairs)}, "valid_loader is a list_iterator, which ends after one epoch"),
    ):
        with pytest.raises(InputError, match=words):
            model.fit(**{"train_loader": pairs, "num_epoch": 2, **arguments})
        assert model.train_loss == []
    model.fit(iter(pairs))
    assert len(model.train_loss) == 1


def test_wrong_arguments_are_refused() -> None:
    """A traceback from inside the model, or an epoch without targets that counts as trained."""
    model, x = documented(), torch.zeros(2, 4, dtype=torch.long)
    for bad, words in (
        ([x], "gave a Tensor"),
        ([(x, x, x)], "gave a tuple"),
        ([], "no targets"),
        ([(x, x - 100)], "no targets"),
    ):
        with pytest.raises(InputError, match=words):
            model.fit(bad)
    with pytest.raises(InputError, match="num_epoch is 0"):
        model.fit(loader(), num_epoch=0)
    with pytest.raises(InputError, match="learning_rate is -1"):
        model.fit(loader(), learning_rate=-1.0)
    with pytest.raises(InputError, match="patience is 0"):
        EarlyStopping(0)
    with torch.no_grad():
        model.wte.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        model.fit(loader())
