"""`python -m gpt.info`: a model's parameters, FLOPs and training memory, and its predicted speed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kernels.files
from gpt.cli import OptionParser, option, run_command
from gpt.cluster import (
    BASE_SECONDS,
    HOP_SECONDS,
    LINK_SHARE,
    NODE_HOP_SECONDS,
    NODE_LINK,
    NODE_LINK_SHARE,
    PER_NODE,
    Cluster,
    ClusterPrediction,
    Transfer,
    predict_cluster,
    rate,
)
from gpt.config import PRESETS, GPTConfig, TrainConfig, override
from gpt.device import GPU, find_gpu
from gpt.errors import InputError, cannot_write
from gpt.files import read_json, user_path
from gpt.step_time import DISPATCH_SECONDS, GAP_SECONDS, LAUNCH_SECONDS, Prediction
from gpt.training.capture import TOKENS
from gpt.weights import checkpoint
from gpt.weights.commit import present, undisturbed

MIB = 2**20


@dataclass(frozen=True)
class StepOptions:
    """The flags of a prediction."""

    gpu: str | None = option(None, "predict a training step on this GPU, for example h200 (default: none)")
    batch_size: int = option(TrainConfig().batch_size, "sequences of block_size tokens in a micro-batch")
    grad_accum: int | None = option(
        None, "micro-batches of a step, which --world GPUs divide among them (default: one for each GPU)"
    )
    world: int = option(1, "GPUs of a run, one process on each")
    parallel: str = option(
        "ddp",
        "with --world: ddp has the whole model on each GPU, fsdp shards it, and the optimizer's state",
        choices=("ddp", "fsdp"),
    )
    shard_size: int | None = option(None, "GPUs that share one copy of the model with fsdp (default: all)")
    per_node: int | None = option(None, f"GPUs of a machine (default: {PER_NODE}, or --world if it is less)")
    link: str | None = option(
        None,
        "bandwidth of a GPU within its machine, both directions together, as in 900GB/s (bytes) or 900Gb/s "
        "(bits) (default: the GPU's NVLink)",
    )
    node_link: str = option(NODE_LINK, "bandwidth of a GPU to other machines, in each direction")
    json: str | None = option(None, "write the prediction to this file (default: none)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.info", _info, argv)


def _info(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "python -m gpt.info",
        "Parameters by component, bytes, FLOPs and memory of a model; with --gpu, a prediction of its speed, "
        "on --world GPUs.",
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
        print("\n" + prediction_report(prediction.one))
        if prediction.cluster.world > 1:
            print("\n" + cluster_report(prediction))
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


def _predict(config: GPTConfig, flags: dict[str, Any]) -> ClusterPrediction | None:
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
    gpu = find_gpu(options.gpu)
    cluster = _cluster(options, gpu)
    grad_accum = cluster.world if options.grad_accum is None else options.grad_accum
    train = TrainConfig(batch_size=options.batch_size, grad_accum=grad_accum)
    tokens = train.grad_accum // cluster.world * train.batch_size * config.block_size
    prediction = predict_cluster(
        config, gpu, train.batch_size, train.grad_accum, cluster, captured=tokens <= TOKENS
    )
    if options.json is not None:
        path = user_path(options.json, "--json")
        content = (prediction if cluster.world > 1 else prediction.one).to_dict()
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"--json: {path} is not a file, expected one to replace or a new one")
            kernels.files.write_json(path, content, indent=1)
        except OSError as error:
            raise cannot_write("--json", path, error) from error
    return prediction


def _cluster(options: StepOptions, gpu: GPU) -> Cluster:
    """The GPUs that the flags describe.

    Raises:
        InputError: Flags that contradict each other, a rate without a unit, or no rate of the links within a
            machine.
    """
    link = gpu.link if options.link is None else rate("--link", options.link)
    cluster = Cluster(
        world=options.world,
        link=(link or math.inf) / 2,
        parallel=options.parallel,
        shard_size=options.shard_size,
        per_node=options.per_node,
        node_link=rate("--node_link", options.node_link),
    )
    if link is None and cluster.world > 1:
        raise InputError(
            f"--link is not given, expected the bandwidth between {gpu.name} GPUs of a machine, as in 64GB/s"
        )
    return cluster


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


def cluster_report(prediction: ClusterPrediction) -> str:
    """What several GPUs keep and send in a step, their speed, and what it assumes."""
    one, cluster = prediction.one, prediction.cluster
    shared = f" in groups of {cluster.shards}" if cluster.shard_size not in (None, cluster.world) else ""
    memory = {name: size for name, size in prediction.memory.items() if size}
    total, hidden = prediction.transfer_seconds, prediction.transfer_seconds - prediction.exposed_seconds
    return "\n".join(
        [
            f"Prediction, not a measurement: {cluster.world} x {one.gpu.name} with --parallel "
            f"{cluster.parallel}{shared},",
            f"each with {one.grad_accum} x {one.batch_size} x {one.config.block_size:,} tokens of a step",
            "",
            f"{'memory of each GPU':<56}{'MiB':>12}",
            *(f"  {name:<54}{size / MIB:>12,.0f}" for name, size in memory.items()),
            f"  {'total':<54}{sum(memory.values()) / MIB:>12,.0f}",
            "",
            _sent("each GPU sends in a step", "times", "GPUs", "GB", "ms", "GB across"),
            *map(_transfer, prediction.transfers),
            _sent(
                "  total",
                "",
                "",
                f"{prediction.sent / 1e9:,.2f}",
                f"{1e3 * total:,.2f}",
                f"{prediction.across / 1e9:,.2f}",
            ),
            f"  {1e3 * hidden:,.2f} ms of it ({hidden / total:.0%}) hide in the forward and backward passes; "
            f"{1e3 * prediction.exposed_seconds:,.2f} ms are exposed",
            "",
            f"predicted: {1e3 * prediction.seconds:,.1f} ms a step, "
            f"{prediction.tokens / prediction.seconds:,.0f} tokens/s on all GPUs, "
            f"{one.mfu(prediction.seconds):.1%} MFU",
            f"scaling efficiency: {prediction.efficiency:.1%} of {cluster.world} x "
            f"{one.tokens / one.seconds:,.0f} tokens/s, one GPU alone with its share of the micro-batches",
            "",
            *_cluster_assumptions(cluster),
        ]
    )


def _transfer(transfer: Transfer) -> str:
    return _sent(
        f"  {transfer.op}, {transfer.name}",
        f"{transfer.count:,}",
        f"{transfer.group:,}",
        f"{transfer.count * transfer.sent / 1e9:,.2f}",
        f"{1e3 * transfer.count * transfer.seconds:,.2f}",
        f"{transfer.count * transfer.across / 1e9:,.2f}",
    )


def _sent(name: str, times: str, group: str, sent: str, seconds: str, across: str) -> str:
    """A line of the table of what is sent; `across` is the part that goes to other machines."""
    return f"{name:<40}{times:>8}{group:>8}{sent:>12}{seconds:>12}{across:>14}"


def _cluster_assumptions(cluster: Cluster) -> list[str]:
    """What the prediction for several GPUs assumes."""
    machines, link, node_link = cluster.world // cluster.gpus, 2 * cluster.link / 1e9, cluster.node_link / 1e9
    passes = {
        "ddp": [
            "  DDP sends a bucket, at least 25 MiB of whole blocks, as soon as the last backward pass has",
            "  its float32 gradients. Those of the embeddings come last.",
        ],
        "fsdp": [
            "  FSDP2 gathers a block in bfloat16 while the block before it computes, forward and backward,",
            "  and reduces its float32 gradients while the next one computes, in every micro-batch. What is",
            "  outside the blocks is float32, and nothing hides it. AdamW updates a GPU's own shard.",
        ],
    }
    hops = (
        f"{1e6 * HOP_SECONDS:g} µs for each hop of its ring, {1e6 * NODE_HOP_SECONDS:g} µs between machines"
    )
    return [
        "Assumptions:",
        f"  {machines} machine{'s' * (machines > 1)} of {cluster.gpus} GPUs. Within one, a GPU sends half of "
        f"{link:,.6g} GB/s ({8 * link:,.6g} Gb/s), its link's",
        f"  bandwidth in both directions together. NCCL reaches {LINK_SHARE:.0%} of it on an HGX H100 "
        "(published).",
        f"  To other machines a GPU sends {node_link:,.6g} GB/s ({8 * node_link:,.6g} Gb/s), of which "
        f"{NODE_LINK_SHARE:.0%} are assumed.",
        f"  A collective takes {1e6 * BASE_SECONDS:g} µs, and {hops}",
        "  (NCCL's source). An all-reduce across machines takes a tree where that has fewer hops.",
        *passes[cluster.parallel],
        "  Without a CUDA graph. The engines' work on the host, their copies, and what transfers take away",
        "  from the GPU's other kernels are not counted.",
    ]


if __name__ == "__main__":
    sys.exit(main())
