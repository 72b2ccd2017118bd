"""The training loop: steps, evaluations, and a stop that loses nothing and can be resumed."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kernels
from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch, Split, Stream, TokenData
from gpt.data.tokenizers import first_ids
from gpt.device import peak_flops, pick_device
from gpt.errors import InputError, NonFiniteError
from gpt.model import GPT
from gpt.training import rng
from gpt.training.distributed import ALONE, Ranks
from gpt.training.optim import learning_rate
from gpt.training.run_folder import Progress, RunFolder
from gpt.training.step import PendingStep, TrainStep

SAMPLE_TOKENS = 500


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    `signal` is the signal that stopped the run, or None. The losses, over the whole validation split, and the
    sample exist only for a run that was not stopped.
    """

    step: int
    validation_loss: float | None = None
    bigram_loss: float | None = None
    sample: str | None = None
    checkpoint: Path | None = None
    signal: int | None = None


class _QueuedStep(NamedTuple):
    step: PendingStep
    rate: float
    tokens: int  # of all ranks


class Trainer:
    """Trains `model` on `data`. The constructor checks everything; only `run` writes.

    Args:
        model: Moved to `config.device`.
        data: The tokens. A batch is a function of (config.seed, step).
        config: How long and how to train.
        out: The run's folder, readable by all ranks; None writes nothing. Rank 0 locks it here if it exists,
            else in `claim`, until `run` ends.
        resume: Continue from the newest valid checkpoint in `out`.
        options: Further entries of a checkpoint's state.json; ready for JSON.
        ranks: The processes that train together, from `gpt.training.distributed.join`. They share the
            micro-batches of each step and each evaluation, and rank 0 writes. A run can be resumed with
            another number of processes, but only the same number continues it bit by bit.

    Raises:
        InputError: The model, data, config and folder do not fit together.
    """

    def __init__(
        self,
        model: GPT,
        data: TokenData,
        config: TrainConfig | None = None,
        *,
        out: str | os.PathLike[str] | RunFolder | None = None,
        resume: bool = False,
        options: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config = config or TrainConfig()
        self.data = data
        self.block_size = model.config.block_size
        self.options = dict(options or {})
        self.ranks = ranks
        self._folder = out if out is None or isinstance(out, RunFolder) else RunFolder(Path(out))
        self._progress = Progress()
        self._logged = Progress()  # as of the last record of the log
        self._saved: Path | None = None
        self._queue: deque[_QueuedStep] = deque()  # steps whose results have not been read

        with ranks.agreement():
            ranks.check(config)
            data.check(self.block_size)
            if data.tokenizer.vocab_size > model.config.vocab_size:
                vocab_size, needed = model.config.vocab_size, data.tokenizer.vocab_size
                raise InputError(
                    f"Trainer: the model's vocab_size is {vocab_size}, expected at least the tokenizer's "
                    f"{needed}"
                )
            self.model = model.to(pick_device(config.device))
            self._step = TrainStep(model, config, torch.compile(model) if config.compile else None, ranks)
            on_gpu = self.device.type == "cuda"
            self._ahead = 1 if on_gpu else 0  # steps that may be queued; a CPU computes while it queues
            self._peak = peak_flops(torch.cuda.get_device_name(self.device) if on_gpu else "cpu")
            if ranks.size > 1:
                rng.seed(config.seed, self.step, ranks.rank)
            if self._folder is not None:
                self._enter(self._folder, resume=resume)
        ranks.broadcast_(self.model.parameters())

    def _enter(self, folder: RunFolder, *, resume: bool) -> None:
        """Checks and locks the folder, and continues from its newest valid checkpoint with `resume`."""
        try:
            folder.check(self.model, resume=resume)
            if self.ranks.rank == 0 and folder.path.is_dir():
                folder.lock()
            if resume:
                self._restore(folder)
        except BaseException:
            folder.release()
            raise

    @property
    def step(self) -> int:
        """Steps taken so far, over all resumes."""
        return self._progress.step

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._step.device

    @property
    def precision(self) -> str:
        """The dtype of the forward and backward passes, as in "bfloat16"."""
        return str(self._step.dtype).removeprefix("torch.")

    def preflight(self) -> kernels.Report:
        """Checks each fused op against its reference at the shapes and dtype of a micro-batch.

        See `GPT.preflight`.
        """
        return self.model.preflight(self.config.batch_size, self.block_size, self._step.dtype)

    def claim(self) -> Path | None:
        """Creates and locks the run's folder, unless that has happened, and returns its path.

        Raises:
            InputError: Another run uses the folder, or it cannot be written.
        """
        if self._folder is None:
            return None
        self._folder.path = self.ranks.on_first(partial(self._folder.claim, new=self._saved is None))
        return self._folder.path

    def run(self) -> TrainResult:
        """Trains until max_steps, until patience runs out, or until Ctrl-C or SIGTERM.

        On a GPU, a step's result is read after the next step is queued, so that the GPU always has work. A
        signal lets the queued steps finish; the run then saves a checkpoint and returns.

        Raises:
            NonFiniteError: A loss or gradient is not finite. The step changed nothing, and its batches are
                saved in `out`.
            InputError: Another run uses the folder, or it cannot be written.
        """
        self.claim()
        try:
            return self._run()
        finally:
            if self._folder is not None:
                self._folder.release()

    def _run(self) -> TrainResult:
        from tqdm import tqdm

        done = self.step >= self.config.max_steps
        stop = False
        losses: dict[str, float] = {}
        if self._folder is not None:
            self.ranks.on_first(partial(self._folder.prepare, self.step, keep_final=done))
        self.model.train()

        progress_bar = tqdm(
            total=self.config.max_steps,
            initial=self.step,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        with _stop_signals() as received, progress_bar as bar:
            while not done and not stop:
                self._queue_step(received)
                ahead = 0 if self._needs_result(received) else self._ahead
                while len(self._queue) > (0 if stop else ahead):
                    record, stopped = self._finish_step()
                    stop |= stopped
                    bar.set_postfix_str(_bar_text(record), refresh=False)
                    bar.update()
                if self._queue:
                    continue

                done = self.step >= self.config.max_steps
                if self._due(self.config.eval_interval):
                    record |= self._estimates()
                    bar.write(_evaluation_line(record))
                    done |= self._patience_spent(record["validation_loss"])
                if done:
                    losses = self._final_losses()
                    record |= {"final": True, **losses}

                if self.step == 1 or self._due(self.config.log_interval) or "validation_loss" in record:
                    self._write_log(record)
                if done or stop or self._due(self.config.checkpoint_interval or self.config.eval_interval):
                    self._save()

        if not done:
            number = max(self.ranks.gather(received[0] if received else 0))
            return TrainResult(self.step, checkpoint=self._saved, signal=number)
        losses = losses or self._final_losses()
        sample = self.ranks.on_first(self._finish)
        return TrainResult(self.step, losses["validation_loss"], losses["bigram_loss"], sample, self._saved)

    def evaluate(self, split: Split) -> float:
        """The mean loss over the whole split, in windows of block_size."""
        return self._mean_loss(self.data.windows(split, self.config.batch_size, self.block_size))

    def estimate(self, split: Split) -> float:
        """The mean loss over `eval_batches` batches, the same batches each time."""
        stream: Stream = "estimate" if split == "train" else "validation"
        return self._mean_loss(self._batch(stream, i) for i in range(self.config.eval_batches))

    def _queue_step(self, received: Sequence[int]) -> None:
        """Queues the step after those that are queued."""
        started = time.perf_counter()
        step = self.step + len(self._queue)
        batches = [self._batch("train", step, i) for i in self.ranks.share(range(self.config.grad_accum))]
        tokens = self.ranks.size * sum(batch.inputs.numel() for batch in batches)
        rate = learning_rate(step, self.config)
        self._queue.append(_QueuedStep(self._step.enqueue(batches, rate, received), rate, tokens))
        self._progress.seconds += time.perf_counter() - started

    def _needs_result(self, received: Sequence[int]) -> bool:
        """Whether something follows the newest step that needs its result, or the state after it."""
        config, step = self.config, self.step + len(self._queue)
        if step == 1 or step >= config.max_steps or (received and self.ranks.size == 1):
            return True
        intervals = config.log_interval, config.eval_interval, config.checkpoint_interval or 0
        return any(interval and step % interval == 0 for interval in intervals)

    def _finish_step(self) -> tuple[dict[str, Any], bool]:
        """Reads the result of the oldest queued step; returns its log record, and whether to stop."""
        started = time.perf_counter()
        queued = self._queue.popleft()
        try:
            result = queued.step.result()
        except NonFiniteError as error:
            self._queue.clear()
            kept = self.ranks.on_first(self._keep_batches)
            raise NonFiniteError(
                f"step {self.step + 1}: {error}; stopped before it changed anything{kept}"
            ) from error

        progress = self._progress
        progress.step += 1
        progress.tokens += queued.tokens
        progress.seconds += time.perf_counter() - started
        speed = (progress.tokens - self._logged.tokens) / (progress.seconds - self._logged.seconds)
        mfu = None
        if self._peak is not None:
            mfu = self.model.config.flops_per_token() * speed / (self._peak * self.ranks.size)
        record = {
            "step": progress.step,
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            "train_loss": result.loss,
            "learning_rate": queued.rate,
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": speed,
            "mfu": mfu,
            "gradient_norms": result.gradient_norms,
        }
        return record, result.stop

    def _batch(self, stream: Stream, step: int, micro_step: int = 0) -> Batch:
        config = self.config
        return self.data.batch(
            stream, config.batch_size, self.block_size, seed=config.seed, step=step, micro_step=micro_step
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _mean_loss(self, batches: Iterable[Batch]) -> float:
        """The mean loss over all targets of `batches`, which the ranks share."""
        totals, count = [], 0
        self.model.eval()
        with torch.no_grad(), self.ranks.agreement():
            for batch in self.ranks.share(batches):
                targets = int((batch.targets != IGNORED).sum())
                totals.append(self._step.loss(batch).item() * targets)
                count += targets
        self.model.train()
        totals_of_ranks, counts = zip(*self.ranks.gather((totals, count)), strict=True)
        # fsum is exact, so the result does not depend on how the batches are spread over ranks.
        return math.fsum(itertools.chain(*totals_of_ranks)) / max(1, sum(counts))

    def _estimates(self) -> dict[str, float]:
        return {
            "train_estimate": self.estimate("train"),
            "validation_loss": self.estimate("validation"),
        }

    def _final_losses(self) -> dict[str, float]:
        return {
            "validation_loss": self.evaluate("validation"),
            "bigram_loss": self.ranks.on_first(self.data.bigram_loss),
        }

    def _patience_spent(self, loss: float) -> bool:
        """Notes an evaluation's loss; True if `patience` evaluations in a row have not improved it."""
        progress = self._progress
        if loss < progress.best_loss:
            progress.best_loss, progress.evaluations_since_best = loss, 0
        else:
            progress.evaluations_since_best += 1
        return self.config.patience is not None and progress.evaluations_since_best >= self.config.patience

    def _write_log(self, record: dict[str, Any]) -> None:
        self._logged = replace(self._progress)
        if self._folder is not None:
            self.ranks.on_first(partial(self._folder.append_log, record))

    def _keep_batches(self) -> str:
        """Saves the batches of all ranks for a step that failed; returns where, as the end of a sentence."""
        if self._folder is None:
            return ""
        batches = [self._batch("train", self.step, i) for i in range(self.config.grad_accum)]
        return f", its batch is in {self._folder.keep_batches(self.step + 1, batches)}"

    def _save(self) -> None:
        if self._folder is None:
            return
        state = {
            **self._progress.to_state(),
            "rng": self.ranks.gather(rng.get_state(self.device)),
            "scaler": self._step.scaler.state_dict(),
            "data_identity": self.data.identity,
            "train": self.config.to_dict(),
            **self.options,
        }
        save = partial(self._folder.save, self.model, self.data.tokenizer, self._step.tensors(), state)
        self._saved = self.ranks.on_first(save)

    def _restore(self, folder: RunFolder) -> None:
        """Continues from the newest valid checkpoint in `folder`."""
        self._saved, self._progress, random_states = folder.restore(self.model, self._step, self.data)
        self._logged = replace(self._progress)
        if len(random_states) == self.ranks.size:
            rng.set_state(random_states[self.ranks.rank], self.device)
            return
        warnings.warn(
            f"resume: the run was saved by {len(random_states)} process(es) and continues with "
            f"{self.ranks.size}: the result is close, but not equal bit by bit, and random numbers differ",
            stacklevel=3,
        )
        rng.seed(self.config.seed, self.step, self.ranks.rank)

    def _finish(self) -> str:
        """Generates a sample; with a folder, writes it and draws the loss curve."""
        self.model.eval()
        tokenizer = self.data.tokenizer
        prompt = first_ids(tokenizer)
        ids = self.model.generate(
            torch.tensor([prompt], device=self.device),
            SAMPLE_TOKENS,
            temperature=0.8,
            vocab_size=tokenizer.vocab_size,  # the model's may be padded
            generator=torch.Generator(self.device).manual_seed(self.config.seed),
        )
        sample = tokenizer.decode(ids[0, len(prompt) :].tolist())
        if self._folder is not None:
            self._folder.finish(sample)
        return sample


def _bar_text(record: Mapping[str, Any]) -> str:
    """What the progress bar shows besides steps and remaining time."""
    mfu = "" if record["mfu"] is None else f", {record['mfu']:.1%} MFU"
    return f"loss {record['train_loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s{mfu}"


def _evaluation_line(record: Mapping[str, Any]) -> str:
    return (
        f"step {record['step']}: train {record['train_estimate']:.4f}, "
        f"validation {record['validation_loss']:.4f}"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list, so that the first does not interrupt; the second one does."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
