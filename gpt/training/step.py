"""One training step: gradients over micro-batches, clipping, and the optimizers' update.

The host queues a step without synchronising. Whether its loss and gradients are finite is known on the device
first, which then leaves everything as it is; the host reads the result later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch
from gpt.decoding import captures
from gpt.device import autocast, autocast_dtype
from gpt.errors import NonFiniteError
from gpt.model import GPT
from gpt.packing import refuse_packed
from gpt.training.capture import TOKENS, StepGraph
from gpt.training.distributed import ALONE, Ranks
from gpt.training.loss_scale import LossScale
from gpt.training.optim import load_state_tensors, make_optimizers, state_tensors, update
from gpt.training.parallel import accumulating, gradient_norms, shards


class Batches(Protocol):
    """Micro-batches that can be iterated more than once."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DrawnBatches:
    """The micro-batches draw(number), drawn again at each iteration, so that only one is in memory."""

    draw: Callable[[int], Batch]
    numbers: Sequence[int]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.draw, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class StepResult(NamedTuple):
    """The result of one step.

    `loss` is the mean over the step's targets, before the update; `gradient_norm` is the norm before
    clipping; `stop` is True when any rank asked to stop; `gradient_norms` are the norms before clipping of
    the gradients of each block ("blocks.0") and of each other module.
    """

    loss: float
    gradient_norm: float
    stop: bool
    gradient_norms: Mapping[str, float]


