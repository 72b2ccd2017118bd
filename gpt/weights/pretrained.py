"""Loads models: this package's own, Hugging Face's GPT-2, nanoGPT's, and the book's (LLMs-from-scratch).

The contents of a file decide which layout it has, never its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gpt.config import GPTConfig
from gpt.data.tokenizers import FILE_NAME, Tokenizer, load_tokenizer
from gpt.device import check_weights, parameter_dtype
from gpt.errors import InputError
from gpt.files import read_json
from gpt.model import GPT
from gpt.names import BOOK, FIELD_NAMES, HUGGING_FACE, NANOGPT, STATE_DICT, Layout
from gpt.packing import check_quantize, pack_weights
from gpt.weights.checkpoint import (
    CONFIG,
    find_best_checkpoint,
    find_checkpoint,
    load_checkpoint_tokenizer,
    load_model,
)
from gpt.weights.commit import undisturbed
from gpt.weights.files import Weights, is_own, locate, read_weights, weights_file, weights_size
from gpt.weights.hashes import verify_listed
from gpt.weights.huggingface import read_characters
from gpt.weights.tensors import FLOATS, check_finite

Loaded = TypeVar("Loaded")

# Prefixes of names, by torch.compile, by DistributedDataParallel, and by the module that holds the model.
WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.)*(?:transformer\.)?")
MASKS = re.compile(r".*\.(?:attn\.(?:masked_)?bias|att\.mask)")  # buffers that some versions save
HEADS = ("n_head", "n_heads", "num_heads")
DROPOUTS = {"dropout"} | {
    a for p in FIELD_NAMES.values() for a, name in p.aliases.items() if name == "dropout"
}
UNSEEN = ("n_head", "activation", "eps")  # fields that change the logits but no shape
# The keys of a config.json that matter. No other key changes a GPT-2.
HUGGING_FACE_KEYS = (
    "model_type",
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "tie_word_embeddings",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
)


def load_pretrained(
    source: str | os.PathLike[str],
    config: GPTConfig | Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    use_triton: bool | str = "auto",
) -> GPT:
    """Loads a model of this package, Hugging Face's GPT-2, nanoGPT or the book, from disk or from the hub.

    Args:
        source: A run, a checkpoint, a folder or file of safetensors or of `torch.save`, or the name of a
            model on the Hugging Face hub. Downloads are kept in the hub's own cache.
        config: Fields that the file does not state, in any names that `GPTConfig.from_dict` knows. A bare
            state_dict states shapes alone: not the number of heads, nor the options that change no shape.
        device: Of the parameters; None is torch's default.
        dtype: Of the parameters, also as text; None keeps the file's.
        quantize: Packs the matrices for generation on a CPU, as "bfloat16", or as "int8" with one scale for
            each output. Activations are then bfloat16, or float32 for int8. Such a model generates faster; it
            cannot be trained, saved, or moved to another device or dtype.
        use_triton: As in `GPT`.

    Returns:
        The model in training mode, as `GPT` creates it.

    Raises:
        InputError: Nothing is there; the file is damaged, would run code, claims more bytes than it has, or
            has no known layout; a config is missing or contradicts the file; or `quantize` is another value,
            or does not fit `dtype` or `device`.
        NonFiniteError: A weight is infinite or NaN.
    """

    if not isinstance(config, (GPTConfig, Mapping, NoneType)):
        raise InputError(
            f"from_pretrained: config is {type(config).__name__}, expected a GPTConfig, a dict or None"
        )
    dtype = parameter_dtype(dtype)
    check_quantize(quantize, dtype, torch.get_default_device() if device is None else torch.device(device))

    def read() -> GPT:
        path = locate(source)
        if is_own(path):
            model = load_model(path, device=device, use_triton=use_triton)
            _check_stated(model.config, config, path)
            return model
        file = _recognise(read_weights(weights_file(path)))
        check_finite(file.tensors, file.weights.path)
        return _build(file, _config(file, config), device, use_triton)

    model = undisturbed(source, read)
    if dtype is not None:
        model.to(dtype)
    return model if quantize is None else pack_weights(model, quantize)


def load_pretrained_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer beside the model at `source`, which is as in `load_pretrained`.

    Raises:
        InputError: There is none, or it is of a kind that `gpt.data.tokenizers` does not support.
    """
    return undisturbed(source, lambda: _read_tokenizer(locate(source)))


