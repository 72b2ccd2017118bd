"""A prediction of the time of a training step on a GPU, from counts and stated ceilings. Nothing is measured.

The step is `gpt.training.step.TrainStep` in bfloat16 with the fused kernels and AdamW. A component takes
max(FLOPs / matmul rate, bytes / copy rate) / efficiency. The step takes the sum of the components, or the
host's time to issue them where that is longer and the step is not captured as a CUDA graph.

Shapes: N tokens of a micro-batch, C = n_embd, H heads of D = head_size, I = inner_size, V = vocab_size, P
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import kernels
from gpt.config import GPTConfig
from gpt.device import GPU
from gpt.preflight import cases

# What an H200 reaches of what its vendor states, by published measurements: 785 of 989 TFLOP/s in an 8192³
# bfloat16 matmul of random values, and 4.3 of 4.8 TB/s, read and written, in a copy.
MATMUL_SHARE = 785 / 989
COPY_SHARE = 4.3 / 4.8

# Work of the host in a step of one micro-batch; tests/gpt/test_step_time.py counts it. A dispatch is an
# operation that reaches torch's dispatcher below autograd and is not a view or an allocation.
LAUNCHES_PER_LAYER, LAUNCHES_OUTSIDE = 11, 7  # of Triton kernels
DISPATCHES_PER_LAYER, DISPATCHES_OUTSIDE = 32, 26
DISPATCHES_OF_UPDATE = 39  # weights of micro-batches, norms, clipping, AdamW, loss
LAUNCH_SECONDS = 12e-6  # measured on a CPU: Triton's launcher takes 7 to 33 µs, by the number of arguments
DISPATCH_SECONDS = 35e-6  # measured on a slow CPU: 44 µs, its autograd and the small computation included
GAP_SECONDS = 1e-6  # between two kernels of a stream that the host keeps full

BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Component:
    """A part of a step.

    Args:
        name: In tables and in JSON.
        flops: Floating-point operations; 0 where memory is the limit by far.
        bytes: Read and written in the GPU's memory.
        efficiency: The assumed share of the ceiling, 0 to 1.
        basis: Why this efficiency is assumed.
    """

    name: str
    flops: int
    bytes: int
    efficiency: float
    basis: str

    def times(self, count: int) -> Component:
        """This component `count` times."""
        return Component(self.name, count * self.flops, count * self.bytes, self.efficiency, self.basis)


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a step, and what it was predicted from."""

    config: GPTConfig
    gpu: GPU
    batch_size: int
    grad_accum: int
    components: tuple[Component, ...]
    captured: bool = False  # the step runs as a CUDA graph, which the host launches at once

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of a large bfloat16 matmul."""
        return MATMUL_SHARE * self.gpu.flops

    @property
    def copy_rate(self) -> float:
        """Byte/s, read and written, of a large copy."""
        return COPY_SHARE * self.gpu.bandwidth

    def bound(self, component: Component) -> str:
        """What limits a component: "FLOPs" or "bytes"."""
        compute = component.flops / self.matmul_rate
        return "FLOPs" if compute > component.bytes / self.copy_rate else "bytes"

    def seconds_of(self, component: Component) -> float:
        """The predicted time of a component."""
        least = max(component.flops / self.matmul_rate, component.bytes / self.copy_rate)
        return least / component.efficiency

    @property
    def launches(self) -> int:
        """Launches of Triton kernels in a step."""
        return self.grad_accum * (LAUNCHES_PER_LAYER * self.config.n_layer + LAUNCHES_OUTSIDE)

    @property
    def dispatches(self) -> int:
        """Operations that the host dispatches in a step."""
        passes = DISPATCHES_PER_LAYER * self.config.n_layer + DISPATCHES_OUTSIDE
        return self.grad_accum * passes + DISPATCHES_OF_UPDATE

    @property
    def gap_seconds(self) -> float:
        """The time between kernels."""
        return GAP_SECONDS * (self.launches + self.dispatches)

    @property
    def gpu_seconds(self) -> float:
        """The GPU's time."""
        return sum(map(self.seconds_of, self.components)) + self.gap_seconds

    @property
    def host_seconds(self) -> float:
        """The host's time to issue a step without a CUDA graph."""
        return LAUNCH_SECONDS * self.launches + DISPATCH_SECONDS * self.dispatches

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return self.gpu_seconds if self.captured else max(self.gpu_seconds, self.host_seconds)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.grad_accum * self.batch_size * self.config.block_size

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation, 0 to 1, of a step of `seconds`, by the formula that training logs."""
        return self.config.flops_per_token() * self.tokens / seconds / self.gpu.flops

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        figures = (
            "seconds",
            "gpu_seconds",
            "host_seconds",
            "gap_seconds",
            "tokens",
            "launches",
            "dispatches",
        )
        return {
            "kind": "prediction",
            "config": self.config.to_dict(),
            "gpu": self.gpu._asdict(),
            "batch_size": self.batch_size,
            "grad_accum": self.grad_accum,
            "captured": self.captured,
            "matmul_flops_per_second": self.matmul_rate,
            "copy_bytes_per_second": self.copy_rate,
            **{name: getattr(self, name) for name in figures},
            "tokens_per_second": self.tokens / self.seconds,
            "mfu": self.mfu(self.seconds),
            "components": [
                {**vars(part), "bound": self.bound(part), "seconds": self.seconds_of(part)}
                for part in self.components
            ],
        }


def predict(
    config: GPTConfig, gpu: GPU, batch_size: int, grad_accum: int = 1, *, captured: bool = False
) -> Prediction:
    """Predicts a step of `grad_accum` micro-batches of `batch_size` sequences of block_size tokens."""
    parts = [part.times(grad_accum) for part in _micro_batch(config, batch_size)]
    return Prediction(
        config=config,
        gpu=gpu,
        batch_size=batch_size,
        grad_accum=grad_accum,
        components=(*parts, *_update(config, grad_accum)),
        captured=captured,
    )


def _micro_batch(config: GPTConfig, batch_size: int) -> Iterator[Component]:
    """Forward and backward pass of one micro-batch."""
    n, c, layers = batch_size * config.block_size, config.n_embd, config.n_layer
    hd, inner = config.n_head * config.head_size, config.inner_size
    padded = -(-config.vocab_size // 64) * 64  # columns of the head's matmuls

    linear = {"qkv": (c, 3 * hd), "proj": (hd, c), "up": (c, inner), "down": (inner, c)}
    for name, (width, outputs) in linear.items():
        yield _matmul(name, n, width, outputs, 0.9, "cuBLAS at a model's widths").times(layers)
    yield _matmul("head", n, c, padded, 0.86, "cuBLAS, in chunks of rows")

    ops = dict(cases(config, batch_size, config.block_size, torch.float32))
    attention, norms = {"causal_attention_qkv": layers}, _norms(config)
    dropout = {"dropout": _dropouts(config)}
    reached = 0.46 if config.block_size >= 4096 else 0.37
    basis = "Triton's tutorial on an H100 (published)"
    yield Component("attention forward", *_work(ops, attention, "forward"), reached, basis)
    basis = "between FA2 and cuDNN on an H100 (published)"
    yield Component("attention backward", *_work(ops, attention, "backward"), 0.33, basis)
    yield Component("norms forward", *_work(ops, norms, "forward"), 0.88, "loads in flight, by count")
    yield Component("norms backward", *_work(ops, norms, "backward"), 0.8, "loads in flight, by count")
    if config.dropout:
        yield Component("dropout forward", *_work(ops, dropout, "forward"), 0.9, "a pass over memory")
        yield Component("dropout backward", *_work(ops, dropout, "backward"), 0.9, "a pass over memory")

    # h in and a out; h and da in, dh and a out.
    yield Component("activation forward", 0, 2 * BF16 * n * inner * layers, 0.9, "a pass over memory")
    yield Component("activation backward", 0, 4 * BF16 * n * inner * layers, 0.9, "a pass over memory")
    # Logits in, their gradients out; rows stay in L2 between the two reads.
    yield Component("loss softmax", 0, 2 * BF16 * n * padded, 0.8, "its arithmetic takes part of the time")
    biases = 3 * hd * config.has_qkv_bias + 2 * c * config.bias  # of qkv, proj and down
    yield Component("bias sums", 0, BF16 * n * biases * layers, 0.75, "torch's sum over rows")

    # Forward: rows gathered and stored, added to the positions. Backward: the same for two tables, of which
    # the tokens' is filled with zeros, and added to the head's gradient if they are tied.
    table = config.vocab_size * c
    moved = 8 * n * c + (4 if config.tie_weights else 1) * table
    yield Component("embeddings", 0, FP32 * moved, 0.7, "a gather and a sorted scatter")
    # Weights to bfloat16 and their gradients back; the head's weight, its gradient's zeros and scaling, dx.
    counts = config.parameter_counts()
    matrices = layers * (counts["block"] - 2 * c * (1 + config.bias))
    casts = 2 * (FP32 + BF16) * matrices + (FP32 + BF16 + 3 * FP32) * table + 2 * BF16 * n * c
    yield Component("casts", 0, casts, 0.85, "passes over memory")


def _update(config: GPTConfig, grad_accum: int) -> Iterator[Component]:
    """What a step does once: adding micro-batches, clipping, AdamW."""
    total = config.parameter_counts()["total"]
    if grad_accum > 1:
        moved = 3 * FP32 * total * (grad_accum - 1)
        yield Component("accumulation", 0, moved, 0.85, "a pass over memory")
    # The norm reads the gradients; AdamW, which divides them, writes them back.
    yield Component("clipping", 0, 2 * FP32 * total, 0.85, "passes over memory")
    # Parameter, gradient and two averages in; parameter and two averages out.
    yield Component("AdamW", 0, 7 * FP32 * total, 0.9, "torch's fused kernel")


def _matmul(name: str, n: int, width: int, outputs: int, efficiency: float, basis: str) -> Component:
    """x (n, width) times a weight (outputs, width), and the two matmuls of its backward pass."""
    elements = n * width + width * outputs + n * outputs
    return Component(f"{name} matmuls", 6 * n * width * outputs, 3 * BF16 * elements, efficiency, basis)


def _norms(config: GPTConfig) -> dict[str, int]:
    """How often a pass calls each norm: every addition that a norm follows is fused with it."""
    if not config.residual:
        return {"layer_norm": 2 * config.n_layer + config.final_norm}
    if config.norm == "pre":
        return {"layer_norm": 1, "add_layer_norm": 2 * config.n_layer - 1 + config.final_norm}
    return {"add_layer_norm": 2 * config.n_layer} | ({"layer_norm": 1} if config.final_norm else {})


def _dropouts(config: GPTConfig) -> int:
    """How often a pass calls dropout: for the embeddings, and for each branch that no norm adds."""
    if not config.residual:
        return 1 + 2 * config.n_layer
    return 1 + (config.norm == "pre" and not config.final_norm)


def _work(ops: dict[str, kernels.Case], calls: dict[str, int], direction: str) -> tuple[int, int]:
    """FLOPs and bytes of `calls`, op -> count, by the formulas of the ops' specifications."""
    flops = moved = 0
    for op, count in calls.items():
        work = kernels.work(op, ops[op], torch.bfloat16, direction)
        flops, moved = flops + count * work.flops, moved + count * work.bytes
    return flops, moved
