"""`python -m gpt.sample`: continues a prompt with a trained model, as the tokens come."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.cli import USE_TRITON, OptionParser, device_option, option, run_command, use_triton_option
from gpt.data.corpus import read_text
from gpt.data.tokenizers import Tokenizer, first_ids
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.model import GPT
from gpt.weights.checkpoint import find_checkpoint
from gpt.weights.files import is_own, locate
from gpt.weights.pretrained import load_pretrained, load_pretrained_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    """What to continue, and how tokens are chosen."""

    checkpoint: str | None = option(
        None, "a run (its newest valid checkpoint), a checkpoint, a file of weights, or a hub model"
    )
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


class Stopped(Exception):
    """A stop text came."""


class TextStream:
    """Turns token ids into text as they come, whole characters only, and ends before the first of `stops`."""

    def __init__(
        self, tokenizer: Tokenizer, write: Callable[[str], object], stops: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.write, self.stops = tokenizer, write, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # could be the beginning of a stop text

    def token(self, ids: Tensor) -> None:
        """Takes the next token, as generate's `on_token` gives it, for one row; raises Stopped at a stop
        text."""
        self._take(self._decoder.decode(self.tokenizer.decode_bytes(ids.tolist())))

    def end(self) -> None:
        """Writes what was held back."""
        self._take(self._decoder.decode(b"", True))
        self.write(self._held)
        self._held = ""

    def _take(self, text: str) -> None:
        self._held += text
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.write(self._held[: min(found)])
            self._held = ""
            raise Stopped
        begin = next(
            (i for i in range(len(self._held)) if any(s.startswith(self._held[i:]) for s in self.stops)),
            len(self._held),
        )
        self.write(self._held[:begin])
        self._held = self._held[begin:]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.sample", _sample, argv)


def _sample(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "python -m gpt.sample", "Continues a prompt with a trained model.", sample=SampleConfig()
    )
    config = SampleConfig(**parser.parse_tables(argv)[1]["sample"])
    prompt = _prompt(config)
    if config.checkpoint is None:
        raise InputError("--checkpoint is not given, expected a run, a checkpoint or a model")
    if config.num_samples < 1:
        raise InputError(f"--num_samples is {config.num_samples}, expected at least 1")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"--seed is {config.seed}, expected 0 to {2**63 - 1}")
    if "" in config.stop:
        raise InputError("--stop is '', expected texts that are not empty")
    device = pick_device(config.device)
    source = locate(config.checkpoint)
    source = find_checkpoint(source) if is_own(source) else source
    tokenizer = load_pretrained_tokenizer(source)
    ids = tokenizer.encode(prompt) if prompt else first_ids(tokenizer)
    model = load_pretrained(source, device=device, use_triton=USE_TRITON[config.use_triton]).eval()
    generator = torch.Generator(device).manual_seed(config.seed)
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} ---")
        _continue(model, tokenizer, prompt, ids, config, generator)
    return 0


def _prompt(config: SampleConfig) -> str:
    if config.prompt is not None and config.prompt_file is not None:
        raise InputError("--prompt and --prompt_file are both given, expected one of them")
    if config.prompt == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"--prompt: stdin is not UTF-8 at byte {error.start}") from error
    return read_text(Path(config.prompt_file)) if config.prompt_file is not None else config.prompt or ""


def _continue(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    ids: Sequence[int],
    config: SampleConfig,
    generator: torch.Generator,
) -> None:
    """Prints one continuation of the prompt, behind the prompt."""

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
