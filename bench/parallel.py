"""`python -m bench.parallel`: what a training step of several processes costs, against one process.

Weak scaling: every process takes a micro-batch of the same size. The lanes take turns, one step each:

- one process: process 0 takes a step alone, while the others sleep.
- apart: all processes take steps of their own at the same time. The difference to one process is what they
  share on a machine, such as the bandwidth of its memory.
- plain DDP: a loop of PyTorch alone, DDP, clipping and AdamW, with the same model.
- ddp, fsdp: all processes take a step of the trainer together. The difference of ddp to plain DDP is what the
  trainer costs, the difference to apart is what the engine and the exchange cost.

Under the profiler, it then counts how many of DDP's sums over the processes are started, and how many have
ended, before the last gradient of the backward pass is there. At the end it saves a checkpoint of the fsdp
lane twice, in a temporary folder, and times the second save: until training would go on, and until the
checkpoint is complete. No training goes on beside it.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import kernels.files
from bench.machine import describe
from bench.table import duration, size
from gpt.cli import OptionParser, option, run_command
from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import Batch
from gpt.data.tokenizers import CharTokenizer
from gpt.device import autocast, autocast_dtype
from gpt.errors import InputError, cannot_write
from gpt.files import user_path
from gpt.model import GPT
from gpt.training import distributed
from gpt.training.distributed import ALONE, Ranks
from gpt.training.parallel import BUCKET_MB, parallelize
from gpt.training.run_folder import RunFolder
from gpt.training.saver import Saver
from gpt.training.step import TrainStep

LANES = ("one process", "apart", "plain DDP", "ddp", "fsdp")
ENGINES = LANES[3:]
WARM_UP = 3  # steps of each lane that are not timed
CALL, SUM, LAST = "c10d::allreduce_", "gloo:all_reduce", "AccumulateGrad"  # profiler events, on a CPU


@dataclass(frozen=True)
class Options:
    """Flags."""

    processes: int = option(2, "processes; on a GPU one for each GPU", low=2)
    preset: str = option("char-cpu", "of the model")
    batch_size: int = option(64, "sequences of each process in a step", low=1)
    steps: int = option(30, "timed steps of each lane", low=1)
    json: str | None = option(None, "write every figure to this file")


@dataclass(frozen=True)
class Figures:
    """What process 0 measured: the median seconds of a step by lane, a sharded save, and DDP's sums."""

    seconds: dict[str, float]
    saved: tuple[int, float, float]  # bytes; seconds until training goes on; until the checkpoint is complete
    sums: int = 0
    started: int = 0  # sums that were started before the last gradient was there
    ended: int = 0  # sums that had ended by then


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.parallel", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    config = replace(GPTConfig.preset(options.preset), dropout=0.0)
    gpus = torch.cuda.device_count()
    if 0 < gpus < options.processes:
        raise InputError(f"--processes is {options.processes}, expected at most {gpus}, the number of GPUs")
    path = None if options.json is None else user_path(options.json, "--json")

    figures = _run(options, config)
    machine = describe(torch.device("cuda" if gpus else "cpu"))
    print(report(options, figures))
    if path is not None:
        content = {"machine": asdict(machine), "options": asdict(options), "figures": asdict(figures)}
        try:
            kernels.files.write_json(path, content, indent=1)
        except OSError as error:
            raise cannot_write("--json", path, error) from error
    return 0


def report(options: Options, figures: Figures) -> str:
    """The table of the lanes, and the overlap of DDP."""
    rows = [
        f"{lane:<14}{duration(seconds):>10}"
        + "".join(f"{seconds / figures.seconds[base] - 1:>+15.1%}" for base in LANES[: min(number, 3)])
        for number, (lane, seconds) in enumerate(figures.seconds.items())
    ]
    title = (
        f"{options.processes} processes, {options.preset}, {options.batch_size} sequences in each; medians "
        f"of {options.steps} steps"
    )
    nbytes, blocked, complete = figures.saved
    lines = [title, "", f"{'':<14}{'step':>10}" + "".join(f"{'to ' + base:>15}" for base in LANES[:3]), *rows]
    lines.append(
        f"\nfsdp: a checkpoint of {size(nbytes)} blocks training for {duration(blocked)}, "
        f"and is complete after {duration(complete)}"
    )
    if figures.sums:
        lines.append(
            f"DDP: {figures.started} of {figures.sums} sums are started, {figures.ended} have ended, "
            "before the last gradient is there"
        )
    return "\n".join(lines)


