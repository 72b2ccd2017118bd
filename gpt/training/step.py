"""One training step: gradients over micro-batches, clipping, and the optimizers' update."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch
from gpt.device import autocast, autocast_dtype
from gpt.training.distributed import ALONE, Ranks
from gpt.training.optim import load_state_tensors, make_optimizers, state_tensors


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or NaN; neither the parameters nor the optimizers have changed."""


class StepResult(NamedTuple):
    """The result of one step.

    `loss` is the mean over the step's targets, before the update; `gradient_norm` is the norm before
    clipping; `stop` is True when any rank asked to stop.
    """

    loss: float
    gradient_norm: float
    stop: bool = False


class TrainStep:
    """Trains `model` by one step per call.

    Every target of a step has the same weight in the gradient, however the targets are spread over
    micro-batches and ranks.

    Args:
        model: The model, on its device, with float32 parameters.
        config: Optimizer, dtype and clipping.
        forward: Computes the loss instead of the model itself: the compiled model.
        ranks: The processes that take each step together. Each has its own micro-batches.

    Raises:
        InputError: The device does not support the dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        forward: Callable[..., torch.Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.names)).device
        self.dtype = autocast_dtype(config.dtype, self.device)
        self.optimizers = make_optimizers(self.names, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._model, self._forward = model, model if forward is None else forward
        self._ranks = ranks
        self._clip = config.grad_clip or math.inf
        self._norm = 0.0

    def __call__(self, batches: Sequence[Batch], rate: float, stop: Collection[object] = ()) -> StepResult:
        """Takes one step.

        Args:
            batches: This rank's micro-batches.
            rate: The learning rate of all parameters.
            stop: Not empty if this rank asks all ranks to stop after this step. A signal handler may fill it
                until the backward pass has ended.

        Raises:
            NonFiniteError: The loss or the gradient norm is not finite. In float16 an overflowing gradient is
                not an error while the scaler can lower its scale: the update is skipped.
        """
        self._zero_gradients()
        loss, count = self._accumulate(batches)

        stopping: torch.Tensor | bool = bool(stop)
        if self._ranks.size > 1:
            loss, stopping = self._combine(loss, count, bool(stop))

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.names, self._clip)
        result = StepResult(*torch.stack((loss, norm)).tolist(), stop=bool(stopping))

        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not math.isfinite(result.loss) or not (math.isfinite(result.gradient_norm) or overflow):
            self._zero_gradients()
            name, value = (
                ("gradient norm", result.gradient_norm)
                if math.isfinite(result.loss)
                else ("loss", result.loss)
            )
            raise NonFiniteError(f"the {name} is {value}")

        if math.isfinite(result.gradient_norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self.scaler.step(optimizer)
        self.scaler.update()
        self._norm = result.gradient_norm
        return result

    def gradient_norms(self) -> dict[str, float]:
        """The last step's gradient norms before clipping: one per block ("blocks.0") and per other module."""
        layers: dict[str, list[torch.Tensor]] = {}
        for p, name in self.names.items():
            if p.grad is not None:
                parts = name.split(".")
                layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(p.grad)
        norms = torch.stack([nn.utils.get_total_norm(gradients) for gradients in layers.values()]).tolist()
        clipped = max(1.0, self._norm / self._clip)
        return {layer: norm * clipped for layer, norm in zip(layers, norms, strict=True)}

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        return autocast(self.dtype, self.device)

    def loss(self, batch: Batch, forward: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        """The mean loss over a batch's targets.

        The default is the uncompiled model, because a compiled one is compiled again for each new shape.
        """
        inputs, targets, document_start = (None if t is None else self._to_device(t) for t in batch)
        with self.precision():
            return (self._model if forward is None else forward)(
                inputs, targets, document_start=document_start
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizers' state, keyed by parameter and entry: "wte.weight/exp_avg"."""
        return state_tensors(self.optimizers, self.names)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
        """Restores what `tensors` returned.

        Raises:
            InputError: The state belongs to other parameters or other optimizers.
        """
        load_state_tensors(self.optimizers, self.names, tensors, source)

    def _zero_gradients(self) -> None:
        for p in self.names:
            p.grad = None

    def _accumulate(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, int]:
        """Runs forward and backward; returns the mean loss over the batches' targets and their number."""
        counts = [int((batch.targets != IGNORED).sum()) for batch in batches]
        total = torch.zeros((), device=self.device)
        for batch, count in zip(batches, counts, strict=True):
            loss = self.loss(batch, self._forward) * (count / max(1, sum(counts)))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total, sum(counts)

    def _combine(self, loss: torch.Tensor, count: int, stop: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Averages the loss and the gradients over the targets of all ranks, with one sum over the ranks.

        Returns the mean loss and the number of ranks that ask to stop.
        """
        gradients = [p.grad for p in self.names if p.grad is not None]
        torch._foreach_mul_(gradients, float(count))
        sums = torch.cat(
            ((loss * count)[None], torch.tensor((count, stop), dtype=loss.dtype, device=self.device))
        )
        self._ranks.sum_([*gradients, sums])

        total, targets, stopping = sums.unbind()
        torch._foreach_div_(gradients, targets.clamp_(min=1))
        return total / targets, stopping

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
