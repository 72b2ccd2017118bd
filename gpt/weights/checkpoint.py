"""Checkpoints: folders of safetensors and JSON whose every file is verified by its hash; no pickle.

A checkpoint has model.safetensors, config.json and tokenizer.json; a checkpoint of a run also has
optimizer.safetensors and state.json. SHA256SUMS lists the hash of every other file in the format of
`sha256sum -c`. A checkpoint is written to a temporary folder, flushed to disk and renamed, so that a crash
leaves either the whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gpt.config import GPTConfig
from gpt.data.tokenizers import FILE_NAME as TOKENIZER
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.errors import InputError, cannot_write
from gpt.files import read_json
from gpt.model import GPT
from kernels.files import write_json

SUMS, MODEL, CONFIG, OPTIMIZER, STATE = (
    "SHA256SUMS",
    "model.safetensors",
    "config.json",
    "optimizer.safetensors",
    "state.json",
)
FOLDER = "checkpoints"
KEPT = 3

_UNFINISHED = ".unfinished-"


def save_model(model: GPT, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Saves a model, with its tokenizer if given, as a checkpoint.

    Args:
        model: The model.
        directory: A new or empty folder, or a checkpoint to replace.
        tokenizer: Saved with the model.

    Raises:
        InputError: The folder holds other files, or cannot be written. It stays as it was.
    """
    target = Path(directory)
    check_replaceable(target, "checkpoint")
    commit(target, lambda folder: _write_model(folder, model, tokenizer))


