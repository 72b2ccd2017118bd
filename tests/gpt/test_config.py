"""Configs: the names of each package, the presets, the parameter counts, and the checks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gpt import GPTConfig, InputError, TrainConfig
from tests.gpt.models import BOOK

PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "char-cpu", "char-gpu")
HUGGING_FACE = {  # the config.json of a saved GPT-2
    "_name_or_path": "gpt2",
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_inner": None,
    "n_layer": 12,
    "n_positions": 1024,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.1,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "torch_dtype": "float32",
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": 50257,
}
SMALL = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
PLAIN_HEAD = {"tie_weights": False, "head_bias": True, "final_norm": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param(
            {**SMALL, "dropout": 0.2, "bias": False}, {**SMALL, "dropout": 0.2, "bias": False}, id="nanoGPT"
        ),
        pytest.param(
            {
                "vocab_size": 65,
                "embed_dim": 64,
                "num_heads": 4,
                "num_layers": 2,
                "max_position_embeddings": 32,
                "dropout": 0.1,
            },
            {**SMALL, "dropout": 0.1, **PLAIN_HEAD},
            id="llm-arch-research",
        ),
        pytest.param(
            {
                "vocab_size": 65,
                "max_seq_len": 32,
                "emb_size": 64,
                "num_heads": 4,
                "head_size": 8,
                "num_layers": 2,
                "dropout": 0,
            },
            {**SMALL, "head_dim": 8, **PLAIN_HEAD},
            id="simple-llm",
        ),
        pytest.param({"emb_size": 640}, {"n_embd": 640, "n_head": 10, **PLAIN_HEAD}, id="simple-llm-heads"),
        pytest.param({"emb_size": 32}, {"n_embd": 32, "n_head": 1, **PLAIN_HEAD}, id="simple-llm-one-head"),
        pytest.param(BOOK, {"dropout": 0.1, "qkv_bias": False, "tie_weights": False}, id="LLMs-from-scratch"),
        pytest.param(
            {"emb_dim": 96},
            {"n_embd": 96, "qkv_bias": False, "tie_weights": False},
            id="LLMs-from-scratch-short",
        ),
        pytest.param(HUGGING_FACE, {"dropout": 0.1}, id="Hugging-Face"),
        pytest.param(
            {
                "n_positions": 32,
                "activation_function": "gelu",
                "layer_norm_epsilon": 1e-6,
                "tie_word_embeddings": False,
            },
            {"block_size": 32, "activation": "gelu", "eps": 1e-6, "tie_weights": False, "dropout": 0.1},
            id="Hugging-Face-short",
        ),
        pytest.param({"model_type": "gpt2", "dropout": 0.3}, {"dropout": 0.3}, id="Hugging-Face-with-ours"),
        pytest.param(
            {"embed_dim": 64, "num_heads": 4, "norm": "post", "activation": "relu", "head_bias": False},
            {
                "n_embd": 64,
                "n_head": 4,
                "norm": "post",
                "activation": "relu",
                **PLAIN_HEAD,
                "head_bias": False,
            },
            id="our-names-over-a-package",
        ),
    ],
)
def test_names_of_other_packages(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """A name that sets another field, or a package's defaults that are lost or override values."""
    assert GPTConfig.from_dict(given) == GPTConfig(**expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_embed": 64}, "'n_embed' is unknown, the nearest valid one is 'n_embd'"),
        ({"emb_dimm": 64}, "'emb_dimm' is unknown, the nearest valid one is 'emb_dim'"),
        ({7: 64}, "7 is unknown"),
        (
            {"emb_dim": 64, "num_heads": 4},
            "emb_dim (LLMs-from-scratch), num_heads (llm-arch-research or simple-llm)",
        ),
        ({"n_embd": 64, "emb_dim": 32}, "both mean n_embd"),
        ({"n_positions": 64, "n_ctx": 32}, "both mean block_size"),
        ({"resid_pdrop": 0.0}, "embd_pdrop is 0.1, expected 0.0 as resid_pdrop (both mean dropout)"),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt2'"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True, expected False",
        ),
        (
            {"activation_function": "silu"},
            "activation is 'silu', expected one of 'gelu_tanh', 'gelu', 'relu'",
        ),
        ([("n_embd", 64)], "list, expected a dict"),
    ],
)
def test_wrong_names_are_refused(given: Any, message: str) -> None:
    """A key that is silently ignored, or one of two contradicting names that silently wins."""
    with pytest.raises(InputError) as caught:
        GPTConfig.from_dict(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd is 100, expected a multiple of n_head (3), or head_dim given"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648, expected an integer in [1, 2147483647]"),
        (
            {"block_size": 2**30, "n_embd": 2**14, "n_head": 1},
            "parameters, expected at most 1,000,000,000,000",
        ),
        ({"n_layer": 10_001}, "n_layer is 10001"),
        *[
            ({name: 0}, f"{name} is 0, expected an integer in [1,")
            for name in ("vocab_size", "block_size", "n_layer", "n_head")
        ],
        *[
            ({name: -4}, f"{name} is -4, expected an integer in [1,")
            for name in ("n_embd", "head_dim", "n_inner")
        ],
        ({"n_head": True}, "n_head is True, expected int"),
        ({"n_head": 2.0}, "n_head is 2.0, expected int"),
        ({"n_embd": None}, "n_embd is None, expected int"),
        ({"head_dim": "64"}, "head_dim is '64', expected int or None"),
        ({"dropout": 1}, "dropout is 1, expected a number in [0, 1)"),
        ({"dropout": -0.1}, "dropout is -0.1, expected a number in [0, 1)"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": False}, "dropout is False, expected a number"),
        ({"bias": 1}, "bias is 1, expected bool"),
        ({"qkv_bias": "no"}, "qkv_bias is 'no', expected bool or None"),
        ({"activation": "swish"}, "activation is 'swish', expected one of 'gelu_tanh', 'gelu', 'relu'"),
        ({"norm": None}, "norm is None, expected str"),
        ({"eps": 0}, "eps is 0, expected a number in [1e-30, 1)"),
    ],
)
def test_wrong_model_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """A size, type or value that fails deep inside torch, or not at all."""
    with pytest.raises(InputError) as caught:
        GPTConfig(**fields)
    assert str(caught.value).startswith("GPTConfig: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number in (0, 1e+15)"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": 1e-5}, "min_lr is 0.0001, expected at most learning_rate (1e-05)"),
        ({"beta2": 1.0}, "beta2 is 1.0, expected a number in [0, 1)"),
        ({"grad_clip": -1}, "grad_clip is -1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected one of 'adamw', 'muon'"),
        ({"dtype": "fp16"}, "dtype is 'fp16'"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"compile": 1}, "compile is 1, expected bool"),
        ({"device": 0}, "device is 0, expected str or None"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_wrong_training_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """A wrong training setting that is noticed hours later."""
    with pytest.raises(InputError) as caught:
        TrainConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.44),
        ("gpt2-medium", 354.82),
        ("gpt2-large", 774.03),
        ("gpt2-xl", 1557.61),
        ("char-cpu", 0.80),
        ("char-gpu", 10.75),
    ],
)
def test_presets(name: str, millions: float) -> None:
    """A preset of another size than the model of its name, or without training settings."""
    assert round(GPTConfig.preset(name).parameter_counts()["total"] / 1e6, 2) == millions
    assert GPTConfig.preset(name, dropout=0.5) == dataclasses.replace(GPTConfig.preset(name), dropout=0.5)
    assert TrainConfig.preset(name, max_steps=7).max_steps == 7


