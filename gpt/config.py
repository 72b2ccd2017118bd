"""The configs of a model and of its training: frozen dataclasses that check their fields.

The fields are flags of the commands and keys of TOML files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from gpt.cli import option
from gpt.errors import InputError, shown, unknown
from gpt.names import translate_fields

LARGEST_SIZE = 2**31 - 1
LARGEST_MODEL = 10**12  # parameters
LARGEST_RATE = 1e15  # of a learning rate, a decay or a norm: a product of two stays finite in float32


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M's.

    Raises:
        InputError: A field is of the wrong type or outside its range, or sizes contradict each other.
    """

    vocab_size: int = option(50257, "number of token ids", low=1)
    block_size: int = option(1024, "longest context, in tokens", low=1)
    n_layer: int = option(12, "transformer blocks", low=1, high=10_000)
    n_head: int = option(12, "attention heads of a block", low=1)
    n_embd: int = option(768, "width of the residual stream", low=1)
    head_dim: int | None = option(None, "width of a head (default: n_embd / n_head)", low=1)
    n_inner: int | None = option(None, "width inside the feed-forward (default: 4 n_embd)", low=1)
    dropout: float = option(
        0.0, "probability of dropping, in embeddings, attention and both branches", low=0, below=1
    )
    bias: bool = option(True, "biases in linear layers and norms")
    qkv_bias: bool | None = option(None, "biases of the query, key and value projections (default: as bias)")
    tie_weights: bool = option(True, "share the token embedding with the head")
    head_bias: bool = option(False, "a bias in the head")
    final_norm: bool = option(True, "a norm before the head")
    activation: str = option("gelu_tanh", "of the feed-forward", choices=("gelu_tanh", "gelu", "relu"))
    norm: str = option(
        "pre", "normalise before each branch (GPT-2), or after its addition (GPT-1)", choices=("pre", "post")
    )
    eps: float = option(1e-5, "added to the variance in norms", low=1e-30, below=1)
    residual: bool = option(True, "add each branch to its input; without, it replaces it")

    def __post_init__(self) -> None:
        _check(self)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise InputError(
                f"GPTConfig: n_embd is {self.n_embd}, expected a multiple of n_head ({self.n_head}), or "
                "head_dim given"
            )
        total = self.parameter_counts()["total"]
        if total > LARGEST_MODEL:
            raise InputError(
                f"GPTConfig: the model has {total:,} parameters, expected at most {LARGEST_MODEL:,}"
            )

    @property
    def head_size(self) -> int:
        """D, the width of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """I, the width inside the feed-forward network."""
        return self.n_inner or 4 * self.n_embd

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The preset `name`, with fields overridden.

        Raises:
            InputError: An unknown preset or field, or an error of the constructor.
        """
        return _preset(cls, _MODEL_PRESETS, name, overrides)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> GPTConfig:
        """The config that a dict describes, by our field names or by those of another package.

        Args:
            d: Fields of this class, which include nanoGPT's names, and names of at most one other package:
                llm-arch-research (embed_dim, max_position_embeddings, …), simple-llm (emb_size, max_seq_len,
                head_size, …), "Build a Large Language Model From Scratch" (emb_dim, context_length,
                drop_rate, …) or Hugging Face's GPT-2 (n_positions, activation_function, resid_pdrop, …).
                Fields that are not given have the defaults of that package.

        Raises:
            InputError: An unknown name, names of different packages, two names that contradict each other,
                a setting that this model does not have, or an error of the constructor.
        """
        return cls(**translate_fields(d, [f.name for f in fields(cls)]))

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, for JSON; `from_dict` reads it back."""
        return asdict(self)

    def parameter_counts(self, shards: int = 1) -> dict[str, int]:
        """The number of parameters of each component, and the "total".

        "block" is one of the n_layer blocks. A tied "head" counts its bias only.

        Args:
            shards: Counts what one of so many ranks holds under FSDP: ceil(rows / shards) rows of each
                parameter. The last ranks may hold fewer, and are padded to this number in every exchange.
        """

        def rows(count: int) -> int:
            return -(-count // shards)

        c, hd, inner = self.n_embd, self.n_head * self.head_size, self.inner_size
        norm = rows(c) * (1 + self.bias)
        attention = rows(3 * hd) * (c + self.has_qkv_bias) + rows(c) * (hd + self.bias)
        ffn = rows(inner) * (c + self.bias) + rows(c) * (inner + self.bias)
        counts = {
            "token_embedding": rows(self.vocab_size) * c,
            "position_embedding": rows(self.block_size) * c,
            "block": 2 * norm + attention + ffn,
            "final_norm": norm * self.final_norm,
            "head": rows(self.vocab_size) * (c * (not self.tie_weights) + self.head_bias),
        }
        counts["total"] = sum(counts.values()) + (self.n_layer - 1) * counts["block"]
        return counts

    def flops_per_token(self) -> int:
        """6 N + 12 n_layer n_head D T for forward and backward pass at full context T = block_size.

        N leaves out the embeddings that are only looked up.

        Source: nanoGPT's `estimate_mfu`, after PaLM (arXiv 2204.02311), appendix B.
        """
        counts = self.parameter_counts()
        looked_up = counts["position_embedding"] + (0 if self.tie_weights else counts["token_embedding"])
        attention = 12 * self.n_layer * self.n_head * self.head_size * self.block_size
        return 6 * (counts["total"] - looked_up) + attention

    def training_bytes(
        self,
        batch_size: int,
        value: int = 4,
        *,
        fused: bool = True,
        checkpoint_activations: bool = False,
        shards: int = 1,
    ) -> int:
        """The memory of a training step with AdamW: the sum of `training_memory`, which takes the same."""
        parts = self.training_memory(
            batch_size, value, fused=fused, checkpoint_activations=checkpoint_activations, shards=shards
        )
        return sum(parts.values())

    def training_memory(
        self,
        batch_size: int,
        value: int = 4,
        *,
        fused: bool = True,
        checkpoint_activations: bool = False,
        shards: int = 1,
    ) -> dict[str, int]:
        """The memory of a training step with AdamW by its parts, from the sizes of what it keeps at once.

        A parameter takes 16 bytes: a float32 weight, its gradient and AdamW's two averages. In half precision
        the matrices are kept in 16 bits too. The loss keeps the float32 gradient of the head's weight, and C
        values per token; with the last norm that is 3 value C bytes. DDP takes no more: the gradients are
        views of its buckets.

        FSDP keeps the 16 bytes of a rank's own shard of each parameter. What is outside the blocks is
        gathered in float32 for the whole step, with a whole gradient: 8 bytes. Of the blocks, two are
        gathered, one of them has a gradient, and one a gradient that is sent in float32:
        3 value + 4 bytes. The head's matrix alone is kept in 16 bits too.

        A block keeps per token what its two norms normalised, their outputs, q, k, v and the output of
        attention, the feed-forward before its activation, and the statistics of norms and softmax:

            value (4 C + 4 n_head D + I) + 16 + 4 n_head   bytes.

        The references keep the inputs of the norms in float32, 4 bytes per value, and the feed-forward after
        its activation, value I bytes; on a CPU they compute attention in float32. With
        `checkpoint_activations`, a block keeps its two inputs, 4 C + value C bytes, and one block at a time
        has the rest. Dropout of the references, `document_start` and a chunk of logits come on top.

        Args:
            batch_size: Sequences of block_size tokens in a micro-batch.
            value: Bytes of a value in the forward pass: 4 in float32, 2 in half precision.
            fused: For the fused ops; False for the references on a CPU.
            checkpoint_activations: As of TrainConfig.
            shards: The ranks that share the parameters under FSDP; 1 has all of them, as under DDP.
        """
        c, hd, inner = self.n_embd, self.n_head * self.head_size, self.inner_size
        block = value * (4 * c + 4 * hd + inner) + 16 + 4 * self.n_head
        last = 3 * value * c
        if not fused:
            last += (4 - value) * c
            block += 2 * (4 - value) * c
            block += value * inner + (4 - value) * 4 * hd + (value < 4) * value * hd
        inputs = (4 + value) * c
        blocks = self.n_layer * inputs + block if checkpoint_activations else self.n_layer * block

        counts, head = self.parameter_counts(), self.vocab_size * c
        own = self.parameter_counts(shards)["total"]
        matrices = (self.n_layer * (4 * c * hd + 2 * c * inner) if shards == 1 else 0) + head
        outside = counts["total"] - self.n_layer * counts["block"]
        gathered = 8 * outside + min(self.n_layer, 2) * value * counts["block"]
        in_flight = gathered + (value + 4) * counts["block"] if shards > 1 else 0
        return {
            "weights": 4 * own,
            "gradients": 4 * own,
            "averages of AdamW": 8 * own,
            "matrices in 16 bits": value * matrices if value < 4 else 0,
            "gathered, in flight": in_flight,
            "gradient of the head": 4 * head,
            "activations": batch_size * self.block_size * (blocks + last),
        }


def _refuse_to_set(config: GPTConfig, name: str, value: object) -> NoReturn:
    """The error of a frozen dataclass, for Hugging Face's Trainer too: it starts by setting `use_cache`."""
    hint = (
        "; Hugging Face's Trainer needs a model of transformers: model.save_pretrained(DIR, "
        "format='huggingface'), GPT2LMHeadModel.from_pretrained(DIR), kernels.integrations.transformers.fuse"
    )
    raise FrozenInstanceError(
        f"GPTConfig: {name} cannot be set, expected a new config{hint if name == 'use_cache' else ''}"
    )


