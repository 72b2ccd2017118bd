"""The files of a run: log.jsonl, checkpoints, loss.png, sample.txt, and the batches of a step that failed.

One process at a time writes them: it holds a lock on a file of the folder. The kernel frees the lock when the
process ends, however it ends. Readers need no lock.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gpt.data.dataset import Batch, TokenData
from gpt.data.tokenizers import Tokenizer
from gpt.errors import InputError, cannot_write
from gpt.files import read_json, read_regular
from gpt.model import GPT
from gpt.training import rng
from gpt.training.plot import plot_log
from gpt.training.step import TrainStep
from gpt.weights import checkpoint
from kernels.files import replacing

if TYPE_CHECKING:
    from filelock import FileLock

LOG, PLOT, SAMPLE, LOCK = "log.jsonl", "loss.png", "sample.txt", ".lock"
RUNS = Path("runs")

# Errors of a file system that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and saves
    best_loss: float = math.inf  # lowest validation loss of an evaluation
    evaluations_since_best: int = 0

    def to_state(self) -> dict[str, Any]:
        """The entries of state.json."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best_loss if math.isfinite(self.best_loss) else None,
            "worse": self.evaluations_since_best,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Reads what `to_state` returned; KeyError if an entry is missing."""
        return cls(
            step=int(state["step"]),
            tokens=int(state["tokens"]),
            seconds=float(state["seconds"]),
            best_loss=math.inf if state["best"] is None else float(state["best"]),
            evaluations_since_best=int(state["worse"]),
        )


class Restored(NamedTuple):
    """A loaded checkpoint, besides its tensors: the folder, the progress, and one random state per rank."""

    folder: Path
    progress: Progress
    random_states: Sequence[rng.State]


class RunFolder:
    """The folder of one run. The methods that write are for rank 0 alone.

    Args:
        path: The folder, which `claim` creates. None is the first free number in `runs`, when it is created.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._numbered = path is None
        self.path = _next_folder(RUNS) if path is None else path
        self._lock: FileLock | None = None

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
        """Which process holds the lock, as it wrote into the file of the lock."""
        try:
            text = read_regular(self.path / LOCK, "out", 1000).decode("utf-8", "replace")
        except InputError:
            text = ""
        return " ".join(text.split()) or "another process"

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

    def check(self, model: GPT, *, resume: bool) -> None:
        """Checks, without writing, that the folder can take a run of `model`.

        Raises:
            InputError: The path is not a folder, holds another run, is not writable or has too little space.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out: {self.path} is not a folder, expected one to write to")
        if not resume:
            self._check_new()

        parent = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        if not os.access(parent, os.W_OK):
            raise InputError(f"out: cannot write to {parent}, expected a writable folder")
        checkpoint_bytes = 3 * sum(p.nbytes for p in model.parameters())  # weights and AdamW's two averages
        needed = (checkpoint.KEPT + 1) * checkpoint_bytes
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise InputError(
                f"out: {parent} has {free / 1e6:,.0f} MB free, expected {needed / 1e6:,.0f} MB for the "
                "checkpoints"
            )

    def prepare(self, step: int, *, keep_final: bool) -> None:
        """Truncates the log to `step`, where the run starts or resumes, and sets later checkpoints aside.

        Args:
            step: The step of the checkpoint that the run resumes from, or 0.
            keep_final: Keep the final record too: there is nothing left to train.

        Raises:
            InputError: The folder cannot be written.
        """
        with self._writing():
            checkpoint.clean(self.path, step)
            log = self.path / LOG
            lines = log.read_text("utf-8").splitlines(keepends=True) if log.exists() else []
            kept = [line for line in lines if _is_kept(line, step, keep_final)]
            with replacing(log) as file:
                file.write("".join(kept).encode("utf-8"))

    def append_log(self, record: Mapping[str, Any]) -> None:
        """Appends one record to log.jsonl; numbers that are not finite become null."""
        line = json.dumps(_finite(record)) + "\n"
        with self._writing(), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(line)

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
            checkpoint.write_tensors(path, tensors)
        return path

    def save(
        self, model: GPT, tokenizer: Tokenizer, optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Saves a checkpoint with `state` as its state.json, and returns the checkpoint's folder.

        Raises:
            InputError: The checkpoint cannot be written. Earlier ones are unchanged.
        """
        return checkpoint.save_checkpoint(
            self.path, state["step"], model, tokenizer, optimizer=optimizer, state=state
        )

    def restore(self, model: GPT, step: TrainStep, data: TokenData) -> Restored:
        """Loads the newest valid checkpoint into `model` and `step`.

        Raises:
            InputError: There is none, or it belongs to another text, tokenizer, model or version.
        """
        folder = checkpoint.find_checkpoint(self.path)
        state = read_json(folder / checkpoint.STATE)
        try:
            _check_same_run(folder, state, model, data)
            progress = Progress.from_state(state)
            random_states = [{name: saved[name] for name in ("cpu", "cuda")} for saved in state["rng"]]
            weights, optimizer = folder / checkpoint.MODEL, folder / checkpoint.OPTIMIZER
            checkpoint.copy_tensors(dict(model.named_parameters()), checkpoint.read_tensors(weights), weights)
            step.load_tensors(checkpoint.read_tensors(optimizer), optimizer)
            if state["scaler"]:
                step.scaler.load_state_dict(state["scaler"])
        except KeyError as error:
            raise InputError(f"resume: {folder} lacks {error}, expected a run of this version") from error
        return Restored(folder, progress, random_states)

    def finish(self, sample: str) -> None:
        """Writes sample.txt, and draws loss.png from the log."""
        with self._writing():
            (self.path / SAMPLE).write_text(sample + "\n", encoding="utf-8")
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


def _check_same_run(folder: Path, state: Mapping[str, Any], model: GPT, data: TokenData) -> None:
    """Raises InputError unless the checkpoint in `folder` was saved with the same model config and data."""
    if not isinstance(state["rng"], list):
        raise InputError(
            f"resume: {folder / checkpoint.STATE} has as rng a {type(state['rng']).__name__}, expected a "
            "list with one state per process"
        )
    if state["data_identity"] != data.identity:
        raise InputError(f"resume: the text or the tokenizer is not the one that {folder} was trained on")
    saved, config = read_json(folder / checkpoint.CONFIG), model.config.to_dict()
    for name in config:
        if saved[name] != config[name]:
            raise InputError(f"resume: {name} is {config[name]!r}, expected {saved[name]!r} as in {folder}")


def _finite(value: Any) -> Any:
    """`value` with None for every float that is not finite, because JSON has no NaN or infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_kept(line: str, step: int, keep_final: bool) -> bool:
    """Whether a line of an earlier log belongs to the run up to `step`. A half-written line does not."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return record["step"] <= step and (keep_final or not record.get("final"))
