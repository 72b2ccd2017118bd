"""The files of a run: log.jsonl, checkpoints, loss.png, sample.txt, and the batches of a step that failed.

One process at a time writes them: it holds a lock on a file of the folder. The kernel frees the lock when the
process ends, however it ends. Readers need no lock.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gpt.data.dataset import Batch, TokenData
from gpt.data.tokenizers import Tokenizer
from gpt.errors import InputError, ReportedError, cannot_write
from gpt.files import read_json, read_regular
from gpt.model import GPT
from gpt.training import run_log
from gpt.training.plot import plot_log
from gpt.training.run_state import RunState, read_state
from gpt.training.step import TrainStep
from gpt.weights import checkpoint
from gpt.weights.sharded import read_parts
from gpt.weights.tensors import check_finite, check_tensors, copy_tensors, write_tensors
from kernels.files import replacing

if TYPE_CHECKING:
    from filelock import FileLock

LOG, PLOT, SAMPLE, LOCK = "log.jsonl", "loss.png", "sample.txt", ".lock"
SIGNING = 1.0  # seconds in which the holder of a lock has written which process it is
RUNS = Path("runs")

# Errors of a file system that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunFolder:
    """The folder of one run. The methods that write are for rank 0 alone.

    Args:
        path: The folder, which `claim` creates. None is the first free number in `runs`, when it is created.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._numbered = path is None
        self.path = _next_folder(RUNS) if path is None else path
        self._lock: FileLock | None = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def lock(self) -> None:
        """Takes the lock of the folder, unless this object holds it already.

        Raises:
            InputError: Another process or another object holds it, or its file cannot be written.
        """
        from filelock import FileLock, Timeout

        if self._lock is not None:
            return
        lock = FileLock(
            self.path / LOCK, timeout=0, thread_local=False, fallback_to_soft=False, on_acquired=_sign
        )
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"out: {self.path} is in use by {self._holder()}, expected a folder that no other run "
                "writes to"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise cannot_write("out", self.path / LOCK, error) from error
            warnings.warn(f"out: {self.path} cannot be locked ({error.strerror})", stacklevel=2)
        self._lock = lock

    def _holder(self) -> str:
        """Which process holds the lock, as it writes into the file of the lock once it holds it."""
        give_up = time.monotonic() + SIGNING
        while time.monotonic() < give_up:
            with suppress(InputError):
                text = read_regular(self.path / LOCK, "out", 1000).decode("utf-8", "replace")
                if text.endswith("\n"):
                    return " ".join(text.split())
            time.sleep(0.01)
        return "another process"

    def release(self) -> None:
        """Lets other processes write to the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def claim(self, *, new: bool) -> Path:
        """Creates the folder, locks it and returns its path.

        Args:
            new: The run has no checkpoint yet.

        Raises:
            InputError: Another process uses the folder or has used it, or it cannot be created.
        """
        try:
            while self._numbered and self._lock is None:
                try:
                    self.path.mkdir(parents=True)
                    break
                except FileExistsError:  # another run took this number
                    self.path = _next_folder(self.path.parent)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write("out", self.path, error) from error
        self.lock()
        if new:
            self._check_new()
        return self.path

    def _check_new(self) -> None:
        if checkpoint.list_checkpoints(self.path):
            raise InputError(
                f"out: {self.path} holds the checkpoints of a run, expected --resume to continue it, or "
                "another folder"
            )

    def check(self, model: GPT, *, resume: bool, keep_best: bool) -> None:
        """Checks, without writing, that the folder can take a run of `model`.

        Raises:
            InputError: The path is not a folder, holds another run, is not writable or has too little space;
                or the model could not be loaded from its checkpoints.
        """
        checkpoint.check_parameters(model)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out: {self.path} is not a folder, expected one to write to")
        if not resume:
            self._check_new()

        parent = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        if not os.access(parent, os.W_OK):
            raise InputError(f"out: cannot write to {parent}, expected a writable folder")
        checkpoint_bytes = 3 * sum(p.nbytes for p in model.parameters())  # weights and AdamW's two averages
        needed = (checkpoint.KEPT + 1 + keep_best) * checkpoint_bytes
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise InputError(
                f"out: {parent} has {free / 1e6:,.0f} MB free, expected {needed / 1e6:,.0f} MB for the "
                "checkpoints"
            )

    def prepare(self, step: int, *, keep_final: bool, best: int | None = None) -> None:
        """Truncates the log to `step`, where the run starts or resumes, and sets later checkpoints aside.

        Args:
            step: The step of the checkpoint that the run resumes from, or 0.
            keep_final: Keep the final record too: there is nothing left to train.
            best: The step of the best checkpoint, to be kept; None keeps the newest ones alone.

        Raises:
            InputError: The folder cannot be written.
        """
        with self._writing():
            checkpoint.clean(self.path, step, best)
            run_log.rewrite(
                self.path / LOG,
                lambda records: (
                    r for r in records if r["step"] <= step and (keep_final or not r.get("final"))
                ),
            )

    def append_log(self, record: Mapping[str, Any]) -> None:
        """Appends one record to log.jsonl; numbers that are not finite become null."""
        with self._writing():
            run_log.append(self.path / LOG, record)

    def complete_log(self, final: Mapping[str, Any]) -> None:
        """Adds the entries of `final` to the record of its step, if the log ends with it."""

        def complete(records: Iterator[run_log.Record]) -> Iterator[run_log.Record]:
            last: run_log.Record = {}
            for record in records:
                if last:
                    yield last
                last = record
            if last and last["step"] != final["step"]:
                yield last
                last = {}
            yield {**last, **final}

        with self._writing():
            run_log.rewrite(self.path / LOG, complete)

    def keep_batches(self, step: int, batches: Sequence[Batch]) -> Path:
        """Saves the micro-batches of a step that failed, for debugging, and returns the file."""
        path = self.path / f"non-finite-step-{step}.safetensors"
        tensors = {
            f"{i}/{name}": tensor
            for i, batch in enumerate(batches)
            for name, tensor in batch._asdict().items()
            if tensor is not None
        }
        with self._writing():
            write_tensors(path, tensors)
        return path

    def how_to_go_on(self, step: int) -> str:
        """The command that goes on from the newest valid checkpoint before `step`, as a sentence's end."""
        for folder in reversed(checkpoint.list_checkpoints(self.path)):
            with suppress(ReportedError):
                if checkpoint.step_of(folder) < step:
                    name = checkpoint.find_checkpoint(folder).name
                    return (
                        "; to go on from an earlier checkpoint: python -m gpt.train --out "
                        f"{shlex.quote(str(self.path))} --resume_from {name}"
                    )
        return ""

    def save(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: int | None,
    ) -> Path:
        """Saves a checkpoint with `state` as its state.json, and returns the checkpoint's folder.

        The checkpoint of step `best` is kept besides the newest ones.

        Raises:
            InputError: The checkpoint cannot be written. Earlier ones are unchanged.
        """
        return checkpoint.save_checkpoint(
            self.path, state["step"], model, tokenizer, optimizer=optimizer, state=state, best=best
        )

    def new_checkpoint(
        self, model: GPT, tokenizer: Tokenizer, state: Mapping[str, Any], *, best: int | None
    ) -> AbstractContextManager[Path]:
        """Gives the folder for the tensors of a checkpoint; the end of the block completes it. As `save`."""
        return checkpoint.new_checkpoint(self.path, state["step"], model, tokenizer, state=state, best=best)

    def checkpoint(self, name: str | None = None) -> Path:
        """The checkpoint `name`, as in "step-100"; None is the newest valid one.

        Raises:
            InputError: There is no such checkpoint, or it is damaged.
        """
        if name is None:
            return checkpoint.find_checkpoint(self.path)
        folders = {folder.name: folder for folder in checkpoint.list_checkpoints(self.path)}
        if name not in folders:
            listed = f"one of {', '.join(folders)}" if folders else "a run that has checkpoints"
            raise InputError(f"resume: {self.path} has no checkpoint {name!r}, expected {listed}")
        return checkpoint.find_checkpoint(folders[name])

    def restore(self, folder: Path, model: GPT, step: TrainStep, data: TokenData) -> RunState:
        """Loads the checkpoint in `folder` into `model` and `step`, once all of it has been checked.

        It may be one of whole files or of shards. Of a sharded model, this rank loads its shards.

        Raises:
            InputError: It is damaged, or belongs to another text, tokenizer, model or version.
            NonFiniteError: A weight or a value of the optimizer is infinite or NaN.
        """
        weights, optimizer = folder / checkpoint.MODEL, folder / checkpoint.OPTIMIZER
        state = read_state(folder / checkpoint.STATE)
        _check_same_run(folder, state, model, data)
        parameters = dict(model.named_parameters())
        tensors = read_parts(folder, checkpoint.MODEL, parameters)
        check_tensors(parameters, tensors, weights)
        check_finite(tensors, weights)
        step.load_tensors(read_parts(folder, checkpoint.OPTIMIZER, parameters), optimizer)
        copy_tensors(parameters, tensors, weights)
        if state.scaler:
            step.scaler.load_state_dict(state.scaler)
        return state

    def finish(self, sample: str) -> None:
        """Writes sample.txt, and draws loss.png from the log."""
        with self._writing():
            with replacing(self.path / SAMPLE) as file:
                file.write(f"{sample}\n".encode())
            plot_log(self.path / LOG, self.path / PLOT)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an OSError into the error that a command reports."""
        try:
            yield
        except OSError as error:
            raise cannot_write("out", self.path, error) from error


def _sign(handle: int) -> None:
    """Writes which process this is into the file of the lock."""
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _next_folder(parent: Path) -> Path:
    """`parent`/N, where N is one more than the largest N in `parent`."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    return parent / str(max(taken, default=0) + 1)


def _check_same_run(folder: Path, state: RunState, model: GPT, data: TokenData) -> None:
    """Raises InputError unless the checkpoint in `folder` was saved with the same model config and data."""
    if state.identity != data.identity:
        raise InputError(f"resume: the text or the tokenizer is not the one that {folder} was trained on")
    saved, config = read_json(folder / checkpoint.CONFIG), model.config.to_dict()
    for name in config:
        if name not in saved:
            raise InputError(f"resume: {folder / checkpoint.CONFIG} lacks {name!r}, expected this version's")
        if saved[name] != config[name]:
            raise InputError(f"resume: {name} is {config[name]!r}, expected {saved[name]!r} as in {folder}")
