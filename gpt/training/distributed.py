"""Training in several processes that `torchrun` starts: sharing work, exchanging values, and joint errors.

Python objects are exchanged through gloo, tensors through the backend of their device: NCCL for CUDA, gloo
for the CPU.
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from gpt.config import TrainConfig
from gpt.errors import InputError, MachineError, ReportedError, first_line, shown
from gpt.training.lost_ranks import lost_ranks_named

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT, DEFAULT_TIMEOUT = "FUSED_GPT_RANK_TIMEOUT", "1800"  # seconds that a rank waits for another one
PREPARING = timedelta(days=1)  # the longest that the first rank of a machine may take to prepare the data
PRINTING = 2.0  # seconds for rank 0 to print an error, before the end of others lets torchrun end it
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun sets it


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of its processes sees them.

    Every rank must make the same calls in the same order. In a run of one process the calls do nothing.

    Attributes:
        rank: This process, from 0.
        size: The number of processes.
        local_rank: This process among those on its machine, from 0.
        local_size: The number of processes on its machine.
        store: What torchrun keeps while it restarts processes; None without it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Store | None = None

    def check(self, config: TrainConfig) -> None:
        """Raises InputError if the micro-batches or the devices cannot be divided among the ranks."""
        if self.size == 1:
            return
        if config.grad_accum % self.size:
            fitting = -(-config.grad_accum // self.size) * self.size
            raise InputError(
                f"grad_accum is {config.grad_accum}, expected a multiple of {self.size}, the number of "
                f"processes (--grad_accum {fitting}; a step has batch_size times grad_accum sequences in all)"
            )
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if config.shard_size is not None and (config.parallel != "fsdp" or self.size % config.shard_size):
            raise InputError(
                f"shard_size is {config.shard_size} with --parallel {config.parallel}, expected a divisor of "
                f"{self.size}, the number of processes, with --parallel fsdp"
            )
        if device not in ("cpu", "cuda", f"cuda:{self.local_rank}"):
            raise InputError(
                f"device is {device!r}, expected cpu or cuda: process {self.rank} uses cuda:{self.local_rank}"
            )
        if device != "cpu" and self.local_size > (gpus := torch.cuda.device_count()):
            raise InputError(
                f"torchrun: --nproc_per_node is {self.local_size}, expected at most {gpus}, the GPUs of this "
                "machine"
            )

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """This rank's share of `items`: those at index rank, rank + size, rank + 2 size, and so on."""
        return islice(items, self.rank, None, self.size)

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The values of all ranks, in rank order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group)
        return values

    def note(self, name: str, value: str) -> None:
        """Keeps a value for the processes that torchrun starts again if one of these fails."""
        if self.store is not None and self.rank == 0:
            self.store.set(f"fused-gpt/{name}", value)

    def noted(self, name: str) -> str | None:
        """The value that the processes before torchrun's last restart have kept, if any."""
        if self.store is None or not self.store.check([f"fused-gpt/{name}"]):
            return None
        return self.store.get(f"fused-gpt/{name}").decode()

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 alone; returns its result on every rank.

        Raises:
            ReportedError: On every rank, if `function` raised it.
        """
        with self.agreement():
            value = function() if self.rank == 0 else None
        return self.gather(value)[0]  # type: ignore[return-value]

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Raises InputError on every rank if a value differs from rank 0's. The message names the first."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, start=1):
            for name in first:
                if (value := theirs.get(name)) != first[name]:
                    raise _shared(
                        InputError(f"rank {rank}: {name} is {value!r}, expected {first[name]!r} as on rank 0")
                    )

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Raises a ReportedError of one rank on every rank at the end of the block, as `shared`.

        If several ranks fail, the error of the lowest counts. The block must not exchange values.
        """
        if self.size == 1:
            yield
            return
        failure = None
        try:
            yield
        except ReportedError as error:
            failure = type(error), str(error)
        if failures := [failure for failure in self.gather(failure) if failure is not None]:
            kind, message = failures[0]
            raise _shared(kind(message))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Runs the block on the first rank of each machine before the others, which then use its caches."""
        group = dist.new_group(backend="gloo", timeout=PREPARING) if self.size > 1 else None
        if self.local_rank:
            self.gather(None, group)
        try:
            yield
        finally:
            if not self.local_rank:
                self.gather(None, group)


ALONE = Ranks()


def _shared(error: ReportedError) -> ReportedError:
    error.shared = True
    return error


@contextmanager
def join() -> Iterator[Ranks]:
    """Connects to the other processes of a `torchrun`, if there are any; "cuda" becomes GPU LOCAL_RANK.

    Only rank 0 prints: the output of the others is dropped, and a shared ReportedError ends them silently
    with its exit code. Any other exception ends its process, and the others then name its rank.

    Raises:
        InputError: WORLD_SIZE is above 1, but other variables that torchrun sets are missing; or
            FUSED_GPT_RANK_TIMEOUT is not a number of seconds.
        MachineError: A rank has ended, or another one has waited for it for FUSED_GPT_RANK_TIMEOUT seconds.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(store=_store(0, _timeout())) if dist.is_torchelastic_launched() else ALONE
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} without {missing[0]}, expected both, as torchrun "
            "sets them"
        )

    # Its functions have the default group of the moment of its import as a default argument. torch._dynamo
    # imports it; if there were a group by then, the group and its threads would live until the interpreter
    # exits, where a thread that drops its last tensor aborts the process.
    import torch.distributed.nn

    rank, size, local_rank, local_size = (int(os.environ[name]) for name in VARIABLES[:4])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    try:
        with _silence() if rank else nullcontext():
            timeout = _timeout()
            store = _store(rank, timeout)
            ranks = Ranks(rank, size, local_rank, local_size, store)
            with lost_ranks_named(rank, size, store), _connection(ranks, store, timeout):
                yield ranks
    except ReportedError as error:
        _write_error_file(error)
        if error.shared and rank:
            time.sleep(PRINTING)
            raise SystemExit(error.exit_code) from None
        raise