# A frozen dataclass cannot define it in its body.
GPTConfig.__setattr__ = _refuse_to_set  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class TrainConfig:
    """How a GPT is trained.

    Raises:
        InputError: A field is of the wrong type or outside its range, or min_lr is above learning_rate.
    """

    max_steps: int = option(2000, "optimizer steps", low=1)
    batch_size: int = option(12, "sequences of a micro-batch", low=1)
    grad_accum: int = option(1, "micro-batches of a step", low=1)
    optimizer: str = option(
        "adamw", "muon is for the blocks' matrices, with adamw for the rest", choices=("adamw", "muon")
    )
    # A float32 can hold the rate times Muon's factor.
    learning_rate: float = option(1e-3, "highest learning rate", above=0)
    min_lr: float = option(1e-4, "learning rate at the end of the cosine", low=0)
    warmup_steps: int = option(100, "steps of linear warm-up", low=0)
    decay_steps: int | None = option(None, "step at which the cosine ends (default: max_steps)", low=1)
    weight_decay: float = option(0.1, "decay of matrices and embeddings", low=0)
    beta1: float = option(0.9, "decay of the gradient's average", low=0, below=1)
    beta2: float = option(0.99, "decay of the squared gradient's average", low=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 for no limit", low=0)
    dtype: str = option(
        "auto",
        "of autocast; auto takes the device's fastest",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    eval_interval: int = option(250, "steps between evaluations", low=1)
    eval_batches: int = option(20, "batches of an evaluation, for each split", low=1)
    checkpoint_interval: int | None = option(
        None, "steps between checkpoints (default: eval_interval)", low=1
    )
    log_interval: int = option(10, "steps between lines of the log", low=1)
    patience: int | None = option(
        None, "stop after so many evaluations without improvement (default: never)", low=1
    )
    keep_best: bool | None = option(
        None,
        "keep the checkpoint of the lowest validation loss besides the newest ones (default: with patience)",
    )
    time_limit: str | None = option(
        None, "save and end after this time of training, as in 3h, 90m, 45s, 1h30m (default: never)"
    )
    final_eval_batches: int | None = option(
        1000,
        "batches of the final evaluation, spread evenly over the validation split; none reads all of it",
        low=1,
    )
    profile: bool = option(
        False, "write a Chrome trace of three steps into --out, and print the ops that take the longest"
    )
    tensorboard: bool = option(False, "write the log for TensorBoard too, into --out")
    checkpoint_activations: bool = option(
        False,
        "keep the inputs of each block alone, and run it again in the backward pass: less memory, slower",
    )
    check_memory: bool = option(True, "refuse a model that needs more memory than is free")
    peak_tflops: float | None = option(
        None, "dense TFLOP/s of the device in the run's dtype, for MFU (default: a known GPU's)", above=0
    )
    seed: int = option(1337, "of initialisation, batches and dropout", low=0, high=2**63 - 1)
    compile: bool = option(False, "run the model through torch.compile")
    parallel: str = option(
        "ddp",
        "under torchrun: ddp has the whole model in every process; fsdp shards it, and the optimizer's state",
        choices=("ddp", "fsdp"),
    )
    shard_size: int | None = option(
        None, "processes that share one copy of the model with fsdp (default: all of them)", low=1
    )
    no_capture: bool = option(False, "run small steps on a GPU without a CUDA graph")
    device: str | None = option(None, "cpu, cuda, cuda:1, … (default: a GPU if there is one)")

    def __post_init__(self) -> None:
        _check(self)
        if self.time_limit_seconds == 0:
            raise InputError(
                f"TrainConfig: time_limit is {shown(self.time_limit)}, expected a time, as in 1h30m or 45s"
            )
        if self.min_lr > self.learning_rate:
            raise InputError(
                f"TrainConfig: min_lr is {self.min_lr}, expected at most learning_rate ({self.learning_rate})"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """The training settings for the model preset `name`, with fields overridden.

        Raises:
            InputError: An unknown preset or field, or an error of the constructor.
        """
        return _preset(cls, _TRAIN_PRESETS, name, overrides)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, for JSON."""
        return asdict(self)

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is kept: `keep_best`, by default whether there is patience."""
        return self.patience is not None if self.keep_best is None else self.keep_best

    @property
    def time_limit_seconds(self) -> int | None:
        """`time_limit` in seconds; 0 if it is not a time."""
        if self.time_limit is None:
            return None
        parts = _TIME.fullmatch(self.time_limit)
        hours, minutes, seconds = (int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)
        return 3600 * hours + 60 * minutes + seconds


_TIME = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)
_CHARACTERS = {"vocab_size": 65, "bias": False}
_MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "char-cpu": {**_CHARACTERS, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128},
    "char-gpu": {**_CHARACTERS, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2},
}

PRESETS = tuple(_MODEL_PRESETS)

_GPT2_RECIPE = {
    "max_steps": 600_000,
    "batch_size": 12,
    "grad_accum": 40,
    "learning_rate": 6e-4,
    "min_lr": 6e-5,
    "warmup_steps": 2000,
    "beta2": 0.95,
    "eval_interval": 2000,
    "eval_batches": 200,
}
_TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2_RECIPE,
    "gpt2-medium": {**_GPT2_RECIPE, "learning_rate": 3e-4, "min_lr": 3e-5},
    "gpt2-large": {**_GPT2_RECIPE, "learning_rate": 2.5e-4, "min_lr": 2.5e-5},
    "gpt2-xl": {**_GPT2_RECIPE, "learning_rate": 2e-4, "min_lr": 2e-5},
    "char-cpu": {
        "max_steps": 5000,
        "optimizer": "muon",
        "learning_rate": 1e-2,
        "min_lr": 1e-4,
        "eval_interval": 500,
    },
    "char-gpu": {"max_steps": 5000, "batch_size": 64, "eval_batches": 200},
}


