"""`python -m gpt.sample`: continues a prompt with a trained model, and prints each token at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.cli import (
    USE_TRITON,
    OptionParser,
    device_option,
    option,
    run_command,
    use_triton_option,
    which_option,
)
from gpt.data.text_stream import Stopped, TextStream
from gpt.data.tokenizers import Tokenizer, first_ids
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.files import read_limited, read_regular, user_path
from gpt.model import GPT
from gpt.weights.pretrained import from_checkpoint, load_pretrained, load_pretrained_tokenizer

PROMPT_LIMIT = 1 << 24  # bytes


@dataclass(frozen=True)
class SampleConfig:
    """The flags: the model, the prompt, and how tokens are chosen."""

    checkpoint: str | None = option(
        None, "a run (its checkpoint that --which names), a checkpoint, a file of weights, or a hub model"
    )
    which: str = which_option()
    prompt: str | None = option(None, "text to continue; - reads it from stdin (default: a new line)")
    prompt_file: str | None = option(None, "a UTF-8 file with the text to continue")
    num_samples: int = option(1, "how many continuations")
    max_new_tokens: int = option(200, "the most tokens of a continuation")
    temperature: float = option(0.8, "divides the logits: below 1 bolder, above 1 wilder")
    top_k: int | None = option(None, "choose among the k likeliest tokens")
    top_p: float | None = option(None, "choose among the likeliest tokens whose probabilities sum to p")
    min_p: float | None = option(None, "choose among the tokens at least p times as likely as the likeliest")
    repetition_penalty: float = option(1.0, "above 1 makes tokens that came before less likely")
    stop: tuple[str, ...] = option((), "texts at which a continuation ends; they are not shown")
    seed: int = option(1337, "the same seed gives the same continuations")
    greedy: bool = option(False, "always the likeliest token")
    device: str | None = device_option()
    use_triton: str = use_triton_option()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.sample", _sample, argv, lower="--max_new_tokens")


def _sample(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "python -m gpt.sample", "Continues a prompt with a trained model.", sample=SampleConfig()
    )
    config = SampleConfig(**parser.parse_tables(argv)[1]["sample"])
    prompt = _prompt(config)
    if config.checkpoint is None:
        raise InputError("--checkpoint is not given, expected a run, a checkpoint or a model")
    _check(config)

    device = pick_device(config.device)
    use_triton = USE_TRITON[config.use_triton]

    def load(path: Path) -> tuple[Tokenizer, list[int], GPT]:
        tokenizer = load_pretrained_tokenizer(path)
        ids = tokenizer.encode(prompt) if prompt else first_ids(tokenizer)
        return tokenizer, ids, load_pretrained(path, device=device, use_triton=use_triton).eval()

    tokenizer, ids, model = from_checkpoint(config.checkpoint, device, load, which=config.which)

    generator = torch.Generator(device).manual_seed(config.seed)
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} ---")
        _continue(model, tokenizer, prompt, ids, config, generator)
    return 0


def _check(config: SampleConfig) -> None:
    """Refuses values that `GPT.generate` does not check."""
    if config.num_samples < 1:
        raise InputError(f"--num_samples is {config.num_samples}, expected at least 1")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"--seed is {config.seed}, expected 0 to {2**63 - 1}")
    if "" in config.stop:
        raise InputError("--stop is '', expected texts that are not empty")
    for text in config.stop:
        _check_text(text, "--stop")


def _prompt(config: SampleConfig) -> str:
    """The text of --prompt, --prompt_file or stdin."""
    if config.prompt is not None and config.prompt_file is not None:
        raise InputError("--prompt and --prompt_file are both given, expected one of them")
    if config.prompt == "-":
        if sys.stdin is None:
            raise InputError("--prompt: stdin is closed, expected text")
        return _decode(read_limited(sys.stdin.buffer, "--prompt: stdin", PROMPT_LIMIT), "--prompt: stdin")
    if config.prompt_file is not None:
        path = user_path(config.prompt_file, "--prompt_file")
        return _decode(read_regular(path, "--prompt_file", PROMPT_LIMIT), f"--prompt_file: {path}")
    _check_text(config.prompt or "", "--prompt")
    return config.prompt or ""


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}") from error


def _check_text(text: str, flag: str) -> None:
    """Refuses an argument with bytes that are not UTF-8; Python passes them as surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{flag} is not UTF-8 at character {error.start}") from error


def _continue(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    ids: Sequence[int],
    config: SampleConfig,
    generator: torch.Generator,
) -> None:
    """Prints the prompt and one continuation of it."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    write(prompt)
    stream = TextStream(tokenizer, write, config.stop)
    try:
        model.generate(
            torch.tensor([ids], device=model.wte.weight.device),
            config.max_new_tokens,
            do_sample=not config.greedy,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
            on_token=stream.token,
        )
        stream.end()
    except Stopped:
        pass
    print()


if __name__ == "__main__":
    sys.exit(main())
