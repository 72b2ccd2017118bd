"""Weights in from Hugging Face's GPT-2, nanoGPT and "Build a Large Language Model From Scratch", and out to
Hugging Face.

Which layout a file has is read from its contents, never from its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt.config import GPTConfig
from gpt.data.dataset import Split, TokenData
from gpt.data.tokenizers import END_OF_TEXT, FILE_NAME, BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer
from gpt.errors import InputError
from gpt.model import GPT
from gpt.names import BOOK, HUGGING_FACE, NANOGPT, Layout
from gpt.weights.checkpoint import (
    CONFIG,
    MODEL,
    SUMS,
    commit,
    find_checkpoint,
    load_checkpoint_tokenizer,
    load_model,
    read_json,
)
from gpt.weights.files import Weights, is_own, locate, read_weights, weights_file
from kernels.files import replacing

WRAPPERS = re.compile(
    r"(?:_orig_mod\.|module\.)*(?:transformer\.)?"
)  # of torch.compile, of DDP, and of the model itself
MASKS = re.compile(r".*\.(?:attn\.(?:masked_)?bias|att\.mask)")  # buffers that some versions save
HEADS = ("n_head", "n_heads", "num_heads")
UNSEEN = ("n_head", "activation", "eps")  # a contradiction here changes the logits and no shape
# fmt: off
HUGGING_FACE_KEYS = (
    "model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner",
    "activation_function",
    "layer_norm_epsilon", "resid_pdrop", "embd_pdrop", "attn_pdrop", "tie_word_embeddings",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "add_cross_attention",
)  # the rest of a config.json changes nothing in a GPT-2
# fmt: on
SPLITS: dict[Split, str] = {"train": "train.bin", "validation": "val.bin"}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


def load_pretrained(
    source: str | os.PathLike[str],
    config: GPTConfig | Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    use_triton: bool | str = "auto",
) -> GPT:
    """The model in a file or folder, or of the Hugging Face hub: ours, Hugging Face's GPT-2, nanoGPT's or the
    book's.

    Args:
        source: A run, a checkpoint, a folder or file of safetensors or of `torch.save`, or the name of a
            model on the hub, whose files are kept in the hub's own cache.
        config: What the file does not say, in any names that `GPTConfig.from_dict` knows: a bare state_dict
            has no number of heads.
        device: Of the parameters, which keep the file's dtype; torch's default.
        use_triton: As in `GPT`.

    Returns:
        The model in training mode, as `GPT` makes it.

    Raises:
        InputError: Nothing there; a file that is damaged, would run code, claims more than it holds or is of
            no known layout; a config that is missing or contradicts the file.
    """
    path = locate(source)
    if is_own(path):
        if config is not None:
            raise InputError(f"from_pretrained: {path} says what its model is, expected no config")
        return load_model(path, device=device, use_triton=use_triton)
    found = _recognise(read_weights(weights_file(path)))
    return _build(found, _config(found, config), device, use_triton)


def load_pretrained_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that lies beside the model at `source`, which is as in `load_pretrained`.

    Raises:
        InputError: There is none, or one of another kind than `gpt.data.tokenizers` has.
    """
    path = locate(source)
    if is_own(path):
        return load_checkpoint_tokenizer(find_checkpoint(path))
    folder = path if path.is_dir() else path.parent
    if (folder / FILE_NAME).exists():
        return _characters(read_json(folder / FILE_NAME)) or load_tokenizer(folder)
    if (folder / "merges.txt").exists():
        return load_tokenizer(folder / "merges.txt")
    raise InputError(f"tokenizer: {folder} holds none, expected {FILE_NAME} or merges.txt beside the weights")


def save_huggingface(
    model: GPT, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> None:
    """Writes a folder that `transformers` loads as a GPT2LMHeadModel, with its tokenizer.

    Args:
        directory: A new or empty folder, or one written before.
        tokenizer: Saved along; its end of text becomes the model's.

    Raises:
        InputError: The model is none that their GPT-2 can be, the tokenizer has more ids than the model, or
            the folder holds something else or cannot be written.
    """
    config, target = model.config, Path(directory)
    _check_exportable(config)
    if target.is_dir() and any(target.iterdir()) and not (target / SUMS).exists():
        raise InputError(
            f"save_pretrained: {target} holds other files, expected a new or empty folder, or one written "
            "before"
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"save_pretrained: the tokenizer has {tokenizer.vocab_size} ids, expected at most "
            f"{config.vocab_size} (vocab_size)"
        )

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(_exported(model)), folder / MODEL, metadata={"format": "pt"})
        end = tokenizer.special_tokens.get(END_OF_TEXT) if isinstance(tokenizer, BPETokenizer) else None
        _write_json(folder / CONFIG, _huggingface_config(model, end))
        if tokenizer is not None:
            tokenizer.save(folder)
            if isinstance(tokenizer, CharTokenizer):
                _write_json(folder / FILE_NAME, _word_level(tokenizer))
            mark = END_OF_TEXT if end is not None else None
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
            settings |= {"bos_token": mark, "eos_token": mark, "clean_up_tokenization_spaces": False}
            _write_json(folder / "tokenizer_config.json", settings)

    commit(target, write)


