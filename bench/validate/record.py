"""Runs the launches of `bench.validate.cases` in Triton's interpreter and records their tensors.

`bench.validate` does this in a process of its own: interpreted and compiled kernels cannot share a process.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.validate.cases import HALF, Sample, samples
from kernels import tolerance, tuning
from kernels.tuning import Tile


@dataclass(frozen=True)
class Buffer:
    """The storage of a tensor argument, before and after a launch."""

    before: np.ndarray
    after: np.ndarray
    address: int  # of the tensor's first element
    base: int  # of the storage
    dtype: torch.dtype


@dataclass(frozen=True)
class Recorded:
    """A launch with its arguments, and what the interpreter made of its tensors."""

    op: str
    label: str
    module: str  # that defines the kernel
    kernel: str
    grid: tuple[int, ...]
    tile: Tile
    arguments: dict[str, Any]  # those that are not tensors
    buffers: dict[str, Buffer]
    reference: float  # the sample's largest error against plain PyTorch over what kernels/tolerance.py allows


def _storage(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


def record(sample: Sample) -> list[Recorded]:
    """Runs the launches of a sample, and records the storages of their tensors before and after each one."""
    launches = []
    for launch in sample.launches:
        tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
        storages = {name: _storage(x) for name, x in tensors.items()}
        before = {name: storage.numpy().copy() for name, storage in storages.items()}
        launch.run()
        buffers = {
            name: Buffer(
                before[name], storages[name].numpy().copy(), x.data_ptr(), storages[name].data_ptr(), x.dtype
            )
            for name, x in tensors.items()
        }
        others = {name: x for name, x in launch.arguments.items() if name not in tensors}
        launches.append((launch, others, buffers))

    worst = compare(sample)
    return [
        Recorded(
            op=sample.op,
            label=sample.label,
            module=launch.kernel.fn.__module__,
            kernel=launch.kernel.fn.__name__,
            grid=launch.grid,
            tile=launch.tile,
            arguments=others,
            buffers=buffers,
            reference=worst,
        )
        for launch, others, buffers in launches
    ]


def compare(sample: Sample) -> float:
    """The largest error of a sample's results against plain PyTorch, over what the package's rule allows."""
    narrow, wide = sample.expected(HALF), sample.expected(torch.float64)
    scale = max(x.abs().max().item() for x in wide.values())
    verdicts = [
        tolerance.compare(name, y, narrow[name].to(y.dtype), wide[name], dtype=HALF, scale=scale)
        for name, y in sample.actual.items()
    ]
    return max(max(verdict.max_ratio, verdict.rms_ratio) for verdict in verdicts)


def write(path: str, architecture: str, *ops: str) -> None:
    """Records the samples of `ops` in a pickle file. The process has started with TRITON_INTERPRET=1."""
    # torch.empty then gives NaN, so that an element that a kernel should fill and does not is seen.
    torch.use_deterministic_algorithms(True)
    tuning.starts_early = lambda architecture: False  # the interpreter runs one launch after another
    distinct: dict[str, Recorded] = {}
    for op in ops:
        for sample in samples(op, int(architecture)):
            for launch in record(sample):
                if sample.only in launch.kernel:
                    distinct.setdefault(_identity(launch), launch)
    Path(path).write_bytes(pickle.dumps(list(distinct.values())))


def _identity(recorded: Recorded) -> str:
    """Equal for launches that compile to the same code and run on the same values."""
    kernel = (recorded.module, recorded.kernel, recorded.grid, recorded.tile, recorded.arguments)
    return repr(
        (
            kernel,
            [
                (name, buffer.dtype, hash(buffer.before.tobytes()))
                for name, buffer in recorded.buffers.items()
            ],
        )
    )
