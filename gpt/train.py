"""`python -m gpt.train`: trains a GPT on text; with no arguments on Python's own sources, for about three minutes."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpt import checkpoint
from gpt.config import GPTConfig, TrainConfig, override
from gpt.corpus import STDLIB
from gpt.data import DataConfig, TokenData
from gpt.errors import InputError
from gpt.info import check_memory
from gpt.model import GPT
from gpt.options import OptionParser, run_command
from gpt.step import NonFiniteError
from gpt.trainer import PLOT, USE_TRITON, Trainer, TrainResult, pick_device

TABLES = ("model", "train", "data")


def _option(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class RunConfig:
    """What belongs to one call of the command, and to no table of a file."""

    preset: str | None = _option(
        None, "gpt2, gpt2-medium, gpt2-large, gpt2-xl, char-cpu or char-gpt (default: char-gpu with a GPU, else char-cpu)"
    )
    config: str | None = _option(
        None, "a TOML file with tables [model], [train] and [data]; it wins over the preset, flags win over it"
    )
    out: str | None = _option(None, "folder for checkpoints, log, plot and sample (default: runs/1, or the next number)")
    resume: bool = _option(False, "go on from the newest valid checkpoint in --out, with its settings where no flag changes them")
    use_triton: str = _option("auto", "fused kernels: where faster, wherever they apply, or never", choices=tuple(USE_TRITON))
    deterministic: bool = _option(False, "refuse operations whose result is not the same each time")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.train", _train, argv)


def _train(argv: Sequence[str]) -> int:
    preset = "char-gpu" if torch.cuda.is_available() else "char-cpu"
    parser = OptionParser(
        "python -m gpt.train",
        f"Trains a GPT on text. Flags are spelt with underscores or hyphens. Defaults of model and train are {preset}'s; "
        "with another --preset, they are that one's.",
        skip=("vocab_size",),
        run=RunConfig(),
        data=DataConfig(),
        model=GPTConfig.preset(preset),
        train=TrainConfig.preset(preset),
    )
    _, flags = parser.parse_tables(argv)
    run = RunConfig(**flags.pop("run"))
    given = parser.read_file(run.config, TABLES) if run.config else {table: {} for table in TABLES}
    given = {table: {**given[table], **flags[table]} for table in TABLES}
    if run.resume:
        model_config, config, data_config = _saved_settings(run)
    else:
        name = run.preset or ("char-cpu" if pick_device(given["train"].get("device")).type == "cpu" else "char-gpu")
        model_config, config = GPTConfig.preset(name), TrainConfig.preset(name)
        data_config = DataConfig(tokenizer="char" if name.startswith("char") else "gpt2")
    config = override(config, given["train"])
    data_config = dataclasses.replace(data_config, **given["data"])
    model_config = override(model_config, given["model"])
    device = pick_device(config.device)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    data = TokenData.load(data_config)
    model_config = override(model_config, {"vocab_size": data.tokenizer.vocab_size})
    check_memory(model_config, config, device)
    torch.manual_seed(config.seed)
    model = GPT(model_config, use_triton=USE_TRITON[run.use_triton], device=device)
    out = Path(run.out) if run.out else _next_folder(Path("runs"))
    trainer = Trainer(model, data, config, out=out, resume=run.resume, options={"data": dataclasses.asdict(data_config)})
    _introduce(trainer, data_config, out)
    try:
        result = trainer.run()
    except NonFiniteError as error:
        print(f"gpt.train: {error}", file=sys.stderr)
        return 4
    if result.signal is not None:
        resume = f"{_python()} -m gpt.train --out {shlex.quote(str(out))} --resume"
        print(f"stopped at step {result.step}, saved in {result.checkpoint}\ngo on with: {resume}")
        return 128 + result.signal
    _conclude(result, len(data.tokens("validation")) - 1, out, "def " if data_config.data == (STDLIB,) else "")
    return 0


def _saved_settings(run: RunConfig) -> tuple[GPTConfig, TrainConfig, DataConfig]:
    """What the run that --resume goes on with was started with."""
    if run.out is None:
        raise InputError("--resume: --out is not given, expected the folder of the run to go on with")
    folder = checkpoint.find_checkpoint(run.out)
    state = checkpoint.read_json(folder / checkpoint.STATE)
    try:
        data = {**state["data"], "data": tuple(state["data"]["data"])}
        return (
            GPTConfig.from_dict(checkpoint.read_json(folder / checkpoint.CONFIG)),
            TrainConfig(**state["train"]),
            DataConfig(**data),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"--resume: {folder / checkpoint.STATE} is not of this version ({error})") from error


def _next_folder(parent: Path) -> Path:
    """`parent`/N, one above the highest N there."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    return parent / str(max(taken, default=0) + 1)


def _introduce(trainer: Trainer, data: DataConfig, out: Path) -> None:
    config, tokens = trainer.model.config, trainer.data
    print(
        f"model: {trainer.model.num_parameters() / 1e6:.2f} M parameters, {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} wide, context {config.block_size}; {trainer.precision} on {trainer.device}\n"
        f"data: {' '.join(data.data)}, {len(tokens.tokens('train')):,} tokens to train on and "
        f"{len(tokens.tokens('validation')):,} to validate, of {tokens.tokenizer.vocab_size:,} kinds\n"
        f"out: {out}",
        flush=True,
    )


def _conclude(result: TrainResult, targets: int, out: Path, prompt: str) -> None:
    following = f"{_python()} -m gpt.sample --checkpoint {shlex.quote(str(out))}"
    print(
        f"\n{(result.sample or '').strip()}\n\n"
        f"validation loss {result.validation_loss:.4f}, bigram baseline {result.bigram_loss:.4f} "
        f"(nats per token, {targets:,} tokens)\n"
        f"checkpoint: {result.checkpoint}\n"
        f"loss curve: {out / PLOT}\n"
        f"next: {following}{f' --prompt {shlex.quote(prompt)}' if prompt else ''}"
    )


def _python() -> str:
    """What to type for this interpreter: "python" where that is it, else its path."""
    if (found := shutil.which("python")) and Path(found).parent == Path(sys.executable).parent:
        return "python"
    executable = Path(sys.executable)
    return shlex.quote(str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable))


if __name__ == "__main__":
    sys.exit(main())
