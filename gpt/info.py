"""`python -m gpt.info`: a model's parameters, FLOPs and training memory, and its predicted speed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kernels.files
from gpt.cli import OptionParser, option, run_command
from gpt.config import PRESETS, GPTConfig, TrainConfig, override
from gpt.device import find_gpu
from gpt.errors import InputError, cannot_write
from gpt.files import read_json, user_path
from gpt.step_time import DISPATCH_SECONDS, GAP_SECONDS, LAUNCH_SECONDS, Prediction, predict
from gpt.training.capture import TOKENS
from gpt.weights import checkpoint
from gpt.weights.commit import present, undisturbed

MIB = 2**20


@dataclass(frozen=True)
class StepOptions:
    """The flags of a prediction."""

    gpu: str | None = option(None, "predict a training step on this GPU, for example h200 (default: none)")
    batch_size: int = option(TrainConfig().batch_size, "sequences of block_size tokens in a micro-batch")
    grad_accum: int = option(TrainConfig().grad_accum, "micro-batches of a step")
    json: str | None = option(None, "write the prediction to this file (default: none)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.info", _info, argv)


def _info(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "python -m gpt.info",
        "Parameters by component, bytes, FLOPs and memory of a model; with --gpu, a prediction of its speed.",
        arguments="PRESET|DIR",
        model=GPTConfig(),
        step=StepOptions(),
    )
    parser.add_argument("target", metavar="PRESET|DIR", help="a preset, a run's folder or a checkpoint")
    arguments, flags = parser.parse_tables(argv)
    config = override(_config(arguments.target), flags["model"])
    prediction = _predict(config, flags["step"])
    print(report(config))
    if prediction is not None:
        print("\n" + prediction_report(prediction))
    return 0


def _config(target: str) -> GPTConfig:
    path = user_path(target, "PRESET|DIR")
    if os.path.isdir(present(path, "PRESET|DIR") or path):
        content = undisturbed(path, lambda: read_json(checkpoint.find_checkpoint(path) / checkpoint.CONFIG))
        return GPTConfig.from_dict(content)
    if target not in PRESETS:
        raise InputError(
            f"PRESET|DIR: {target!r} is neither a folder nor a preset, expected a run, a checkpoint, or one "
            f"of {', '.join(PRESETS)}"
        )
    return GPTConfig.preset(target)


def _predict(config: GPTConfig, flags: dict[str, Any]) -> Prediction | None:
    """The prediction that the flags ask for, if any; --json writes it.

    Raises:
        InputError: A flag without --gpu, an unknown GPU, a size outside its range, or a file that cannot be
            written.
    """
    options = StepOptions(**flags)
    if options.gpu is None:
        if flags:
            raise InputError(f"--gpu is not given, expected a GPU with --{next(iter(flags))}")
        return None
    train = TrainConfig(batch_size=options.batch_size, grad_accum=options.grad_accum)
    tokens = train.grad_accum * train.batch_size * config.block_size
    prediction = predict(
        config, find_gpu(options.gpu), train.batch_size, train.grad_accum, captured=tokens <= TOKENS
    )
    if options.json is not None:
        path = user_path(options.json, "--json")
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"--json: {path} is not a file, expected one to replace or a new one")
            kernels.files.write_json(path, prediction.to_dict(), indent=1)
        except OSError as error:
            raise cannot_write("--json", path, error) from error
    return prediction


def report(config: GPTConfig) -> str:
    """The table of parameters, and the costs."""
    counts = config.parameter_counts()
    rows = [
        ("embeddings", counts["token_embedding"] + counts["position_embedding"]),
        ("  of tokens", counts["token_embedding"]),
        ("  of positions", counts["position_embedding"]),
        ("block", counts["block"]),
        (f"{config.n_layer} blocks", config.n_layer * counts["block"]),
        ("final norm", counts["final_norm"]),
        ("head" + (" (the token embedding's weight)" if config.tie_weights else ""), counts["head"]),
        ("total", counts["total"]),
    ]
    lines = [f"{'':<38}{'parameters':>16}{'MiB in float32':>16}"]
    lines += [f"{name:<38}{count:>16,}{4 * count / MIB:>16,.2f}" for name, count in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"{config.flops_per_token() / 1e6:,.1f} MFLOP per token, forward and backward, at context T = "
            f"{config.block_size}:",
            "  6 N + 12 n_layer n_head D T, N without embeddings that are only looked up",
            "",
            f"{'MiB to train with AdamW and the fused ops':<50}{'model':>12}{'each sequence':>16}",
            *(
                _memory(config, name, value, checkpoint_activations)
                for name, value in (("float32", 4), ("bfloat16", 2))
                for checkpoint_activations in (False, True)
            ),
            "  the formula is in the documentation of GPTConfig.training_bytes",
        ]
    )


def _memory(config: GPTConfig, dtype: str, value: int, checkpoint_activations: bool) -> str:
    """The line of the memory that training takes in one precision."""
    fixed, one = (
        config.training_bytes(size, value, checkpoint_activations=checkpoint_activations) for size in (0, 1)
    )
    flag = " --checkpoint_activations" if checkpoint_activations else ""
    return f"  {dtype + flag:<48}{fixed / MIB:>12,.0f}{(one - fixed) / MIB:>16,.1f}"


def prediction_report(prediction: Prediction) -> str:
    """The table of a prediction, its totals, and what it assumes."""
    rows = [
        _row(
            part.name,
            f"{part.flops / 1e12:.2f}",
            f"{part.bytes / 1e9:.2f}",
            prediction.bound(part),
            f"{part.efficiency:.0%}",
            f"{1e3 * prediction.seconds_of(part):.2f}",
            part.basis,
        )
        for part in prediction.components
    ]
    memory = prediction.config.training_bytes(prediction.batch_size, 2)
    gaps, host = 1e3 * prediction.gap_seconds, prediction.host_seconds
    issued = f"{prediction.launches:,} Triton launches, {prediction.dispatches:,} other operations"
    micro_batches = f"{prediction.grad_accum} x " if prediction.grad_accum > 1 else ""
    lines = [
        f"Prediction, not a measurement: a training step of {micro_batches}{prediction.batch_size} x "
        f"{prediction.config.block_size:,} tokens on one {prediction.gpu.name}",
        "",
        _row("", "TFLOP", "GB", "bound", "assumed", "ms", "basis of the assumption"),
        *rows,
        _row("gaps", "", "", "", "", f"{gaps:.2f}", f"{1e6 * GAP_SECONDS:g} µs after each kernel"),
        _row("GPU", "", "", "", "", f"{1e3 * prediction.gpu_seconds:.2f}", "the sum of the above"),
        _row("host", "", "", "", "", f"{1e3 * host:.2f}", issued),
        "",
        f"predicted: {_speed(prediction, prediction.seconds)}",
        f"memory: about {memory / 2**30:,.1f} GiB, on a GPU of {prediction.gpu.memory} GB",
    ]
    if prediction.captured and host > prediction.gpu_seconds:
        lines.append(f"predicted with --no_capture, without a CUDA graph: {_speed(prediction, host)}")
    return "\n".join([*lines, "", *_assumptions(prediction)])


def _row(name: str, flops: str, moved: str, bound: str, share: str, time: str, basis: str) -> str:
    """A line of the prediction's table."""
    return f"{name:<20}{flops:>7}{moved:>8}  {bound:<6}{share:>8}{time:>9}  {basis}".rstrip()


