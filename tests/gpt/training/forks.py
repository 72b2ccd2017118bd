"""Forked processes that train together, one for each rank, as torchrun starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.scorecard.crash_trials import Child, Ended

LIMIT = 120.0  # seconds
needs_fork = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the ranks are forked, on Linux")


def fork_ranks(run: Callable[[int], int | None], size: int, folder: Path, **variables: str) -> list[Child]:
    """Starts `size` processes.

    Args:
        run: What a process does; the argument is its rank, the result its exit code, or None for 0.
        size: The number of ranks.
        folder: Where the output goes; it is made.
        variables: More of the environment.
    """
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), **variables}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))

    def act(rank: int) -> int | None:
        os.environ.update(common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)))
        return run(rank)

    return [Child(partial(act, rank), folder / f"rank-{rank}") for rank in range(size)]


def wait_for(ranks: list[Child]) -> list[Ended]:
    """How the ranks ended; those that are left after LIMIT are killed."""
    return [rank.wait(LIMIT) for rank in ranks]


def check_succeeded(ranks: list[Child]) -> None:
    """Waits for the ranks.

    Raises:
        AssertionError: One of them failed.
    """
    for number, ended in enumerate(wait_for(ranks)):
        assert ended.code == 0, f"rank {number} ended with {ended.code}: {ended.errors[-3000:]}"