def from_checkpoint(
    source: str, device: torch.device, load: Callable[[Path], Loaded], *, which: str = "newest"
) -> Loaded:
    """What load(path) returns for the model that --checkpoint names; of a run, path is one checkpoint.

    `load` is called again where the run has removed that checkpoint meanwhile, because it has newer ones.

    Args:
        source: As in `load_pretrained`.
        device: Of the model.
        load: Loads it.
        which: The checkpoint of a run: "newest" or "best".

    Raises:
        InputError: There is no such model, or its weights do not fit into the free memory of `device`.
        NonFiniteError: A weight is infinite or NaN.
    """

    def read() -> Loaded:
        path = locate(source)
        if which == "best":
            path = find_best_checkpoint(path)
        elif is_own(path):
            path = find_checkpoint(path)
        check_weights("--checkpoint", weights_size(path), device)
        return load(path)

    return undisturbed(source, read)


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer beside the model at `path`."""
    if is_own(path):
        return load_checkpoint_tokenizer(find_checkpoint(path))
    folder = path if os.path.isdir(path) else path.parent
    for file in (folder / FILE_NAME, folder / "merges.txt"):
        if os.path.lexists(file):
            verify_listed(file, "tokenizer")
            characters = read_characters(read_json(file, "tokenizer")) if file.name == FILE_NAME else None
            return characters or load_tokenizer(file)
    raise InputError(
        f"tokenizer: {folder} holds no tokenizer, expected {FILE_NAME} or merges.txt beside the weights "
        "(gpt.train: or --tokenizer)"
    )


class _ModelFile(NamedTuple):
    """A weights file whose layout is known, with its parameters by the names of that layout."""

    layout: Layout
    weights: Weights
    tensors: dict[str, Tensor]
    tied: bool  # the file has no head, or its head equals the token embedding

    def fail(self, message: str) -> InputError:
        return InputError(f"from_pretrained: {self.weights.path} ({self.layout.package}'s layout) {message}")

    def first(self, name: str) -> Tensor:
        """The first tensor that is stacked into our parameter `name`."""
        first_name = self.layout.names(name)[0]
        if first_name not in self.tensors:
            raise self.fail(f"lacks {first_name}")
        return self.tensors[first_name]

    def has(self, name: str) -> bool:
        """Whether the file has our parameter `name`."""
        return self.layout.names(name)[0] in self.tensors

    def count_blocks(self) -> int:
        blocks = re.compile(rf"{self.layout.blocks}\.(\d+)\.")
        return len({match.group(1) for match in map(blocks.match, self.tensors) if match})


def _recognise(weights: Weights) -> _ModelFile:
    """Finds the layout of a file, and drops masks and the prefixes of wrappers."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        plain = WRAPPERS.sub("", name, count=1)
        if MASKS.fullmatch(plain):
            continue
        if plain in tensors:
            raise InputError(f"from_pretrained: {weights.path} has {plain} twice, once as {name}")
        if tensor.layout != torch.strided or tensor.dtype not in FLOATS or tensor.is_meta:
            kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
            raise InputError(
                f"from_pretrained: {weights.path}: {name} is {kind}, expected floating-point strided"
            )
        tensors[plain] = tensor

    layout = _layout(tensors)
    if layout is None:
        first_names = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"from_pretrained: {weights.path} has no known layout ({first_names}, ...), expected the folder "
            "of a checkpoint, or the tensors of Hugging Face's GPT-2, nanoGPT or LLMs-from-scratch"
        )

    # Tensors may be views of one small storage; copying them must not allocate more than the file has.
    head = tensors.get(layout.names("lm_head.weight")[0])
    claimed = sum(tensor.nbytes for tensor in tensors.values() if tensor is not head)
    if max(claimed, 0 if head is None else head.nbytes) > weights.size:
        raise InputError(
            f"from_pretrained: {weights.path} claims {claimed:,} bytes of parameters, but has "
            f"{weights.size:,}"
        )
    embedding = tensors.get(layout.names("wte.weight")[0])
    tied = head is None or (embedding is not None and torch.equal(head, embedding))
    return _ModelFile(layout, weights, tensors, tied)


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    """The layout that the names, and the shape of the qkv matrix, belong to."""
    qkv, embedding = tensors.get("h.0.attn.c_attn.weight"), tensors.get("wte.weight")
    if qkv is not None and embedding is not None and qkv.ndim == embedding.ndim == 2:
        return HUGGING_FACE if qkv.shape[0] == embedding.shape[1] else NANOGPT  # (C, 3 C), or (3 C, C)
    if "blocks.0.attn.qkv.weight" in tensors:
        return STATE_DICT
    return BOOK if "trf_blocks.0.att.W_query.weight" in tensors else None


def _check_stated(stated: GPTConfig, given: GPTConfig | Mapping[str, Any] | None, path: Path) -> None:
    """Raises InputError where `given` differs from the config that a checkpoint of this package states."""
    if not isinstance(given, GPTConfig):
        given = GPTConfig.from_dict({**stated.to_dict(), **(given or {})})
    for name, value in stated.to_dict().items():
        if getattr(given, name) != value:
            raise InputError(
                f"from_pretrained: {name} is {getattr(given, name)!r}, expected {value!r} as in {path}"
            )


