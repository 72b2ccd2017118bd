"""A head that shares the token embedding's weight, and the loss of a head that cannot be fused with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from gpt.config import GPTConfig
from gpt.data.dataset import IGNORED
from gpt.errors import InputError


class TiedHead(nn.Module):
    """Logits of hidden states, with the weight that it is given. Its only parameter is the bias, if any."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        if weight is None:  # a wrapper, such as peft's modules_to_save, knows nothing of the embedding
            raise InputError(
                "GPT: lm_head is wrapped, but has no weight of its own, expected "
                "modules_to_save=['wte'], or a model with tie_weights=False"
            )
        return kernels.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"weight of the token embedding, bias={self.bias is not None}"


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of `kernels.linear_cross_entropy`, from logits (..., V)."""
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    count = (targets != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED) / count