def save_bin(data: TokenData, directory: str | os.PathLike[str]) -> None:
    """Writes the splits of `data` as nanoGPT's train.bin and val.bin (raw little-endian uint16 ids), and
    tokenizer.json beside.

    Raises:
        InputError: The vocabulary has more ids than 16 bits do, or a file cannot be written.
    """
    import numpy as np

    if data.tokenizer.vocab_size > 1 << 16:
        raise InputError(
            f"save_bin: the vocabulary has {data.tokenizer.vocab_size} ids, expected at most 65536 (uint16)"
        )
    folder = Path(directory)
    try:
        for split, name in SPLITS.items():
            with replacing(folder / name) as file:
                np.asarray(data.tokens(split), "<u2").tofile(file)
        data.tokenizer.save(folder)
    except OSError as error:
        raise InputError(f"save_bin: cannot write {folder}: {error.strerror or error}") from error


class _Found(NamedTuple):
    """A file's parameters by its layout's names."""

    layout: Layout
    weights: Weights
    tensors: dict[str, Tensor]
    tied: bool  # no head, or one that is the token embedding

    def fail(self, message: str) -> InputError:
        return InputError(f"from_pretrained: {self.weights.path} ({self.layout.package}'s layout) {message}")

    def first(self, ours: str) -> Tensor:
        """The tensor that is, or begins, our parameter `ours`."""
        name = self.layout.names(ours)[0]
        if name not in self.tensors:
            raise self.fail(f"lacks {name}")
        return self.tensors[name]


def _recognise(weights: Weights) -> _Found:
    """The layout of a file, and its parameters without wrappers' prefixes and masks."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        plain = WRAPPERS.sub("", name, count=1)
        if MASKS.fullmatch(plain):
            continue
        if plain in tensors:
            raise InputError(f"from_pretrained: {weights.path} has {plain} twice, once as {name}")
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
            kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
            raise InputError(
                f"from_pretrained: {weights.path}: {name} is {kind}, expected floating-point strided"
            )
        tensors[plain] = tensor
    layout = _layout(tensors)
    if layout is None:
        some = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"from_pretrained: {weights.path} has no known layout ({some}, ...), expected a checkpoint's "
            "folder, or the tensors "
            "of Hugging Face's GPT-2, nanoGPT or LLMs-from-scratch"
        )
    head = tensors.get(layout.names("lm_head.weight")[0])
    claimed = sum(tensor.nbytes for tensor in tensors.values() if tensor is not head)
    if max(claimed, 0 if head is None else head.nbytes) > weights.size:
        raise InputError(
            f"from_pretrained: {weights.path} claims {claimed:,} bytes of parameters, but has "
            f"{weights.size:,}"
        )
    embedding = tensors.get(layout.names("wte.weight")[0])
    return _Found(
        layout, weights, tensors, head is None or (embedding is not None and torch.equal(head, embedding))
    )


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    query, embedding = tensors.get("h.0.attn.c_attn.weight"), tensors.get("wte.weight")
    if query is not None and embedding is not None and query.ndim == embedding.ndim == 2:
        return HUGGING_FACE if query.shape[0] == embedding.shape[1] else NANOGPT  # (C, 3 C), or (3 C, C)
    return BOOK if "trf_blocks.0.att.W_query.weight" in tensors else None


def _config(found: _Found, given: GPTConfig | Mapping[str, Any] | None) -> GPTConfig:
    """The model's config: what the file states, what the shapes show, and for the rest `given`."""
    if not isinstance(given, (GPTConfig, Mapping, NoneType)):
        raise InputError(
            f"from_pretrained: config is {type(given).__name__}, expected a GPTConfig, a dict or None"
        )
    stated = _stated(found)
    if given is not None:
        stated.pop("dropout", None)
    if not found.tied:
        stated["tie_weights"] = False
    known = {**found.layout.assumed, **_shown(found), **stated}
    if not isinstance(given, GPTConfig) and not {*HEADS} & {*known, *(given or ())}:
        width = found.first("wte.weight").shape[1]
        raise found.fail(
            f"does not say how many heads there are, expected config={{'n_head': ...}}, a divisor of {width}"
        )
    config = given if isinstance(given, GPTConfig) else GPTConfig.from_dict({**known, **(given or {})})
    for name in UNSEEN:
        if name in stated and getattr(config, name) != stated[name]:
            raise found.fail(
                f"says that {name} is {stated[name]!r}, expected no other in config= "
                f"({getattr(config, name)!r})"
            )
    return config


def _stated(found: _Found) -> dict[str, Any]:
    """The fields that nanoGPT's model_args, or the config.json beside Hugging Face's weights, state."""
    if found.layout is NANOGPT:
        arguments = found.weights.extra.get("model_args")
        return dict(arguments) if isinstance(arguments, dict) else {}
    settings = found.weights.path.parent / CONFIG
    if found.layout is HUGGING_FACE and settings.exists():
        content = read_json(settings)
        return GPTConfig.from_dict(
            {key: content[key] for key in HUGGING_FACE_KEYS if key in content}
        ).to_dict()
    return {}


