"""What a run measures of its model: the loss over some batches or a whole split, and a sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch, Split, Stream, TokenData
from gpt.data.tokenizers import first_ids
from gpt.model import GPT
from gpt.training.distributed import Ranks
from gpt.training.step import TrainStep


class FinalLosses(NamedTuple):
    """The losses of the trained model and of a bigram baseline over the same tokens."""

    validation_loss: float
    bigram_loss: float


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
        return self._mean_loss(self._batch(stream, i) for i in range(self._config.eval_batches))

    def evaluate(self, split: Split, check: Callable[[], None] = lambda: None) -> float:
        """The mean loss over the whole split, in windows of block_size. Each batch calls `check`."""
        windows = self._data.windows(split, self._config.batch_size, self._model.config.block_size)
        return self._mean_loss(windows, check)

    def final_losses(self, check: Callable[[], None]) -> FinalLosses:
        """The losses over the whole validation split; the bigram's is NaN if the model's is not finite.

        Args:
            check: Called for each batch and each chunk of tokens; it may raise to end the evaluation.
        """
        loss = self.evaluate("validation", check)
        if not math.isfinite(loss):
            return FinalLosses(loss, math.nan)
        return FinalLosses(loss, self._ranks.on_first(partial(self._data.bigram_loss, check)))

    def loss_now(self) -> float:
        """The loss of one validation batch, on this rank alone."""
        self._model.eval()
        with torch.no_grad():
            loss = self._step.loss(self._batch("validation", 0)).item()
        self._model.train()
        return loss

    def sample(self, tokens: int, check: Callable[[object], None]) -> str:
        """A text that the model generates, of so many tokens, each of which calls `check`."""
        self._model.eval()
        tokenizer = self._data.tokenizer
        prompt, device = first_ids(tokenizer), self._step.device
        ids = self._model.generate(
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

    def _mean_loss(self, batches: Iterable[Batch], check: Callable[[], None] = lambda: None) -> float:
        """The mean loss over all targets of `batches`, which the ranks share; each batch calls `check`."""
        totals, count = [], 0
        self._model.eval()
        with torch.no_grad(), self._ranks.agreement():
            for batch in self._ranks.share(batches):
                check()
                targets = int((batch.targets != IGNORED).sum())
                totals.append(self._step.loss(batch).item() * targets)
                count += targets
        self._model.train()
        totals_of_ranks, counts = zip(*self._ranks.gather((totals, count)), strict=True)
        # fsum is exact, so the result does not depend on how the batches are spread over ranks.
        return math.fsum(itertools.chain(*totals_of_ranks)) / max(1, sum(counts))
