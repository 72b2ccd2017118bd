"""The kernels in transformers models, compared with the attention, norms, FFN and loss of transformers."""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'fused-gpt[test]'"
)
fused = importlib.import_module("kernels.integrations.transformers")

ROOT = Path(__file__).parents[2]
V, T = 61, 12
CACHE = "past_key_values"
if "cache" in inspect.signature(transformers.GPT2LMHeadModel.forward).parameters:
    CACHE = "cache"  # from transformers 5.24 on


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test receives the warning that is given only once."""
    monkeypatch.setattr(fused, "_warned", set())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The key_start of each call of causal_attention."""
    seen: list[Tensor | None] = []
    op = kernels.causal_attention

    def counted(*args: Any, **settings: Any) -> Tensor:
        seen.append(settings["key_start"])
        return op(*args, **settings)

    monkeypatch.setattr(kernels, "causal_attention", counted)
    return seen


def gpt2(**settings: Any) -> Any:
    shape = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return prepared(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**shape, **NO_ENDS, **settings}))


def llama(**settings: Any) -> Any:
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return prepared(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**shape, **heads, **NO_ENDS, **settings})
    )


def mistral() -> Any:
    shape = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "sliding_window": 4,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return prepared(
        transformers.MistralForCausalLM, transformers.MistralConfig(**{**shape, **heads, **NO_ENDS})
    )


NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MODELS = {"gpt2": gpt2, "llama-grouped": llama, "mistral-window": mistral}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def prepared(kind: Any, config: Any) -> Any:
    """A model with large weights, so that attention changes its logits."""
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def left_padding() -> Tensor:
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return mask


