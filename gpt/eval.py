"""`python -m gpt.eval`: the loss, perplexity and bits per byte of a text under a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.cli import (
    USE_TRITON,
    OptionParser,
    device_option,
    dtype_option,
    option,
    run_command,
    use_triton_option,
    which_option,
)
from gpt.data.dataset import DataConfig, TokenData
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.model import GPT
from gpt.packing import generation_format
from gpt.training.evaluation import evaluate
from gpt.weights.pretrained import from_checkpoint, load_pretrained, load_pretrained_tokenizer


@dataclass(frozen=True)
class EvalConfig:
    """The flags: the model, the text, and how to evaluate."""

    checkpoint: str | None = option(
        None, "a run (its checkpoint that --which names), a checkpoint, a file of weights, or a hub model"
    )
    which: str = which_option()
    data: tuple[str, ...] = option((), "the text: as in gpt.train, and all of it")
    text_field: str = option("text", "the field of a row that has its text")
    keep_newlines: bool = option(False, "keep the carriage returns of CRLF")
    stride: int | None = option(None, "tokens by which windows of block_size advance (default: half of it)")
    batch_size: int = option(8, "windows at a time")
    dtype: str = dtype_option()
    device: str | None = device_option()
    use_triton: str = use_triton_option()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.eval", _eval, argv, lower="--batch_size")


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
    dtype, quantize = generation_format(config.dtype, device)
    use_triton = USE_TRITON[config.use_triton]

    data = DataConfig(data=config.data, text_field=config.text_field, keep_newlines=config.keep_newlines)

    def load(path: Path) -> tuple[TokenData, GPT]:
        text = TokenData.load(data, load_pretrained_tokenizer(path), split=False)
        model = load_pretrained(path, device=device, dtype=dtype, quantize=quantize, use_triton=use_triton)
        return text, model.eval()

    text, model = from_checkpoint(config.checkpoint, device, load, which=config.which)

    evaluation = evaluate(
        model,
        text.all_tokens(),
        text.tokenizer,
        targets=text.all_targets(),
        stride=config.stride,
        batch_size=config.batch_size,
    )
    print(
        f"loss {evaluation.loss:.4f} nats per token, perplexity {evaluation.perplexity:,.2f}, "
        f"{evaluation.bits_per_byte:.4f} bits per byte, over {evaluation.tokens:,} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