def _store(rank: int, timeout: timedelta) -> Store:
    """The store of torchrun; without it, the one that rank 0 keeps for the others."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(host, port, is_master=server, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    except dist.DistError as error:
        failure = MachineError(f"rank 0 is not at {host}:{port}: {first_line(error)}")
        failure.shared = rank > 1  # ranks 0 and 1 print it
        raise failure from error


def _timeout() -> timedelta:
    """How long a rank waits for another one."""
    text = os.environ.get(TIMEOUT, DEFAULT_TIMEOUT)
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII):
        raise _shared(InputError(f"{TIMEOUT} is {shown(text)}, expected seconds, as in {DEFAULT_TIMEOUT}"))
    return timedelta(seconds=int(text))


@contextmanager
def _connection(ranks: Ranks, store: Store, timeout: timedelta) -> Iterator[None]:
    """Connects the ranks, and at the end of the block, or after a shared error, disconnects them."""
    # torchrun's store still has the addresses of the processes that it has restarted. The number of restarts
    # separates them; on several machines it may differ between processes, so it is not used there.
    restarts = os.environ.get(RESTARTS, "0") if ranks.size == ranks.local_size else "0"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
        store=dist.PrefixStore(restarts, store),  # type: ignore[attr-defined]
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timeout,
    )
    try:
        yield
    except ReportedError as error:
        if error.shared:
            _leave(ranks)
        raise
    _leave(ranks)


def _write_error_file(error: ReportedError) -> None:
    """Writes the message where torchrun looks for what it prints about a process that has failed."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))


def _leave(ranks: Ranks) -> None:
    """Disconnects when all ranks are ready: torchrun stops the others as soon as one process fails.

    The end of the process group joins its threads, unless something else still refers to the group, as a
    model that DDP wrapped may do.
    """
    ranks.gather(None)
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    """Drops all output of the block. The traceback of an exception that leaves it is still printed."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield
