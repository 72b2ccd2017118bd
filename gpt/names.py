"""The names that other packages use: for the fields of a config, for flags, arguments and parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from gpt.errors import InputError, shown, unknown

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FieldNames:
    """A package's names for the fields of GPTConfig.

    Attributes:
        aliases: The package's name -> ours.
        defaults: The package's defaults, by either name, where they differ from ours.
        spellings: The package's values -> ours.
        fixed: Settings for which GPTConfig has no field, and the only value that is accepted.
        ignored: Settings that do not change the model.
        counts_heads: Whether n_head is n_embd // 64 where it is not given.
    """

    aliases: dict[str, str]
    defaults: dict[str, Any]
    spellings: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    counts_heads: bool = False

    def knows(self, key: str) -> bool:
        return key in self.aliases or key in self.fixed or key in self.ignored


_OWN = FieldNames({}, {})
# fmt: off
_HUGGING_FACE_IGNORED = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation", "bos_token_id",
    "dtype", "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "label2id",
    "output_attentions", "output_hidden_states", "output_past", "pad_token_id", "reorder_and_upcast_attn",
    "return_dict", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
})
# fmt: on
_PLAIN_HEAD = {"tie_weights": False, "head_bias": True, "final_norm": False}
FIELD_NAMES = {
    "llm-arch-research": FieldNames(
        {
            "embed_dim": "n_embd",
            "num_heads": "n_head",
            "num_layers": "n_layer",
            "max_position_embeddings": "block_size",
        },
        _PLAIN_HEAD,
    ),
    "simple-llm": FieldNames(
        {
            "max_seq_len": "block_size",
            "emb_size": "n_embd",
            "num_heads": "n_head",
            "head_size": "head_dim",
            "num_layers": "n_layer",
        },
        _PLAIN_HEAD,
        counts_heads=True,
    ),
    "LLMs-from-scratch": FieldNames(
        {
            "context_length": "block_size",
            "emb_dim": "n_embd",
            "n_heads": "n_head",
            "n_layers": "n_layer",
            "drop_rate": "dropout",
        },
        {"tie_weights": False, "qkv_bias": False},
    ),
    "Hugging Face": FieldNames(
        {
            "n_positions": "block_size",
            "n_ctx": "block_size",
            "activation_function": "activation",
            "layer_norm_epsilon": "eps",
            "resid_pdrop": "dropout",
            "embd_pdrop": "dropout",
            "attn_pdrop": "dropout",
            "tie_word_embeddings": "tie_weights",
        },
        {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
        spellings={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        fixed={
            "model_type": "gpt2",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        ignored=_HUGGING_FACE_IGNORED,
    ),
}


def translate_fields(d: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """The values of `d` by our names, with the defaults of the package that the other names belong to.

    Args:
        d: Values by our names and by the names of at most one package in FIELD_NAMES.
        own: Our names: the fields of GPTConfig.

    Raises:
        InputError: `d` is not a dict, or has an unknown name, names of different packages, names that
            contradict each other, or a setting that GPTConfig does not have.
    """
    if not isinstance(d, Mapping):
        raise InputError(f"GPTConfig: the config is {type(d).__name__}, expected a dict")
    package = _package(d, own)
    defaults = {k: v for k, v in package.defaults.items() if package.aliases.get(k, k) not in d}
    values: dict[str, Any] = {}
    source: dict[str, str] = {}  # our name -> the key of `d` that gave the value

    for key, value in {**defaults, **d}.items():
        if key in package.ignored:
            continue
        if key in package.fixed:
            if value != package.fixed[key]:
                expected = package.fixed[key]
                raise InputError(
                    f"GPTConfig: {key} is {shown(value)}, expected {expected!r} (this GPT has nothing else)"
                )
            continue
        name = package.aliases.get(key, key)
        value = package.spellings.get(value, value) if isinstance(value, str) else value
        if name in values and values[name] != value:
            raise InputError(
                f"GPTConfig: {key} is {shown(value)}, expected {shown(values[name])} as {source[name]} "
                f"(both mean {name})"
            )
        values[name], source[name] = value, key

    if package.counts_heads and "n_head" not in values and isinstance(values.get("n_embd"), int):
        values["n_head"] = max(1, values["n_embd"] // 64)
    return values


def _package(d: Mapping[str, Any], own: Collection[str]) -> FieldNames:
    """The first package that knows every name in `d` that is not ours."""
    foreign = [key for key in d if key not in own]
    if not foreign:
        return _OWN
    valid = [*own, *(alias for package in FIELD_NAMES.values() for alias in package.aliases)]
    for key in foreign:
        if not any(package.knows(key) for package in FIELD_NAMES.values()):
            raise unknown("GPTConfig", key, valid)
    for package in FIELD_NAMES.values():
        if all(package.knows(key) for key in foreign):
            return package

    owners = [
        f"{key} ({' or '.join(name for name, package in FIELD_NAMES.items() if package.knows(key))})"
        for key in foreign
    ]
    raise InputError(
        f"GPTConfig: the names of different packages are mixed: {', '.join(owners)}; expected those of one"
    )


# Our flag -> the names that commands of other packages give it.
HABITS = {
    "learning_rate": "lr max_lr",
    "max_steps": "epochs n_epochs num_epochs num_train_epochs max_epochs iters max_iters steps num_steps",
    "batch_size": "bs batch micro_batch_size per_device_train_batch_size train_batch_size",
    "grad_accum": "gradient_accumulation_steps accumulate_grad_batches accumulation_steps",
    "block_size": "seq_len seq_length sequence_length context context_size ctx max_length",
    "n_layer": "layers depth n_blocks num_hidden_layers",
    "n_head": "heads num_attention_heads",
    "n_embd": "n_embed d_model hidden_size dim width",
    "n_inner": "d_ff intermediate_size",
    "weight_decay": "wd",
    "grad_clip": "clip max_grad_norm gradient_clip_val",
    "warmup_steps": "warmup warmup_iters",
    "decay_steps": "lr_decay_iters",
    "eval_interval": "eval_steps eval_every",
    "eval_batches": "eval_iters",
    "checkpoint_interval": "save_steps save_every save_interval",
    "log_interval": "logging_steps log_every",
    "dtype": "precision mixed_precision amp bf16 fp16",
    "seed": "random_seed",
    "device": "gpu gpus cuda",
    "patience": "early_stopping early_stopping_patience",
    "time_limit": "max_time",
    "checkpoint_activations": "gradient_checkpointing activation_checkpointing",
    "validation": "val val_data eval_data val_file validation_file",
    "validation_fraction": "val_split val_fraction validation_split",
    "data": "dataset data_dir data_path train_data train_file text input file",
    "out": "out_dir output output_dir save_dir log_dir",
    "preset": "model model_name model_type",
    "checkpoint": "model ckpt checkpoint_path run load out_dir init_from model_path",
    "init": "init_from pretrained ckpt checkpoint model_name_or_path",
    "prompt": "start text input",
    "max_new_tokens": "tokens n_tokens length max_length max_tokens n_predict",
    "num_samples": "n samples num_return_sequences",
    "temperature": "temp",
}


def habitual(name: str, ours: Collection[str]) -> str | None:
    """Our name, one of `ours`, for what other packages call `name`; None if there is none."""
    for package in FIELD_NAMES.values():
        if package.aliases.get(name) in ours:
            return package.aliases[name]
    return next((our for our, theirs in HABITS.items() if our in ours and name in theirs.split()), None)


def also_named(**aliases: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A function whose arguments may also be given by other packages' names, as in also_named(x="idx")."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for alias in aliases.keys() & kwargs.keys():
                if aliases[alias] in kwargs:
                    name = function.__name__
                    raise InputError(f"{name}: {alias} and {aliases[alias]} are both given, expected one")
                kwargs[aliases[alias]] = kwargs.pop(alias)
            return function(*args, **kwargs)

        return call

    return decorate


@dataclass(frozen=True)
class Layout:
    """A package's names for our parameters.

    Attributes:
        package: Its name in messages.
        blocks: The prefix of block i: "h" for "h.0.", "h.1.", and so on.
        modules: Our module name -> the package's; several tensors are stacked into one of ours.
        transposed: Whether the matrices of the blocks are (in, out) instead of (out, in).
        kinds: Our name of a norm's parameter -> the package's.
        assumed: Fields of GPTConfig that hold for the package's models and that its files do not state.
    """

    package: str
    blocks: str
    modules: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    kinds: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)

    def names(self, name: str) -> list[str]:
        """The package's names for our parameter `name`, in the order in which they are stacked."""
        module, _, kind = name.rpartition(".")
        block = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            block = f"{self.blocks}.{layer}."
        kind = self.kinds.get(kind, kind) if module.startswith("ln_") else kind
        return [f"{block}{theirs}.{kind}" for theirs in self.modules[module]]

    def is_transposed(self, name: str) -> bool:
        """Whether the package stores our parameter `name` transposed."""
        return (
            self.transposed and name.startswith("blocks.") and name.endswith("weight") and ".ln_" not in name
        )


