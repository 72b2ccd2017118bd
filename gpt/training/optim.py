"""Muon: momentum whose update is made orthogonal, matrix by matrix (Jordan et al.,
https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: steep at 0, and near 1 for what is above


class Muon(torch.optim.Optimizer):
    """p ← p - lr (0.2 √max(m, n) orthogonal(g + μ v) + weight_decay p), with v ← μ v + g.

    The factor gives an update the root mean square of AdamW's, so that both take the same learning rate (Liu
    et al. 2025, arXiv 2502.16982). Matrices of one shape are made orthogonal together.

    Args:
        params: Matrices, or groups of them; a group's `parts` is the number of matrices stacked in each, as
            q, k and v are.
        lr: The learning rate.
        momentum: μ.
        weight_decay: Decoupled, as AdamW's.
        steps: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        parts: int = 1,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "parts": parts},
        )

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
        """The same step for parameters of one shape."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        velocities = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        stacked = torch.stack(torch._foreach_add(gradients, velocities, alpha=group["momentum"]))
        matrices = stacked.view(-1, stacked.shape[1] // group["parts"], stacked.shape[2])  # (K, m, n)
        updates = orthogonalize(matrices, group["steps"]).view_as(stacked)
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ, roughly, of each matrix U S Vᵀ in (K, m, n): singular values come to lie in about [0.7, 1.2].

    Numerics: bfloat16 inside, the input's dtype outside. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (K, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
