"""`python -m gpt.sample`: continues a prompt, or answers line by line, and prints each token at once."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
from gpt.data.instructions import NEXT_TURN, conversation
from gpt.data.text_stream import Stopped, TextStream
from gpt.data.tokenizers import END_OF_TEXT, Tokenizer, first_ids
from gpt.device import pick_device
from gpt.errors import InputError
from gpt.files import read_limited, read_regular, user_path
from gpt.model import GPT
from gpt.packing import generation_format
from gpt.sampler import LARGEST, SCALES, SMALLEST
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
    interactive: bool = option(False, "continue each line of stdin, after --prompt; Ctrl-D ends")
    chat: bool = option(False, "the prompt, or each line, is what a user says in a conversation")
    system: str = option("", "the system message of --chat")
    num_samples: int = option(1, "how many continuations")
    max_new_tokens: int = option(200, "the most tokens of a continuation")
    temperature: float = option(0.8, "divides the logits: below 1 bolder, above 1 wilder")
    top_k: int | None = option(None, "choose among the k likeliest tokens")
    top_p: float | None = option(None, "choose among the likeliest tokens whose probabilities sum to p")
    min_p: float | None = option(None, "choose among the tokens at least p times as likely as the likeliest")
    repetition_penalty: float = option(1.0, "above 1 makes tokens that came before less likely")
    stop: tuple[str, ...] = option(
        (), "texts that end a continuation, as <|endoftext|> does; they are not shown"
    )
    seed: int = option(1337, "the same seed gives the same continuations")
    greedy: bool = option(False, "always the likeliest token")
    verbose: bool = option(False, "print the time to the first token, and tokens per second, to stderr")
    dtype: str = dtype_option()
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
    _check(config)
    prompt = _prompt(config)
    if config.checkpoint is None:
        raise InputError("--checkpoint is not given, expected a run, a checkpoint or a model")
    if config.chat and not prompt and not config.interactive:
        raise InputError("--prompt is not given, expected what a user says to --chat, or --interactive")
    device = pick_device(config.device)
    dtype, quantize = generation_format(config.dtype, device)
    use_triton = USE_TRITON[config.use_triton]

    def load(path: Path) -> tuple[Tokenizer, list[int], GPT]:
        tokenizer = load_pretrained_tokenizer(path)
        ids = _encode(tokenizer, config, [(prompt, None)])
        model = load_pretrained(path, device=device, dtype=dtype, quantize=quantize, use_triton=use_triton)
        return tokenizer, ids, model.eval()

    tokenizer, ids, model = from_checkpoint(config.checkpoint, device, load, which=config.which)
    sampler = _Sampler(model, tokenizer, config, torch.Generator(device).manual_seed(config.seed))
    if config.interactive:
        _interact(sampler, prompt)
        return 0
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} ---")
        print("" if config.chat else prompt, end="", flush=True)
        sampler.write(ids)
    return 0


def _check(config: SampleConfig) -> None:
    """Refuses values that `GPT.generate` does not check, and those for which a flag is the answer."""
    if not config.greedy and not SMALLEST <= config.temperature <= LARGEST:
        raise InputError(
            f"--temperature is {config.temperature}, expected a number in {SCALES} (--greedy takes the "
            "likeliest token each time)"
        )
    if config.interactive and (config.prompt == "-" or config.num_samples > 1):
        other = "--prompt -" if config.prompt == "-" else "--num_samples"
        raise InputError(f"--interactive and {other} are both given, expected one of them")
    if config.system and not config.chat:
        raise InputError("--system is given without --chat, expected both or neither")
    if config.num_samples < 1:
        raise InputError(f"--num_samples is {config.num_samples}, expected at least 1")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"--seed is {config.seed}, expected 0 to {2**63 - 1}")
    if "" in config.stop:
        raise InputError("--stop is '', expected texts that are not empty")
    for text in config.stop:
        _check_text(text, "--stop")
    _check_text(config.system, "--system")


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


Exchanges = Sequence[tuple[str, str | None]]  # as in `conversation`


def _encode(tokenizer: Tokenizer, config: SampleConfig, exchanges: Exchanges) -> list[int]:
    """The ids that come before the text to generate, as a model trained on such rows has seen them."""
    if config.chat:
        return [i for piece in conversation(config.system, exchanges) for i in tokenizer.encode(piece.text)]
    prompt, _ = exchanges[-1]
    return tokenizer.encode(prompt) if prompt else first_ids(tokenizer)


@dataclass(frozen=True)
class _Sampler:
    """A model with the settings of the command."""

    model: GPT
    tokenizer: Tokenizer
    config: SampleConfig
    generator: torch.Generator

    def write(self, ids: Sequence[int], *, ctrl_c_ends_it: bool = False) -> str:
        """Prints a continuation of `ids` as it is generated, and a newline; returns it."""
        written: list[str] = []

        def write(text: str) -> None:
            written.append(text)
            print(text, end="", flush=True)

        config, speed = self.config, _Speed()

        def on_token(token: Tensor) -> None:
            speed.count()
            stream.token(token)

        stops = (*config.stop, END_OF_TEXT, *([NEXT_TURN] if config.chat else []))
        stream = TextStream(self.tokenizer, write, stops)
        try:
            self.model.generate(
                torch.tensor([ids], device=self.model.wte.weight.device),
                config.max_new_tokens,
                do_sample=not config.greedy,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                repetition_penalty=config.repetition_penalty,
                vocab_size=self.tokenizer.vocab_size,
                generator=self.generator,
                on_token=on_token,
            )
            stream.end()
        except Stopped:
            pass
        except KeyboardInterrupt:
            if not ctrl_c_ends_it:
                raise
        print(flush=True)
        if config.verbose:
            print(f"{len(ids):,} tokens of prompt, {speed}", file=sys.stderr)
        return "".join(written)


class _Speed:
    """The times of generated tokens, from the call of `generate` on."""

    def __init__(self) -> None:
        self._begin = self._first = self._last = time.perf_counter()
        self._tokens = 0

    def count(self) -> None:
        """Notes that a token is there."""
        self._last = time.perf_counter()
        if self._tokens == 0:
            self._first = self._last
        self._tokens += 1

    def __str__(self) -> str:
        if self._tokens == 0:
            return "no token generated"
        text = f"first token after {self._first - self._begin:.3f} s"
        if self._tokens > 1:
            more, seconds = self._tokens - 1, self._last - self._first
            text += f", {more:,} more in {seconds:.2f} s: {more / seconds:,.1f} tokens/s"
        return text


def _interact(sampler: _Sampler, prompt: str) -> None:
    """Answers `prompt`, if there is one, and each line of stdin. Empty lines are passed over."""
    config = sampler.config
    most = sampler.model.config.block_size - min(config.max_new_tokens, sampler.model.config.block_size // 2)
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with suppress(ImportError):
            importlib.import_module("readline")  # input() then edits lines and remembers them

    exchanges: list[tuple[str, str | None]] = []
    line: str | None = prompt
    while line is not None:
        if line:
            asked = [*(exchanges if config.chat else []), (line, None)]
            try:
                while len(ids := _encode(sampler.tokenizer, config, asked)) > most and len(asked) > 1:
                    asked.pop(0)
            except InputError as error:  # a character that the tokenizer does not have
                warnings.warn(str(error), stacklevel=2)
            else:
                exchanges = [*asked[:-1], (line, sampler.write(ids, ctrl_c_ends_it=terminal))]
        line = _read_line(terminal)


def _read_line(terminal: bool) -> str | None:
    """The next line of stdin, without its end; None if there is none."""
    where = "--interactive: stdin"
    if terminal:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            raise
    if sys.stdin is None:
        raise InputError(f"{where} is closed, expected lines of text")
    try:
        line = sys.stdin.buffer.readline(PROMPT_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from error
    if len(line) > PROMPT_LIMIT:
        raise InputError(f"{where} has a line of more than {PROMPT_LIMIT:,} bytes, the most that is read")
    return _decode(line, where).rstrip("\r\n") if line else None


if __name__ == "__main__":
    sys.exit(main())
