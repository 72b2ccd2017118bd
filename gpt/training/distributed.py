"""The few lines between the trainer and torch.distributed: what the processes of one `torchrun` say to one
another.

Small objects travel through gloo, tensors through the backend of their device: NCCL for CUDA, gloo for the
CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from gpt.config import TrainConfig
from gpt.errors import InputError

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(
    days=1
)  # the others wait for what rank 0 does alone; whom a dead process leaves waiting, torchrun ends
BUCKET = 1 << 24  # numbers that are summed at a time


class SharedError(InputError):
    """The InputError of one rank, raised by all."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; the methods with an underscore work in place, as torch's do.

    Every rank makes the same calls in the same order. A single process makes them too, and they then do
    nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def check(self, config: TrainConfig) -> None:
        """Raises InputError where the ranks cannot share a step's micro-batches, or have no device each."""
        if self.size == 1:
            return
        if config.grad_accum % self.size:
            fitting = -(-config.grad_accum // self.size) * self.size
            raise InputError(
                f"grad_accum is {config.grad_accum}, expected a multiple of {self.size}, the processes to "
                "which a step's "
                f"micro-batches are dealt (--grad_accum {fitting}; a step has batch_size times grad_accum "
                "sequences in all)"
            )
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in ("cpu", "cuda", f"cuda:{self.local_rank}"):
            raise InputError(
                f"device is {device!r}, expected cpu or cuda: process {self.rank} has cuda:{self.local_rank}"
            )
        if device != "cpu" and self.local_size > (gpus := torch.cuda.device_count()):
            raise InputError(
                f"torchrun: --nproc_per_node is {self.local_size}, expected at most {gpus}, the GPUs here"
            )

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Items rank, rank + size, rank + 2 size, …"""
        return islice(items, self.rank, None, self.size)

    def gather(self, value: T) -> list[T]:
        """The ranks' values, in their order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, the only one that calls it.

        Raises:
            InputError: As `function` there.
        """
        with self.agreement():
            value = function() if self.rank == 0 else None
        return self.gather(value)[0]  # type: ignore[return-value]

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Ends together: an InputError of one rank is raised by all, the lowest rank's if they differ. No
        collectives within."""
        if self.size == 1:
            yield
            return
        failure = None
        try:
            yield
        except InputError as error:
            failure = str(error)
        if failures := [message for message in self.gather(failure) if message is not None]:
            raise SharedError(failures[0])

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A machine's first rank goes before its others, who find in the caches what it made."""
        if self.local_rank:
            self.gather(None)
        try:
            yield
        finally:
            if not self.local_rank:
                self.gather(None)

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces tensors of one dtype and device by their sums over the ranks, the same bits on each."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(total.view_as(t))

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces tensors by rank 0's."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)


ALONE = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """Meets the other processes of a `torchrun`, if this is one of several; "cuda" is then the GPU of its
    LOCAL_RANK.

    Rank 0 alone speaks: what the others print is dropped, and a SharedError ends them in silence with exit
    code 2. Any other exception ends one process, and torchrun the rest.

    Raises:
        InputError: WORLD_SIZE is above 1, and other variables that torchrun sets are missing.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} without {missing[0]}, expected both, as torchrun "
            "sets them"
        )
    ranks = Ranks(*(int(os.environ[name]) for name in VARIABLES[:4]))
    if ranks.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local_rank)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    try:
        with _silence() if ranks.rank else nullcontext():
            yield ranks
    except SharedError:
        _leave(ranks)
        if ranks.rank:
            raise SystemExit(2) from None
        raise
    _leave(ranks)


def _leave(ranks: Ranks) -> None:
    """Ends the connection once all are here: torchrun stops the others as soon as one process has failed."""
    ranks.gather(None)
    dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    """Drops what is printed, but for the traceback of an exception that leaves it."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """`tensors` in order, in lists that end with the tensor by which they reach BUCKET numbers."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
