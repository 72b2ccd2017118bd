"""The factor on a float16 loss that keeps small gradients from becoming zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """`torch.amp.GradScaler`'s scale, kept on the device: to update it, the host does not synchronise.

    A step whose gradients overflow halves it; 2000 steps in a row without an overflow double it.

    Args:
        device: Of the loss.
        enabled: False for a scale of 1 that never changes.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), INITIAL if enabled else 1.0, device=device)
        self._steps = torch.zeros((), dtype=torch.int32, device=device)  # in a row without an overflow

    def scale(self, loss: Tensor) -> Tensor:
        """loss · scale."""
        return loss * self.value if self.enabled else loss

    def update(self, overflow: Tensor, failed: Tensor) -> None:
        """Notes whether a step's gradients overflowed. Nothing changes where `failed` is true."""
        if not self.enabled:
            return
        steps = self._steps + 1
        grown = ~overflow & (steps == INTERVAL)
        doubled = torch.where(self.value < 2.0**127, self.value * GROWTH, self.value)
        value = torch.where(grown, doubled, torch.where(overflow, self.value * BACKOFF, self.value))
        self.value.copy_(torch.where(failed, self.value, value))
        self._steps.copy_(torch.where(failed, self._steps, steps.masked_fill(overflow | grown, 0)))

    def get_scale(self) -> float:
        """The scale; synchronises with the device."""
        return self.value.item()

    def state_dict(self) -> dict[str, Any]:
        """The state as GradScaler's, for a checkpoint; empty if the scale never changes."""
        if not self.enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": GROWTH,
            "backoff_factor": BACKOFF,
            "growth_interval": INTERVAL,
            "_growth_tracker": int(self._steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, unless the scale never changes."""
        if self.enabled:
            self.value.fill_(state["scale"])
            self._steps.fill_(state["_growth_tracker"])