def _run(options: Options, config: GPTConfig) -> Figures:
    """Starts the processes, and returns what process 0 measured."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context: Any = get_context("spawn")
    queue = context.SimpleQueue()
    spawn(_work, (options, config, port, queue), options.processes)
    figures: Figures = queue.get()
    return figures


def _work(rank: int, options: Options, config: GPTConfig, port: int, queue: Any) -> None:
    """One of the processes."""
    size = options.processes
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ |= {name: str(v) for name, v in zip(names, (rank, size, rank, size, port), strict=True)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    with distributed.join() as ranks:
        figures = _measure(options, config, ranks)
        if not rank:
            queue.put(figures)


def _measure(options: Options, config: GPTConfig, ranks: Ranks) -> Figures:
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    generator = torch.Generator().manual_seed(ranks.rank)
    ids = torch.randint(
        config.vocab_size, (options.batch_size, config.block_size + 1), generator=generator
    ).to(device)
    batches = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]

    steps = {LANES[2]: _plain(GPT(config).to(device), batches[0])}
    for lane in LANES[:2] + ENGINES:
        train = TrainConfig(grad_accum=ranks.size, parallel=lane if lane in ENGINES else "ddp")
        model, together = GPT(config), ranks if lane in ENGINES else ALONE
        step = TrainStep(model, train, parallelize(model, device, train, together), together)
        steps[lane] = partial(step, batches, rate=1e-4)

    samples: dict[str, list[float]] = {lane: [] for lane in LANES}
    for number in range(WARM_UP + options.steps):
        for lane in LANES:
            dist.barrier()
            started = time.perf_counter()
            if ranks.rank == 0 or lane != LANES[0]:
                steps[lane]()
            dist.barrier()  # the slowest process counts
            if number >= WARM_UP:
                samples[lane].append(time.perf_counter() - started)
    seconds = {lane: statistics.median(times) for lane, times in samples.items()}
    saved = _save(model, step, ranks)  # of the last lane, fsdp
    return Figures(seconds, saved, *(overlap(steps["ddp"]) if device.type == "cpu" else ()))


def _plain(model: GPT, batch: Batch) -> Callable[[], object]:
    """A step of PyTorch's own loop: DDP, clipping, AdamW, and the loss on the host."""
    module = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with autocast(autocast_dtype("auto", model.device), model.device):
            loss = module(batch.inputs, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _save(model: GPT, step: TrainStep, ranks: Ranks) -> tuple[int, float, float]:
    """What the second save of a sharded model and its optimizer's state takes: see `Figures.saved`."""
    with tempfile.TemporaryDirectory() if ranks.rank == 0 else nullcontext("") as name:
        folder = Path(ranks.gather(name)[0])
        saver = Saver(RunFolder(folder), ranks, None, sharded=True)
        for number in (1, 2):
            dist.barrier()
            started = time.perf_counter()
            saver.save(
                model,
                CharTokenizer("a"),
                step.tensors(),
                {"step": number},
                best=None,
                loss=0.0,
                timer=nullcontext(),
            )
            blocked = time.perf_counter() - started
            saver.finish()
            complete = time.perf_counter() - started
        assert saver.newest is not None
        nbytes = sum(file.stat().st_size for file in saver.newest.iterdir())
        saver.close()
        dist.barrier()
    return nbytes, blocked, complete


def overlap(step: Callable[[], object]) -> tuple[int, int, int]:
    """The number of DDP's sums in a step; how many are started, and have ended, before the last gradient."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.events() or []
    last = max(event.time_range.start for event in events if LAST in event.name)
    starts = sorted(event.time_range.start for event in events if event.name == CALL)
    ends = sorted(event.time_range.end for event in events if event.name == SUM)
    # Without the first and the last: the sums of the number of targets and of the loss.
    return len(starts) - 2, sum(t < last for t in starts[1:-1]), sum(t < last for t in ends[1:-1])


if __name__ == "__main__":
    sys.exit(run_command("bench.parallel", main))
