"""What is left of a run after one of its processes ends or hangs: an error that names its rank."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING

import torch.distributed as dist

from gpt.errors import MachineError, first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

ANSWERS = 10.0  # seconds that ranks have to answer after an exchange between ranks has failed
HURRIED = 1.0  # the same after SIGTERM, with which torchrun ends those that are left
ANSWER = "fused-gpt/answer"  # begins the keys with which they answer


@contextmanager
def lost_ranks_named(rank: int, size: int, store: Store) -> Iterator[None]:
    """Turns the failure of an exchange between ranks in the block into an error that names who is missing.

    One of the ranks that are left prints it.

    Raises:
        MachineError: A rank has ended, or another one has waited for it for the timeout of the group.
    """
    store.delete_key(f"{ANSWER}/{rank}")  # of a process before a restart
    try:
        yield
        return
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the process group
        reason = first_line(error)

    ends: list[float] = []
    handler = signal.signal(signal.SIGTERM, lambda *_: ends.append(monotonic() + HURRIED))
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # closes the connections, so that ranks that wait for this one notice too
    ends.append(monotonic() + ANSWERS)
    lost = sorted(_lost(rank, size, store, ends))
    signal.signal(signal.SIGTERM, handler)
    if rank == 0:
        sleep(0.5)  # without torchrun, rank 0 keeps the store, in which the others may still look
    if len(lost) > 1:
        message = f"ranks {', '.join(map(str, lost))} of {size} do not answer: they have ended or hang"
    elif lost:
        message = f"rank {lost[0]} of {size} does not answer: it has ended or hangs"
    else:
        message = f"an exchange between ranks failed, though all {size} answer: {reason}"
    failure = MachineError(message)
    failure.shared = rank != min(set(range(size)) - {*lost})
    raise failure


def _lost(rank: int, size: int, store: Store, ends: Sequence[float]) -> set[int]:
    """The ranks that do not call this too, before the first time in `ends`."""
    answers = set[int]()

    def ask() -> None:
        """Writes this rank's key into the store, and looks for those of the others."""
        with suppress(OSError, RuntimeError):
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 1).close()
            store.set(f"{ANSWER}/{rank}", "")
            while True:
                answers.update(r for r in range(size) if store.check([f"{ANSWER}/{r}"]))
                if len(answers) == size or monotonic() > min(ends):
                    return
                sleep(0.1)

    thread = threading.Thread(target=ask, daemon=True)  # it never ends if the store hangs
    thread.start()
    thread.join(ANSWERS + 1)
    return set(range(size)) - answers if answers else {0}