@pytest.mark.parametrize("cls", [GPTConfig, TrainConfig])
def test_unknown_presets_and_fields(cls: type[GPTConfig] | type[TrainConfig]) -> None:
    """A misspelt preset or override that is ignored."""
    with pytest.raises(InputError, match=r"'gpt-2' is unknown, the nearest valid one is 'gpt2'"):
        cls.preset("gpt-2")
    with pytest.raises(InputError, match=r"is unknown, the nearest valid one is"):
        cls.preset("gpt2", emb_dim=64)


def test_parameters_by_component() -> None:
    """A component that is counted wrongly; the figures are those of the book's chapter 4."""
    counts = GPTConfig.from_dict(BOOK).parameter_counts()
    assert counts["token_embedding"] + counts["position_embedding"] == 39_383_808
    assert (counts["block"], counts["final_norm"], counts["head"]) == (7_085_568, 1_536, 38_597_376)
    assert counts["total"] == 163_009_536
    assert round(counts["total"] * 4 / 2**20, 2) == 621.83
    assert GPTConfig.from_dict({**BOOK, "tie_weights": True}).parameter_counts()["total"] == 124_412_160


@pytest.mark.parametrize(
    "config", [GPTConfig(), GPTConfig.preset("char-gpu", head_dim=40, qkv_bias=True, n_inner=7, norm="post")]
)
def test_a_config_survives_json(config: GPTConfig) -> None:
    """A checkpoint's config.json that describes another model than the one saved."""
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("cls", [GPTConfig, TrainConfig])
def test_every_field_has_a_help_text(cls: type[GPTConfig] | type[TrainConfig]) -> None:
    """A flag without a text in --help, or a config that can change after its check."""
    for field in dataclasses.fields(cls):
        assert field.metadata["help"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().seed = 1  # type: ignore[misc, union-attr]


def test_a_long_value_is_cut_in_the_message() -> None:
    """A message of thousands of characters, because a field was given a list."""
    with pytest.raises(InputError) as caught:
        GPTConfig(n_layer=[0] * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400
    assert str(caught.value).endswith("..., expected int")
