"""Checkpoints: folders of safetensors and JSON whose every file is verified by its hash; no pickle.

A checkpoint has model.safetensors, config.json and tokenizer.json; a checkpoint of a run also has
optimizer.safetensors and state.json. A sharded run has files of `gpt.weights.sharded` instead of the two
of tensors. SHA256SUMS lists the hash of every other file. A checkpoint is written by `gpt.weights.commit`, so
that a crash leaves either the whole checkpoint or none. Its weights, and the optimizer's state, are finite.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gpt.config import GPTConfig
from gpt.data.tokenizers import FILE_NAME as TOKENIZER
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.errors import InputError, ReportedError
from gpt.files import read_json, user_path
from gpt.model import GPT
from gpt.names import HUGGING_FACE
from gpt.packing import refuse_packed
from gpt.weights.commit import commit, discard, interrupted, present, recover, replaceable
from gpt.weights.hashes import SUMS, list_folder, verify
from gpt.weights.sharded import FILES, read_parts, tensor_files
from gpt.weights.tensors import check_finite, check_tensors, copy_tensors, read_tensors, write_tensors
from kernels.files import write_json

MODEL, OPTIMIZER = FILES
CONFIG, STATE = "config.json", "state.json"
FOLDER = "checkpoints"
KEPT = 3

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_PARAMETER = re.compile(
    rf"(blocks\.[0-9]+\.)?({'|'.join(map(re.escape, HUGGING_FACE.modules))})\.(weight|bias)"
)


def save_model(model: GPT, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Saves a model, with its tokenizer if given, as a checkpoint.

    Args:
        model: The model.
        directory: A new or empty folder, or a checkpoint to replace.
        tokenizer: Saved with the model.

    Raises:
        InputError: The folder holds other files, or cannot be written. It stays as it was.
        MachineError: The disk is full, or fails. The folder stays as it was.
        NonFiniteError: A weight is infinite or NaN. Nothing is written.
    """
    target = replaceable(directory, "checkpoint")
    check_parameters(model)
    check_finite(dict(model.named_parameters()), "the model")
    with commit(target) as folder:
        write_tensors(folder / MODEL, dict(model.named_parameters()))
        _write_settings(folder, model, tokenizer)


def save_checkpoint(
    out: Path,
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    best: int | None = None,
) -> Path:
    """Saves a checkpoint of a run, removes all but the newest KEPT and the best, and returns the new folder.

    Args:
        out: The run's folder.
        step: Steps taken so far.
        model, tokenizer: Of the run.
        optimizer: The optimizers' state, by names.
        state: The content of state.json.
        best: The step of the best checkpoint; None keeps the newest ones alone.

    Raises:
        InputError: The checkpoint cannot be written. The earlier ones stay as they were.
        MachineError: The disk is full, or fails. The earlier ones stay as they were.
        NonFiniteError: A weight, or a value of the optimizer, is infinite or NaN. Nothing is written.
    """
    check_savable(model, optimizer)
    with new_checkpoint(out, step, model, tokenizer, state, best=best) as folder:
        write_tensors(folder / MODEL, dict(model.named_parameters()))
        write_tensors(folder / OPTIMIZER, optimizer)
    return step_folder(out, step)


@contextmanager
def new_checkpoint(
    out: Path,
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
    *,
    best: int | None = None,
) -> Generator[Path]:
    """Gives a folder for the tensors of a checkpoint. At the end of the block it becomes that checkpoint.

    The arguments and errors are those of `save_checkpoint`. The block may end in another thread, as a save in
    the background does.
    """
    target = step_folder(out, step)
    with commit(target) as folder:
        _write_settings(folder, model, tokenizer)
        write_json(folder / STATE, state, indent=1)
        yield folder
    _tidy(out, target, best)


def check_savable(model: GPT, optimizer: Mapping[str, torch.Tensor]) -> None:
    """Checks, before anything is written, that a checkpoint could be loaded; of DTensors, this rank's part.

    Raises:
        InputError: See `check_parameters`.
        NonFiniteError: A weight, or a value of the optimizer, is infinite or NaN.
    """
    check_parameters(model)
    check_finite(dict(model.named_parameters()), "the model")
    check_finite(optimizer, "the optimizer")


