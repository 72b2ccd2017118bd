"""Weights of nanoGPT and of the book: logits equal to plain-torch models, and errors for wrong files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt import GPT, CharTokenizer, GPTConfig, InputError
from gpt.weights.pretrained import load_pretrained_tokenizer
from tests.gpt.models import CONFIGS, random_model
from tests.gpt.weights.layouts import BookGPT, C, H, L, NanoGPT, T, V, randomise

BOOK_CONFIG = {
    "vocab_size": V,
    "context_length": T,
    "emb_dim": C,
    "n_heads": H,
    "n_layers": L,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def tokens() -> Tensor:
    return torch.randint(V, (2, T))


def nano_checkpoint(model: NanoGPT, prefix: str = "") -> dict[str, Any]:
    """A checkpoint as nanoGPT's train.py saves it."""
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": torch.optim.SGD(model.parameters()).state_dict(),
        "model_args": model.arguments,
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_same_logits(model: GPT, theirs: nn.Module) -> None:
    idx = tokens()
    torch.testing.assert_close(model.eval()(idx), theirs(idx))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "_orig_mod.module.", "module."])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_nanogpt_gives_the_same_logits(bias: bool, prefix: str, tmp_path: Path) -> None:
    """A matrix transposed as in Hugging Face's layout, tanh GELU, a mask read as a bias, or a kept prefix."""
    theirs = randomise(NanoGPT(bias))
    model = GPT.from_pretrained(saved(nano_checkpoint(theirs, prefix), tmp_path / "ckpt.pt"))
    assert model.config == GPTConfig(**theirs.arguments, qkv_bias=bias, activation="gelu")
    assert_same_logits(model, theirs)


