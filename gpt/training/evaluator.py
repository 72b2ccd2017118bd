"""What a run measures of its model: the loss over some batches or a whole split, and a sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gpt.config import TrainConfig
from gpt.data.dataset import BIGRAM_CHUNKS, IGNORED, Batch, Split, Stream, TokenData
from gpt.data.token_files import CHUNK
from gpt.data.tokenizers import first_ids
from gpt.model import GPT
from gpt.training.display import progress_bar
from gpt.training.distributed import Ranks
from gpt.training.step import TrainStep

if TYPE_CHECKING:
    from tqdm import tqdm


class FinalLosses(NamedTuple):
    """The losses of the trained model and of a bigram baseline over the same tokens.

    These are `validation_tokens` tokens, which are the share `validation_share` of the validation split.
    """

    validation_loss: float
    bigram_loss: float
    validation_tokens: int
    validation_share: float


class MeanLoss(NamedTuple):
    """The mean loss over `targets` targets."""

    loss: float
    targets: int


class Evaluator:
    """Evaluates the model of a run. The ranks share the batches; none of it consumes random numbers.

    Args:
        model: The model, which is in training mode between the calls.
        step: Computes the loss of a batch, in the dtype of the run.
        data: The tokens.
        config: Batch size, seed and the number of batches of an estimate.
        ranks: The processes of the run.
    """

    def __init__(
        self, model: GPT, step: TrainStep, data: TokenData, config: TrainConfig, ranks: Ranks
    ) -> None:
        self._model, self._step, self._data, self._config, self._ranks = model, step, data, config, ranks

    def estimate(self, split: Split) -> float:
        """The mean loss over `eval_batches` batches, the same batches each time."""
        stream: Stream = "estimate" if split == "train" else "validation"
        return self._mean_loss(self._batch(stream, i) for i in range(self._config.eval_batches)).loss

    def evaluate(self, split: Split) -> float:
        """The mean loss over the whole split, in windows of block_size."""
        return self._mean_loss(self._windows(split)).loss

    def final_losses(self, check: Callable[[], None]) -> FinalLosses:
        """The losses over up to `final_eval_batches` batches of the validation split, with a progress bar.

        The bigram's is NaN if the model's is not finite.

        Args:
            check: Called for each batch and each chunk of tokens; it may raise to end the evaluation.
        """
        config, data = self._config, self._data
        most = config.final_eval_batches
        windows = _ceil_div(len(data.tokens("validation")) - 1, self._model.config.block_size)
        whole = _ceil_div(windows, config.batch_size)
        total = whole if most is None else min(most, whole)
        with _bar(_ceil_div(total, self._ranks.size), "final evaluation", "batch") as bar:
            loss, targets = self._mean_loss(self._windows("validation", most), _both(check, bar.update))

        bigram = math.nan
        if math.isfinite(loss):
            chunks = min(_ceil_div(len(data.tokens("train")) - 1, CHUNK), BIGRAM_CHUNKS)
            with _bar(chunks, "bigram baseline", "chunk") as bar:
                progress = _both(check, bar.update)
                bigram = self._ranks.on_first(
                    lambda: data.bigram_loss(self._windows("validation", most), progress)
                )
        share = min(1.0, total * config.batch_size / windows)
        return FinalLosses(loss, bigram, targets, share)

    def loss_now(self) -> float:
        """The loss of one validation batch, the same on all ranks."""
        self._model.eval()
        loss = self._step.evaluate(self._batch("validation", 0)).item()
        self._model.train()
        return loss

    def sample(self, model: GPT, tokens: int, check: Callable[[object], None]) -> str:
        """A text that `model` generates, of so many tokens, each of which calls `check`."""
        model.eval()
        tokenizer = self._data.tokenizer
        prompt, device = first_ids(tokenizer), self._step.device
        ids = model.generate(
            torch.tensor([prompt], device=device),
            tokens,
            temperature=0.8,
            vocab_size=tokenizer.vocab_size,  # the model's may be padded
            generator=torch.Generator(device).manual_seed(self._config.seed),
            on_token=check,
        )
        return tokenizer.decode(ids[0, len(prompt) :].tolist())

    def _batch(self, stream: Stream, number: int) -> Batch:
        config = self._config
        return self._data.batch(
            stream, config.batch_size, self._model.config.block_size, seed=config.seed, step=number
        )

    def _windows(self, split: Split, most: int | None = None) -> Iterator[Batch]:
        return self._data.windows(split, self._config.batch_size, self._model.config.block_size, most)

    def _mean_loss(self, batches: Iterable[Batch], check: Callable[[], None] = lambda: None) -> MeanLoss:
        """The mean loss over all targets of `batches`, which the ranks share; each batch calls `check`.

        The ranks compute the same number of losses, because a sharded model needs all of them for each.
        """
        totals, count = [], 0
        self._model.eval()
        for batch, counts in self._rounds(batches, check):
            loss = self._step.evaluate(batch).item()
            if counts:
                targets = int((batch.targets != IGNORED).sum())
                totals.append(loss * targets)
                count += targets
        self._model.train()
        totals_of_ranks, targets_of_ranks = zip(*self._ranks.gather((totals, count)), strict=True)
        # fsum is exact, so the result does not depend on how the batches are spread over ranks.
        total, targets = math.fsum(itertools.chain(*totals_of_ranks)), sum(targets_of_ranks)
        return MeanLoss(total / max(1, targets), targets)

    def _rounds(self, batches: Iterable[Batch], check: Callable[[], None]) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of `batches`, and whether they count: a last batch may be there for others."""
        remaining = iter(batches)
        while True:
            with self._ranks.agreement():
                group = list(itertools.islice(remaining, self._ranks.size))
                if group:
                    check()
            if not group:
                return
            counts = self._ranks.rank < len(group)
            yield group[self._ranks.rank if counts else 0], counts


def _bar(total: int, text: str, unit: str) -> tqdm[Any]:
    """A progress bar that appears after a second, and leaves nothing."""
    return progress_bar(total, desc=text, unit=unit, leave=False, delay=1)


def _both(check: Callable[[], None], update: Callable[[], object]) -> Callable[[], None]:
    """Calls `check`, then `update`."""

    def call() -> None:
        check()
        update()

    return call


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