_GPT2_MODULES = {
    "wte": ("wte",),
    "wpe": ("wpe",),
    "ln_1": ("ln_1",),
    "attn.qkv": ("attn.c_attn",),
    "attn.proj": ("attn.c_proj",),
    "ln_2": ("ln_2",),
    "ffn.up": ("mlp.c_fc",),
    "ffn.down": ("mlp.c_proj",),
    "ln_f": ("ln_f",),
    "lm_head": ("lm_head",),
}
HUGGING_FACE = Layout("Hugging Face", "h", _GPT2_MODULES, transposed=True)
NANOGPT = Layout("nanoGPT", "h", _GPT2_MODULES, assumed={"activation": "gelu"})
STATE_DICT = Layout(
    "fused-gpt", "blocks", {name: (name,) for name in _GPT2_MODULES}
)  # of GPT, without a config
BOOK = Layout(
    "LLMs-from-scratch",
    "trf_blocks",
    {
        "wte": ("tok_emb",),
        "wpe": ("pos_emb",),
        "ln_1": ("norm1",),
        "attn.qkv": ("att.W_query", "att.W_key", "att.W_value"),
        "attn.proj": ("att.out_proj",),
        "ln_2": ("norm2",),
        "ffn.up": ("ff.layers.0",),
        "ffn.down": ("ff.layers.2",),
        "ln_f": ("final_norm",),
        "lm_head": ("out_head",),
    },
    kinds={"weight": "scale", "bias": "shift"},
)
