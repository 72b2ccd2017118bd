"""GPT-2 of transformers, loaded and exported: the same logits, and the same tokens from `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt import GPT, BPETokenizer, CharTokenizer, GPTConfig, InputError
from gpt.weights.pretrained import load_pretrained_tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'fused-gpt[test]'"
)

V, T = 61, 16
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tie_word_embeddings": False},
    "narrow": {"n_inner": 40, "n_head": 2},
    "deep": {"n_layer": 4, "n_embd": 24, "n_head": 3},
    "exact-gelu": {"activation_function": "gelu"},
    "relu-eps": {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    "no-dropout": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
each_shape = pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
TEXT = "the cat sat on the mat, that the cat saw\n" * 5


def gpt2(**settings: Any) -> Any:
    """A GPT-2 of transformers with random parameters, biases and norms included."""
    shape = {"vocab_size": V, "n_positions": T, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **ends, **settings})).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("ln_" in name and name.endswith("weight")), 0.3)
    return model


def tokens(batch: int = 3, length: int = T) -> Tensor:
    return torch.randint(V, (batch, length))


def assert_same_logits(ours: GPT, theirs: Any, **tolerance: float) -> None:
    idx = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(idx), theirs.eval()(idx).logits, **tolerance)


@each_shape
def test_loading_gives_the_same_logits(settings: dict[str, Any], tmp_path: Path) -> None:
    """A matrix left transposed, or a wrong activation, eps or tied head."""
    theirs = gpt2(**settings)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs)
    assert ours.config.tie_weights == theirs.config.tie_word_embeddings
    assert ours.config.dropout == theirs.config.resid_pdrop


def test_sharded_weights_load(tmp_path: Path) -> None:
    """A shard that is left out when the weights are in several files."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_pickled_weights_load(sharded: bool, tmp_path: Path) -> None:
    """A refused pytorch_model.bin, the only format of older models on the hub."""
    theirs = gpt2()
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()
    if sharded:
        places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in state if places[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}), "utf-8")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_model_without_a_head_loads(tmp_path: Path) -> None:
    """Names without the prefix "transformer.", as in the hub's gpt2, or saved masks, that are refused."""
    from safetensors.torch import load_file, save_file

    theirs = gpt2()
    theirs.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_bare_file_needs_the_heads(tmp_path: Path) -> None:
    """A guessed number of heads for weights without a config.json."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"\(Hugging Face's layout\) does not state the number of heads"):
        GPT.from_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path / "model.safetensors", {"n_head": 4}), theirs)


def test_a_separate_head_loads(tmp_path: Path) -> None:
    """A separate head dropped because config.json says it is tied; transformers keeps it."""
    from safetensors.torch import load_file, save_file

    gpt2().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": torch.randn(V, 32)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert_same_logits(GPT.from_pretrained(tmp_path), transformers.GPT2LMHeadModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["dropout", "drop_rate", "resid_pdrop"])
def test_dropout_can_be_given(name: str, tmp_path: Path) -> None:
    """A given dropout that the dropout of pre-training overrides."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    rates = (
        dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.3)
        if name == "resid_pdrop"
        else {name: 0.3}
    )
    ours = GPT.from_pretrained(tmp_path, rates)
    assert ours.config.dropout == 0.3
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True, expected False",
        ),
        ({"activation_function": "silu"}, "activation is 'silu', expected one of"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo', expected 'gpt2'"),
        ({"n_embd": 64}, "has wte.weight of shape (61, 32), expected (61, 64)"),
        ({"n_layer": 3}, "has 2 blocks, expected 3 (n_layer)"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648, expected an integer in"),
        ({"n_inner": 64}, "has h.0.mlp.c_fc.weight of shape (32, 128), expected (32, 64)"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """An unsupported setting that changes the logits, or sizes that contradict the tensors."""
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    with pytest.raises(InputError) as raised:
        GPT.from_pretrained(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_settings_without_effect_are_ignored(tmp_path: Path) -> None:
    """A config.json that is refused for a key that does not change the model."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    extra = {
        "_num_labels": 1,
        "n_ctx": 1024,
        "prefix": None,
        "task_specific_params": {"text-generation": {"max_length": 50}},
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **extra}), "utf-8")
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


OURS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no-bias": {"bias": False},
    "qkv-bias-alone": {"bias": False, "qkv_bias": True},
    "untied-no-qkv-bias": {"tie_weights": False, "qkv_bias": False},
    "exact-gelu": {"activation": "gelu", "n_inner": 40, "dropout": 0.25},
    "relu-eps": {"activation": "relu", "eps": 0.1},
}


def random_model(**fields: Any) -> GPT:
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=4, n_embd=32), **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("ln_" in name and name.endswith("weight")), 0.3)
    return model


@pytest.mark.parametrize("fields", OURS.values(), ids=OURS)
def test_an_export_loads_in_both_packages(fields: dict[str, Any], tmp_path: Path) -> None:
    """An export with other logits in transformers, or one that loads here as another model."""
    ours = random_model(**fields)
    ours.save_pretrained(tmp_path / "out", format="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert theirs.config.tie_word_embeddings == ours.config.tie_weights
    assert (
        theirs.config.resid_pdrop
        == theirs.config.attn_pdrop
        == theirs.config.embd_pdrop
        == ours.config.dropout
    )
    assert_same_logits(ours, theirs)
    back = GPT.from_pretrained(tmp_path / "out")
    assert_same_logits(back, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(GPT.from_pretrained(tmp_path / "theirs"), theirs)
    if not fields:
        assert back.config == ours.config


def test_an_export_keeps_the_dtype(tmp_path: Path) -> None:
    """bfloat16 weights that are exported in float32."""
    ours = random_model(dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "out", format="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, ours.wte.weight)


def test_an_export_loads_in_transformers_4(tmp_path: Path) -> None:
    """A file without the metadata "format": "pt", which transformers 4 requires."""
    from safetensors import safe_open

    random_model().save_pretrained(tmp_path / "out", format="huggingface")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "post"}, "norm is 'post', expected 'pre' for a GPT-2 of transformers"),
        ({"final_norm": False}, "final_norm is False, expected True"),
        ({"residual": False}, "residual is False, expected True"),
        ({"head_bias": True}, "head_bias is True, expected False"),
        ({"head_dim": 16}, "head_dim is 16, expected n_embd / n_head"),
    ],
)
def test_an_unsupported_model_is_not_exported(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """An export that loads in transformers and computes something else."""
    with pytest.raises(InputError, match=message):
        random_model(**fields).save_pretrained(tmp_path / "out", format="huggingface")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_only_an_export(tmp_path: Path) -> None:
    """An export that replaces the user's other files, or that cannot be repeated."""
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(
        InputError,
        match=r"holds other files \(notes.txt\), expected a new or empty folder",
    ):
        random_model().save_pretrained(tmp_path, format="huggingface")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    for _ in range(2):
        random_model().save_pretrained(tmp_path / "out", format="huggingface")
    with pytest.raises(InputError, match="format: 'hf' is unknown, expected one of fused-gpt, huggingface"):
        random_model().save_pretrained(tmp_path / "other", format="hf")


TOKENIZERS = {"char": CharTokenizer.train(TEXT + "éß☃"), "bpe": BPETokenizer.train(TEXT, 280)}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_tokenizer_is_exported(tokenizer: Any, tmp_path: Path) -> None:
    """Other ids in transformers, text that is not decoded exactly, or a tokenizer that does not load here."""
    ours = random_model(vocab_size=300)
    ours.save_pretrained(tmp_path / "out", format="huggingface", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "that cat\nsat" if isinstance(tokenizer, BPETokenizer) else "é cat\nß☃"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert load_pretrained_tokenizer(tmp_path / "out").to_json() == tokenizer.to_json()
    end = tokenizer.vocab_size - 1 if isinstance(tokenizer, BPETokenizer) else None
    assert theirs.eos_token_id == end
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == end


def test_a_merges_file_loads_as_the_tokenizer(tmp_path: Path) -> None:
    """A refused merges.txt, the only file of older models, or a traceback where there is none."""
    with pytest.raises(
        InputError, match=r"holds no tokenizer, expected tokenizer\.json or merges\.txt beside the weights"
    ):
        load_pretrained_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", "utf-8")
    assert load_pretrained_tokenizer(tmp_path).encode("the") == [257]


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """An exported tokenizer with ids that have no embedding."""
    with pytest.raises(InputError, match=r"the tokenizer has 2[0-9]+ ids, expected at most 61"):
        random_model().save_pretrained(tmp_path / "out", format="huggingface", tokenizer=TOKENIZERS["bpe"])


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy-penalty": {"do_sample": False, "repetition_penalty": 1.8},
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4, "temperature": 2.0},
    "top-p": {"top_p": 0.7, "temperature": 2.0},
    "min-p": {"min_p": 0.2, "temperature": 2.0},
    "penalty": {"repetition_penalty": 1.8},
    "together": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("padded", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_generation_equals_transformers(settings: dict[str, Any], padded: bool, tmp_path: Path) -> None:
    """A logits processor of another order or meaning, positions that count padding, or other sampling."""
    theirs = gpt2(n_positions=40)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx, mask = tokens(4, 9), torch.ones(4, 9, dtype=torch.long)
    idx[:, 6] = 0  # the padding id occurs in every prompt, since only transformers penalises padding
    if padded:
        for row, begin in enumerate((0, 5, 2, 6)):
            mask[row, :begin], idx[row, :begin] = 0, 0
    torch.manual_seed(3)
    off = {"top_k": 0, "pad_token_id": 0}
    expected = theirs.generate(
        idx, attention_mask=mask, max_new_tokens=20, **{"do_sample": True, **off, **settings}
    )
    torch.manual_seed(3)
    actual = ours.generate(idx, 20, attention_mask=mask, **settings)
    assert torch.equal(actual, expected)


def test_stop_tokens_equal_transformers(tmp_path: Path) -> None:
    """A row that continues after its stop token, or an output that is wider than transformers'."""
    theirs = gpt2(n_positions=60)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = tokens(2, 4)
    free = ours.generate(idx, 40, do_sample=False)[:, 4:]
    stop = next(token for token in free[0].tolist() if token in free[1])
    expected = theirs.generate(idx, max_new_tokens=40, do_sample=False, eos_token_id=stop, pad_token_id=stop)
    assert torch.equal(ours.generate(idx, 40, do_sample=False, stop_tokens=stop), expected)
    assert expected.shape[1] < 44