def _preset(cls: Any, presets: Mapping[str, dict[str, Any]], name: str, overrides: dict[str, Any]) -> Any:
    if name not in presets:
        raise unknown(f"{cls.__name__}.preset", name, presets)
    return override(cls(**presets[name]), overrides)


Config = TypeVar("Config", GPTConfig, TrainConfig)


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with fields replaced.

    Raises:
        InputError: An unknown field, or an error of the constructor.
    """
    names = [f.name for f in fields(config)]
    for key in overrides:
        if key not in names:
            raise unknown(type(config).__name__, key, names)
    return replace(config, **overrides)


def resolve(config: GPTConfig | Mapping[str, Any] | str | None, overrides: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig that the arguments of `GPT` describe."""
    if config is None:
        return GPTConfig.from_dict(overrides)
    if isinstance(config, str):
        return GPTConfig.preset(config, **overrides)
    return override(config if isinstance(config, GPTConfig) else GPTConfig.from_dict(config), overrides)


def _check(config: GPTConfig | TrainConfig) -> None:
    """Raises InputError for a field that is not of its type or not within the limits of its option."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, types = getattr(config, f.name), get_args(hints[f.name]) or (hints[f.name],)
        if value is None and NoneType in types:
            continue
        wrong = f"{type(config).__name__}: {f.name} is {shown(value)}, expected"

        accepted = (*types, int) if float in types else types
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in types):
            names = [{"NoneType": "None", "float": "a number"}.get(t.__name__, t.__name__) for t in types]
            raise InputError(f"{wrong} {' or '.join(names)}")
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            raise InputError(f"{wrong} one of {', '.join(map(repr, f.metadata['choices']))}")
        if int in types:
            low, high = f.metadata["low"], f.metadata.get("high", LARGEST_SIZE)
            if not low <= value <= high:
                raise InputError(f"{wrong} an integer in [{low}, {high}]")
        if float in types:
            low, above = f.metadata.get("low", -math.inf), f.metadata.get("above", -math.inf)
            below = f.metadata.get("below", LARGEST_RATE)
            if not (low <= value < below and above < value):
                begin = f"[{low}" if "low" in f.metadata else f"({above}"
                raise InputError(f"{wrong} a number in {begin}, {below:g})")
