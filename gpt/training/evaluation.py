"""How well a model predicts a text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from gpt.data.dataset import IGNORED, Batch
from gpt.data.tokenizers import Tokenizer, end_of_text
from gpt.errors import InputError
from gpt.model import GPT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpt.data.token_files import Ids


class Evaluation(NamedTuple):
    """The mean loss over `tokens` targets, in nats per token, and as bits per byte of the targets' text."""

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 709.0))  # exp(710) overflows


def evaluate(
    model: GPT,
    ids: Ids,
    tokenizer: Tokenizer,
    *,
    targets: NDArray[np.bool_] | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """The loss of every token but the first, in windows of block_size tokens that advance by `stride`.

    The model sees at least the block_size - stride tokens before a target, if the text has that many.

    Args:
        model: In evaluation mode.
        ids: (N,) token ids of a text, in order.
        tokenizer: The tokenizer of the ids, from which their bytes are counted.
        targets: (N,) which tokens are predicted; the others are context. None: all.
        stride: In [1, block_size]; None is half of block_size. A smaller stride gives more context and takes
            longer.
        batch_size: Windows per forward pass.

    Raises:
        InputError: The text has fewer than two tokens or none to predict, or the stride is outside its range.
    """
    import numpy as np
    from tqdm import tqdm

    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise InputError(f"eval: stride is {stride}, expected 1 to {block_size} (block_size)")
    if len(ids) < 2:
        raise InputError(f"eval: the text has {len(ids)} tokens, expected at least 2")
    targets = np.ones(len(ids), bool) if targets is None else targets
    if not targets[1:].any():
        raise InputError("eval: the text has no tokens to predict, expected answers as well as prompts")

    device = model.wte.weight.device
    starts = list(range(0, max(1, len(ids) - 1 - block_size + stride), stride))
    nats, count = 0.0, 0
    with (
        torch.no_grad(),
        tqdm(total=len(starts), desc="evaluating", leave=False, delay=2) as bar,
    ):
        for i in range(0, len(starts), batch_size):
            batch = _windows(ids, targets, starts[i : i + batch_size], block_size, stride)
            number = int((batch.targets != IGNORED).sum())
            nats += model(batch.inputs.to(device), batch.targets.to(device)).item() * number
            count += number
            bar.update(len(batch.inputs))

    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    if (end := end_of_text(tokenizer)) is not None:
        lengths[end] = 0  # it is not in the text
    size = int(lengths[ids[1:][targets[1:]]].sum())  # bytes
    return Evaluation(nats / count, nats / math.log(2) / size if size else math.inf, count)


def _windows(
    ids: Ids, targets: NDArray[np.bool_], starts: Sequence[int], block_size: int, stride: int
) -> Batch:
    """Windows of block_size tokens at `starts`; targets that an earlier window has are ignored."""
    import numpy as np

    positions = np.asarray(starts)[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    clipped = np.minimum(positions, len(ids) - 1)
    rows = ids[clipped].astype(np.int64)
    seen = (np.asarray(starts)[:, None] > 0) & (np.arange(block_size) < block_size - stride)
    ignored = (positions[:, 1:] >= len(ids)) | seen | ~targets[clipped[:, 1:]]
    return Batch(
        torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(np.where(ignored, IGNORED, rows[:, 1:]))
    )
