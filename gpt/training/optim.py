"""Optimizers: Muon, the choice of optimizer per parameter, the learning-rate schedule, and saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.config import TrainConfig
from gpt.device import multiplies_bfloat16
from gpt.errors import InputError
from gpt.weights.tensors import check_finite

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: steep at 0, close to 1 for larger x


class Muon(torch.optim.Optimizer):
    """p ← p - lr (0.2 √max(m, n) orthogonal(g + μ v) + weight_decay p), with v ← μ v + g.

    The factor 0.2 √max(m, n) gives an update the same root mean square as AdamW's, so that one learning rate
    fits both (Liu et al. 2025, arXiv 2502.16982). Matrices of the same shape are orthogonalised in one batch;
    those that are sharded over processes are gathered for it, and every process orthogonalises all of them.

    Args:
        params: Matrices, or groups of matrices. A group's `parts` says how many matrices each parameter
            stacks: 3 for a fused query, key and value projection.
        lr: The learning rate.
        momentum: μ.
        weight_decay: Decoupled, as in AdamW.
        steps: Newton-Schulz iterations.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon.
    """

    # As in torch's fused optimizers: `step` divides the gradients by grad_scale, and changes neither the
    # parameters nor their momentum where found_inf is 1. Both are on the device: `step` does not synchronise.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        parts: int = 1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"steps": steps, "parts": parts, "capturable": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for parameters in shapes.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Updates parameters of one shape."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [self.state[p]["momentum_buffer"] for p in parameters]
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.grad_scale is not None:
            torch._foreach_div_(grads, self.grad_scale)

        gradients, momentum, rate = torch.stack(grads), group["momentum"], group["lr"]
        if self.found_inf is not None:  # a skipped step has gradients 0, momentum 1 and rate 0
            skip = self.found_inf == 1
            gradients, rate = gradients.masked_fill_(skip, 0), rate.masked_fill(skip, 0)
            momentum = self.found_inf.new_full((), momentum).masked_fill(skip, 1)
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, list(gradients.unbind()))

        directions = torch.add(gradients, torch.stack(velocities), alpha=group["momentum"])
        stacked = _whole(directions)
        matrices = stacked.view(-1, stacked.shape[1] // group["parts"], stacked.shape[2])  # (K, m, n)
        updates = _sharded_like(directions, orthogonalize(matrices, group["steps"]).view_as(stacked))

        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        factor = torch.as_tensor(rate * scale, dtype=updates.dtype, device=updates.device)
        torch._foreach_addcmul_(parameters, list(updates.unbind()), [factor] * len(updates), value=-1)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ, approximately, for each matrix U S Vᵀ in (K, m, n): singular values end in about [0.7, 1.2].

    Numerics: computes in bfloat16 where the hardware multiplies it, else in float32, and returns the input's
    dtype. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    dtype = torch.bfloat16 if multiplies_bfloat16(matrices.device) else torch.float32
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (K, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _whole(t: Tensor) -> Tensor:
    """`t`, gathered from all processes if it is sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # a DTensor


def _sharded_like(like: Tensor, t: Tensor) -> Tensor:
    """`t`, which every process has, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return t
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


# The tensors that each optimizer keeps per parameter.
STATE_ENTRIES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}


def make_optimizers(names: Mapping[nn.Parameter, str], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; with "muon", Muon for the matrices of the blocks and AdamW for the rest.

    Weight decay applies to matrices and embeddings, not to biases and norms.
    """
    muon = [
        p
        for p, name in names.items()
        if config.optimizer == "muon" and p.dim() == 2 and name.startswith("blocks.")
    ]
    muon_set = set(muon)
    rest = [p for p in names if p not in muon_set]
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
            capturable=all(p.device.type == "cuda" for p in rest),
        )
    ]

    if muon:
        stacked = [p for p in muon if names[p].endswith("qkv.weight")]
        single = [p for p in muon if not names[p].endswith("qkv.weight")]
        groups = [{"params": stacked, "parts": 3}, {"params": single}]
        optimizers.append(Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay))
    return optimizers


@torch.no_grad()
def update(
    optimizers: Sequence[torch.optim.Optimizer], rate: Tensor, divisor: Tensor | None, skip: Tensor
) -> None:
    """Divides the gradients by `divisor` and takes a step of each optimizer, where `skip` is false.

    Where `skip` is true, parameters, moments and step counts stay as they are. The arguments are on the
    device, and the host does not synchronise with a CUDA GPU.
    """
    found_inf = skip.float()
    for optimizer in optimizers:
        fused = optimizer.defaults.get("fused", True)
        for group in optimizer.param_groups:
            group["lr"] = rate if fused else rate.item()
        if fused:
            optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
            optimizer.step()
        elif not skip:  # other devices have no fused kernel that could skip
            gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
            if divisor is not None:
                torch._foreach_div_(gradients, divisor)
            optimizer.step()


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step `step`, counted from 0.

    Linear warm-up to learning_rate, then half a cosine down to min_lr at decay_steps, then min_lr.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    end = config.decay_steps or config.max_steps
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_steps) / (end - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def state_tensors(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """The optimizers' state, keyed by parameter and entry: "wte.weight/exp_avg"."""
    return {
        f"{names[p]}/{entry}": tensor
        for optimizer in optimizers
        for p in _parameters(optimizer)
        for entry, tensor in optimizer.state.get(p, {}).items()
    }


def load_state_tensors(
    optimizers: Sequence[torch.optim.Optimizer],
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    source: Path,
) -> None:
    """Restores what `state_tensors` returned.

    Raises:
        InputError: The tensors belong to other parameters or other optimizers. Nothing is restored. The
            message names `source`.
        NonFiniteError: A value is infinite or NaN. Nothing is restored.
    """
    entries: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
    by_name = {name: p for p, name in names.items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in entries or tensor.shape != (() if entry == "step" else by_name[name].shape):
            raise InputError(
                f"checkpoint: {source} has {key} of shape {tuple(tensor.shape)}, which fits no parameter"
            )
        if tensor.dtype != by_name[name].dtype:
            raise InputError(f"checkpoint: {source}: {key} is {tensor.dtype}, expected {by_name[name].dtype}")
        entries[name][entry] = tensor
    for optimizer in optimizers:
        expected = STATE_ENTRIES[type(optimizer)]
        if wrong := [names[p] for p in _parameters(optimizer) if entries[names[p]].keys() != expected]:
            raise InputError(
                f"checkpoint: {source} has for {wrong[0]} the state of another optimizer, expected "
                f"{type(optimizer).__name__}'s"
            )
    check_finite(tensors, source)

    for optimizer in optimizers:
        state = {i: entries[names[p]] for i, p in enumerate(_parameters(optimizer))}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters in the order in which the optimizer's state_dict numbers them."""
    return (p for group in optimizer.param_groups for p in group["params"])
