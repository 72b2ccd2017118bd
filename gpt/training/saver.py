"""Saving the checkpoints of a run: at once, or in the background where its parameters are sharded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gpt.data.tokenizers import Tokenizer
from gpt.errors import NonFiniteError
from gpt.model import GPT
from gpt.training.distributed import Ranks
from gpt.training.run_folder import RunFolder
from gpt.weights import checkpoint
from gpt.weights.sharded import finish_shards, write_shards
from gpt.weights.tensors import check_finite


class Saver:
    """Saves checkpoints of a run, one at a time. Every rank makes the same calls.

    If each rank has the whole model, rank 0 saves it at once. The ranks of a sharded run copy their shards to
    the CPU, write them while training goes on, and rank 0 then completes the checkpoint. They must share the
    file system of the run's folder.

    Args:
        folder: The run's folder.
        ranks: The processes of the run.
        newest: The checkpoint from which the run resumes, if any.
        sharded: Whether the parameters are DTensors.

    Attributes:
        newest: The newest complete checkpoint.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, newest: Path | None, *, sharded: bool) -> None:
        self.newest = newest
        self._folder, self._ranks, self._sharded = folder, ranks, sharded
        self._saving: tuple[Future[None], Path] | None = None
        # A thread and a process group of its own: what a save exchanges cannot mix with the training's.
        self._background: tuple[ThreadPoolExecutor, dist.ProcessGroup] | None = None

    def save(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: int | None,
        loss: float,
        timer: AbstractContextManager[object],
    ) -> None:
        """Saves a checkpoint with `state` as its state.json, or begins to: `finish` waits for its end.

        The checkpoint of step `best` is kept besides the newest ones. `loss` is the loss after the last step,
        on each rank. `timer` is entered for as long as the save takes.

        Raises:
            NonFiniteError: The loss, a weight, or a value of the optimizer is infinite or NaN. Nothing is
                written.
            InputError, MachineError: This checkpoint, or the one before it, cannot be written. Earlier ones
                are unchanged.
        """
        self.finish()
        if self._sharded:
            _reshard(model)
        with self._ranks.agreement():
            if not math.isfinite(loss):
                # If a weight is the reason, the message names it.
                check_finite(dict(model.named_parameters()), "the model")
                raise NonFiniteError(f"the loss after the step is {loss}")
            if self._sharded:
                checkpoint.check_savable(model, optimizer)
        if not self._sharded:
            with timer:
                save = partial(self._folder.save, model, tokenizer, optimizer, state, best=best)
                self.newest = self._ranks.on_first(save)
            return

        if self._background is None:
            self._background = ThreadPoolExecutor(1, "checkpoint"), dist.new_group(backend="gloo")
        thread, group = self._background
        block = ExitStack()
        block.enter_context(timer)
        new = self._folder.new_checkpoint(model, tokenizer, state, best=best)
        folder = self._ranks.on_first(partial(block.enter_context, new))
        written = write_shards({**dict(model.named_parameters()), **optimizer}, folder, group)
        path = checkpoint.step_folder(self._folder.path, state["step"])
        self._saving = thread.submit(_complete, block, written), path

    def finish(self) -> None:
        """Waits until the checkpoint that is being saved is complete.

        Raises:
            InputError, MachineError: It could not be written. Earlier ones are unchanged.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            completed, path = saving
            wait([completed])
            self._ranks.on_first(completed.result)
            self.newest = path

    def close(self) -> None:
        """Waits for this rank's part of a save, without the other ranks: they may have failed."""
        if self._background is not None:
            thread, group = self._background
            self._background = None
            thread.shutdown()
            dist.destroy_process_group(group)


def _reshard(model: GPT) -> None:
    """Makes DTensors of the parameters outside the blocks, which an evaluation leaves gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _complete(block: ExitStack, written: Future[Any]) -> None:
    """Ends the block of a new checkpoint once all ranks have written their shards."""
    with block:
        finish_shards(written)