def _speed(prediction: Prediction, seconds: float) -> str:
    """The time of a step, tokens per second and MFU."""
    mfu = prediction.mfu(seconds)
    return f"{1e3 * seconds:,.1f} ms a step, {prediction.tokens / seconds:,.0f} tokens/s, {mfu:.1%} MFU"


def _assumptions(prediction: Prediction) -> list[str]:
    """What a prediction assumes."""
    gpu = prediction.gpu
    matmuls, copies = prediction.matmul_rate / 1e12, prediction.copy_rate / 1e12
    return [
        "Assumptions:",
        f"  Ceilings: {matmuls:.0f} TFLOP/s in bfloat16 matmuls, {copies:.2f} TB/s in copies. Of NVIDIA's "
        f"{gpu.flops / 1e12:g} and {gpu.bandwidth / 1e12:g}",
        "  they are the shares that an H200 reaches in published measurements.",
        "  A component takes the larger of TFLOP and GB over its ceiling, divided by the assumed share of",
        "  that ceiling, which is the same on every GPU. Bytes come from memory, never from the L2 cache.",
        f"  The host takes {1e6 * LAUNCH_SECONDS:g} µs for a launch and {1e6 * DISPATCH_SECONDS:g} µs for "
        "another operation, while the GPU works.",
        "  The fused kernels run under bfloat16 autocast, with AdamW and block_size tokens in each sequence.",
    ]


if __name__ == "__main__":
    sys.exit(main())
