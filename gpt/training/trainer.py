"""The training loop: evaluation, log, checkpoints, and a stop at any moment that can be taken up again bit by
bit."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch, Split, Stream, TokenData
from gpt.data.tokenizers import first_ids
from gpt.device import peak_flops, pick_device
from gpt.errors import InputError
from gpt.files import replacing
from gpt.model import GPT
from gpt.training import rng
from gpt.training.distributed import ALONE, Ranks
from gpt.training.optim import learning_rate
from gpt.training.plot import plot_log
from gpt.training.step import NonFiniteError, TrainStep
from gpt.weights import checkpoint

LOG, PLOT, SAMPLE = "log.jsonl", "loss.png", "sample.txt"
SAMPLE_TOKENS = 500


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `signal` is the one that stopped it, and the losses are over the whole validation
    split, if it was not."""

    step: int
    validation_loss: float | None = None
    bigram_loss: float | None = None
    sample: str | None = None
    checkpoint: Path | None = None
    signal: int | None = None


class Trainer:
    """Trains `model` on `data`; everything is checked here, and nothing written before `run`.

    Args:
        model: Moved to `config.device`.
        data: The tokens; batches are functions of (config.seed, step).
        config: How long and how.
        out: The run's folder, for log, checkpoints, plot and sample, which all ranks can read; None writes
            nothing.
        resume: Go on from the newest valid checkpoint in `out`.
        options: What else a checkpoint should tell about the run; ready for JSON.
        ranks: The processes that train together, as `gpt.training.distributed.join` gives them: they share
            each step's micro-batches and each evaluation, and rank 0 writes. Another number of them may go on
            with a run, though bit by bit only the same.

    Raises:
        InputError: Model, data, config and folder do not fit one another.
    """

    def __init__(
        self,
        model: GPT,
        data: TokenData,
        config: TrainConfig | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = False,
        options: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config = config or TrainConfig()
        self.data = data
        self.out = None if out is None else Path(out)
        self.block_size = model.config.block_size
        self.options = dict(options or {})
        self.ranks = ranks
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._best, self._worse = math.inf, 0
        self._logged = (0, 0.0)
        self._saved: Path | None = None
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
            self._peak = peak_flops(torch.cuda.get_device_name(self.device) if on_gpu else "cpu")
            if ranks.size > 1:
                rng.seed(config.seed, self.step, ranks.rank)
            if self.out is not None:
                self._check_folder(self.out, resume)
                if resume:
                    self._restore(self.out)
        ranks.broadcast_(self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._step.device

    @property
    def precision(self) -> str:
        """The dtype of forward and backward, as in "bfloat16"."""
        return str(self._step.dtype).removeprefix("torch.")

    def preflight(self) -> kernels.Report:
        """Each fused op against its reference, at the shapes, dtype and strides of a micro-batch: see
        `GPT.preflight`."""
        return self.model.preflight(self.config.batch_size, self.block_size, self._step.dtype)

    def run(self) -> TrainResult:
        """Trains until max_steps, until patience is spent, or until Ctrl-C or SIGTERM, which finish the step,
        save and return.

        Raises:
            NonFiniteError: A loss or gradient was not finite; that step changed nothing, and its batch is
                kept in `out`.
            InputError: The folder cannot be written.
        """
        from tqdm import tqdm

        done = self.step >= self.config.max_steps
        if self.out is not None:
            self.ranks.on_first(partial(self._prepare, self.out, keep_final=done))
        losses: dict[str, float] = {}
        stop = False
        wait = 0.1 if sys.stderr.isatty() else 10.0
        self.model.train()
        with (
            _stop_signals() as received,
            tqdm(
                total=self.config.max_steps,
                initial=self.step,
                unit="step",
                mininterval=wait,
                dynamic_ncols=True,
            ) as bar,
        ):
            while not done and not stop:
                record, stop = self._train_step(received)
                done = self.step >= self.config.max_steps
                if self._due(self.config.eval_interval):
                    record |= {
                        "train_estimate": self.estimate("train"),
                        "validation_loss": self.estimate("validation"),
                    }
                    bar.write(
                        "step {step}: train {train_estimate:.4f}, validation {validation_loss:.4f}".format(
                            **record
                        )
                    )
                    done |= self._patience_spent(record["validation_loss"])
                if done:
                    losses = self._final_losses()
                    record |= {"final": True, **losses}
                bar.set_postfix_str(_progress(record), refresh=False)
                bar.update()
                if self.step == 1 or self._due(self.config.log_interval) or "validation_loss" in record:
                    self._write_log(record | {"gradient_norms": self._step.gradient_norms()})
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
        """The mean loss over `eval_batches` batches, the same ones each time."""
        stream: Stream = "estimate" if split == "train" else "validation"
        return self._mean_loss(self._draw(stream, i) for i in range(self.config.eval_batches))

    def _train_step(self, received: Sequence[int]) -> tuple[dict[str, Any], bool]:
        """One step, counted and timed; returns its line for the log, and whether a rank has received a
        signal."""
        rate = learning_rate(self.step, self.config)
        started = time.perf_counter()
        batches = [self._draw("train", self.step, i) for i in self.ranks.share(range(self.config.grad_accum))]
        try:
            loss, norm, stop = self._step(batches, rate, received)
        except NonFiniteError as error:
            kept = self.ranks.on_first(self._keep)
            raise NonFiniteError(
                f"step {self.step + 1}: {error}; stopped before it changed anything{kept}"
            ) from error
        self.step += 1
        self.tokens += self.ranks.size * sum(batch.inputs.numel() for batch in batches)
        self.seconds += time.perf_counter() - started
        speed = (self.tokens - self._logged[0]) / (self.seconds - self._logged[1])
        use = (
            None
            if self._peak is None
            else self.model.config.flops_per_token() * speed / (self._peak * self.ranks.size)
        )
        record = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "train_loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": speed,
            "mfu": use,
        }
        return record, stop

    def _draw(self, stream: Stream, step: int, micro_step: int = 0) -> Batch:
        config = self.config
        return self.data.batch(
            stream, config.batch_size, self.block_size, seed=config.seed, step=step, micro_step=micro_step
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _mean_loss(self, batches: Iterable[Batch]) -> float:
        totals, count = [], 0
        self.model.eval()
        with torch.no_grad(), self.ranks.agreement():
            for batch in self.ranks.share(batches):
                targets = int((batch.targets != IGNORED).sum())
                totals.append(self._step.loss(batch).item() * targets)
                count += targets
        self.model.train()
        shares, counts = zip(*self.ranks.gather((totals, count)), strict=True)
        return math.fsum(itertools.chain(*shares)) / max(
            1, sum(counts)
        )  # exact, so that the order does not matter

    def _final_losses(self) -> dict[str, float]:
        return {
            "validation_loss": self.evaluate("validation"),
            "bigram_loss": self.ranks.on_first(self.data.bigram_loss),
        }

    def _patience_spent(self, loss: float) -> bool:
        self._worse = 0 if loss < self._best else self._worse + 1
        self._best = min(self._best, loss)
        return self.config.patience is not None and self._worse >= self.config.patience

    def _check_folder(self, out: Path, resume: bool) -> None:
        if out.exists() and not out.is_dir():
            raise InputError(f"out: {out} is no folder, expected one to write to")
        if not resume and checkpoint.list_checkpoints(out):
            raise InputError(
                f"out: {out} holds the checkpoints of a run, expected --resume to go on with it, or another "
                "folder"
            )
        parent = next(path for path in (out, *out.absolute().parents) if path.is_dir())
        needed = (
            (checkpoint.KEPT + 1) * 3 * sum(p.nbytes for p in self.model.parameters())
        )  # weights and AdamW's two averages
        free = shutil.disk_usage(parent).free
        if not os.access(parent, os.W_OK):
            raise InputError(f"out: cannot write to {parent}, expected a writable folder")
        if free < needed:
            raise InputError(
                f"out: {parent} has {free / 1e6:,.0f} MB free, expected {needed / 1e6:,.0f} MB for the "
                "checkpoints"
            )

    def _prepare(self, out: Path, keep_final: bool) -> None:
        """Makes the folder, and cuts the log behind the checkpoint that the run goes on from."""
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(out, self.step)
            log = out / LOG
            lines = log.read_text("utf-8").splitlines(keepends=True) if log.exists() else []
            kept = [line for line in lines if _belongs(line, self.step, keep_final)]
            with replacing(log) as file:
                file.write("".join(kept).encode("utf-8"))

    def _write_log(self, record: dict[str, Any]) -> None:
        self._logged = (self.tokens, self.seconds)
        if self.out is not None:
            self.ranks.on_first(partial(self._append, self.out / LOG, json.dumps(_finite(record)) + "\n"))

    def _append(self, path: Path, text: str) -> None:
        with _writing(path.parent), path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _keep(self) -> str:
        """Saves the batches of a step that failed; returns where, as the end of a sentence."""
        if self.out is None:
            return ""
        batches = [self._draw("train", self.step, i) for i in range(self.config.grad_accum)]
        path = self.out / f"non-finite-step-{self.step + 1}.safetensors"
        named = {
            f"{i}/{name}": t
            for i, batch in enumerate(batches)
            for name, t in batch._asdict().items()
            if t is not None
        }
        with _writing(self.out):
            checkpoint.write_tensors(path, named)
        return f", its batch is in {path}"

    def _save(self) -> None:
        if self.out is None:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self._best if math.isfinite(self._best) else None,
            "worse": self._worse,
            "rng": self.ranks.gather(rng.get_state(self.device)),
            "scaler": self._step.scaler.state_dict(),
            "data_identity": self.data.identity,
            "train": self.config.to_dict(),
            **self.options,
        }
        run = self.out, self.step, self.model, self.data.tokenizer, self._step.tensors(), state
        self._saved = self.ranks.on_first(partial(checkpoint.save_checkpoint, *run))

    def _restore(self, out: Path) -> None:
        folder = checkpoint.find_checkpoint(out)
        source = folder / checkpoint.STATE
        state = checkpoint.read_json(source)
        saved, own = checkpoint.read_json(folder / checkpoint.CONFIG), self.model.config.to_dict()
        try:
            if not isinstance(state["rng"], list):
                kind = type(state["rng"]).__name__
                raise InputError(
                    f"resume: {source} has as rng a {kind}, expected a list, one state for each process"
                )
            if state["data_identity"] != self.data.identity:
                raise InputError(
                    f"resume: the text or the tokenizer is not the one that {folder} was trained on"
                )
            for name in own:
                if saved[name] != own[name]:
                    raise InputError(
                        f"resume: {name} is {own[name]!r}, expected {saved[name]!r} as in {folder}"
                    )
            self.step, self.tokens, self.seconds = (
                int(state["step"]),
                int(state["tokens"]),
                float(state["seconds"]),
            )
            self._best, self._worse = (
                math.inf if state["best"] is None else float(state["best"]),
                int(state["worse"]),
            )
            checkpoint.copy_tensors(
                dict(self.model.named_parameters()),
                checkpoint.read_tensors(folder / checkpoint.MODEL),
                folder / checkpoint.MODEL,
            )
            optimizer = folder / checkpoint.OPTIMIZER
            self._step.load_tensors(checkpoint.read_tensors(optimizer), optimizer)
            if state["scaler"]:
                self._step.scaler.load_state_dict(state["scaler"])
            self._restore_random_state(state["rng"])
        except KeyError as error:
            raise InputError(f"resume: {folder} lacks {error}, expected a run of this version") from error
        self._logged, self._saved = (self.tokens, self.seconds), folder

    def _restore_random_state(self, states: Sequence[rng.State]) -> None:
        if len(states) == self.ranks.size:
            rng.set_state(states[self.ranks.rank], self.device)
            return
        warnings.warn(
            f"resume: the run was saved by {len(states)} process(es) and goes on with {self.ranks.size}: "
            "near what it would "
            "have been, not bit by bit, and with other random numbers",
            stacklevel=2,
        )
        rng.seed(self.config.seed, self.step, self.ranks.rank)

    def _finish(self) -> str:
        """Draws the loss curve and writes a sample, which it returns."""
        self.model.eval()
        tokenizer = self.data.tokenizer
        prompt = first_ids(tokenizer)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        idx = torch.tensor([prompt], device=self.device)
        vocab_size = tokenizer.vocab_size  # the model's may be padded
        ids = self.model.generate(
            idx, SAMPLE_TOKENS, temperature=0.8, vocab_size=vocab_size, generator=generator
        )
        sample = tokenizer.decode(ids[0, len(prompt) :].tolist())
        if self.out is not None:
            with _writing(self.out):
                (self.out / SAMPLE).write_text(sample + "\n", encoding="utf-8")
                plot_log(self.out / LOG, self.out / PLOT)
        return sample


def _finite(value: Any) -> Any:
    """`value` as JSON has it: None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(record: Mapping[str, Any]) -> str:
    """What the bar shows beside steps and time left."""
    use = "" if record["mfu"] is None else f", {record['mfu']:.1%} MFU"
    return f"loss {record['train_loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s{use}"


def _belongs(line: str, step: int, keep_final: bool) -> bool:
    """Whether a line of an earlier log is part of the run up to `step`; what a kill left half-written is
    not."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return record["step"] <= step and (keep_final or not record.get("final"))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"out: cannot write to {out}: {error.strerror or error}") from error


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM instead of dying of them; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
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