def _config(file: _ModelFile, given: GPTConfig | Mapping[str, Any] | None) -> GPTConfig:
    """The model's config, from the file's metadata, the tensors' shapes, and for the rest `given`."""
    stated = _stated_fields(file)
    if isinstance(given, Mapping) and DROPOUTS & given.keys():
        stated.pop("dropout", None)
    if not file.tied:
        stated["tie_weights"] = False

    known = {**file.layout.assumed, **_fields_from_shapes(file), **stated}
    if not isinstance(given, GPTConfig) and not {*HEADS} & {*known, *(given or ())}:
        width = file.first("wte.weight").shape[1]
        raise file.fail(
            f"does not state the number of heads, expected config={{'n_head': ...}}, a divisor of {width} "
            "(gpt.train: --n_head; gpt.sample, gpt.eval: a folder that save_pretrained wrote)"
        )
    config = given if isinstance(given, GPTConfig) else GPTConfig.from_dict({**known, **(given or {})})
    for name in UNSEEN:
        if name in stated and getattr(config, name) != stated[name]:
            raise file.fail(
                f"states that {name} is {stated[name]!r}, expected the same in config= "
                f"({getattr(config, name)!r})"
            )
    return config


def _stated_fields(file: _ModelFile) -> dict[str, Any]:
    """The fields in nanoGPT's model_args, or in the config.json beside Hugging Face's weights."""
    if file.layout is NANOGPT:
        arguments = file.weights.extra.get("model_args")
        return dict(arguments) if isinstance(arguments, dict) else {}
    settings = file.weights.path.parent / CONFIG
    if file.layout is HUGGING_FACE and os.path.lexists(settings):
        verify_listed(settings, "from_pretrained")
        content = read_json(settings, "from_pretrained")
        return GPTConfig.from_dict(
            {key: content[key] for key in HUGGING_FACE_KEYS if key in content}
        ).to_dict()
    return {}


def _fields_from_shapes(file: _ModelFile) -> dict[str, Any]:
    """The fields that follow from the names and shapes of the tensors."""
    for name in ("wte.weight", "wpe.weight", "blocks.0.ffn.up.weight"):
        if file.first(name).ndim != 2:
            raise file.fail(
                f"has {file.layout.names(name)[0]} of shape {tuple(file.first(name).shape)}, expected two "
                "dimensions"
            )
    vocab_size, n_embd = file.first("wte.weight").shape
    inner = file.first("blocks.0.ffn.up.weight").shape[1 if file.layout.transposed else 0]
    return {
        "vocab_size": vocab_size,
        "block_size": file.first("wpe.weight").shape[0],
        "n_layer": file.count_blocks(),
        "n_embd": n_embd,
        "n_inner": None if inner == 4 * n_embd else inner,
        "bias": file.has("blocks.0.attn.proj.bias"),
        "qkv_bias": file.has("blocks.0.attn.qkv.bias"),
        "tie_weights": file.tied,
        "head_bias": file.has("lm_head.bias"),
        "final_norm": file.has("ln_f.weight"),
    }


def _build(
    file: _ModelFile, config: GPTConfig, device: torch.device | str | None, use_triton: bool | str
) -> GPT:
    """The model of `config` with the file's parameters, allocated after every name and shape is checked."""
    if config.n_layer != file.count_blocks():
        raise file.fail(f"has {file.count_blocks()} blocks, expected {config.n_layer} (n_layer)")
    model = GPT(config, device="meta", dtype=file.first("wte.weight").dtype)
    _check_parameters(file, model)

    model.to_empty(device=torch.get_default_device() if device is None else device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part_names = file.layout.names(name)
            for rows, part in zip(parameter.chunk(len(part_names)), part_names, strict=True):
                tensor = file.tensors[part]
                rows.copy_(tensor.T if file.layout.is_transposed(name) else tensor)
    model.use_triton = use_triton
    return model


def _check_parameters(file: _ModelFile, model: GPT) -> None:
    """Raises InputError unless the file has the parameters of `model`, in their shapes, and no others."""
    unused = set(file.tensors)
    if model.config.tie_weights and file.tied:
        unused -= {*file.layout.names("lm_head.weight")}
    for name, parameter in model.named_parameters():
        part_names = file.layout.names(name)
        rows, *columns = parameter.shape
        shape = (rows // len(part_names), *columns)
        expected = shape[::-1] if file.layout.is_transposed(name) else shape
        for part in part_names:
            if part not in file.tensors:
                raise file.fail(f"lacks {part}")
            if file.tensors[part].shape != expected:
                raise file.fail(f"has {part} of shape {tuple(file.tensors[part].shape)}, expected {expected}")
        unused -= {*part_names}
    if unused:
        raise file.fail(f"has {min(unused)}, which a model of its config does not have: {model.config}")