@torch.no_grad()
def logits(model: Any, implementation: str, idx: Tensor, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model(idx, **inputs).logits


@each_model
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padding"])
def test_logits_equal_sdpa(make: Any, padded: bool, calls: list[Tensor | None]) -> None:
    """A mask, a scale, grouped heads or a window that does not reach the kernel."""
    model, idx = make(), torch.randint(V, (3, T))
    mask = left_padding() if padded else torch.ones(3, T, dtype=torch.long)
    expected = logits(model, "sdpa", idx, attention_mask=mask)
    actual = logits(model, "fused_gpt", idx, attention_mask=mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    assert len(calls) == 2


def test_padding_becomes_one_start_for_each_row(calls: list[Tensor | None]) -> None:
    """Left padding passed as one start per query instead of one per row, which runs slower kernels."""
    logits(gpt2(), "fused_gpt", torch.randint(V, (3, T)), attention_mask=left_padding())
    assert all(
        start is not None and start.tolist() == [4, 0, 1] and start.dtype == torch.int32 for start in calls
    )


def test_packed_documents_become_a_start_for_each_query(calls: list[Tensor | None]) -> None:
    """Packed documents that attend to each other, or that run on the fallback."""
    model, idx = gpt2(), torch.randint(V, (1, T))
    position_ids = torch.cat([torch.arange(5), torch.arange(T - 5)])[None]
    packed = logits(model, "fused_gpt", idx, position_ids=position_ids, use_cache=False)
    assert [start.tolist() for start in calls if start is not None] == [[[0] * 5 + [5] * (T - 5)]] * 2
    torch.testing.assert_close(packed[:, 5:], logits(model, "sdpa", idx[:, 5:]))


@each_model
def test_generation_equals_sdpa(make: Any, calls: list[Tensor | None]) -> None:
    """A query that gets the position of the first key, not of the last, when keys come from the cache."""
    model, idx, mask = make(), torch.randint(V, (3, T)), left_padding()
    settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("sdpa")
    expected = model.generate(idx, **settings)
    model.set_attn_implementation("fused_gpt")
    assert torch.equal(model.generate(idx, **settings), expected)
    assert len(calls) == 2 * 9


def test_a_prompt_in_two_parts_gives_the_same_logits(calls: list[Tensor | None]) -> None:
    """Queries of the second part that get the positions of the first tokens."""
    model, idx = gpt2(), torch.randint(V, (2, T))
    whole = logits(model, "sdpa", idx)
    model.set_attn_implementation("fused_gpt")
    with torch.no_grad():
        first = model(idx[:, :5], use_cache=True)
        rest = model(idx[:, 5:], **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    assert len(calls) == 4


def other_masks() -> dict[str, dict[str, Any]]:
    right = torch.ones(2, T, dtype=torch.long)
    right[0, -3:] = 0
    holes = torch.rand(2, 1, T, T) < 0.7
    holes |= torch.eye(T, dtype=torch.bool)
    bias = torch.where(holes, torch.randn(2, 1, T, T), torch.finfo(torch.float32).min)
    return {
        "right-padding": {"attention_mask": right},
        "bool": {"attention_mask": holes},
        "bias": {"attention_mask": bias},
    }


@pytest.mark.parametrize("name", other_masks())
def test_other_masks_fall_back_with_one_warning(name: str, calls: list[Tensor | None]) -> None:
    """A mask with gaps or a bias that is computed as if it were causal, or a fallback without a warning."""
    model, idx, inputs = gpt2(), torch.randint(V, (2, T)), other_masks()[name]
    with pytest.warns(
        kernels.FallbackWarning, match="the mask is not causal from a first key on; sdpa runs instead"
    ) as caught:
        actual = logits(model, "fused_gpt", idx, **inputs)
    assert len(caught) == 1
    logits(model, "fused_gpt", idx, **inputs)
    assert torch.equal(actual, logits(model, "sdpa", idx, **inputs))
    assert calls == []


def test_a_static_cache_falls_back() -> None:
    """A preallocated cache that is read past its last key."""
    model, idx = gpt2(), torch.randint(V, (2, T))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    results = []
    for implementation in ("sdpa", "fused_gpt"):
        model.set_attn_implementation(implementation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(model.generate(idx, disable_compile=True, **settings))
    assert torch.equal(*results)


def test_attention_that_is_not_causal_falls_back(calls: list[Tensor | None]) -> None:
    """Cross-attention that is masked causally, and so ignores part of the encoder's states."""
    model, idx, states = gpt2(add_cross_attention=True), torch.randint(V, (2, T)), torch.randn(2, 5, 32)
    with pytest.warns(kernels.FallbackWarning, match="the layer is not causal"):
        actual = logits(model, "fused_gpt", idx, encoder_hidden_states=states)
    torch.testing.assert_close(actual, logits(model, "sdpa", idx, encoder_hidden_states=states))
    assert len(calls) == 2


def attend(implementation: Any, q: Tensor, k: Tensor, **settings: Any) -> Tensor:
    return implementation(torch.nn.Module(), q, k, k, None, **settings)[0]


def test_the_models_scale_is_used() -> None:
    """A model's own scale that is replaced by 1 / sqrt(D)."""
    q, k = torch.randn(2, 1, 2, 5, 8)
    sdpa = transformers.AttentionInterface()["sdpa"]
    torch.testing.assert_close(attend(fused.attention, q, k, scaling=1.7), attend(sdpa, q, k, scaling=1.7))


def test_dropout_is_applied() -> None:
    """Training without the dropout of the attention weights or of the feed-forward."""
    q, k = torch.randn(2, 1, 2, 5, 8)
    assert (attend(fused.attention, q, k, dropout=0.9) == 0).float().mean() > 0.2
    model = gpt2(resid_pdrop=0.5).train()
    fused.fuse(model)
    assert (model.transformer.h[0].mlp(torch.randn(4, 9, 32)) == 0).float().mean() == pytest.approx(
        0.5, abs=0.1
    )


def test_queries_at_unknown_positions_fall_back() -> None:
    """The first pass with a static cache, whose queries are treated as the last positions, not the first."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    sdpa = transformers.AttentionInterface()["sdpa"]
    with pytest.warns(kernels.FallbackWarning, match="the positions of the queries are unknown"):
        actual = attend(fused.attention, q, k)
    assert torch.equal(actual, attend(sdpa, q, k))


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_soft_caps_and_sinks_are_refused(name: str) -> None:
    """A soft cap or attention sinks that are silently ignored."""
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"the model sets {name}, expected attn_implementation='eager'"):
        fused.attention(torch.nn.Module(), q, q, q, None, **{name: 1.0})


@pytest.fixture
def training() -> Any:
    """A GPT-2 in training mode without dropout, so that its losses are reproducible."""
    return gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, activation_function="gelu_new").train()


def loss_and_gradients(model: Any, idx: Tensor, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(idx, **inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


LABELS = {
    "mean": {},
    "items": {"num_items_in_batch": 7},
    "ignored": {"ignore_index": 3},
    "shifted": {"shift_labels": torch.arange(2 * T).view(2, T) % V},
}


@pytest.mark.parametrize("extra", LABELS.values(), ids=LABELS)
def test_fused_training_gives_the_same_loss_and_gradients(training: Any, extra: dict[str, Any]) -> None:
    """Unshifted labels, a wrong mean, a transposed weight, or a gradient that a tied head loses."""
    idx = torch.randint(V, (2, T))
    labels = idx.clone()
    labels[0, :4] = -100 if "ignore_index" not in extra else 3
    expected = loss_and_gradients(training, idx, labels=labels, **extra)
    assert fused.fuse(training) == 5 + 2 + 1
    actual = loss_and_gradients(training, idx, labels=labels, **extra)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert training(idx, labels=labels).logits is None


@pytest.mark.kernels
def test_the_triton_kernels_run_in_transformers(training: Any) -> None:
    """A Triton kernel that misreads the transposed weights of Conv1D or strided queries."""
    idx = torch.randint(V, (2, T))
    inputs = {"labels": idx, "attention_mask": left_padding()[:2]}
    expected = loss_and_gradients(training, idx, **inputs)
    fused.fuse(training)
    training.set_attn_implementation("fused_gpt")
    with kernels.use_backend("triton"):
        actual = loss_and_gradients(training, idx, **inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("op", "count"), [("layer_norm", 5), ("gelu_ffn", 2), ("linear_cross_entropy", 1)])
def test_each_op_can_be_fused_alone(
    training: Any, op: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `fuse` that omits the requested op, or that puts in other ops."""
    called: list[str] = []
    for name in ("layer_norm", "gelu_ffn", "linear_cross_entropy"):
        original = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, _n=name, _o=original, **k: called.append(_n) or _o(*a, **k)
        )
    which = {"layer_norm": "norm", "gelu_ffn": "ffn", "linear_cross_entropy": "loss"}
    assert fused.fuse(training, **{setting: name == op for name, setting in which.items()}) == count
    idx = torch.randint(V, (2, T))
    training(idx, labels=idx)
    assert called == [op] * count


def test_unfuse_restores_the_model(training: Any) -> None:
    """A `fuse` that cannot be undone, or that changes parameters or their names."""
    before, classes = training.state_dict(), [type(module) for module in training.modules()]
    copied = copy.deepcopy(training)
    fused.fuse(training)
    assert list(training.state_dict()) == list(before)
    assert all(
        a is b
        for a, b in zip(training.state_dict(keep_vars=True).values(), training.parameters(), strict=False)
    )
    assert fused.unfuse(training) == 8
    assert [type(module) for module in training.modules()] == classes
    idx = torch.randint(V, (2, T))
    assert torch.equal(training(idx, labels=idx).loss, copied(idx, labels=idx).loss)


def test_a_fused_model_is_saved_as_a_plain_gpt2(training: Any, tmp_path: Path) -> None:
    """A config.json that names a class of this package, which transformers cannot load."""
    fused.fuse(training)
    training.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is transformers.GPT2LMHeadModel
    idx = torch.randint(V, (2, T))
    torch.testing.assert_close(model(idx).logits, training.eval()(idx).logits)


def test_evaluation_keeps_its_logits(training: Any) -> None:
    """Missing logits in evaluation, or a signature from which Trainer concludes to drop every column."""
    idx = torch.randint(V, (2, T))
    expected = training.eval()(idx, labels=idx)
    fused.fuse(training)
    actual = training(idx, labels=idx)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert "input_ids" in inspect.signature(training.forward).parameters


def test_a_custom_loss_is_kept(training: Any) -> None:
    """A custom loss that the fused loss replaces."""
    training.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
    fused.fuse(training)
    idx = torch.randint(V, (2, T))
    assert training(idx, labels=idx).loss.item() == 42


def test_return_dict_false_returns_a_tuple(training: Any) -> None:
    """return_dict=False that is ignored, which breaks training loops that unpack a tuple."""
    fused.fuse(training)
    idx = torch.randint(V, (2, T))
    assert torch.equal(training(idx, labels=idx, return_dict=False)[0], training(idx, labels=idx).loss)


def test_the_output_has_the_other_fields(training: Any) -> None:
    """A cache, hidden states or attention weights that the fused loss drops or puts under another name."""
    idx = torch.randint(V, (2, T))
    training.set_attn_implementation("eager")
    wanted = {"labels": idx, "use_cache": True, "output_hidden_states": True, "output_attentions": True}
    expected = training(idx, **wanted)
    fused.fuse(training)
    actual = training(idx, **wanted)
    assert {CACHE, "hidden_states", "attentions"} < set(expected)
    assert [*actual] == [name for name in expected if name != "logits"]
    torch.testing.assert_close(actual["hidden_states"], expected["hidden_states"])
    torch.testing.assert_close(actual["attentions"], expected["attentions"])
    assert actual[CACHE].get_seq_length() == T


def test_nothing_deprecated_is_used(training: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A name that a new transformers still accepts, but logs as deprecated, such as past_key_values."""
    transformers.utils.logging.warning_once.cache_clear()
    idx = torch.randint(V, (2, T))
    fused.fuse(training)
    training.set_attn_implementation("fused_gpt")
    training(idx, labels=idx, use_cache=True)
    training.eval().generate(idx, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert "deprecated" not in caplog.text


def test_other_activations_are_not_fused() -> None:
    """A ReLU that becomes a GELU."""
    model, idx = gpt2(activation_function="relu"), torch.randint(V, (2, T))
    expected = model(idx).logits
    assert fused.fuse(model, norm=False, loss=False) == 0
    assert torch.equal(model(idx).logits, expected)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_each_gelu_keeps_its_formula(activation: str) -> None:
    """The exact GELU computed by the tanh formula, or the reverse."""
    model, idx = gpt2(activation_function=activation), torch.randint(V, (2, T))
    expected = model.double()(idx).logits
    assert fused.fuse(model) == 8
    torch.testing.assert_close(model(idx).logits, expected)


@pytest.mark.parametrize("fused_first", [False, True])
def test_adapters_keep_their_effect(training: Any, fused_first: bool) -> None:
    """Adapters in the feed-forward or on the head that a fused op reads past (bug 28)."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layers = {"target_modules": ["c_fc", "c_proj", "lm_head"], "fan_in_fan_out": True}
    config = peft.LoraConfig(r=2, init_lora_weights=False, **layers)
    if fused_first:
        fused.fuse(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm_head is tied, and not a Conv1D
        peft.inject_adapter_in_model(config, training)

    idx = torch.randint(V, (2, T))
    if not fused_first:
        fused.fuse(training)
    actual = loss_and_gradients(training, idx, labels=idx)
    assert len(kernels.explain(training)) == 2 * 2 + 1
    fused.unfuse(training)
    torch.testing.assert_close(loss_and_gradients(training, idx, labels=idx), actual)


@pytest.mark.parametrize("name", ["lm_head", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.act"])
def test_hooks_run(training: Any, name: str) -> None:
    """A hook on a module that a fused op reads past, so that the hook never runs."""
    idx = torch.randint(V, (2, T))
    fused.fuse(training)
    training.get_submodule(name).register_forward_hook(lambda *call: 2 * call[-1])
    assert kernels.explain(training) == {name: "has hooks"}
    actual = training(idx, labels=idx).loss
    fused.unfuse(training)
    torch.testing.assert_close(actual, training(idx, labels=idx).loss)


def test_only_gpt2_is_fused() -> None:
    """An untested model that `fuse` changes because it contains modules of the same classes."""
    with pytest.raises(TypeError, match="fuse: model is LlamaForCausalLM, expected a GPT-2 of transformers"):
        fused.fuse(llama())


@pytest.mark.parametrize("order", ["import kernels, gpt, transformers", "import transformers, gpt, kernels"])
def test_transformers_works_with_this_package_imported(order: str, tmp_path: Path) -> None:
    """The import name `kernels`, which transformers takes for Hugging Face's package and fails on."""
    program = f"""
{order}
import torch
shape = dict(vocab_size=61, n_positions=8, n_embd=16, n_layer=1, n_head=2)
config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, **shape)
model = transformers.GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
idx = torch.arange(16).view(2, 8)
losses = []
for _ in range(5):
    loss = model(idx, labels=idx).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
model.save_pretrained({str(tmp_path)!r})
loaded = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert torch.equal(loaded(idx).logits, model.eval()(idx).logits)
assert gpt.GPT.from_pretrained({str(tmp_path)!r})(idx).shape == (2, 8, 61)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
