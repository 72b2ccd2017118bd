"""Named tensors: checks of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt.errors import NonFiniteError


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Checks that no value is infinite or NaN, in one pass over the tensors and without a copy of them.

    Args:
        tensors: The tensors by name; those of an integer dtype are ignored.
        source: The file, or "the model"; the error message begins with it.

    Raises:
        NonFiniteError: The message names the first such tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor)  # NaN wherever there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(f"{source}: {name} holds infinite or NaN values, expected finite ones")
