"""Reads weights that other packages wrote, from disk or from the hub, and trusts nothing in them.

No code in a file runs, and no more memory is allocated than the file has bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt.errors import InputError, first_line, shown
from gpt.files import PATIENCE, open_regular, read_json, user_path, within
from gpt.memory import exhausted
from gpt.weights.archives import check_archive
from gpt.weights.checkpoint import CONFIG, FOLDER, MODEL, OPTIMIZER, STATE, runs_in
from gpt.weights.commit import present
from gpt.weights.hashes import SUMS, list_folder, verify_listed
from gpt.weights.sharded import tensor_files
from gpt.weights.tensors import check_names, read_tensors

WEIGHTS = (MODEL, f"{MODEL}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "ckpt.pt")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Weights(NamedTuple):
    """The tensors of a file, or of all its shards.

    `extra` holds the other entries of a nanoGPT or book checkpoint; `size` is the number of bytes on disk.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]
    size: int


def locate(source: str | os.PathLike[str]) -> Path:
    """The file or folder that `source` names: a path, or a model on the hub, which is downloaded once.

    Raises:
        InputError: There is no such path, and the hub does not give such a model within a few seconds.
    """
    path = user_path(source, "from_pretrained")
    if (existing := present(path, "from_pretrained")) is not None:
        return existing
    name = os.fspath(source)
    first, slash, _ = name.partition("/")
    is_here = bool(slash) and os.path.lexists(first)
    if not isinstance(source, str) or is_here or name.endswith(SUFFIXES) or not HUB_NAME.fullmatch(name):
        if slash and os.path.isdir(path.parent) and (held := runs_in(path.parent, "from_pretrained")):
            raise InputError(f"from_pretrained: {path} does not exist; {path.parent} {held}")
        raise InputError(
            f"from_pretrained: {path} does not exist, expected a file, a folder or the name of a model on "
            "the hub"
        )
    return _download(name)


def is_own(path: Path) -> bool:
    """Whether `path` is a run or a checkpoint of this package."""
    if os.path.isdir(path / FOLDER):
        return True
    if not os.path.lexists(path / CONFIG):
        return os.path.lexists(path / SUMS)
    return "block_size" in read_json(path / CONFIG, "from_pretrained")


def weights_file(path: Path) -> Path:
    """The file with the weights, or with the list of shards: `path` itself, or a file in that folder.

    Raises:
        InputError: The folder has no such file, or several and none with a known name.
    """
    if not os.path.isdir(path):
        return path
    names = list_folder(path, "from_pretrained")
    for name in WEIGHTS:
        if name in names:
            return path / name
    files = [name for name in names if name.endswith(SUFFIXES)]
    if len(files) == 1:
        return path / files[0]
    if held := runs_in(path, "from_pretrained"):
        raise InputError(f"from_pretrained: {path} {held}")
    held = f"several files of weights ({', '.join(files[:3])})" if files else "no weights"
    raise InputError(
        f"from_pretrained: {path} holds {held}, expected a run, a checkpoint, or one file of weights "
        f"({', '.join(WEIGHTS[::2])})"
    )


def weights_size(path: Path) -> int:
    """The bytes on disk of the weights in the file or folder `path`.

    Raises:
        InputError: As `weights_file`, or a file cannot be looked up.
    """
    try:
        if is_own(path):
            return sum(file.stat().st_size for file in tensor_files(path, MODEL))
        file = weights_file(path)
        if file.name.endswith(".index.json"):
            suffix = Path(file.name.removesuffix(".index.json")).suffix
            return sum(shard.stat().st_size for shard in file.parent.glob(f"*{suffix}"))
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"from_pretrained: cannot read {path}: {error.strerror}") from error


