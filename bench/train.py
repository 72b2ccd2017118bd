"""`python -m bench.train`: training steps of a whole GPT, with this package and with plain PyTorch.

The plain PyTorch baseline is a strong one: SDPA, F.layer_norm, F.linear and a loss over all logits under
torch.compile, fused AdamW, the same autocast, and a vocabulary padded to a multiple of 64. A step is
`gpt.training.step.TrainStep`: forward, backward, clipping, AdamW. With --nanogpt, nanoGPT's own step is timed
in the same run.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from bench import table
from bench.command import parse_budget, say, start_report
from bench.contestants import OURS, first_sentence, padded_vocabulary
from bench.machine import bench_device
from bench.measure import Call, Ceilings, Clock, Lane, interleave, release
from bench.nanogpt import load_nanogpt, nanogpt_step
from bench.record import Report, Row
from gpt.cli import OptionParser, option, run_command
from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import Batch
from gpt.device import autocast_dtype, known_gpu, peak_flops
from gpt.errors import InputError
from gpt.model import GPT
from gpt.step_time import predict
from gpt.training.step import TrainStep
from kernels.spec import SHORT_DTYPE

PLAIN = "plain PyTorch"
AGREE = 0.01  # largest relative difference of the losses with kernels and with references
BATCHES = {60: 64, 20: 16, 0: 4}  # least GiB of GPU memory -> sequences per step


@dataclass(frozen=True)
class Options:
    """Flags."""

    quick: bool = option(False, "a short time, and no torch.compile on a CPU")
    preset: str | None = option(None, "of the model (default: gpt2 on a GPU, char-cpu on a CPU)")
    batch_size: int | None = option(None, "sequences of a step (default: what the GPU's memory holds)")
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)")
    nanogpt: str | None = option(None, "a checkout of nanoGPT, which then takes part")
    budget: str | None = option(None, "as in 90s or 8m: bounds the time of the samples")
    json: str | None = option(None, "write every figure to this file")


class Disagreement(RuntimeError):
    """The loss with kernels differs from that with references."""


@dataclass(frozen=True)
class Entrant:
    """A step ready to be timed and the memory it took, or the status and problem that prevent it."""

    step: Call | None = None
    memory: int | None = None
    status: str = "failed"
    problem: str = ""


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.train", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    budget = parse_budget(options.budget)
    clock = Clock(bench_device(options.device))
    config = GPTConfig.preset(options.preset or ("gpt2" if clock.on_gpu else "char-cpu"))
    if options.batch_size is not None and options.batch_size <= 0:
        raise InputError(f"--batch_size is {options.batch_size}, expected > 0")
    nanogpt = None if options.nanogpt is None else load_nanogpt(options.nanogpt)
    report = start_report("bench.train", argv, clock)
    batch_size = options.batch_size or _batch_size(report, clock)
    train = TrainConfig(batch_size=batch_size, device=str(clock.device))
    seconds = min(5.0 if clock.on_gpu else 2.0, (budget or math.inf) / 8)
    seconds = 0.5 if options.quick else seconds
    for rows in run(config, train, clock, report, seconds=seconds, quick=options.quick, nanogpt=nanogpt):
        report.rows = rows
        if options.json is not None:
            report.save(options.json)
    report.complete = True
    print("\n" + table.race(report.rows))
    if options.json is not None:
        report.save(options.json)
    return (
        1 if any(row.status in ("wrong", "failed") and row.contestant == OURS for row in report.rows) else 0
    )


def run(
    config: GPTConfig,
    train: TrainConfig,
    clock: Clock,
    report: Report,
    *,
    seconds: float,
    quick: bool,
    nanogpt: ModuleType | None = None,
) -> Iterator[list[Row]]:
    """Yields the rows of the contestants that are ready, and at the end those of all.

    Early rows matter because compiling the next contestant takes a minute.
    """
    tokens = train.batch_size * config.block_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (train.batch_size, config.block_size + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    compiled = clock.on_gpu or not quick
    if not compiled:
        say(report, f"{PLAIN}: without torch.compile, which --quick leaves out on a CPU")
    padded = replace(config, vocab_size=padded_vocabulary(config.vocab_size))
    say(report, f"vocabulary: {OURS} {config.vocab_size:,}, {PLAIN} padded to {padded.vocab_size:,}")

    builds: dict[str, Callable[[], Call]] = {
        OURS: lambda: _step(config, train, batch, clock, use_triton=True if clock.on_gpu else "auto"),
        PLAIN: lambda: _step(
            padded, train, batch, clock, use_triton=False, forward=whole_logits, compiled=compiled
        ),
    }
    if nanogpt is not None:
        builds["nanoGPT"] = lambda: nanogpt_step(nanogpt, config, train, batch, clock.device)
        if not clock.on_gpu:
            say(report, "nanoGPT: in float32, as it trains on a CPU")

    dtype = autocast_dtype(train.dtype, clock.device)
    peak = _peak(clock, report, dtype)
    flops = config.flops_per_token() * tokens
    case = f"{config.n_layer}x{config.n_embd}-V{config.vocab_size}-B{train.batch_size}-T{config.block_size}"
    template = Row(
        op="train",
        case=case,
        dtype=SHORT_DTYPE[dtype],
        direction="step",
        contestant="",
        status="failed",
        limit=flops / peak,
        flops=flops,
        tokens=tokens,
    )

    gpu = known_gpu(report.machine.device)
    if clock.on_gpu and gpu is not None and dtype == torch.bfloat16:
        prediction = predict(config, gpu, train.batch_size)
        say(
            report,
            f"{OURS}, predicted and not measured: {1e3 * prediction.gpu_seconds:.1f} ms of the GPU and "
            f"{1e3 * prediction.host_seconds:.1f} ms of the host for a step (gpt.info shows the components)",
        )

    entrants: dict[str, Entrant] = {}
    for name, build in builds.items():
        entrants[name] = _enter(build, clock)
        if clock.on_gpu:
            yield _rows(entrants, clock, template, 0.0)
    yield _rows(entrants, clock, template, seconds)


def _rows(entrants: Mapping[str, Entrant], clock: Clock, template: Row, seconds: float) -> list[Row]:
    lanes = {name: Lane([entrant.step]) for name, entrant in entrants.items() if entrant.step is not None}
    timings = interleave(lanes, clock, seconds) if lanes else {}
    rows = []
    for name, entrant in entrants.items():
        row = replace(template, contestant=name, status=entrant.status, reason=entrant.problem)
        rows.append(
            row.measured(timings[name], memory=entrant.memory)
            if name in timings
            else replace(row, limit=None)
        )
    return rows


def _enter(build: Callable[[], Call], clock: Clock) -> Entrant:
    """Builds a contestant and takes its first two steps."""
    before = torch.cuda.memory_allocated(clock.device) if clock.on_gpu else 0
    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats(clock.device)
    try:
        step = build()
        clock.synchronize()
        with clock.active():
            for _ in range(2):
                step()
        clock.synchronize()
    except torch.OutOfMemoryError:
        release(clock)
        return Entrant(problem="out of memory; try a smaller --batch_size")
    except Disagreement as error:
        return Entrant(status="wrong", problem=str(error))
    except Exception as error:  # torch.compile fails in many ways
        clock.synchronize()
        return Entrant(problem=first_sentence(error))
    return Entrant(step, torch.cuda.max_memory_allocated(clock.device) - before if clock.on_gpu else None)


def _step(
    config: GPTConfig,
    train: TrainConfig,
    batch: Batch,
    clock: Clock,
    *,
    use_triton: bool | str,
    forward: Callable[..., torch.Tensor] | None = None,
    compiled: bool = False,
) -> Call:
    """A training step of this package's model; `forward` replaces the model's own loss.

    Raises:
        Disagreement: The loss with kernels differs from that with references.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the op benches report what cannot run Triton here
        model = GPT(config, use_triton=use_triton, device=clock.device)
    loss = None if forward is None else partial(torch.compile(forward) if compiled else forward, model)
    step = TrainStep(model, train, loss)
    if use_triton is not False:
        _compare(model, step, batch)
    return lambda: step.enqueue([batch], train.learning_rate)


