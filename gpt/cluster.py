"""A prediction of a training step on several GPUs, from counts and stated bandwidths. Nothing is measured.

The GPUs divide the micro-batches of a step. Each computes as `gpt.step_time` predicts for one GPU, and
exchanges what PyTorch's engines do. With P float32 parameters, n GPUs and g micro-batches on each:

- DDP sums the gradients by all-reduce once per step (`no_sync` for the other micro-batches). A GPU sends
  2 (n-1)/n 4 P bytes.
- FSDP2 gathers each block twice per micro-batch, for its forward and for its backward pass, in 16 bits. It
  gathers what is outside the blocks once, in float32, and keeps it for the backward pass. Gradients are
  reduce-scattered in float32 in every micro-batch. With B parameters in the blocks, a GPU sends
  (n-1)/n (2 · 2 B + 4 (P - B) + 4 P) g bytes, and what pads each parameter to n equal shards.
- With `shard_size` s, this happens among s GPUs, and the n/s copies of a shard are summed by all-reduce in
  every micro-batch: 2 (n/s-1)/(n/s) 4 P/s g bytes.

Sources: "DistributedDataParallel" and "torch.distributed.fsdp.fully_shard" in PyTorch's documentation (what
is exchanged, and when); doc/PERFORMANCE.md of NVIDIA's nccl-tests (the bytes of a collective).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt.config import GPTConfig
from gpt.device import GPU
from gpt.errors import InputError
from gpt.step_time import BF16, FP32, Prediction, predict

PER_NODE = 8
NODE_LINK = "400Gb/s"
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once, at least

# NCCL's rings reach 741 of 900 GB/s on an HGX H100, by the published validation of ASTRA-sim. No figure is
# known for a network adapter.
LINK_SHARE = 741 / 900
NODE_LINK_SHARE = 0.9
# Of a collective and of each of its hops, in NCCL's own model (src/graph/tuning.cc, ring, protocol Simple).
BASE_SECONDS = 8.4e-6
HOP_SECONDS = 3.4e-6
NODE_HOP_SECONDS = 14e-6

# Components in the blocks, and the share of each in the backward pass, which has two of three matmuls.
_BLOCKS = {
    "qkv matmuls": 2 / 3,
    "proj matmuls": 2 / 3,
    "up matmuls": 2 / 3,
    "down matmuls": 2 / 3,
    "attention forward": 0,
    "attention backward": 1,
    "norms forward": 0,
    "norms backward": 1,
    "dropout forward": 0,
    "dropout backward": 1,
    "activation forward": 0,
    "activation backward": 1,
    "bias sums": 1,
    "casts": 1 / 2,
}
_EMBEDDINGS = {"embeddings": 1 / 2}
_LOSS = ("head matmuls", "loss softmax")  # the fused loss computes its gradients in the forward pass
_UPDATE = ("accumulation", "clipping", "AdamW")  # of a GPU's own shard


def rate(flag: str, text: str) -> float:
    """Byte/s of a text such as 900GB/s (bytes) or 400Gb/s (bits).

    Raises:
        InputError: The text is another one, or it is zero.
    """
    parts = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([GT])([Bb])/s", text, re.ASCII)
    if parts is None or not float(parts[1]):
        raise InputError(f"{flag} is {text!r}, expected bytes or bits per second, as in 900GB/s or 400Gb/s")
    return float(parts[1]) * {"G": 1e9, "T": 1e12}[parts[2]] / {"B": 1, "b": 8}[parts[3]]


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run, and how they are connected.

    Args:
        world: GPUs, each with a process of its own.
        link: Byte/s that a GPU sends within its machine, to a single direction.
        parallel: "ddp" or "fsdp", as of TrainConfig.
        shard_size: GPUs that share the parameters under fsdp. None: all of them.
        per_node: GPUs of a machine. None: 8, or all of them if they are fewer.
        node_link: Byte/s that each GPU sends to other machines.

    Raises:
        InputError: GPUs that are not divided into equal machines or shard groups, or a group that has parts
            of a machine.
    """

    world: int
    link: float
    parallel: str = "ddp"
    shard_size: int | None = None
    per_node: int | None = None
    node_link: float = 50e9

    def __post_init__(self) -> None:
        for name, value, most in (
            ("world", self.world, 2**20),
            ("shard_size", self.shard_size, self.world),
            ("per_node", self.per_node, self.world),
        ):
            if value is not None and not 1 <= value <= most:
                raise InputError(f"--{name} is {value}, expected an integer in [1, {most}]")
        if self.shard_size is not None and self.parallel != "fsdp":
            raise InputError(
                f"--shard_size is given with --parallel {self.parallel}, expected --parallel fsdp"
            )
        if self.world % self.gpus:
            raise InputError(f"--per_node is {self.gpus}, expected a divisor of --world ({self.world})")
        if self.world % self.shards:
            raise InputError(f"--shard_size is {self.shards}, expected a divisor of --world ({self.world})")
        if self.shards % self.gpus and self.gpus % self.shards:
            raise InputError(
                f"--shard_size is {self.shards}, expected a divisor or a multiple of --per_node ({self.gpus})"
            )

    @property
    def gpus(self) -> int:
        """GPUs of a machine."""
        return min(PER_NODE, self.world) if self.per_node is None else self.per_node

    @property
    def shards(self) -> int:
        """GPUs that share the parameters."""
        return 1 if self.parallel == "ddp" else self.shard_size or self.world

    @property
    def replicas(self) -> int:
        """Copies of the parameters."""
        return self.world // self.shards

    def transfer(self, name: str, op: str, size: float, count: int) -> Transfer:
        """`count` collectives of `op` with `size` bytes on each GPU at the start.

        An all-gather and a reduce-scatter happen among the GPUs that share the parameters, an all-reduce
        among those that hold the same ones. A ring crosses to another machine once for each machine, so
        1/m of the bytes cross, with m GPUs of a machine in the group.
        """
        group, stride = (self.replicas, self.shards) if op == "all-reduce" else (self.shards, 1)
        members = min(group, max(1, self.gpus // stride))  # of the group, in a machine
        machines = group // members

        passes = 2 if op == "all-reduce" else 1
        sent = passes * size * (group - 1) / group if op != "all-gather" else size * (group - 1)
        across = sent / members if machines > 1 else 0.0

        hops = passes * ((group - machines) * HOP_SECONDS + (machines - 1) * NODE_HOP_SECONDS)
        if op == "all-reduce":  # NCCL takes a tree between many machines
            tree = (members - 1) * HOP_SECONDS + math.log2(machines) * NODE_HOP_SECONDS
            hops = min(hops, passes * tree)
        seconds = max((sent - across) / (LINK_SHARE * self.link), across / (NODE_LINK_SHARE * self.node_link))
        return Transfer(name, op, count, group, sent, across, BASE_SECONDS + hops + seconds)


@dataclass(frozen=True)
class Transfer:
    """Equal collectives of a step.

    A GPU sends `sent` bytes in each, `across` of them to another machine, on average over its machine's GPUs.
    """

    name: str
    op: str
    count: int
    group: int
    sent: float
    across: float
    seconds: float


@dataclass(frozen=True)
class ClusterPrediction:
    """The predicted time of a step on several GPUs, and what it was predicted from.

    `one` is the prediction for a GPU alone with its share of the micro-batches, `exposed_seconds` the time of
    the transfers in which the GPU computes nothing.
    """

    one: Prediction
    cluster: Cluster
    transfers: tuple[Transfer, ...]
    exposed_seconds: float

    @property
    def transfer_seconds(self) -> float:
        """The time of all transfers."""
        return sum(transfer.count * transfer.seconds for transfer in self.transfers)

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends in a step."""
        return sum(transfer.count * transfer.sent for transfer in self.transfers)

    @property
    def across(self) -> float:
        """Those of them that go to another machine, on average over the GPUs of a machine."""
        return sum(transfer.count * transfer.across for transfer in self.transfers)

    @property
    def seconds(self) -> float:
        """The time of a step. A GPU updates its own shard; several GPUs run no CUDA graph."""
        if self.cluster.world == 1:
            return self.one.seconds
        update = sum(self.one.seconds_of(part) for part in self.one.components if part.name in _UPDATE)
        others = update * (1 - 1 / self.cluster.shards)
        return max(self.one.gpu_seconds - others + self.exposed_seconds, self.one.host_seconds)

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all GPUs."""
        return self.cluster.world * self.one.tokens

    @property
    def efficiency(self) -> float:
        """Tokens per second, relative to those of as many GPUs that each work alone."""
        return self.one.seconds / self.seconds

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each GPU, by `GPTConfig.training_memory`."""
        return self.one.config.training_memory(self.one.batch_size, BF16, shards=self.cluster.shards)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        figures = ("seconds", "exposed_seconds", "transfer_seconds", "sent", "across", "tokens", "efficiency")
        return {
            "kind": "prediction",
            "cluster": {**asdict(self.cluster), "per_node": self.cluster.gpus, "shards": self.cluster.shards},
            **{name: getattr(self, name) for name in figures},
            "tokens_per_second": self.tokens / self.seconds,
            "mfu": self.one.mfu(self.seconds),
            "memory": self.memory,
            "transfers": [asdict(transfer) for transfer in self.transfers],
            "one_gpu": self.one.to_dict(),
        }


def predict_cluster(
    config: GPTConfig,
    gpu: GPU,
    batch_size: int,
    grad_accum: int,
    cluster: Cluster,
    *,
    captured: bool = False,
) -> ClusterPrediction:
    """Predicts a step of `grad_accum` micro-batches that the GPUs divide among them.

    Args:
        captured: A GPU alone would run its share as a CUDA graph.

    Raises:
        InputError: The micro-batches cannot be divided equally.
    """
    if grad_accum % cluster.world:
        fitting = -(-grad_accum // cluster.world) * cluster.world
        raise InputError(
            f"--grad_accum is {grad_accum}, expected a multiple of --world ({cluster.world}), which divides "
            f"the micro-batches of a step, as in {fitting}"
        )
    one = predict(config, gpu, batch_size, grad_accum // cluster.world, captured=captured)
    transfers, exposed = _ddp(one, cluster) if cluster.parallel == "ddp" else _fsdp(one, cluster)
    merged = Counter[Transfer]()
    for transfer in transfers:
        if transfer.group > 1:
            merged[replace(transfer, count=1)] += transfer.count
    kinds = tuple(replace(transfer, count=count) for transfer, count in merged.items())
    return ClusterPrediction(one, cluster, kinds, exposed if kinds else 0.0)


def _ddp(one: Prediction, cluster: Cluster) -> tuple[list[Transfer], float]:
    """The all-reduces of a step, and by how long they outlast the last backward pass.

    Gradients are ready in the order of the backward pass, a block's all at once, a tied embedding's at the
    end. A bucket is sent when its gradients are ready and the bucket before it is sent.
    """
    counts, (_, block, embeddings) = one.config.parameter_counts(), _passes(one)
    pieces = [(0.0, counts["head"] + counts["final_norm"])]
    pieces += [(block, counts["block"])] * one.config.n_layer
    pieces += [(embeddings, counts["token_embedding"] + counts["position_embedding"])]

    now = end = 0.0
    transfers = []
    for ready, size in _buckets(pieces):
        now += ready
        transfers.append(cluster.transfer(f"{size / 1e6:,.0f} MB of gradients", "all-reduce", size, 1))
        end = max(end, now) + transfers[-1].seconds
    return transfers, end - now


def _buckets(pieces: Iterable[tuple[float, int]]) -> Iterator[tuple[float, int]]:
    """Joins pieces (seconds of compute, parameters) to buckets (seconds, bytes) of at least BUCKET."""
    seconds, size = 0.0, 0
    for more, parameters in pieces:
        seconds, size = seconds + more, size + FP32 * parameters
        if size >= BUCKET:
            yield seconds, size
            seconds, size = 0.0, 0
    if size:
        yield seconds, size


def _fsdp(one: Prediction, cluster: Cluster) -> tuple[list[Transfer], float]:
    """The exchanges of a step, and the time in which the GPU waits for them.

    While a block computes, the next one is gathered, and in the backward pass the gradients of the one before
    are reduced, one after the other. Nothing hides what is outside the blocks and the first gather of a pass.
    """
    config, times, layers = one.config, one.grad_accum, one.config.n_layer
    forward, backward, embeddings = _passes(one)
    shard = config.parameter_counts(cluster.shards)
    block, outside = shard["block"], shard["total"] - layers * shard["block"]

    def reduce(name: str, parameters: int, count: int) -> list[Transfer]:
        shard_bytes = FP32 * parameters
        return [
            cluster.transfer(name, "reduce-scatter", cluster.shards * shard_bytes, count),
            cluster.transfer(name, "all-reduce", shard_bytes, count),
        ]

    def seconds(transfers: Iterable[Transfer]) -> float:
        return sum(transfer.seconds for transfer in transfers if transfer.group > 1)

    gathers = [
        cluster.transfer("outside the blocks", "all-gather", FP32 * outside, times),
        cluster.transfer("a block", "all-gather", BF16 * block, 2 * layers * times),
    ]
    reductions = reduce("a block", block, layers * times), reduce("outside the blocks", outside, times)
    start, gather = seconds(gathers[:1]), seconds(gathers[1:])
    scatter, last = seconds(reductions[0]), seconds(reductions[1])

    waits = start + gather + (layers - 1) * max(0.0, gather - forward)
    waits += gather
    for layer in reversed(range(layers)):
        hidden = gather * (layer > 0) + scatter * (layer < layers - 1)
        waits += max(0.0, hidden - backward)
    waits += max(0.0, scatter - embeddings) + last
    return [*gathers, *reductions[0], *reductions[1]], times * waits


def _passes(one: Prediction) -> tuple[float, float, float]:
    """Seconds of a micro-batch: a block's forward and backward pass, and the embeddings' backward pass."""
    forward = backward = embeddings = 0.0
    for part in one.components:
        seconds = one.seconds_of(part) / one.grad_accum
        if part.name in _BLOCKS:
            backward += seconds * _BLOCKS[part.name] / one.config.n_layer
            forward += seconds * (1 - _BLOCKS[part.name]) / one.config.n_layer
        elif part.name in _EMBEDDINGS:
            embeddings += seconds * _EMBEDDINGS[part.name]
    return forward, backward, embeddings
