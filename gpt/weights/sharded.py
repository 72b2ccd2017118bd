"""The tensors of a checkpoint, in whole files or in the shards that the ranks of a sharded run write.

A run whose parameters are DTensors saves through `torch.distributed.checkpoint`, as safetensors: each rank
writes one file of its rows of the weights, and one of its rows of the optimizer's state. The metadata of a
file states, for each tensor, the row of the whole tensor at which its own rows begin.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from gpt.errors import InputError
from gpt.weights.hashes import list_folder
from gpt.weights.tensors import is_sharded, read_tensors
from kernels.files import json_object

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The files of tensors of a checkpoint that one process writes. The names in the second one have a "/".
FILES = "model.safetensors", "optimizer.safetensors"
SUFFIX = ".safetensors"
_SHARD = re.compile(r"shard-[0-9]{5}-model-0000([12])-of-00002\.safetensors")  # the names are torch's
_OFFSETS = "DCP_SHARDING_INFO"  # in the metadata of a file


class _Shard(NamedTuple):
    """Part of a tensor: where it begins in the whole tensor, and its elements."""

    offset: list[int]
    tensor: Tensor


def tensor_files(folder: Path, name: str) -> list[Path]:
    """The files with the tensors of `name`, one of FILES: the shards if there are any, else that file."""
    number = str(1 + FILES.index(name))
    matches = map(_SHARD.fullmatch, list_folder(folder, "checkpoint"))
    return [folder / match[0] for match in matches if match and match[1] == number] or [folder / name]


def read_parts(folder: Path, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of `name`, one of FILES, whole and on the CPU, or this rank's part of them.

    Args:
        folder: The checkpoint, of one process or of a sharded run.
        name: The file, as one process writes it.
        like: The model's parameters by name. Where one is a DTensor, it and its entries of the optimizer's
            state become DTensors with that layout, and this rank reads its own rows alone. The ranks do not
            communicate.

    Raises:
        InputError: A file cannot be read or is not a safetensors file, or the shards of a tensor are not
            successive rows of it.
    """
    layouts = {key: tensor for key, tensor in (like or {}).items() if is_sharded(tensor)}
    if not layouts and tensor_files(folder, name) == [folder / name]:
        return read_tensors(folder / name)

    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {}
    for key, whole in _describe(folder).items():
        if _file(key) != name:
            continue
        layout = layouts.get(key.partition("/")[0])
        if layout is not None and layout.shape == whole.shape:
            tensors[key] = torch.empty_like(layout, dtype=whole.dtype)
        else:
            tensors[key] = torch.empty(whole.shape, dtype=whole.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: ProcessGroup) -> Future[Any]:
    """Copies the tensors to the CPU, and begins to write this rank's shards of them in the background.

    Every rank calls it with the same names and folder. The folder exists.

    Args:
        tensors: The weights and the optimizer's state. Those that are not DTensors are equal on all ranks.
        folder: Where to write; all ranks share its file system.
        group: A process group of the CPU that nothing else uses until the result is there.

    Returns:
        What `finish_shards` waits for.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    files = {key: 1 + ("/" in key) for key in tensors}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    content = {key: tensor.detach() for key, tensor in tensors.items()}
    return cast("Future[Any]", async_save(content, storage_writer=writer, process_group=group))


def finish_shards(upload: Future[Any]) -> None:
    """Waits until every rank has written its shards; raises the error of the first rank that could not."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        upload.result()
    except CheckpointException as error:
        rank = min(error.failures)
        raise error.failures[rank][0] from None


def _describe(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of which the files in `folder` hold the shards, on the meta device.

    Raises:
        InputError: A file is not one of a checkpoint, or the shards of a tensor are not successive rows.
    """
    shards: dict[str, list[_Shard]] = {}
    known = {path: name for name in FILES for path in tensor_files(folder, name)}
    for path in (folder / file for file in list_folder(folder, "checkpoint") if file.endswith(SUFFIX)):
        if path not in known:
            raise InputError(
                f"checkpoint: {path} belongs to no checkpoint, expected {FILES[0]} or its shards"
            )
        for key, shard in _read_shards(path).items():
            if _file(key) != known[path]:
                raise InputError(f"checkpoint: {path} has {key}, expected tensors of {known[path]} alone")
            shards.setdefault(key, []).append(shard)
    return {key: _whole(folder, key, parts) for key, parts in shards.items()}


def _read_shards(path: Path) -> dict[str, _Shard]:
    """The tensors of a file, with the offsets that its metadata states; 0 if it has none."""
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get(_OFFSETS)
    if not stated:
        return {key: _Shard([0] * tensor.ndim, tensor) for key, tensor in tensors.items()}
    try:
        entries = json_object(stated.encode(), path)
    except ValueError as error:
        raise InputError(f"checkpoint: {_OFFSETS} of {error}") from error

    shards = {}
    for key, tensor in tensors.items():
        entry = entries.get(key)
        offset = entry.get("saved_offsets") if isinstance(entry, dict) else None
        valid = isinstance(offset, list) and all(type(number) is int for number in offset)
        if not isinstance(offset, list) or not valid or len(offset) != tensor.ndim:
            raise InputError(f"checkpoint: {path} does not state where its rows of {key} begin")
        shards[key] = _Shard(offset, tensor)
    return shards


def _whole(folder: Path, key: str, shards: list[_Shard]) -> Tensor:
    """The tensor, on the meta device, of which the shards are successive rows; InputError if they are not."""
    shards.sort(key=lambda shard: (shard.offset, shard.tensor.shape))
    first = shards[0].tensor
    rows = 0
    for number, (offset, tensor) in enumerate(shards):
        alike = tensor.shape[1:] == first.shape[1:] and tensor.dtype == first.dtype
        follows = offset == [rows, *[0] * (tensor.ndim - 1)] if tensor.ndim else number == 0
        if not (alike and follows and tensor.ndim == first.ndim):
            raise InputError(
                f"checkpoint: {folder}: the shards of {key} overlap, leave a gap or differ in shape or "
                "dtype, expected successive rows of one tensor"
            )
        rows += len(tensor) if tensor.ndim else 0
    return torch.empty((rows, *first.shape[1:])[: first.ndim], dtype=first.dtype, device="meta")


def _file(key: str) -> str:
    """The one of FILES that has a tensor of this name."""
    return FILES["/" in key]
