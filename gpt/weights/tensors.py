"""Named tensors: files of safetensors, and checks of names, shapes and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.errors import InputError, NonFiniteError, first_line
from gpt.files import open_regular
from gpt.memory import exhausted

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of parameters
_CHUNK = 1 << 20  # elements


def read_tensors(path: Path, where: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped on the CPU.

    Raises:
        InputError: The file cannot be read, or is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    open_regular(path, where).close()  # safetensors would wait for a FIFO
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if exhausted(error) is not None:
            raise
        raise InputError(f"{where}: cannot read {path}: {first_line(error)}") from error
    check_names(tensors, path, where)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(content, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. The class itself is not imported here: that takes a second."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def check_names(tensors: Mapping[Any, object], source: Path, where: str) -> None:
    """Raises InputError for a name that a message could not show in one line."""
    for name in tensors:
        if isinstance(name, str) and not name.isprintable():
            raise InputError(f"{where}: {source} has a tensor {name[:80]!a}, expected a printable name")


def check_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises InputError if `tensors` differ from `targets` in a name or a shape, or are not floats."""
    for name in targets:
        if name not in tensors:
            raise InputError(f"checkpoint: {source} lacks {name}")
    for name, tensor in tensors.items():
        if name not in targets:
            raise InputError(
                f"checkpoint: {source} has {name}, which the model of its config.json does not have"
            )
        if tensor.shape != targets[name].shape:
            shape, expected = tuple(tensor.shape), tuple(targets[name].shape)
            raise InputError(
                f"checkpoint: {source}: {name} has shape {shape}, expected {expected} (from config.json)"
            )
        if tensor.dtype not in FLOATS:
            raise InputError(f"checkpoint: {source}: {name} is {tensor.dtype}, expected a float dtype")


def copy_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copies `tensors` into `targets` of the same names; copies nothing if a check fails.

    Raises:
        InputError: See `check_tensors`.
        NonFiniteError: See `check_finite`.
    """
    check_tensors(targets, tensors, source)
    check_finite(tensors, source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Checks that no value is infinite or NaN, in one pass over the tensors and without a copy of them.

    Args:
        tensors: The tensors by name; those of an integer dtype are ignored. Of a DTensor, this rank's shard
            is checked.
        source: The file, or "the model"; the error message begins with it.

    Raises:
        NonFiniteError: The message names the first such tensor, and counts its values.
    """
    for name, tensor in ((name, local_part(tensor)) for name, tensor in tensors.items()):
        if tensor.dtype not in FLOATS or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor)  # NaN wherever there is one
        if math.isfinite(low) and math.isfinite(high):
            continue
        chunks = tensor.reshape(-1).split(_CHUNK)
        count = sum(chunk.numel() - int(chunk.isfinite().sum()) for chunk in chunks)
        raise NonFiniteError(
            f"{source}: {name} holds {count:,} of {tensor.numel():,} values that are infinite or NaN, "
            "expected finite ones"
        )
