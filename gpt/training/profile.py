"""Profiling: a Chrome trace of a few calls or steps, and a table of the ops that take the longest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity

from gpt.errors import cannot_write
from kernels.files import replacing

TRACE = "trace.json"
FIRST, LAST = 3, 5  # the steps of a process that are profiled: the ones before compile, allocate and capture
ROWS = 10


class StepProfile:
    """Profiles the steps FIRST to LAST of a run, or those of them that it takes before it ends.

    Args:
        path: The trace; None profiles nothing.
        device: Where the steps run.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path, self._device = path, device
        self._open = ExitStack()
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def next_step(self) -> None:
        """To be called before each step is queued."""
        self._step += 1
        if self._path is not None and self._step == FIRST:
            self._open.enter_context(profiling(self._path, self._device))
        if self._step == LAST + 1:
            self._open.close()


@contextmanager
def profiling(path: Path, device: torch.device) -> Iterator[None]:
    """Writes a Chrome trace of the block to `path`, and prints the ops that take the longest.

    On a GPU these are its kernels, else the ops of the CPU, without the ops that they call.

    Raises:
        InputError, MachineError: The trace cannot be written.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    _synchronise(device)
    # torch 2.11 warns without acc_events, although this profile has a single cycle.
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        yield
        _synchronise(device)

    try:
        with replacing(path) as file:
            profiler.export_chrome_trace(file.name)
    except OSError as error:
        raise cannot_write("profile", path, error) from error
    _show(f"{_table(profiler, on_gpu=on_gpu)}\nwrote {path}")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(profiler: torch.profiler.profile, *, on_gpu: bool) -> str:
    """The ROWS longest ops: their share of the time of all, their time and their calls."""
    rows = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if not on_gpu or (event.device_type.name == "CUDA" and not event.is_user_annotation)
    ]
    total = sum(time for time, *_ in rows) or 1.0
    longest = sorted(rows, reverse=True)[:ROWS]
    return "\n".join(
        [
            f"profile: {total / 1e3:,.1f} ms on the {'GPU' if on_gpu else 'CPU'}",
            f"{'share':>7}{'ms':>10}{'calls':>8}  {'kernel' if on_gpu else 'op'}",
            *(
                f"{time / total:>7.1%}{time / 1e3:>10,.2f}{calls:>8}  {key[:53]}"
                for time, calls, key in longest
            ),
        ]
    )


def _show(text: str) -> None:
    """Prints above a progress bar, if there is one."""
    from tqdm import tqdm

    tqdm.write(text)
