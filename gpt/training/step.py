"""One step of training: gradients over micro-batches, clipping, the optimizer, and its state as named
tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gpt.config import TrainConfig
from gpt.data.dataset import IGNORED, Batch
from gpt.errors import InputError, first_line
from gpt.training.distributed import ALONE, Ranks
from gpt.training.optim import Muon

STATE_ENTRIES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(RuntimeError):
    """A loss or gradient was infinite or no number; neither parameters nor optimizer changed."""


class StepResult(NamedTuple):
    """The mean loss over a step's targets, before the update, and the norm of its gradient before clipping.

    `stop` is whether any rank asked for it.
    """

    loss: float
    gradient_norm: float
    stop: bool = False


class TrainStep:
    """Steps `model` as `config` says.

    The gradient is that of the mean loss over all targets of a step, whatever share of them each micro-batch,
    or rank, has.

    Args:
        model: On its device, with float32 parameters.
        forward: What computes the loss, if not the model itself (its compiled form).
        ranks: The processes that take each step together, each with micro-batches of its own.

    Raises:
        InputError: A dtype that the device has not.
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
        """One step at learning rate `rate`.

        Args:
            batches: This rank's micro-batches.
            rate: Of all parameters.
            stop: Not empty, at the latest behind the backward pass, where this rank wants all to stop after
                the step.

        Raises:
            NonFiniteError: Before the parameters or the optimizer change. In float16 a gradient that
                overflows is no error while the scaler can lower its scale: the step is left out.
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
        """The last step's norms before clipping, of each block ("blocks.0") and of what is outside them
        ("wte")."""
        layers: dict[str, list[torch.Tensor]] = {}
        for p, name in self.names.items():
            if p.grad is not None:
                parts = name.split(".")
                layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(p.grad)
        norms = torch.stack([nn.utils.get_total_norm(gradients) for gradients in layers.values()]).tolist()
        clipped = max(1.0, self._norm / self._clip)
        return {layer: norm * clipped for layer, norm in zip(layers, norms, strict=True)}

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context of forward passes."""
        return autocast(self.dtype, self.device)

    def loss(self, batch: Batch, forward: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        """The mean loss over a batch's targets, by the model itself: its compiled form would be made again
        for each shape."""
        inputs, targets, document_start = (None if t is None else self._to_device(t) for t in batch)
        with self.precision():
            return (self._model if forward is None else forward)(
                inputs, targets, document_start=document_start
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizers' state by parameter and entry, as in "wte.weight/exp_avg"."""
        return {
            f"{self.names[p]}/{entry}": tensor
            for optimizer in self.optimizers
            for p in _parameters(optimizer)
            for entry, tensor in optimizer.state.get(p, {}).items()
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
        """Restores what `tensors` returned.

        Raises:
            InputError: The state is not that of these parameters and optimizers.
        """
        entries: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.names.values()}
        shapes = {name: p.shape for p, name in self.names.items()}
        for key, tensor in tensors.items():
            name, _, entry = key.rpartition("/")
            if name not in entries or (tensor.dim() and tensor.shape != shapes[name]):
                raise InputError(
                    f"checkpoint: {source} has {key} of shape {tuple(tensor.shape)}, which fits no parameter"
                )
            entries[name][entry] = tensor
        for optimizer in self.optimizers:
            state = {i: entries[self.names[p]] for i, p in enumerate(_parameters(optimizer))}
            expected = STATE_ENTRIES[type(optimizer)]
            if wrong := [
                self.names[p] for p in _parameters(optimizer) if entries[self.names[p]].keys() != expected
            ]:
                raise InputError(
                    f"checkpoint: {source} has for {wrong[0]} the state of another optimizer than "
                    f"{type(optimizer).__name__}"
                )
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )

    def _zero_gradients(self) -> None:
        for p in self.names:
            p.grad = None

    def _accumulate(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, int]:
        """The mean loss over the batches' targets, whose gradient is left in the parameters, and how many
        targets there are."""
        counts = [int((batch.targets != IGNORED).sum()) for batch in batches]
        total = torch.zeros((), device=self.device)
        for batch, count in zip(batches, counts, strict=True):
            loss = self.loss(batch, self._forward) * (count / max(1, sum(counts)))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total, sum(counts)

    def _combine(self, loss: torch.Tensor, count: int, stop: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean over the targets of all ranks, of losses and of gradients, and how many ranks want to
        stop: one sum."""
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


def pick_device(name: str | None) -> torch.device:
    """The device `name`; None is a GPU if there is one, else the CPU.

    Raises:
        InputError: No such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device is {name!r}, expected a device of this machine ({first_line(error)})"
        ) from error
    return device


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` means on `device`; "auto" is bfloat16 where the device multiplies it in hardware,
    else float32.

    Raises:
        InputError: float16 on a CPU, where its products are many times slower than float32's.
    """
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if name == "auto":
        able = (
            device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities()
        )
        return torch.bfloat16 if able and (able.get("avx512_bf16") or able.get("amx_bf16")) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise InputError("TrainConfig: dtype is 'float16' on a CPU, expected float32 or bfloat16 there")
    return _DTYPES[name]


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context of forward passes in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step `step`, from 0: linear warm-up to learning_rate, half a cosine to min_lr at
    decay_steps, then min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    end = config.decay_steps or config.max_steps
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_steps) / (end - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def make_optimizers(names: Mapping[nn.Parameter, str], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or "muon": Muon for the blocks' matrices and AdamW for the rest. Biases and norms do not
    decay."""
    muon = [
        p
        for p, name in names.items()
        if config.optimizer == "muon" and p.dim() == 2 and name.startswith("blocks.")
    ]
    chosen = set(muon)
    rest = [p for p in names if p not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=all(p.device.type in ("cpu", "cuda") for p in rest),
        )
    ]
    if muon:
        stacked = [p for p in muon if names[p].endswith("qkv.weight")]
        single = [p for p in muon if not names[p].endswith("qkv.weight")]
        groups = [{"params": stacked, "parts": 3}, {"params": single}]
        optimizers.append(Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay))
    return optimizers


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """In the order by which its state_dict numbers them."""
    return (p for group in optimizer.param_groups for p in group["params"])