def save_checkpoint(
    out: Path,
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Saves a checkpoint of a run, removes all but the newest KEPT, and returns the new folder.

    Args:
        out: The run's folder.
        step: Steps taken so far.
        model, tokenizer: Of the run.
        optimizer: The optimizers' state, by names.
        state: The content of state.json.

    Raises:
        InputError: The checkpoint cannot be written. The earlier ones stay as they were.
    """
    target = out / FOLDER / f"step-{step}"

    def write(folder: Path) -> None:
        _write_model(folder, model, tokenizer)
        write_tensors(folder / OPTIMIZER, optimizer)
        write_json(folder / STATE, state, indent=1)

    commit(target, write)
    for old in [path for path in list_checkpoints(out) if path != target][: -(KEPT - 1)]:
        with suppress(OSError):
            _discard(old)
    return target


def load_model(
    directory: str | os.PathLike[str], device: torch.device | str | None = None, use_triton: Any = "auto"
) -> GPT:
    """Loads the model of a checkpoint, or of the newest valid checkpoint of a run.

    Raises:
        InputError: There is no valid checkpoint. The message names the file and what is wrong with it.
    """
    folder = find_checkpoint(directory)
    config = GPTConfig.from_dict(read_json(folder / CONFIG))
    tensors = read_tensors(folder / MODEL)
    # A model on the meta device allocates nothing, so a config that claims too much is refused first.
    check_tensors(dict(GPT(config, device="meta").named_parameters()), tensors, folder / MODEL)
    model = GPT(
        config,
        use_triton=use_triton,
        device=device,
        dtype=next(iter(tensors.values())).dtype if tensors else None,
    )
    copy_tensors(dict(model.named_parameters()), tensors, folder / MODEL)
    return model


def load_checkpoint_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, or of the newest valid checkpoint of a run."""
    folder = find_checkpoint(directory)
    if not (folder / TOKENIZER).exists():
        raise InputError(
            f"checkpoint: {folder} has no {TOKENIZER}, expected a checkpoint saved with its tokenizer"
        )
    return load_tokenizer(folder)


def list_checkpoints(out: Path) -> list[Path]:
    """The step-N folders of a run, oldest first."""
    folders = [path for path in (out / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """N of a step-N folder."""
    return int(folder.name.removeprefix("step-"))


def find_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """The checkpoint at `directory`, or the newest valid one if `directory` is a run.

    Warns if a newer checkpoint of the run is damaged.

    Raises:
        InputError: There is no checkpoint, or no valid one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"checkpoint: {folder} is not a folder, expected a run or a checkpoint")
    if (folder / SUMS).exists() or (folder / MODEL).exists():
        verify(folder)
        return folder
    damage: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
        except InputError as error:
            damage.append(str(error))
            continue
        if damage:
            warnings.warn(
                f"using {path}, which is not the newest checkpoint: {'; '.join(damage)}", stacklevel=2
            )
        return path
    raise InputError(
        "; ".join(damage)
        or f"checkpoint: {folder} holds no checkpoint, expected {FOLDER}/step-N or {SUMS} in it"
    )


def verify(folder: Path) -> None:
    """Raises InputError unless the folder holds exactly the files of its SHA256SUMS, with their hashes."""
    try:
        recorded = (folder / SUMS).read_bytes()
        expected = _sums(folder)
    except OSError as error:
        raise InputError(f"checkpoint: cannot read {error.filename}: {error.strerror}") from error
    if recorded == expected:
        return

    listed, actual = _digests(recorded), _digests(expected)
    if missing := sorted(listed.keys() - actual.keys()):
        raise InputError(f"checkpoint: {folder} lacks {missing[0]}, which its {SUMS} lists")
    if extra := sorted(actual.keys() - listed.keys()):
        raise InputError(f"checkpoint: {folder} has {extra[0]}, which its {SUMS} does not list")
    for name in sorted(actual):
        if listed[name] != actual[name]:
            raise InputError(
                f"checkpoint: {folder / name} is damaged: sha256 {actual[name][:12]}…, expected "
                f"{listed[name][:12]}…"
            )
    raise InputError(f"checkpoint: {folder / SUMS} is damaged")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        InputError: The file cannot be read, or is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint: cannot read {path}: {error}") from error


def copy_tensors(
    targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: Path
) -> None:
    """Copies `tensors` into `targets` of the same names; copies nothing if `check_tensors` raises."""
    check_tensors(targets, tensors, source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def check_tensors(
    targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: Path
) -> None:
    """Raises InputError if `tensors` differ from `targets` in a name or a shape."""
    for name in targets:
        if name not in tensors:
            raise InputError(f"checkpoint: {source} lacks {name}")
    for name, tensor in tensors.items():
        if name not in targets:
            raise InputError(
                f"checkpoint: {source} has {name}, which the model of its {CONFIG} does not have"
            )
        if tensor.shape != targets[name].shape:
            shape, expected = tuple(tensor.shape), tuple(targets[name].shape)
            raise InputError(
                f"checkpoint: {source}: {name} has shape {shape}, expected {expected} (from {CONFIG})"
            )


def clean(out: Path, step: int) -> None:
    """Prepares a run's folder to continue from `step`.

    Removes interrupted saves, and renames later checkpoints, which are damaged, to step-N.damaged.
    """
    for path in (out / FOLDER).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(out):
        if step_of(path) > step:
            path.rename(path.with_name(f"{path.name}.damaged"))


def check_replaceable(target: Path, where: str) -> None:
    """Raises InputError if the folder `target` holds files that `commit` did not write."""
    if target.is_dir() and any(target.iterdir()) and not (target / SUMS).exists():
        raise InputError(
            f"{where}: {target} holds other files, expected a new or empty folder, or one that a save wrote"
        )


def commit(target: Path, write: Callable[[Path], None]) -> None:
    """Creates or replaces the folder `target` atomically, with the files that `write` writes and SHA256SUMS.

    Raises:
        InputError: The folder cannot be written. It stays as it was.
    """
    unfinished = target.parent / f"{_UNFINISHED}{target.name}-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        (unfinished / SUMS).write_bytes(_sums(unfinished))
        mode = (unfinished / SUMS).stat().st_mode
        for path in unfinished.iterdir():
            path.chmod(mode)  # safetensors writes files that only their owner can read
            _flush(path)
        _flush(unfinished)
        if target.exists():
            _discard(target)
        unfinished.rename(target)
        _flush(target.parent)
    except OSError as error:
        raise cannot_write("checkpoint", target, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _discard(path: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a crash leaves no half of it under its name."""
    doomed = path.with_name(f"{_UNFINISHED}{path.name}-{os.getpid()}-old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    """Calls fsync on a file or folder; Windows cannot do so on one that is open for reading."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sums(folder: Path) -> bytes:
    """The text of SHA256SUMS for the files in `folder`."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != SUMS:
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines).encode()


def _digests(sums: bytes) -> dict[str, str]:
    """The digest of each file that a SHA256SUMS lists, without damaged lines."""
    lines = re.findall(r"^([0-9a-f]{64})  (\S+)$", sums.decode("utf-8", "replace"), re.MULTILINE)
    return {name: digest for digest, name in lines}


def _write_model(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> None:
    write_tensors(folder / MODEL, dict(model.named_parameters()))
    write_json(folder / CONFIG, model.config.to_dict(), indent=1)
    if tokenizer is not None:
        tokenizer.save(folder)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file; OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