def test_a_folder_is_searched(tmp_path: Path) -> None:
    """An --out folder of nanoGPT in which ckpt.pt is not found."""
    theirs = randomise(NanoGPT())
    saved(nano_checkpoint(theirs), tmp_path / "ckpt.pt")
    saved({}, tmp_path / "other.pt")
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("qkv_bias", [False, True], ids=["plain", "qkv-bias"])
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model_state_dict": s, "optimizer_state_dict": {}}], ids=["bare", "dict"]
)
def test_the_book_gives_the_same_logits(qkv_bias: bool, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """Query, key and value in another order, scale and shift swapped, or an untied head that is tied."""
    theirs = randomise(BookGPT(qkv_bias))
    path = saved(wrap(theirs.state_dict()), tmp_path / "model.pth")
    model = GPT.from_pretrained(path, {"n_heads": H})
    assert not model.config.tie_weights
    assert_same_logits(model, theirs)


@pytest.mark.parametrize(
    "config",
    [BOOK_CONFIG, GPTConfig.from_dict(BOOK_CONFIG), {"n_head": H}, {"num_heads": H}],
    ids=["dict", "GPTConfig", "ours", "another-package"],
)
def test_the_book_accepts_its_config(config: Any, tmp_path: Path) -> None:
    """A refused config dict of the book, or dropout and heads that are not taken from it."""
    theirs = randomise(BookGPT())
    model = GPT.from_pretrained(saved(theirs.state_dict(), tmp_path / "model.pth"), config)
    assert model.config.n_head == H
    assert model.config.dropout == (0.1 if config is BOOK_CONFIG or isinstance(config, GPTConfig) else 0.0)
    assert_same_logits(model, theirs)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    """A tied head loaded as a second matrix, which training would change separately."""
    theirs = randomise(BookGPT(tied=True))
    model = GPT.from_pretrained(saved(theirs.state_dict(), tmp_path / "model.pth"), {"n_head": H})
    assert model.config.tie_weights
    assert_same_logits(model, theirs)


def test_an_untied_nanogpt_head_stays_untied(tmp_path: Path) -> None:
    """An untied head that is dropped because nanoGPT's is usually tied."""
    theirs = NanoGPT()
    theirs.lm_head.weight = nn.Parameter(torch.empty(V, C))
    model = GPT.from_pretrained(saved(nano_checkpoint(randomise(theirs)), tmp_path / "ckpt.pt"))
    assert not model.config.tie_weights
    assert_same_logits(model, theirs)


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    """Half-precision weights that are loaded in float32."""
    theirs = randomise(NanoGPT()).bfloat16()
    model = GPT.from_pretrained(saved(nano_checkpoint(theirs), tmp_path / "ckpt.pt"))
    assert model.wte.weight.dtype == torch.bfloat16
    assert torch.equal(model.wte.weight, theirs.lm_head.weight)


def test_own_checkpoints_are_recognised(tmp_path: Path) -> None:
    """A checkpoint of this package that is read as another layout, or a config that is ignored."""
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C, norm="post"))
    tokenizer = CharTokenizer.train("abc")
    model.save_pretrained(tmp_path / "own", tokenizer=tokenizer)
    loaded = GPT.from_pretrained(tmp_path / "own", use_triton=False)
    idx = tokens()
    assert torch.equal(loaded(idx), model(idx))
    assert loaded.use_triton is False
    assert load_pretrained_tokenizer(tmp_path / "own").to_json() == tokenizer.to_json()
    assert GPT.from_pretrained(tmp_path / "own", {"n_heads": H}).config == model.config
    for wrong, words in (
        ({"n_head": 1}, "n_head is 1, expected 3 as in"),
        (GPTConfig(), "is 50257, expected 53"),
    ):
        with pytest.raises(InputError, match=words):
            GPT.from_pretrained(tmp_path / "own", wrong)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_own_state_dict_needs_its_config_alone(name: str, tmp_path: Path) -> None:
    """torch.save(model.state_dict()) that is of no known layout, or loads into another model."""
    model = random_model(**CONFIGS[name])
    path = saved(model.state_dict(), tmp_path / "model.pt")
    for config in (model.config, model.config.to_dict()):
        loaded = GPT.from_pretrained(path, config)
        assert loaded.config == model.config
        idx = torch.randint(37, (1, 5))
        assert torch.equal(loaded(idx), model(idx))
    with pytest.raises(InputError, match=r"\(fused-gpt's layout\) does not state the number of heads"):
        GPT.from_pretrained(path)


def test_a_config_keeps_the_dropout_of_the_file(tmp_path: Path) -> None:
    """A file whose dropout is lost because the config states something else."""
    path = saved(nano_checkpoint(NanoGPT()), tmp_path / "ckpt.pt")
    assert GPT.from_pretrained(path, {"n_head": H}).config.dropout == 0.2
    assert GPT.from_pretrained(path, {"dropout": 0.5}).config.dropout == 0.5


