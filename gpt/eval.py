"""`python -m gpt.eval`: how well a model predicts a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from gpt.cli import USE_TRITON, OptionParser, device_option, option, run_command, use_triton_option
from gpt.data.dataset import IGNORED, Batch, DataConfig, TokenData
from gpt.data.tokenizers import Tokenizer
from gpt.device import autocast, autocast_dtype, pick_device
from gpt.errors import InputError
from gpt.model import GPT
from gpt.weights.pretrained import load_pretrained, load_pretrained_tokenizer

if TYPE_CHECKING:
    from gpt.data.token_files import Ids


@dataclass(frozen=True)
class EvalConfig:
    """Which model, which text, and how."""

    checkpoint: str | None = option(
        None, "a run (its newest valid checkpoint), a checkpoint, a file of weights, or a hub model"
    )
    data: tuple[str, ...] = option((), "the text: as in gpt.train, and all of it")
    stride: int | None = option(None, "tokens by which windows of block_size advance (default: half of it)")
    batch_size: int = option(8, "windows at a time")
    dtype: str = option("float32", "of autocast", choices=("auto", "float32", "bfloat16", "float16"))
    device: str | None = device_option()
    use_triton: str = use_triton_option()


class Evaluation(NamedTuple):
    """Over `tokens` targets: nats for each, and bits for each byte of their text."""

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 709.0))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.eval", _eval, argv)


def evaluate(
    model: GPT,
    ids: Ids,
    tokenizer: Tokenizer,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """The loss of every token but the first, given at least the block_size - stride tokens before it, where
    there are so many.

    Args:
        model: In evaluation mode.
        ids: (N,) token ids, a text in order.
        tokenizer: Theirs, for the bytes.
        stride: In [1, block_size]; half of it when None. Smaller gives more context and takes longer.
        batch_size: Windows at a time.
        dtype: Of autocast.

    Raises:
        InputError: Fewer than two tokens, or a stride outside its range.
    """
    import numpy as np
    from tqdm import tqdm

    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise InputError(f"eval: stride is {stride}, expected 1 to {block_size} (block_size)")
    if len(ids) < 2:
        raise InputError(f"eval: the text has {len(ids)} tokens, expected at least 2")
    device = model.wte.weight.device
    windows = list(range(0, max(1, len(ids) - 1 - block_size + stride), stride))
    nats, count = 0.0, 0
    with (
        torch.no_grad(),
        autocast(dtype, device),
        tqdm(total=len(windows), desc="evaluating", leave=False, delay=2) as bar,
    ):
        for i in range(0, len(windows), batch_size):
            batch = _windows(ids, windows[i : i + batch_size], block_size, stride)
            targets = int((batch.targets != IGNORED).sum())
            nats += model(batch.inputs.to(device), batch.targets.to(device)).item() * targets
            count += targets
            bar.update(len(batch.inputs))
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    size = int(lengths[ids[1:]].sum())
    return Evaluation(nats / count, nats / math.log(2) / size, count)


def _windows(ids: Ids, starts: Sequence[int], block_size: int, stride: int) -> Batch:
    """Windows at `starts`, whose targets are those that no earlier window has."""
    import numpy as np

    positions = np.asarray(starts)[:, None] + np.arange(block_size + 1)
    rows = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
    seen = (np.asarray(starts)[:, None] > 0) & (np.arange(block_size) < block_size - stride)
    targets = np.where((positions[:, 1:] >= len(ids)) | seen, IGNORED, rows[:, 1:])
    return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets))


def _eval(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "python -m gpt.eval", "Loss, perplexity and bits per byte of a text.", eval=EvalConfig()
    )
    config = EvalConfig(**parser.parse_tables(argv)[1]["eval"])
    if config.checkpoint is None or not config.data:
        missing = "--checkpoint" if config.checkpoint is None else "--data"
        raise InputError(f"{missing} is not given, expected both --checkpoint and --data")
    if config.batch_size < 1:
        raise InputError(f"--batch_size is {config.batch_size}, expected at least 1")
    device = pick_device(config.device)
    dtype = autocast_dtype(config.dtype, device)
    tokenizer = load_pretrained_tokenizer(config.checkpoint)
    ids = TokenData.load(DataConfig(data=config.data), tokenizer).all_tokens()
    model = load_pretrained(config.checkpoint, device=device, use_triton=USE_TRITON[config.use_triton]).eval()
    found = evaluate(model, ids, tokenizer, stride=config.stride, batch_size=config.batch_size, dtype=dtype)
    print(
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:,.2f}, "
        f"{found.bits_per_byte:.4f} bits per byte, "
        f"over {found.tokens:,} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
