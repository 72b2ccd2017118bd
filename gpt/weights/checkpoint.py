"""Checkpoints that cannot lie: safetensors and JSON, hashed, written beside their place and renamed into it;
no pickle.

A checkpoint is a folder: model.safetensors, config.json, tokenizer.json, for training optimizer.safetensors
and state.json, and SHA256SUMS, which `sha256sum -c` understands and which covers every other file.
"""

from __future__ import annotations

import hashlib
import json
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
from gpt.errors import InputError
from gpt.model import GPT

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
    """Saves a model, and with it its tokenizer, as a checkpoint folder.

    Args:
        directory: A new or empty folder, or a checkpoint to replace.

    Raises:
        InputError: The folder holds something else, or cannot be written; it is then as it was.
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
    """Saves a run at `step` in its folder `out`, keeps the last few checkpoints, and returns the new one.

    Raises:
        InputError: It cannot be written; the earlier checkpoints are as they were.
    """
    target = out / FOLDER / f"step-{step}"

    def write(folder: Path) -> None:
        _write_model(folder, model, tokenizer)
        write_tensors(folder / OPTIMIZER, optimizer)
        _write_json(folder / STATE, state)

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
        InputError: Nothing there is valid: the message names the file and what is wrong with it.
    """
    folder = find_checkpoint(directory)
    config = GPTConfig.from_dict(read_json(folder / CONFIG))
    tensors = read_tensors(folder / MODEL)
    check_tensors(
        dict(GPT(config, device="meta").named_parameters()), tensors, folder / MODEL
    )  # before anything is allocated
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
            f"checkpoint: {folder} has no {TOKENIZER}, expected one that was saved with its tokenizer"
        )
    return load_tokenizer(folder)


def list_checkpoints(out: Path) -> list[Path]:
    """The step-N folders of a run, oldest first."""
    found = [path for path in (out / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """The checkpoint at `directory`, or in a run's folder the newest valid one, with a warning if newer ones
    are damaged.

    Raises:
        InputError: There is none, or none is valid.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"checkpoint: {folder} is no folder, expected a run or a checkpoint")
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
    """Raises InputError unless SHA256SUMS is, byte for byte, what the folder's files give."""
    try:
        recorded = (folder / SUMS).read_bytes()
        expected = _sums(folder)
    except OSError as error:
        raise InputError(f"checkpoint: cannot read {error.filename}: {error.strerror}") from error
    if recorded == expected:
        return
    listed, found = _digests(recorded), _digests(expected)
    if missing := sorted(listed.keys() - found.keys()):
        raise InputError(f"checkpoint: {folder} lacks {missing[0]}, which its {SUMS} lists")
    if extra := sorted(found.keys() - listed.keys()):
        raise InputError(f"checkpoint: {folder} has {extra[0]}, which its {SUMS} does not list")
    for name in sorted(found):
        if listed[name] != found[name]:
            raise InputError(
                f"checkpoint: {folder / name} is damaged: sha256 {found[name][:12]}…, expected "
                f"{listed[name][:12]}…"
            )
    raise InputError(f"checkpoint: {folder / SUMS} is damaged")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError where it has none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"checkpoint: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"checkpoint: {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint: {path} holds a {type(content).__name__}, expected an object")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU; InputError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint: cannot read {path}: {error}") from error


def copy_tensors(
    targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: Path
) -> None:
    """Copies `tensors` into `targets`, which `check_tensors` compares first; where it raises, nothing is
    copied."""
    check_tensors(targets, tensors, source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def check_tensors(
    targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: Path
) -> None:
    """Raises InputError where `tensors` have other names or shapes than `targets`."""
    for name in targets:
        if name not in tensors:
            raise InputError(f"checkpoint: {source} lacks {name}")
    for name, tensor in tensors.items():
        if name not in targets:
            raise InputError(f"checkpoint: {source} has {name}, which the model of its {CONFIG} does not")
        if tensor.shape != targets[name].shape:
            shape, expected = tuple(tensor.shape), tuple(targets[name].shape)
            raise InputError(
                f"checkpoint: {source}: {name} has shape {shape}, expected {expected} (from {CONFIG})"
            )


def clean(out: Path, step: int) -> None:
    """Readies a run's folder to go on from `step`: removes interrupted saves and sets later, damaged
    checkpoints aside."""
    for path in (out / FOLDER).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(out):
        if int(path.name[5:]) > step:
            path.rename(path.with_name(f"{path.name}.damaged"))


def check_replaceable(target: Path, where: str) -> None:
    """Raises InputError if the folder `target` holds files that `commit` did not write."""
    if target.is_dir() and any(target.iterdir()) and not (target / SUMS).exists():
        raise InputError(
            f"{where}: {target} holds other files, expected a new or empty folder, or one that a save wrote"
        )


def commit(target: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder `target` whole or not at all: written beside it, hashed, flushed to disk and
    renamed."""
    unfinished = target.parent / f"{_UNFINISHED}{target.name}-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        (unfinished / SUMS).write_bytes(_sums(unfinished))
        mode = (unfinished / SUMS).stat().st_mode
        for path in unfinished.iterdir():
            path.chmod(mode)  # safetensors makes files that their owner alone can read
            _flush(path)
        _flush(unfinished)
        if target.exists():
            _discard(target)
        unfinished.rename(target)
        _flush(target.parent)
    except OSError as error:
        raise InputError(f"checkpoint: cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _discard(path: Path) -> None:
    """Removes a checkpoint; its name goes first, so that no half of it can be found."""
    doomed = path.with_name(f"{_UNFINISHED}{path.name}-{os.getpid()}-old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    """fsync of a file or folder; Windows has none for what is open to be read."""
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
    """The digest of each file in a SHA256SUMS, damaged lines left out."""
    lines = re.findall(r"^([0-9a-f]{64})  (\S+)$", sums.decode("utf-8", "replace"), re.MULTILINE)
    return {name: digest for digest, name in lines}


def _write_model(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> None:
    write_tensors(folder / MODEL, dict(model.named_parameters()))
    _write_json(folder / CONFIG, model.config.to_dict())
    if tokenizer is not None:
        tokenizer.save(folder)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file; an OSError where it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