def test_loading_keeps_the_random_state(tmp_path: Path) -> None:
    """A load that consumes random numbers, or that ignores use_triton."""
    path = saved(nano_checkpoint(NanoGPT()), tmp_path / "ckpt.pt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert GPT.from_pretrained(path, use_triton=False).use_triton is False
    assert torch.equal(torch.rand(3), expected)


def nano_with(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    checkpoint = nano_checkpoint(NanoGPT())
    change(checkpoint)
    return checkpoint


def in_model(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    return nano_with(lambda checkpoint: change(checkpoint["model"]))


QKV = "transformer.h.1.attn.c_attn.weight"
NANO = "(nanoGPT's layout) "
WRONG: dict[str, tuple[Any, Any, str]] = {
    "no-heads": (
        BookGPT().state_dict(),
        None,
        "(LLMs-from-scratch's layout) does not state the number of heads, expected config={'n_head': "
        "...}, a divisor of 24 (gpt.train: --n_head; gpt.sample, gpt.eval: a folder that save_pretrained",
    ),
    "no-heads-in-config": (
        BookGPT().state_dict(),
        {"drop_rate": 0.1},
        "does not state the number of heads",
    ),
    "no-model-args": (
        nano_with(lambda c: c.pop("model_args")),
        None,
        NANO + "does not state the number of heads",
    ),
    "heads-against-file": (nano_with(id), {"num_heads": 4}, "num_heads is 4, expected 3 as n_head"),
    "our-heads-against-file": (
        nano_with(id),
        {"n_head": 4},
        NANO + "states that n_head is 3, expected the same in config= (4)",
    ),
    "config-against-shape": (
        BookGPT().state_dict(),
        {**BOOK_CONFIG, "emb_dim": 48},
        "emb_dim is 48, expected 24 as n_embd",
    ),
    "whole-config-against-shape": (
        BookGPT().state_dict(),
        GPTConfig.from_dict({**BOOK_CONFIG, "emb_dim": 48}),
        "has tok_emb.weight of shape (53, 24), expected (53, 48)",
    ),
    "config-of-a-tied-head": (
        BookGPT().state_dict(),
        GPTConfig.from_dict({**BOOK_CONFIG, "tie_weights": True}),
        "has out_head.weight, which a model of its config does not have",
    ),
    "config-type": (nano_with(id), "gpt2", "config is str, expected a GPTConfig, a dict or None"),
    "layers-against-file": (
        nano_with(lambda c: c["model_args"].update(n_layer=9999)),
        None,
        NANO + "has 2 blocks, expected 9999",
    ),
    "vocabulary-against-file": (
        nano_with(lambda c: c["model_args"].update(vocab_size=2_000_000_000)),
        None,
        NANO + "has wte.weight of shape (53, 24), expected (2000000000, 24)",
    ),
    "missing": (in_model(lambda m: m.pop(QKV)), None, NANO + "lacks h.1.attn.c_attn.weight"),
    "missing-embedding": (
        in_model(lambda m: m.pop("transformer.wpe.weight")),
        None,
        NANO + "lacks wpe.weight",
    ),
    "extra": (
        in_model(lambda m: m.update(score=torch.zeros(1))),
        None,
        NANO + "has score, which a model of its config does not have",
    ),
    "shape": (
        in_model(lambda m: m.update({QKV: torch.zeros(3 * C, C + 1)})),
        None,
        NANO + "has h.1.attn.c_attn.weight of shape (72, 25), expected (72, 24)",
    ),
    "rank": (
        in_model(lambda m: m.update({"transformer.wpe.weight": torch.zeros(3)})),
        None,
        NANO + "has wpe.weight of shape (3,), expected two dimensions",
    ),
    "integers": (
        in_model(lambda m: m.update({QKV: torch.zeros(3 * C, C).char()})),
        None,
        f"{QKV} is int8 strided, expected",
    ),
    "sparse": (
        in_model(lambda m: m.update({QKV: torch.zeros(2, 2).to_sparse()})),
        None,
        "needs torch._utils._rebuild_sparse_tensor",
    ),
    "twice": (in_model(lambda m: m.update({"wte.weight": torch.zeros(V, C)})), None, "has wte.weight twice"),
    "unknown-argument": (
        nano_with(lambda c: c["model_args"].update(n_expert=2)),
        None,
        "'n_expert' is unknown",
    ),
    "another-model": (
        {"encoder.weight": torch.zeros(2)},
        None,
        "has no known layout (encoder.weight, ...), expected",
    ),
    "no-tensors": ({"model": {"a": 1}}, None, "holds 'a': int, expected a state_dict of tensors"),
    "a-tensor": (torch.zeros(3), None, "holds a Tensor, expected a state_dict of tensors"),
    "nothing": ({}, None, "holds a dict, expected a state_dict of tensors"),
}


@pytest.mark.parametrize(("content", "config", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_in_one_line(content: Any, config: Any, message: str, tmp_path: Path) -> None:
    """A wrong file that loads, or that ends in a traceback of torch."""
    path = saved(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError) as raised:
        GPT.from_pretrained(path, config)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
