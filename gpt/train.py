"""`python -m gpt.train`: trains a GPT on text.

Without arguments it trains on Python's own sources, for a few minutes.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import kernels
from gpt.cli import (
    USE_TRITON,
    OptionParser,
    Values,
    convert,
    field_types,
    option,
    run_command,
    use_triton_option,
)
from gpt.config import GPTConfig, TrainConfig, override
from gpt.data.dataset import DataConfig, TokenData
from gpt.data.sources import SHAKESPEARE, STDLIB
from gpt.data.tokenizers import Tokenizer
from gpt.device import check_memory, pick_device
from gpt.errors import InputError, shown
from gpt.files import read_json, user_path
from gpt.model import GPT
from gpt.training import distributed
from gpt.training.distributed import Ranks
from gpt.training.parallel import shards
from gpt.training.run_folder import PLOT, RunFolder
from gpt.training.run_state import check_names, read_state
from gpt.training.trainer import Trainer, TrainResult
from gpt.weights import checkpoint
from gpt.weights.pretrained import load_pretrained, load_pretrained_tokenizer

TABLES = ("model", "train", "data")
PATHS = {"data", "validation"}  # the data settings that are paths
OUT = "out"  # the note of the run's folder
FINE_TUNING = {"learning_rate": 3e-5, "min_lr": 3e-6}


@dataclass(frozen=True)
class RunConfig:
    """The flags that are not keys of a --config file."""

    preset: str | None = option(
        None,
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, char-cpu or char-gpu (default: char-gpu with a GPU, else "
        "char-cpu)",
    )
    config: str | None = option(
        None,
        "a TOML file with tables [model], [train] and [data]; it wins over the preset, flags win over it",
    )
    out: str | None = option(
        None, "folder for checkpoints, log, plot and sample (default: runs/1, or the next number)"
    )
    resume: str = option(
        "false",
        "go on from the newest valid checkpoint in --out, with its settings where no flag changes them; auto "
        "does so if there is a checkpoint, and else starts the run",
        choices=("true", "false", "auto"),
    )
    resume_from: str | None = option(
        None,
        "go on from this checkpoint in --out, as in step-100; later ones are set aside (implies --resume)",
    )
    init: str | None = option(
        None,
        "start from the model and tokenizer of a run, a checkpoint, a file of weights or the hub; the "
        f"preset's learning rate is then {FINE_TUNING['learning_rate']}",
    )
    use_triton: str = use_triton_option()
    strict: bool = option(False, "end with exit code 3 where a kernel fails its check before the first step")
    deterministic: bool = option(False, "refuse operations whose result is not the same each time")


@dataclass(frozen=True)
class Start:
    """The settings of a run, and the tokenizer and weights of the model that it continues, if any."""

    model: GPTConfig
    train: TrainConfig
    data: DataConfig
    tokenizer: Tokenizer | None = None
    weights: GPT | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.train", _train, argv, lower="--batch_size or --block_size")


def _train(argv: Sequence[str]) -> int:
    with distributed.join() as ranks:
        return _run(argv, ranks)


def _run(argv: Sequence[str], ranks: Ranks) -> int:
    begun = ranks.noted(OUT)
    with ranks.agreement(), ranks.in_turn():
        run, given = _flags(argv)
        if begun is not None:  # before torchrun started these processes in place of those that failed
            run = dataclasses.replace(run, out=begun, resume="auto", resume_from=None)
        folder = RunFolder(None if run.out is None else user_path(run.out, "--out"))
        resume = _resume(run, folder)
        if resume and ranks.rank == 0 and checkpoint.list_checkpoints(folder.path):
            folder.lock()  # before a checkpoint is read, which another run may remove
        start = _start(run, given, folder.checkpoint(run.resume_from) if resume else None)
        device = pick_device(start.train.device)
        ranks.check(start.train)
        data = TokenData.load(start.data, start.tokenizer)
        weights = "none" if ranks.size == 1 or start.weights is None else _hash(start.weights)

    # What the trainer cannot see; it compares the rest.
    ranks.check_equal(
        {
            "the version of Python": ".".join(platform.python_version_tuple()[:2]),
            "the version of triton": _version("triton"),
            "strict": run.strict,
            "deterministic": run.deterministic,
            "pack_documents": start.data.pack_documents,
            "the hash of the weights of init": weights,
        }
    )
    with ranks.agreement():
        vocab_size = data.tokenizer.vocab_size if start.weights is None else start.model.vocab_size
        config = override(start.model, {"vocab_size": vocab_size})
        check_memory(config, start.train, device, shards=shards(start.train, ranks) or 1)
        torch.manual_seed(start.train.seed)
        model = GPT(config, use_triton=USE_TRITON[run.use_triton], device=device)
        if start.weights is not None:
            _copy_weights(start.weights, model)

    options = {"data": dataclasses.asdict(start.data), "working_folder": os.getcwd()}
    trainer = Trainer(model, data, start.train, out=folder, resume=resume, options=options, ranks=ranks)
    _introduce(trainer, start.data)
    if trainer.ended:
        print(
            f"already finished at step {trainer.step}: {trainer.ended}; only the final evaluation is repeated"
        )
    if not _preflight(trainer, strict=run.strict):
        return 3

    trainer.claim()
    out = folder.path
    ranks.note(OUT, str(out.absolute()))
    print(f"out: {out}", flush=True)
    result = trainer.run()
    if result.signal is not None or result.out_of_time:
        launch = f"-m torch.distributed.run --nproc_per_node {ranks.local_size} " if ranks.size > 1 else ""
        resume = f"{_python()} {launch}-m gpt.train --out {shlex.quote(str(out))} --resume"
        event = "time limit reached" if result.signal is None else "stopped"
        print(f"{event} at step {result.step}, saved in {result.checkpoint}\ngo on with: {resume}")
        return 0 if result.signal is None else 128 + result.signal
    _conclude(result, out, "def " if start.data.data == (STDLIB,) else "")
    return 0


def _flags(argv: Sequence[str]) -> tuple[RunConfig, Values]:
    """The flags of the run, and the values that flags and --config give, in this precedence, by table."""
    preset = "char-gpu" if torch.cuda.is_available() else "char-cpu"
    parser = OptionParser(
        "python -m gpt.train",
        "Trains a GPT on text. Flags are spelt with underscores or hyphens. Defaults of model and train "
        f"are {preset}'s; with another --preset, they are that one's.",
        skip=("vocab_size",),
        run=RunConfig(),
        data=DataConfig(),
        model=GPTConfig.preset(preset),
        train=TrainConfig.preset(preset),
    )
    _, flags = parser.parse_tables(argv)
    run = RunConfig(**flags.pop("run"))
    file = {table: {} for table in TABLES} if run.config is None else parser.read_file(run.config, TABLES)
    return run, {table: {**file[table], **flags[table]} for table in TABLES}


def _resume(run: RunConfig, folder: RunFolder) -> bool | str:
    """Whether to go on from a checkpoint, or the name of the checkpoint."""
    if run.resume == "false" and not run.resume_from:
        return False
    if run.out is None:
        raise InputError("--resume: --out is not given, expected the folder of the run to go on with")
    if run.resume == "auto" and not run.resume_from:
        return bool(checkpoint.list_checkpoints(folder.path))
    return run.resume_from or True


def _start(run: RunConfig, given: Values, saved: Path | None) -> Start:
    """The settings that flags and --config, an earlier model and the preset give, in this precedence.

    Args:
        run, given: From `_flags`.
        saved: The checkpoint of the run that goes on, if any.
    """
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if saved is not None:
        return _from_run(saved, given)
    return _from_preset(run, given) if run.init is None else _from_weights(run, given)


def _from_preset(run: RunConfig, given: Values) -> Start:
    """Starts from --preset; without it, from the preset for the device."""
    name = run.preset or (
        "char-cpu" if pick_device(given["train"].get("device")).type == "cpu" else "char-gpu"
    )
    data = DataConfig(tokenizer="gpt2" if name.startswith("gpt2") else None)
    return Start(
        override(GPTConfig.preset(name), given["model"]),
        override(TrainConfig.preset(name), given["train"]),
        dataclasses.replace(data, **given["data"]),
    )


def _from_weights(run: RunConfig, given: Values) -> Start:
    """Starts from the trained model in --init; flags may change its dropout and shorten its context.

    For a file that does not state its config, the other flags of the model do.
    """
    assert run.init is not None
    base = _from_preset(run, {**given, "model": {}, "train": FINE_TUNING | given["train"]})
    fixed = {name: value for name, value in given["model"].items() if name not in ("dropout", "block_size")}
    weights = load_pretrained(run.init, fixed or None, device="cpu").float()
    config = override(weights.config, given["model"])
    if config.block_size > weights.config.block_size:
        kept = weights.config.block_size
        raise InputError(
            f"--init: block_size is {config.block_size}, expected at most {kept} as in {run.init}"
        )
    tokenizer = None if "tokenizer" in given["data"] else load_pretrained_tokenizer(run.init)
    return Start(config, base.train, base.data, tokenizer, weights)


def _from_run(folder: Path, given: Values) -> Start:
    """Continues from a checkpoint of a run, with the settings that the run was started with."""
    state = read_state(folder / checkpoint.STATE)
    where, saved = f"resume: {folder / checkpoint.STATE}: data", state.content.get("data")
    types = field_types(DataConfig)
    if not isinstance(saved, dict):
        raise InputError(f"{where} is {shown(saved)}, expected an object")
    check_names(where, saved, types)
    nullable = {field.name for field in dataclasses.fields(DataConfig) if field.default is None}
    settings = {
        name: convert(f"{where}: {name}", types[name], value)
        for name, value in saved.items()
        if value is not None or name not in nullable
    }
    started = state.content.get("working_folder", os.getcwd())  # earlier versions lack it
    if not isinstance(started, str):
        raise InputError(f"{where}: working_folder is {shown(started)}, expected a path")
    for name in PATHS & settings.keys() - given["data"].keys():
        settings[name] = tuple(_located(source, started, f"{where}: {name}") for source in settings[name])
    try:
        data = DataConfig(**settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    model = GPTConfig.from_dict(read_json(folder / checkpoint.CONFIG))
    tokenizer = None if "tokenizer" in given["data"] else checkpoint.load_checkpoint_tokenizer(folder)
    return Start(
        override(model, given["model"]),
        override(state.train, given["train"]),
        dataclasses.replace(data, **given["data"]),
        tokenizer,
    )


def _located(source: str, started: str, where: str) -> str:
    """A source of a run's data, looked for in the folder in which the run was started, then in this one.

    Raises:
        InputError: It is in neither.
    """
    if source in (STDLIB, SHAKESPEARE):
        return source
    here, path = os.getcwd(), os.path.expanduser(source)
    folders = dict.fromkeys((started, here))
    for folder in folders:
        place = os.path.join(folder, path)
        if os.path.lexists(place) or any(glob.iglob(path, root_dir=folder, recursive=True)):
            return source if folder == here else place
    raise InputError(
        f"{where} is {source}, which does not exist in {' or in '.join(folders)}, expected --data PATH"
    )


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _hash(model: GPT) -> str:
    """The SHA-256 of a model's parameters."""
    hashed = hashlib.sha256()
    for p in model.parameters():
        hashed.update(p.detach().numpy().tobytes())
    return hashed.hexdigest()