def whole_logits(
    model: GPT, inputs: torch.Tensor, targets: torch.Tensor, document_start: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss over all logits. torch.compile fuses it; it would unroll a loop over chunks for minutes."""
    logits = model(inputs, document_start=document_start)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _compare(model: GPT, step: TrainStep, batch: Batch) -> None:
    """Compares the loss with kernels to that with references, with the same parameters."""
    chosen = model.use_triton
    with torch.no_grad():
        loss = step.loss(batch).item()
        model.use_triton = False
        expected = step.loss(batch).item()
    model.use_triton = chosen
    if not abs(loss - expected) <= AGREE * expected:
        raise Disagreement(f"the loss is {loss:.4f}, expected {expected:.4f} as with the references")


def _peak(clock: Clock, report: Report, dtype: torch.dtype) -> float:
    """The FLOP/s that MFU is relative to: the vendor's figure if it is known, else the measured rate."""
    ceilings = Ceilings(clock)
    side = 8192 if clock.on_gpu else 1024
    measured = ceilings.matmul(side, side, side, dtype)
    report.ceilings |= ceilings.measured()
    stated = peak_flops(report.machine.device, dtype) if clock.on_gpu else None
    if stated is None:
        say(
            report,
            f"% limit is MFU against the measured {measured / 1e12:.3g} TFLOP/s: no vendor's peak is known "
            "for this machine",
        )
        return measured
    say(
        report,
        f"% limit is MFU against the vendor's {stated / 1e12:g} TFLOP/s; measured: {measured / 1e12:.3g}",
    )
    return stated


def _batch_size(report: Report, clock: Clock) -> int:
    if not clock.on_gpu:
        return 12
    return next(size for gib, size in BATCHES.items() if report.machine.memory_bytes >= gib * 2**30)


if __name__ == "__main__":
    sys.exit(run_command("bench.train", main))