class PendingStep:
    """A queued step, whose result the host has not read."""

    def __init__(self, step: TrainStep, values: Tensor, names: Sequence[str], *, stop: bool) -> None:
        on_gpu = values.device.type == "cuda"
        self._step, self._names, self._stop = step, names, stop
        self._values = torch.empty(values.shape, pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=on_gpu)
        self._copied = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def result(self) -> StepResult:
        """Synchronises with the end of the step.

        Raises:
            NonFiniteError: The loss or the gradient norm is not finite. The step, and those queued after it,
                have changed nothing. In float16 an overflowing gradient is not an error while the scaler can
                lower its scale: the update is skipped.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, failed, stop, *norms = self._values.tolist()
        if failed:
            self._step.recover()
            name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
            raise NonFiniteError(f"the {name} is {value}")

        layers: dict[str, list[float]] = {}
        for name, value in zip(self._names, norms, strict=True):
            parts = name.split(".")
            layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(value)
        gradient_norms = {layer: math.hypot(*values) for layer, values in layers.items()}
        return StepResult(loss, norm, self._stop or bool(stop), gradient_norms)


class TrainStep:
    """Trains `model` by one step per call.

    Every target of a step has the same weight in the gradient, however the targets are spread over
    micro-batches and ranks. Steps of one process with up to capture.TOKENS tokens run as a CUDA graph, those
    of an evaluation too.

    Args:
        model: The model, on its device, with float32 parameters.
        config: Optimizer, dtype and clipping.
        forward: Computes the loss instead of the model itself: what `parallel.parallelize` returned.
        ranks: The processes that take each step together. Each has its own micro-batches, as many as the
            others.

    Raises:
        InputError: The device does not support the dtype.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        forward: Callable[..., Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        refuse_packed(model, "trained")
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.names)).device
        self.dtype = autocast_dtype(config.dtype, self.device)
        self.optimizers = make_optimizers(self.names, config)
        self.scaler = LossScale(self.device, enabled=self.dtype == torch.float16)
        self._model, self._forward = model, model if forward is None else forward
        self._ranks, self._sharded = ranks, bool(shards(config, ranks))
        self._clip = config.grad_clip

        # The fused kernel of a GPU reads a float32 rate.
        rate_dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self._rate = torch.zeros((), dtype=rate_dtype, device=self.device)
        self._failed = torch.zeros((), dtype=torch.bool, device=self.device)
        self._graph = self._evaluation = None
        model.checkpoint_activations = config.checkpoint_activations
        # A capture runs no hooks, and cannot read random states, as a recomputation does.
        if captures(self.device) and ranks.size == 1 and not (config.no_capture or kernels.has_hooks(model)):
            self._evaluation = StepGraph(self._evaluate, self.device, "evaluation steps")
            if forward is None and not config.checkpoint_activations:
                self._graph = StepGraph(self._run, self.device, "training steps")

    def __call__(self, batches: Batches, rate: float, stop: Sized = ()) -> StepResult:
        """Takes one step and reads its result: see `enqueue` and `PendingStep.result`."""
        return self.enqueue(batches, rate, stop).result()

    def enqueue(self, batches: Batches, rate: float, stop: Sized = ()) -> PendingStep:
        """Queues one step, without synchronising with the device.

        If its loss or gradient is not finite, the device leaves parameters, optimizers and loss scale as they
        are, in this step and in all that are queued until `PendingStep.result` raises the error.

        Args:
            batches: This rank's micro-batches. They are iterated twice, to count their targets first; a step
                that is not captured holds one of them at a time.
            rate: The learning rate of all parameters.
            stop: Not empty if this rank asks all ranks to stop after this step. A signal handler may fill it
                until the backward pass has ended.
        """
        self._zero_gradients()
        self._rate.fill_(rate)
        values = self._replay(self._graph, batches)
        if values is None:
            values = self._run(batches, stop)
        return PendingStep(self, values, self._with_gradients, stop=self._ranks.size == 1 and bool(stop))

    def recover(self) -> None:
        """Lets steps change the parameters again after a step that was not finite."""
        self._zero_gradients()
        self._failed.zero_()

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        return autocast(self.dtype, self.device)

    def loss(self, batch: Batch, forward: Callable[..., Tensor] | None = None) -> Tensor:
        """The mean loss over a batch's targets.

        The default is the uncompiled model, because a compiled one is compiled again for each new shape.
        """
        inputs, targets, document_start = self._to_device(batch)
        with self.precision():
            return (self._model if forward is None else forward)(
                inputs, targets, document_start=document_start
            )

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """`loss` without gradients. The next call may overwrite the result."""
        value = self._replay(self._evaluation, [batch])
        return self.loss(batch) if value is None else value

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state, keyed by parameter and entry: "wte.weight/exp_avg"."""
        return state_tensors(self.optimizers, self.names)

    def load_tensors(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Restores what `tensors` returned.

        Raises:
            InputError: The state belongs to other parameters or other optimizers.
        """
        load_state_tensors(self.optimizers, self.names, tensors, source)
        if self._graph is not None:
            self._graph.reset()

    def _zero_gradients(self) -> None:
        for p in self.names:
            p.grad = None

    def _replay(self, graph: StepGraph | None, batches: Iterable[Batch]) -> Tensor | None:
        """The result of `graph` on the batches, or None if it may not run them.

        It may not with a dropout seed, which the caller may set each time, or with more than TOKENS tokens.
        """
        if graph is None or self._model.dropout_seed is not None or not captures(self.device):
            return None
        drawn, tokens = [], 0
        for batch in batches:
            tokens += batch.inputs.numel()
            if tokens > TOKENS:
                return None
            drawn.append(self._to_device(batch))
        return graph(drawn, (self._model.training, self._model.use_triton)) if drawn else None

    def _evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The loss of the one batch of an evaluation step."""
        (batch,) = batches
        return self.loss(batch)

    def _run(self, batches: Batches, stop: Sized = ()) -> Tensor:
        """Takes one step on the device.

        Returns:
            Loss, gradient norm, whether this or an earlier step failed, the number of ranks that ask to stop,
            and the norm of each parameter's gradient, in one float32 tensor.
        """
        loss, stopping = self._accumulate(batches, stop)
        self._with_gradients = [name for p, name in self.names.items() if p.grad is not None]
        with torch.no_grad():
            gradients = [p.grad for p in self.names if p.grad is not None]
            norms = gradient_norms(gradients, sharded=self._sharded)
            divisor = self.scaler.value if self.scaler.enabled else None
            norms = norms if divisor is None else norms / divisor
            norm = torch.linalg.vector_norm(norms)
            if self._clip:
                excess = (norm / self._clip).clamp(min=1)
                divisor = excess if divisor is None else divisor * excess

            wrong_loss, overflow = (~torch.stack((loss, norm)).isfinite()).unbind()
            self._failed |= wrong_loss | (overflow & (self.scaler.value <= 1))
            update(self.optimizers, self._rate, divisor, skip=overflow | self._failed)
            self.scaler.update(overflow, self._failed)
            return torch.cat((torch.stack((loss, norm, self._failed.float(), stopping)), norms))

    def _accumulate(self, batches: Batches, stop: Sized) -> tuple[Tensor, Tensor]:
        """Runs forward and backward passes, with gradients as the mean over the targets of all ranks.

        Returns the mean loss and the number of ranks that ask to stop.
        """
        counts = self._move(torch.stack([(batch.targets != IGNORED).sum() for batch in batches]))
        count, size = counts.sum(), self._ranks.size
        if size > 1:
            dist.all_reduce(count)
            counts = counts * size  # the engines average over the ranks
        weights = counts / count.clamp(min=1)
        loss = torch.zeros((), device=self.device)
        last = [False] * (len(weights) - 1) + [True]
        for batch, weight, is_last in zip(batches, weights.unbind(), last, strict=True):
            with accumulating(self._forward, last=is_last):
                part = self.loss(batch, self._forward) * weight
                self.scaler.scale(part).backward()
            loss += part.detach()
        if size == 1:
            return loss, torch.zeros_like(loss)

        sums = torch.stack((loss / size, torch.full_like(loss, bool(stop))))
        dist.all_reduce(sums)
        loss, stopping = sums.unbind()
        return loss, stopping

    def _to_device(self, batch: Batch) -> Batch:
        inputs, targets, start = batch
        return Batch(self._move(inputs), self._move(targets), None if start is None else self._move(start))

    def _move(self, t: Tensor) -> Tensor:
        """`t` on the device, without synchronising."""
        if self.device.type == "cuda" and t.device.type == "cpu":
            return t.pin_memory().to(self.device, non_blocking=True)
        return t.to(self.device)
