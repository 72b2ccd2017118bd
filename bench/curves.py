"""`python -m bench.curves`: the loss of one training run with kernels and with plain PyTorch, in one picture.

Both runs begin with the same parameters and take the same batches; they differ by rounding alone. A third
one, with plain PyTorch and other parameters, shows how far apart two correct runs can be.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench import table
from bench.command import say, start_report
from bench.contestants import OURS, padded_vocabulary
from bench.machine import bench_device
from bench.measure import Clock, release
from bench.record import Report, Row
from bench.train import PLAIN, whole_logits
from gpt.cli import OptionParser, option, run_command
from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import DataConfig, TokenData
from gpt.device import autocast_dtype, peak_flops
from gpt.errors import InputError
from gpt.model import GPT
from gpt.training.optim import learning_rate
from gpt.training.step import TrainStep
from kernels.files import replacing
from kernels.spec import SHORT_DTYPE

OTHER = f"{PLAIN}, other seed"
WINDOW = 20  # steps; differences are of means over as many
WARM = 20  # steps at the start that are not timed: they compile


@dataclass(frozen=True)
class Options:
    """Flags."""

    preset: str | None = option(None, "of the model (default: gpt2 on a GPU, char-cpu on a CPU)")
    data: tuple[str, ...] = option(
        ("stdlib",), "as in gpt.train, tokenized by a byte-pair vocabulary of 4,096"
    )
    steps: int = option(300, "of each run")
    batch_size: int = option(16, "sequences of a step")
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)")
    out: str = option("curves.png", "the picture")
    json: str | None = option(None, "write every figure to this file")


@dataclass(frozen=True)
class Curve:
    """One run: the loss of each step, the seconds of a step, and the peak memory on a GPU, in bytes."""

    losses: list[float]
    seconds: float
    memory: int | None


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.curves", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    if options.steps <= WARM or options.batch_size <= 0:
        raise InputError(
            f"--steps is {options.steps} and --batch_size {options.batch_size}, expected more than {WARM} "
            "and more than 0"
        )
    clock = Clock(bench_device(options.device))
    preset = options.preset or ("gpt2" if clock.on_gpu else "char-cpu")
    model = GPTConfig.preset(preset)
    data = TokenData.load(DataConfig(data=options.data, tokenizer="bpe"))
    data.check(model.block_size)
    wide = max(model.vocab_size, data.tokenizer.vocab_size)
    model = replace(model, vocab_size=padded_vocabulary(wide))
    recipe = replace(
        TrainConfig.preset(preset),
        batch_size=options.batch_size,
        max_steps=options.steps,
        warmup_steps=options.steps // 10,
        device=str(clock.device),
    )
    report = start_report("bench.curves", argv, clock)

    curves: dict[str, Curve] = {}
    for name, seed in ((OURS, 0), (PLAIN, 0), (OTHER, 1)):
        curves[name] = train(name, model, recipe, data, clock, seed)
        report.rows.append(_row(name, curves[name], model, recipe, clock, report))
        if options.json is not None:
            report.save(options.json)
    print("\n" + table.race(report.rows))
    for note in compare(curves):
        say(report, note)
    report.complete = True
    draw(curves, report, Path(options.out))
    print(f"drew {options.out}")
    if options.json is not None:
        report.save(options.json)
    return 0


def train(
    name: str, model: GPTConfig, recipe: TrainConfig, data: TokenData, clock: Clock, seed: int
) -> Curve:
    """One run of `recipe.max_steps` steps; plain PyTorch runs under torch.compile on a GPU."""
    torch.manual_seed(seed)
    ours = name == OURS
    gpt = GPT(model, use_triton=(True if clock.on_gpu else "auto") if ours else False, device=clock.device)
    forward: Callable[..., torch.Tensor] | None = None
    if not ours:
        forward = partial(torch.compile(whole_logits) if clock.on_gpu else whole_logits, gpt)
    step = TrainStep(gpt, recipe, forward)
    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats(clock.device)

    pending, began = [], 0.0
    for number in range(recipe.max_steps):
        if number == WARM:
            clock.synchronize()
            began = time.perf_counter()
        batch = data.batch("train", recipe.batch_size, model.block_size, seed=0, step=number)
        pending.append(step.enqueue([batch], learning_rate(number, recipe)))
    clock.synchronize()
    seconds = (time.perf_counter() - began) / (recipe.max_steps - WARM)
    memory = torch.cuda.max_memory_allocated(clock.device) if clock.on_gpu else None
    losses = [one.result().loss for one in pending]
    del gpt, step, forward, pending
    release(clock)
    return Curve(losses, seconds, memory)


def compare(curves: Mapping[str, Curve]) -> list[str]:
    """What the curves show: the last losses, and the largest differences from plain PyTorch's."""
    last = ", ".join(f"{name} {_means(curve)[-1]:.4f}" for name, curve in curves.items())
    gaps = {name: _gap(curves[name], curves[PLAIN]) for name in (OURS, OTHER)}
    return [
        f"mean loss of the last {WINDOW} steps: {last}",
        f"largest difference from {PLAIN} between means over {WINDOW} steps: {OURS} {gaps[OURS]:.4f}, "
        f"{OTHER} {gaps[OTHER]:.4f}",
    ]


def _means(curve: Curve) -> list[float]:
    losses = curve.losses
    return [statistics.fmean(losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1, WINDOW)]


def _gap(a: Curve, b: Curve) -> float:
    return max(abs(x - y) for x, y in zip(_means(a), _means(b), strict=True))


def _row(name: str, curve: Curve, model: GPTConfig, recipe: TrainConfig, clock: Clock, report: Report) -> Row:
    tokens = recipe.batch_size * model.block_size
    dtype = autocast_dtype(recipe.dtype, clock.device)
    peak = peak_flops(report.machine.device, dtype) if clock.on_gpu else None
    flops = model.flops_per_token() * tokens
    sizes = f"{model.n_layer}x{model.n_embd}-V{model.vocab_size}-B{recipe.batch_size}-T{model.block_size}"
    return Row(
        op="curves",
        case=f"{sizes}-steps{recipe.max_steps}",
        dtype=SHORT_DTYPE[dtype],
        direction="step",
        contestant=name,
        status="measured",
        seconds=curve.seconds,
        low=curve.seconds,
        high=curve.seconds,
        samples=1,
        flops=flops,
        tokens=tokens,
        limit=None if peak is None else flops / peak,
        memory=curve.memory,
    )


def draw(curves: Mapping[str, Curve], report: Report, path: Path) -> None:
    """Draws the losses, and below them the differences from plain PyTorch's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    styles = {OURS: ("#0b6e4f", "-"), PLAIN: ("#c98b5e", "--"), OTHER: ("#9bb4d6", "-")}
    for name in (OTHER, OURS, PLAIN):
        color, line = styles[name]
        label = f"{name}: {report.rows[0].tokens / curves[name].seconds:,.0f} tokens/s"  # type: ignore[operator]
        top.plot(curves[name].losses, line, color=color, linewidth=1.2, label=label)
    for name in (OTHER, OURS):
        gap = [x - y for x, y in zip(curves[name].losses, curves[PLAIN].losses, strict=True)]
        bottom.plot(gap, color=styles[name][0], linewidth=1)
    top.set(ylabel="training loss (nats per token)")
    top.legend()
    bottom.set(xlabel="step", ylabel=f"minus {PLAIN}'s")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    about = report.machine
    row = report.rows[0]
    title = f"{row.case} {row.dtype} · {about.device} · torch {about.torch} · {about.date[:10]}"
    figure.suptitle(title, fontsize=10)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(run_command("bench.curves", main))