def check_parameters(model: GPT) -> None:
    """Raises InputError for parameters that could not be loaded: adapters', pruned or quantized ones."""
    refuse_packed(model, "saved")
    for name, _ in model.named_parameters():
        if not _PARAMETER.fullmatch(name):
            raise InputError(
                f"checkpoint: the model has a parameter {name}, expected only a GPT's own: merge adapters, "
                "and remove parametrizations and pruning, before saving"
            )


def load_model(
    directory: str | os.PathLike[str], device: torch.device | str | None = None, use_triton: Any = "auto"
) -> GPT:
    """Loads the model of a checkpoint, or of the newest valid checkpoint of a run.

    Raises:
        InputError: There is no valid checkpoint. The message names the file and what is wrong with it.
        NonFiniteError: A weight is infinite or NaN.
    """
    folder = find_checkpoint(directory, (CONFIG, MODEL))
    config = GPTConfig.from_dict(read_json(folder / CONFIG))
    tensors = read_parts(folder, MODEL)
    # A model on the meta device allocates nothing, so a config that claims too much is refused first.
    model = GPT(config, device="meta")
    check_tensors(dict(model.named_parameters()), tensors, folder / MODEL)

    model.to(tensors["wte.weight"].dtype).to_empty(device=device or torch.get_default_device())
    model.use_triton = use_triton
    copy_tensors(dict(model.named_parameters()), tensors, folder / MODEL)
    return model


def load_checkpoint_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, or of the newest valid checkpoint of a run."""
    folder = find_checkpoint(directory, (TOKENIZER,))
    if not os.path.lexists(folder / TOKENIZER):
        raise InputError(
            f"checkpoint: {folder} has no {TOKENIZER}, expected a checkpoint saved with its tokenizer"
        )
    return load_tokenizer(folder)


def list_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, without those that were set aside (step-N.damaged).

    They are named step-N, except for one whose replacement was interrupted: see `gpt.weights.commit`.
    """
    parent = out / FOLDER
    if not os.path.isdir(parent):
        return []
    names = {*list_folder(parent, "checkpoint"), *(path.name for path in interrupted(parent))}
    steps = sorted(int(name.removeprefix("step-")) for name in names if _STEP.fullmatch(name))
    folders = (present(parent / f"step-{step}", "checkpoint") for step in steps)
    return [folder for folder in folders if folder is not None]


