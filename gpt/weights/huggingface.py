"""Export to Hugging Face: a folder that `transformers` loads as a GPT2LMHeadModel, with its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from gpt.config import GPTConfig
from gpt.data.tokenizers import END_OF_TEXT, FILE_NAME, BPETokenizer, CharTokenizer, Tokenizer
from gpt.errors import InputError
from gpt.model import GPT
from gpt.names import HUGGING_FACE
from gpt.weights.checkpoint import CONFIG, MODEL, check_parameters
from gpt.weights.commit import commit, replaceable
from gpt.weights.tensors import check_finite, write_tensors
from kernels.files import write_json

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


def save_huggingface(
    model: GPT, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> None:
    """Writes a folder that `transformers` loads as a GPT2LMHeadModel, with its tokenizer.

    Args:
        model: The model. Its options must be those of Hugging Face's GPT-2.
        directory: A new or empty folder, or one that an earlier save wrote.
        tokenizer: Saved with the model. Its end-of-text token becomes the model's.

    Raises:
        InputError: GPT-2 has no setting for an option of the model, the tokenizer has more ids than the
            model, or the folder holds other files or cannot be written.
        MachineError: The disk is full, or fails.
        NonFiniteError: A weight is infinite or NaN. Nothing is written.
    """
    config = model.config
    _check_exportable(config)
    target = replaceable(directory, "save_pretrained")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"save_pretrained: the tokenizer has {tokenizer.vocab_size} ids, expected at most "
            f"{config.vocab_size} (vocab_size)"
        )

    check_parameters(model)
    check_finite(dict(model.named_parameters()), "the model")

    with commit(target) as folder:
        # transformers 4 refuses a file without this metadata.
        write_tensors(folder / MODEL, dict(_exported(model)), metadata={"format": "pt"})
        end = tokenizer.special_tokens.get(END_OF_TEXT) if isinstance(tokenizer, BPETokenizer) else None
        write_json(folder / CONFIG, _model_config(model, end), indent=1, ensure_ascii=False)
        if tokenizer is not None:
            tokenizer.save(folder)
            if isinstance(tokenizer, CharTokenizer):
                write_json(folder / FILE_NAME, _word_level(tokenizer), indent=1, ensure_ascii=False)
            settings = _tokenizer_config(config, end)
            write_json(folder / "tokenizer_config.json", settings, indent=1, ensure_ascii=False)


def read_characters(content: Mapping[str, Any]) -> CharTokenizer | None:
    """The CharTokenizer that `save_huggingface` wrote as the tokenizer.json `content`; None for any other."""
    model = content.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type") != "WordLevel"
        or not isinstance(model.get("vocab"), dict)
    ):
        return None
    tokenizer = CharTokenizer("".join(model["vocab"]))
    return tokenizer if _word_level(tokenizer) == content else None


def _check_exportable(config: GPTConfig) -> None:
    """Raises InputError for options that Hugging Face's GPT-2 has no setting for."""
    for name, expected in {"norm": "pre", "residual": True, "final_norm": True, "head_bias": False}.items():
        if getattr(config, name) != expected:
            raise InputError(
                f"save_pretrained: {name} is {getattr(config, name)!r}, expected {expected!r} for a GPT-2 "
                "of transformers"
            )
    if config.n_head * config.head_size != config.n_embd:
        raise InputError(
            f"save_pretrained: head_dim is {config.head_size}, expected n_embd / n_head for a GPT-2 of "
            f"transformers ({config.n_embd} / {config.n_head})"
        )


def _exported(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Each parameter under its name in a GPT2LMHeadModel; zeros for biases that this model does not have."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        (exported_name,) = HUGGING_FACE.names(name)
        prefix = "" if exported_name.startswith("lm_head") else "transformer."
        tensor = parameter.detach().cpu()
        tensor = tensor.T if HUGGING_FACE.is_transposed(name) else tensor
        yield prefix + exported_name, tensor.contiguous()

        bias = f"{name.removesuffix('weight')}bias"
        if name.endswith("weight") and name.startswith(("blocks.", "ln_f.")) and bias not in parameters:
            yield prefix + HUGGING_FACE.names(bias)[0], parameter.new_zeros(len(parameter), device="cpu")


def _model_config(model: GPT, end: int | None) -> dict[str, Any]:
    """The config.json of a GPT2LMHeadModel; `end` is the id of the end-of-text token."""
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


def _tokenizer_config(config: GPTConfig, end: int | None) -> dict[str, Any]:
    """The tokenizer_config.json that goes with tokenizer.json."""
    token = END_OF_TEXT if end is not None else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "bos_token": token,
        "eos_token": token,
        "clean_up_tokenization_spaces": False,
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