@torch.no_grad()
def _copy_weights(source: GPT, target: GPT) -> None:
    parameters = dict(source.named_parameters())
    for name, p in target.named_parameters():
        p.copy_(parameters[name][: len(p)])  # a shorter context uses the first positions


def _introduce(trainer: Trainer, data: DataConfig) -> None:
    config, tokens = trainer.model.config, trainer.data
    size, engine = trainer.ranks.size, trainer.config.parallel
    processes = f", {size} processes ({engine})" if size > 1 else ""
    print(
        f"model: {trainer.model.num_parameters() / 1e6:.2f} M parameters, {config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} wide, context {config.block_size}; "
        f"{trainer.precision} on {trainer.device}{processes}\n"
        f"data: {' '.join(data.data)}, {len(tokens.tokens('train')):,} tokens to train on and "
        f"{len(tokens.tokens('validation')):,} to validate, of {tokens.tokenizer.vocab_size:,} kinds",
        flush=True,
    )


def _preflight(trainer: Trainer, *, strict: bool) -> bool:
    """Checks the kernels that will run; False if one fails and `strict` is set.

    Without `strict`, the references run instead of the kernels that fail.
    """
    if trainer.model.use_triton is False:
        return True
    report = trainer.ranks.on_first(trainer.preflight)
    if not report.checked:
        print(f"kernels: none, the references run ({'; '.join(report.skipped)})", flush=True)
        return True
    print(report, flush=True)
    if report.ok:
        return True
    failed = "; ".join(f"{op}: {problem}" for op, problem in report.failed.items())
    if strict:
        print(f"gpt.train: --strict: preflight failed, nothing was trained: {failed}", file=sys.stderr)
        return False
    report.enforce()
    warnings.warn(
        f"PREFLIGHT FAILED, the references run instead: {failed}", kernels.FallbackWarning, stacklevel=2
    )
    return True


def _conclude(result: TrainResult, out: Path, prompt: str) -> None:
    share = "all" if result.validation_share == 1 else f"{result.validation_share:.1%}"
    following = f"{_python()} -m gpt.sample --checkpoint {shlex.quote(str(out))}"
    print(
        f"\n{(result.sample or '').strip()}\n\n"
        f"validation loss {result.validation_loss:.4f}, bigram baseline {result.bigram_loss:.4f} "
        f"(nats per token, {result.validation_tokens:,} tokens, {share} of the validation split)\n"
        f"checkpoint: {result.checkpoint}\n"
        f"loss curve: {out / PLOT}\n"
        f"next: {following}{f' --prompt {shlex.quote(prompt)}' if prompt else ''}"
    )


def _python() -> str:
    """The shell word for this interpreter: "python" if the shell finds it by that name, else its path."""
    python = shutil.which("python")
    if python and Path(python).parent == Path(sys.executable).parent:
        return "python"
    executable = Path(sys.executable)
    return shlex.quote(
        str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)
    )


if __name__ == "__main__":
    sys.exit(main())