def read_weights(path: Path) -> Weights:
    """The tensors in the file `path`, or in the shards that it lists; memory-mapped if the format allows it.

    Raises:
        InputError: The file is not the one that a SHA256SUMS beside it lists; or it is damaged, claims more
            bytes than it has, would run code, or has another format.
    """
    verify_listed(path, "from_pretrained")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with open_regular(path, "from_pretrained") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)

    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"from_pretrained: {path} is a Git LFS pointer, expected the file itself (git lfs pull)"
        )
    if head.startswith(b"PK"):
        if path.suffix == ".safetensors":  # torch.load would read it as safetensors, by its name
            raise InputError(
                f"from_pretrained: {path} is a torch.save file, not safetensors, expected a name that ends "
                "in .pt"
            )
        return _read_torch(path, size)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return Weights(path, read_tensors(path, "from_pretrained"), {}, size)

    hint = ""
    if head.startswith(b"\x80"):
        hint = "; torch.save(torch.load(FILE, weights_only=True), FILE) converts a file from before torch 1.6"
    raise InputError(
        f"from_pretrained: {path} is damaged or not a weights file, expected safetensors or a "
        f"torch.save file{hint}"
    )


def _read_shards(index: Path) -> Weights:
    """The tensors that an index lists, each from the file that the index names for it."""
    places = read_json(index, "from_pretrained").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"from_pretrained: {index} has no weight_map, expected a file name for each tensor")
    check_names(places, index, "from_pretrained")
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for name in sorted(set(places.values())):
        if name != Path(name).name or name.endswith(".index.json") or not os.path.isfile(index.parent / name):
            raise InputError(f"from_pretrained: {index} lists {shown(name)}, expected a file beside it")
        shard = read_weights(index.parent / name)
        size += shard.size
        tensors |= {key: tensor for key, tensor in shard.tensors.items() if places.get(key) == name}
    if missing := sorted(places.keys() - tensors.keys()):
        raise InputError(
            f"from_pretrained: {index.parent / places[missing[0]]} lacks {missing[0]}, which {index.name} "
            "lists for it"
        )
    return Weights(index, tensors, {}, size)


def _read_torch(path: Path, size: int) -> Weights:
    """Reads a `torch.save` file: a state_dict, or a dict with one under "model" or "model_state_dict"."""
    check_archive(path, size)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        if exhausted(error) is not None:
            raise
        raise InputError(
            f"from_pretrained: {path} is damaged ({type(error).__name__}: {first_line(error)})"
        ) from error
    extra: Mapping[str, Any] = {}
    for key in ("model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content, extra = content[key], content
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"from_pretrained: {path} holds a {type(content).__name__}, expected a state_dict of tensors"
        )
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise InputError(
                f"from_pretrained: {path} holds a name of type {type(name).__name__}, expected a state_dict "
                "of tensors"
            )
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"from_pretrained: {path} holds {name[:80]!a}: {type(tensor).__name__}, expected a "
                "state_dict of tensors"
            )
    check_names(content, path, "from_pretrained")
    return Weights(path, dict(content), dict(extra), size)


def _download(name: str) -> Path:
    """The folder of a model on the hub: the copy in the hub's cache, else a download."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        if any((folder / weights).exists() for weights in WEIGHTS):
            return folder
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        info = within(PATIENCE, lambda: huggingface_hub.HfApi().model_info(name, timeout=PATIENCE))
        files = _wanted_files([sibling.rfilename for sibling in info.siblings or []])
        return Path(huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=files))
    except Exception as error:  # the client also raises the errors of its HTTP library
        reason = first_line(error)
        raise InputError(
            f"from_pretrained: {name} is not a path, and cannot be downloaded ({reason}), expected a "
            f"network, or {CONFIG}, {MODEL} and tokenizer.json from "
            f"https://huggingface.co/{name}/tree/main in a folder, and its path"
        ) from error


def _wanted_files(names: list[str]) -> list[str]:
    """The files of a repository to download: config, tokenizer, and the weights in one format."""
    top = [name for name in names if "/" not in name]
    safe = [name for name in top if re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name)]
    weights = safe or [name for name in top if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)]
    return weights + [
        name for name in top if name in (CONFIG, "tokenizer.json", "merges.txt", SUMS, OPTIMIZER, STATE)
    ]