def step_folder(out: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return out / FOLDER / f"step-{step}"


def step_of(folder: Path) -> int:
    """N of a checkpoint of a run."""
    return int(folder.name.rpartition("step-")[2])


def find_checkpoint(directory: str | os.PathLike[str], names: Collection[str] | None = None) -> Path:
    """The checkpoint at `directory`, or the newest valid one if `directory` is a run.

    Warns if a newer checkpoint of the run is damaged, or holds values that are not finite.

    Args:
        directory: A checkpoint, or a run.
        names: The files that will be read, or whose shards will be. Of a checkpoint, only these are hashed;
            None hashes all.

    Raises:
        InputError: There is no checkpoint, or no valid one.
        NonFiniteError: All checkpoints of the run hold values that are not finite.
    """
    path = user_path(directory, "checkpoint")
    folder = present(path, "checkpoint")
    if folder is None or not os.path.isdir(folder):
        raise InputError(f"checkpoint: {path} is not a folder, expected a run or a checkpoint")
    if os.path.lexists(folder / SUMS) or os.path.lexists(folder / MODEL):
        verify(folder, names and _with_shards(folder, names))
        return folder

    problems: list[ReportedError] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if (problem := _problem(checkpoint)) is not None:
            problems.append(problem)
            continue
        if problems:
            warnings.warn(
                f"using {checkpoint}, which is not the newest checkpoint: {'; '.join(map(str, problems))}",
                stacklevel=2,
            )
        return checkpoint
    if not problems:
        held = runs_in(folder, "checkpoint")
        raise InputError(
            f"checkpoint: {folder} "
            + (held or f"holds no checkpoint, expected {FOLDER}/step-N or {SUMS} in it")
        )
    kinds = {type(problem) for problem in problems}
    raise (kinds.pop() if len(kinds) == 1 else InputError)("; ".join(map(str, problems)))


def _with_shards(folder: Path, names: Collection[str]) -> list[str]:
    shards = [path.name for path in tensor_files(folder, MODEL)] if MODEL in names else []
    return [*names, *shards]


def runs_in(folder: Path, where: str) -> str | None:
    """What a folder above or inside a run holds, and the run to name instead; None for any other folder.

    Args:
        folder: The folder.
        where: Begins the error message if it cannot be read.
    """
    if folder.name == FOLDER and list_checkpoints(folder.parent):
        return f"holds the checkpoints of a run, expected {folder.parent}"
    runs = [path for name in list_folder(folder, where) if os.path.isdir((path := folder / name) / FOLDER)]
    if not runs:
        return None
    newest = max(runs, key=lambda run: os.path.getmtime(run / FOLDER))
    held = "a run, expected" if len(runs) == 1 else f"{len(runs)} runs, expected one of them, as in"
    return f"holds {held} {newest}"


def find_best_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """The checkpoint of a run with the lowest validation loss, which the newest valid one names.

    Raises:
        InputError: The run did not keep it, it is damaged, or the folder is not a run.
        NonFiniteError: It holds values that are not finite.
    """
    newest = find_checkpoint(directory)
    step = read_json(newest / STATE).get("best_step") if os.path.lexists(newest / STATE) else None
    for folder in list_checkpoints(user_path(directory, "checkpoint")):
        if step_of(folder) == step:
            if (problem := _problem(folder)) is not None:
                raise problem
            return folder
    raise InputError(
        f"checkpoint: {directory} does not hold the best checkpoint of a run, expected --which newest, or a "
        "run with --keep_best or --patience"
    )


def clean(out: Path, step: int, best: int | None = None) -> None:
    """Prepares a run's folder to continue from `step`, with its best checkpoint at `best`.

    Puts back or removes what interrupted saves left, renames later checkpoints (damaged ones to
    step-N.damaged, valid ones to step-N.superseded, with a number where that name is taken), and removes
    earlier ones that a killed save had yet to remove.
    """
    for path in interrupted(out / FOLDER):
        recover(path)
    for path in list_checkpoints(out):
        if step_of(path) > step:
            path.rename(_free_name(path, "superseded" if _problem(path) is None else "damaged"))
    _tidy(out, step_folder(out, step), best)


def _tidy(out: Path, newest: Path, best: int | None) -> None:
    """Removes what killed saves left, and checkpoints until `newest`, the last others and the best remain.

    They are KEPT in all, and one more if the best, of step `best`, is an older one.
    """
    with suppress(OSError, ReportedError):
        for path in interrupted(out / FOLDER):
            recover(path)
        for old in [path for path in list_checkpoints(out) if path != newest][: -(KEPT - 1)]:
            if step_of(old) != best:
                discard(old)


def _problem(folder: Path) -> ReportedError | None:
    """Why a checkpoint of a run is not valid: a file is damaged, or holds values that are not finite."""
    try:
        verify(folder)
        for path in (*tensor_files(folder, MODEL), *tensor_files(folder, OPTIMIZER)):
            check_finite(read_tensors(path), path)
    except ReportedError as error:
        return error
    return None


def _free_name(folder: Path, suffix: str) -> Path:
    """`folder` with a suffix, and a number if there is such a folder already."""
    number, path = 1, folder.with_name(f"{folder.name}.{suffix}")
    while os.path.lexists(path):
        number += 1
        path = folder.with_name(f"{folder.name}.{suffix}-{number}")
    return path


def _write_settings(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> None:
    write_json(folder / CONFIG, model.config.to_dict(), indent=1)
    if tokenizer is not None:
        tokenizer.save(folder)