def _shown(found: _Found) -> dict[str, Any]:
    """The fields that the tensors' names and shapes show."""
    layout, names = found.layout, found.tensors
    for name in ("wte.weight", "wpe.weight", "blocks.0.ffn.up.weight"):
        if found.first(name).ndim != 2:
            raise found.fail(
                f"has {layout.names(name)[0]} of shape {tuple(found.first(name).shape)}, expected two "
                "dimensions"
            )
    vocab_size, n_embd = found.first("wte.weight").shape
    inner = found.first("blocks.0.ffn.up.weight").shape[1 if layout.transposed else 0]
    return {
        "vocab_size": vocab_size,
        "block_size": found.first("wpe.weight").shape[0],
        "n_layer": _layers(found),
        "n_embd": n_embd,
        "n_inner": None if inner == 4 * n_embd else inner,
        "bias": layout.names("blocks.0.attn.proj.bias")[0] in names,
        "qkv_bias": layout.names("blocks.0.attn.qkv.bias")[0] in names,
        "tie_weights": found.tied,
        "head_bias": layout.names("lm_head.bias")[0] in names,
        "final_norm": layout.names("ln_f.weight")[0] in names,
    }


def _layers(found: _Found) -> int:
    blocks = re.compile(rf"{found.layout.blocks}\.(\d+)\.")
    return len({match.group(1) for match in map(blocks.match, found.tensors) if match})


def _build(
    found: _Found, config: GPTConfig, device: torch.device | str | None, use_triton: bool | str
) -> GPT:
    """The model of `config` with the file's parameters, made once every name and shape has been checked."""
    if config.n_layer != _layers(found):
        raise found.fail(f"has {_layers(found)} blocks, expected {config.n_layer} (n_layer)")
    model = GPT(config, device="meta", dtype=found.first("wte.weight").dtype)
    left = set(found.tensors)
    if config.tie_weights and found.tied:
        left -= {*found.layout.names("lm_head.weight")}
    for name, parameter in model.named_parameters():
        theirs = found.layout.names(name)
        rows, *columns = parameter.shape
        shape = (rows // len(theirs), *columns)
        expected = shape[::-1] if found.layout.is_transposed(name) else shape
        for part in theirs:
            if part not in found.tensors:
                raise found.fail(f"lacks {part}")
            if found.tensors[part].shape != expected:
                raise found.fail(
                    f"has {part} of shape {tuple(found.tensors[part].shape)}, expected {expected}"
                )
        left -= {*theirs}
    if left:
        raise found.fail(f"has {min(left)}, which a model of its config does not: {config}")
    model.to_empty(device=torch.get_default_device() if device is None else device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = found.layout.names(name)
            for piece, part in zip(parameter.chunk(len(theirs)), theirs, strict=True):
                tensor = found.tensors[part]
                piece.copy_(tensor.T if found.layout.is_transposed(name) else tensor)
    model.use_triton = use_triton
    return model


def _check_exportable(config: GPTConfig) -> None:
    """Refuses what Hugging Face's GPT-2 has no setting for."""
    for name, expected in {"norm": "pre", "final_norm": True, "head_bias": False}.items():
        if getattr(config, name) != expected:
            raise InputError(
                f"save_pretrained: {name} is {getattr(config, name)!r}, expected {expected!r} for a GPT-2 "
                "of transformers"
            )
    if config.n_head * config.head_size != config.n_embd:
        raise InputError(
            f"save_pretrained: head_dim is {config.head_size}, expected n_embd / n_head for a GPT-2 of "
            "transformers "
            f"({config.n_embd} / {config.n_head})"
        )


def _exported(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by its name in a GPT2LMHeadModel; zeros for the biases that only that has."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        (theirs,) = HUGGING_FACE.names(name)
        prefix = "" if theirs.startswith("lm_head") else "transformer."
        tensor = parameter.detach().cpu()
        yield prefix + theirs, (tensor.T if HUGGING_FACE.is_transposed(name) else tensor).contiguous()
        bias = f"{name.removesuffix('weight')}bias"
        if name.endswith("weight") and name.startswith(("blocks.", "ln_f.")) and bias not in parameters:
            yield prefix + HUGGING_FACE.names(bias)[0], tensor.new_zeros(tensor.shape[0])


def _huggingface_config(model: GPT, end: int | None) -> dict[str, Any]:
    """The config.json of a GPT2LMHeadModel."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }


def _word_level(tokenizer: CharTokenizer) -> dict[str, Any]:
    """A tokenizer.json of Hugging Face `tokenizers` in which each character is a word."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {c: i for i, c in enumerate(tokenizer.characters)},
            "unk_token": "<unk>",
        },
    }


def _characters(content: Mapping[str, Any]) -> CharTokenizer | None:
    """The tokenizer that `_word_level` describes, if `content` is such a description."""
    model = content.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type") != "WordLevel"
        or not isinstance(model.get("vocab"), dict)
    ):
        return None
    tokenizer = CharTokenizer("".join(model["vocab"]))
    return tokenizer if _word_level(tokenizer) == content else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
