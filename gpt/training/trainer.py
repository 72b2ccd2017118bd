"""The training loop: steps, evaluations, and a stop that loses nothing and can be resumed."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sized
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kernels
from gpt.config import TrainConfig
from gpt.data.dataset import Batch, Split, TokenData
from gpt.device import peak_flops, pick_device
from gpt.errors import InputError, NonFiniteError
from gpt.model import GPT
from gpt.training import rng, tensorboard
from gpt.training.display import bar_text, evaluation_line, progress_bar
from gpt.training.distributed import ALONE, Ranks
from gpt.training.evaluator import Evaluator
from gpt.training.optim import learning_rate
from gpt.training.parallel import parallelize, shards, whole
from gpt.training.profile import TRACE, StepProfile
from gpt.training.run_folder import RunFolder
from gpt.training.run_state import Progress
from gpt.training.saver import Saver
from gpt.training.signals import Stopped, StopRequest
from gpt.training.step import DrawnBatches, PendingStep, TrainStep

SAMPLE_TOKENS = 500


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    `signal` is the signal that stopped the run or its final evaluation, or None; `out_of_time` is True where
    the time limit did. The losses, over `validation_tokens` tokens, which are `validation_share` of the
    validation split, and the sample exist only for a run that was not stopped.
    """

    step: int
    validation_loss: float | None = None
    bigram_loss: float | None = None
    sample: str | None = None
    checkpoint: Path | None = None
    signal: int | None = None
    out_of_time: bool = False
    validation_tokens: int | None = None
    validation_share: float | None = None


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
        resume: Continue from the newest valid checkpoint in `out`, or from the one with this name, as in
            "step-100". Later checkpoints are then set aside.
        options: Further entries of a checkpoint's state.json; ready for JSON.
        on_log: Called on rank 0 with a copy of each record of log.jsonl, after it is written. An exception in
            it ends the run; earlier checkpoints stay.
        ranks: The processes that train together, from `gpt.training.distributed.join`. They share the
            micro-batches of each step and each evaluation. With parallel="fsdp" the model is sharded in
            place. A run can be resumed with another number of processes or another `parallel`, but only the
            same ones continue it bit by bit.

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
        resume: bool | str = False,
        options: Mapping[str, Any] | None = None,
        on_log: Callable[[dict[str, Any]], object] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config = config or TrainConfig()
        self.data = data
        self.block_size = model.config.block_size
        self.options = dict(options or {})
        self.ranks = ranks
        self._sharded = bool(shards(config, ranks))
        self._folder = out if out is None or isinstance(out, RunFolder) else RunFolder(Path(out))
        self._progress = Progress()
        self._logged = Progress()  # as of the last record of the log
        self._saver: Saver | None = None
        self._queue: deque[_QueuedStep] = deque()  # steps whose results have not been read
        self._on_log = [] if on_log is None else [on_log]

        with ranks.agreement():
            ranks.check(config)
            data.check(self.block_size)
            if self._folder is None and (config.profile or config.tensorboard):
                wanted = "profile" if config.profile else "tensorboard"
                raise InputError(f"Trainer: {wanted} is True without out, expected a folder to write to")
            if config.tensorboard:
                tensorboard.check_installed()
            if data.tokenizer.vocab_size > model.config.vocab_size:
                vocab_size, needed = model.config.vocab_size, data.tokenizer.vocab_size
                raise InputError(
                    f"Trainer: the model's vocab_size is {vocab_size}, expected at least the tokenizer's "
                    f"{needed}"
                )
            device = pick_device(config.device)
        self.model = model
        ranks.check_equal(self._shared_settings(resume, device))
        forward = parallelize(model, device, config, ranks)
        with ranks.agreement():
            self._step = TrainStep(model, config, forward, ranks)
            self._evaluator = Evaluator(model, self._step, data, config, ranks)
            on_gpu = self.device.type == "cuda"
            self._ahead = 1 if on_gpu else 0  # steps that may be queued; a CPU computes while it queues
            name = torch.cuda.get_device_name(self.device) if on_gpu else "cpu"
            self._peak = (
                1e12 * config.peak_tflops if config.peak_tflops else peak_flops(name, self._step.dtype)
            )
            if ranks.size > 1:
                rng.seed(config.seed, self.step, ranks.rank)
            if self._folder is not None:
                self._enter(self._folder, resume=resume)
        ranks.check_equal({"step": self.step, "dtype": self.precision})

    def __repr__(self) -> str:
        out = None if self._folder is None else str(self._folder.path)
        return (
            f"Trainer(step {self.step} of {self.config.max_steps}, {self.precision} on {self.device}, "
            f"out={out!r})"
        )

    def _shared_settings(self, resume: bool | str, device: torch.device) -> dict[str, object]:
        """What must be the same on all ranks, by the names that an error shows."""
        return {
            "the version of fused-gpt": kernels.__version__,
            "the version of torch": torch.__version__,
            "resume": resume,
            **self.model.config.to_dict(),
            **self.config.to_dict(),
            "device": device.type,
            "use_triton": self.model.use_triton,
            "the hash of text and tokenizer": self.data.identity,
        }

    def _enter(self, folder: RunFolder, *, resume: bool | str) -> None:
        """Checks and locks the folder, and continues from one of its checkpoints with `resume`."""
        try:
            folder.check(self.model, resume=bool(resume), keep_best=self.config.keeps_best)
            if self.ranks.rank == 0 and folder.path.is_dir():
                folder.lock()
            newest = self._restore(folder, resume if isinstance(resume, str) else None) if resume else None
            self._saver = Saver(folder, self.ranks, newest, sharded=self._sharded)
        except BaseException:
            folder.release()
            raise

    @property
    def step(self) -> int:
        """Steps taken so far, over all resumes."""
        return self._progress.step

    @property
    def _best(self) -> int | None:
        """The step of the best checkpoint, if it is kept."""
        return self._progress.best_step if self.config.keeps_best else None

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
        """Creates, locks and prepares the run's folder, unless that has happened, and returns its path.

        Raises:
            InputError: Another run uses the folder, or it cannot be written.
        """
        if self._folder is None:
            return None
        self._folder.path = self.ranks.on_first(partial(self._folder.claim, new=self._saved is None))
        prepare = partial(self._folder.prepare, keep_final=self._is_done(), best=self._best)
        self.ranks.on_first(partial(prepare, self.step))
        return self._folder.path

    def run(self) -> TrainResult:
        """Trains until max_steps, until patience or the time runs out, or until Ctrl-C or SIGTERM.

        On a GPU, a step's result is read after the next step is queued, so that the GPU always has work. A
        signal, or the end of `time_limit`, which begins here, lets the queued steps finish; the run then
        saves a checkpoint and returns. The final evaluation comes after the last checkpoint: a signal or the
        time limit ends it at once, and a resumed run repeats it. A second signal ends the process.

        Raises:
            NonFiniteError: A loss, gradient, weight or value of the optimizer is not finite. Nothing of it is
                saved but the batches of the step, in `out`.
            InputError: Another run uses the folder, or it cannot be written.
            MachineError: The disk is full or fails. Earlier checkpoints stay as they were.
        """
        try:
            self.claim()
            if self._folder is not None and self.config.tensorboard:
                folder = self._folder.path / tensorboard.FOLDER
                self._on_log.append(tensorboard.TensorBoard(folder, self.step + 1))
            stop = StopRequest(self.config.time_limit_seconds)
            with stop.listening():
                self._train(stop)
                if self._saver is not None:
                    self._saver.finish()
                with suppress(Stopped):
                    if self._is_done():
                        return self._finish(stop)
                number = max(self.ranks.gather(stop.signal)) or None
                return TrainResult(
                    self.step, checkpoint=self._saved, signal=number, out_of_time=number is None
                )
        finally:
            if self._saver is not None:
                self._saver.close()
            if self._folder is not None:
                self._folder.release()

    def _train(self, stop: StopRequest) -> None:
        """Takes the steps that are left, or those that are queued when a rank is to stop."""
        config, stopped = self.config, False
        stop.consequence = self._last_step
        self.model.train()
        with progress_bar(config.max_steps, self.step, unit="step") as bar, self._profile() as profile:
            while not self._is_done() and not stopped:
                profile.next_step()
                self._queue_step(stop)
                ahead = 0 if self._needs_result(stop) else self._ahead
                while len(self._queue) > (0 if stopped else ahead):
                    record, stops = self._finish_step()
                    stopped |= stops
                    bar.set_postfix_str(bar_text(record), refresh=False)
                    bar.update()
                if self._queue:
                    continue

                improved = False
                if self._due(config.eval_interval):
                    record |= self._estimates()
                    bar.write(evaluation_line(record))
                    improved = self._progress.note_evaluation(record["validation_loss"])
                done = self._is_done()
                if done and self.step < config.max_steps:
                    bar.write(f"stopped: {self.ended}")
                due = done or self.step == 1 or self._due(config.log_interval)
                if due or "validation_loss" in record:
                    self._write_log(record)
                due = done or stopped or self._due(config.checkpoint_interval or config.eval_interval)
                if due or (improved and config.keeps_best):
                    self._save(stop)

    def _profile(self) -> StepProfile:
        """The profile of rank 0's steps, if it is asked for."""
        wanted = self.config.profile and self.ranks.rank == 0
        path = self._folder.path / TRACE if wanted and self._folder is not None else None
        return StepProfile(path, self.device)

    def _last_step(self) -> str:
        """What a signal makes the run do: the next step to be queued learns of it, and is the last one."""
        step = min(self.step + len(self._queue) + 1, self.config.max_steps)
        return f"finishing step {step}, then saving; press Ctrl-C again to stop at once"

    @property
    def ended(self) -> str | None:
        """Why the run takes no more steps, and what would let it go on; None while it does."""
        config, progress = self.config, self._progress
        if progress.step >= config.max_steps:
            return f"max_steps is {config.max_steps} (a larger --max_steps goes on)"
        if config.patience is None or progress.evaluations_since_best < config.patience:
            return None
        return (
            f"validation loss has not improved for {progress.evaluations_since_best} evaluations; best "
            f"{progress.best_loss:.4f} at step {progress.best_step} (a larger --patience goes on)"
        )

    def _is_done(self) -> bool:
        return self.ended is not None

    def evaluate(self, split: Split) -> float:
        """The mean loss over the whole split, in windows of block_size."""
        return self._evaluator.evaluate(split)

    def estimate(self, split: Split) -> float:
        """The mean loss over `eval_batches` batches, the same batches each time."""
        return self._evaluator.estimate(split)

    def _queue_step(self, stop: Sized) -> None:
        """Queues the step after those that are queued."""
        started = time.perf_counter()
        step = self.step + len(self._queue)
        numbers = list(self.ranks.share(range(self.config.grad_accum)))
        batches = DrawnBatches(partial(self._micro_batch, step), numbers)
        tokens = self.config.grad_accum * self.config.batch_size * self.block_size
        rate = learning_rate(step, self.config)
        self._queue.append(_QueuedStep(self._step.enqueue(batches, rate, stop), rate, tokens))
        self._progress.seconds += time.perf_counter() - started

    def _needs_result(self, stop: Sized) -> bool:
        """Whether something follows the newest step that needs its result, or the state after it."""
        config, step = self.config, self.step + len(self._queue)
        if step == 1 or step >= config.max_steps or (stop and self.ranks.size == 1):
            return True
        intervals = config.log_interval, config.eval_interval, config.checkpoint_interval or 0
        return any(interval and step % interval == 0 for interval in intervals)

    def _finish_step(self) -> tuple[dict[str, Any], bool]:
        """Reads the result of the oldest queued step; returns its log record, and whether to stop."""
        started = time.perf_counter()
        queued = self._queue[0]
        try:
            result = queued.step.result()
        except NonFiniteError as error:
            self._queue.clear()
            step = self.step + 1
            kept = self.ranks.on_first(partial(self._kept, step))
            with self.ranks.agreement():
                raise NonFiniteError(
                    f"step {step}: {error}; stopped before it changed anything{kept}"
                ) from error

        progress = self._progress
        self._queue.popleft()
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

    def _micro_batch(self, step: int, number: int) -> Batch:
        config = self.config
        return self.data.batch(
            "train",
            config.batch_size,
            self.block_size,
            seed=config.seed,
            step=step,
            micro_step=number,
            grad_accum=config.grad_accum,
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _estimates(self) -> dict[str, float]:
        return {"train_estimate": self.estimate("train"), "validation_loss": self.estimate("validation")}

    def _finish(self, stop: StopRequest) -> TrainResult:
        """Evaluates the trained model, completes the log, and samples.

        Raises:
            Stopped: Any rank has received a signal, or has no time left.
        """
        stop.consequence = lambda: "the final evaluation is skipped; --resume repeats it, without a step"
        final = self._evaluator.final_losses(stop.check)
        if not math.isfinite(final.validation_loss):
            with self.ranks.agreement():
                advice = "" if self._folder is None else self._folder.how_to_go_on(self.step)
                loss = final.validation_loss
                raise NonFiniteError(f"step {self.step}: the final validation loss is {loss}{advice}")
        record = {"step": self.step, "final": True, **final._asdict()}
        model = whole(self.model, self.ranks) if self._sharded else self.model
        sample = self.ranks.on_first(partial(self._conclude, model, record, stop.check))
        return TrainResult(self.step, **final._asdict(), sample=sample, checkpoint=self._saved)

    def _write_log(self, record: dict[str, Any]) -> None:
        self._logged = replace(self._progress)
        self.ranks.on_first(partial(self._log, record))

    def _log(self, record: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.append_log(record)
        self._notify(record)

    def _notify(self, record: Mapping[str, Any]) -> None:
        for on_log in self._on_log:
            on_log(deepcopy(dict(record)))

    def _kept(self, step: int) -> str:
        """What is kept of step `step`, which failed, as the end of a sentence: its batches, on rank 0."""
        if self._folder is None:
            return ""
        batches = [self._micro_batch(step - 1, i) for i in range(self.config.grad_accum)]
        path = self._folder.keep_batches(step, batches)
        return f", its batch is in {path}{self._folder.how_to_go_on(step)}"

    @property
    def _saved(self) -> Path | None:
        """The newest checkpoint of the run that is complete."""
        return None if self._saver is None else self._saver.newest

    def _save(self, stop: StopRequest) -> None:
        """Saves a checkpoint, unless weights, optimizer or the loss after the last step are not finite."""
        if self._saver is None:
            return
        state = {
            **self._progress.to_state(),
            "rng": self.ranks.gather(rng.get_state(self.device)),
            "scaler": self._step.scaler.state_dict(),
            "data_identity": self.data.identity,
            "train": self.config.to_dict(),
            **self.options,
        }
        try:
            self._saver.save(
                self.model,
                self.data.tokenizer,
                optimizer=self._step.tensors(),
                state=state,
                best=self._best,
                loss=self._evaluator.loss_now(),
                timer=stop.saving(),
            )
        except NonFiniteError as error:
            kept = self.ranks.on_first(partial(self._kept, self.step))
            with self.ranks.agreement():
                raise NonFiniteError(f"step {self.step}: {error}; not saved{kept}") from error

    def _restore(self, folder: RunFolder, name: str | None) -> Path:
        """Continues from the checkpoint `name`, or from the newest valid one, and returns its path."""
        path = folder.checkpoint(name)
        state = folder.restore(path, self.model, self._step, self.data)
        self._progress, random_states = state.progress, state.random_states
        self._logged = replace(self._progress)
        saved, now = (
            f"{size} process(es)" + (f" and --parallel {config.parallel}" if size > 1 else "")
            for size, config in ((len(random_states), state.train), (self.ranks.size, self.config))
        )
        if saved == now:
            rng.set_state(random_states[self.ranks.rank], self.device)
            return path
        warnings.warn(
            f"resume: the run was saved by {saved} and continues with {now}: the result is close, but not "
            "equal bit by bit, and random numbers differ",
            stacklevel=3,
        )
        rng.seed(self.config.seed, self.step, self.ranks.rank)
        return path

    def _conclude(self, model: GPT, record: Mapping[str, Any], check: Callable[[object], None]) -> str:
        """Completes the log, draws the losses, and lets `model` generate a sample; a token calls `check`."""
        if self._folder is not None:
            self._folder.complete_log(record)
        self._notify(record)
        sample = self._evaluator.sample(model, SAMPLE_TOKENS, check)
        if self._folder is not None:
            self._folder.finish(sample)
        return sample
