"""Adapters, hooks, parametrizations and pruning on the modules that a fused op would read past."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import kernels
from gpt import GPT, InputError, TrainConfig
from gpt.training.step import TrainStep
from kernels.nn import GELUFeedForward
from tests.gpt.graphs import fake
from tests.gpt.models import CONFIGS, SMALL, random_model, tokens

READ_PAST = (
    "blocks.0.ln_1",
    "blocks.1.ln_1",
    "blocks.1.ln_2",
    "blocks.1.ffn.up",
    "blocks.1.ffn.down",
    "ln_f",
)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    """The model with LoRA adapters that change its logits."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings))


def unfused(model: nn.Module) -> nn.Module:
    """The model after a hook without effect on each module: everything is called."""
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, arguments: None)
    return model


def loss_and_gradients(model: nn.Module, idx: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(idx, idx.roll(1, 1))
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["up", "down"]},
        {"target_modules": ["wte"]},
        {"target_modules": ["qkv"], "modules_to_save": ["wte", "ln_1", "ln_2", "ln_f"]},
    ],
    ids=["all-linear", "ffn", "wte", "modules-to-save"],
)
def test_every_adapter_trains(settings: dict[str, Any]) -> None:
    """An adapter that a fused op reads past: no gradient, no effect, or lost by merging (bug 28)."""
    model, idx = random_model(), tokens(2, 8)
    plain = model(idx).detach()
    wrapped = adapted(model, **settings)
    loss_and_gradients(wrapped, idx)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()

    with torch.no_grad():
        trained = wrapped(idx)
        assert (trained - plain).abs().max() > 0.1
        merged = wrapped.merge_and_unload()
        assert kernels.explain(merged) == {}
        torch.testing.assert_close(merged(idx), trained, **CLOSE)


@pytest.mark.parametrize(
    ("name", "use_triton"),
    [pytest.param("gpt2", True, marks=pytest.mark.kernels), ("untied", False), ("post", False)],
)
def test_adapted_models_equal_unfused_ones(name: str, use_triton: bool) -> None:
    """A fused op that remains beside an adapter, and computes something else than the modules would."""
    idx = tokens(2, 8)
    model = random_model(**CONFIGS[name], n_layer=1, use_triton=use_triton)
    wrapped = adapted(model, target_modules="all-linear")
    assert all("peft" in reason for reason in kernels.explain(wrapped).values())
    fused = loss_and_gradients(wrapped, idx)
    torch.testing.assert_close(loss_and_gradients(unfused(wrapped), idx), fused, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_steps_aside_computes_the_same(name: str) -> None:
    """A norm, feed-forward, head or loss that differs where it is not fused: its mask, mean or formula."""
    model = random_model(**CONFIGS[name], dropout=0.2).double()
    model.dropout_seed = 3
    idx, targets = tokens(2, 8), tokens(2, 8)
    targets[0, :5] = -100
    fused = [model(idx, targets), model(idx), model(idx, torch.full_like(idx, -100))]
    unfused(model)
    assert set(kernels.explain(model).values()) == {"has hooks"}
    torch.testing.assert_close(
        [model(idx, targets), model(idx), model(idx, torch.full_like(idx, -100))], fused
    )


def test_generation_runs_adapters() -> None:
    """Cached decoding that reads past an adapter: other tokens than without a cache."""
    model = adapted(random_model(), target_modules="all-linear").eval()
    idx, settings = tokens(2, 4), {"do_sample": False, "max_new_tokens": 5}
    cached = model.generate(idx, **settings)
    assert torch.equal(cached, model.generate(idx, use_cache=False, **settings))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(idx, **settings))


@pytest.mark.parametrize("name", [*READ_PAST, "blocks.0.attn.qkv", "blocks.0.attn.proj", "lm_head"])
@pytest.mark.parametrize("targets", [False, True], ids=["logits", "loss"])
def test_hooks_run_and_can_change_the_output(name: str, targets: bool) -> None:
    """A module that is read past, so that its hooks never run, or that a hook runs for twice."""
    model, idx = random_model(), tokens(2, 8)
    arguments = (idx, idx) if targets else (idx,)
    before, calls = model(*arguments), []
    model.get_submodule(name).register_forward_hook(lambda *call: calls.append(name) or call[-1] * 1.5)
    assert not torch.allclose(model(*arguments), before)
    assert calls == [name]


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, inputs, outputs: None)


def own_forward(module: nn.Module) -> None:
    module.forward = module.forward  # type: ignore[method-assign]  # as Accelerate's hooks do


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", nn.Identity())


@pytest.mark.parametrize("change", [backward_hook, own_forward, pruned, parametrized])
@pytest.mark.parametrize("name", READ_PAST)
def test_changed_modules_are_called(
    change: Callable[[nn.Module], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruning that breaks the second backward pass, or a changed module that is still read past."""
    model, idx, calls = random_model(), tokens(2, 8), []
    module = model.get_submodule(name)
    change(module)
    assert [*kernels.explain(model)] == [name]
    call = type(module).__call__
    monkeypatch.setattr(
        type(module), "__call__", lambda self, *a, **k: calls.append(self) or call(self, *a, **k)
    )
    for _ in range(2):
        model(idx, idx).backward()
    assert sum(called is module for called in calls) == 2


def test_a_wrapped_tied_head_is_refused() -> None:
    """A copy of a head without parameters that peft would save, and that nothing trains."""
    model = adapted(random_model(), target_modules=["qkv"], modules_to_save=["lm_head"])
    with pytest.raises(
        InputError, match=re.escape("modules_to_save=['wte'], or a model with tie_weights=False")
    ):
        model(tokens(1, 4))


def test_an_untied_head_can_be_adapted() -> None:
    """A head that peft does not accept as a linear layer, or that the fused loss reads past."""
    for settings in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["qkv"], "modules_to_save": ["lm_head"]},
    ):
        model = adapted(random_model(**CONFIGS["untied"]), **settings)
        assert any("lm_head" in name for name in loss_and_gradients(model, tokens(2, 8)))


@pytest.mark.parametrize("format", ["fused-gpt", "huggingface"])
def test_unmerged_models_are_not_saved(format: str, tmp_path: Path) -> None:
    """A checkpoint with the parameters of adapters or masks, which no model can load."""
    model = random_model()
    pruned(model.blocks[0].ffn.up)
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.up\.weight_orig, expected only"):
        model.save_pretrained(tmp_path / "model", format=format)
    assert [*tmp_path.iterdir()] == []


def test_hooks_run_at_every_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph whose replays leave out the hooks, in decoding or in training."""
    graphs = fake(monkeypatch)
    monkeypatch.setattr("gpt.decoding.captures", lambda device: True)
    monkeypatch.setattr("gpt.training.step.captures", lambda device: True)
    model, calls = random_model(), []
    model.blocks[0].ffn.up.register_forward_hook(lambda *call: calls.append(1))
    model.generate(tokens(1, 3), 5)
    assert (graphs, len(calls)) == ([], 5)
    assert TrainStep(model, TrainConfig(device="cpu"))._graph is None


def test_explain_gives_the_reason() -> None:
    """A module that steps aside although `kernels.explain` says nothing, or the reverse."""
    model = random_model()
    assert kernels.explain(model) == {}
    model.blocks[0].ffn.up = nn.Linear(16, 64)
    model.blocks[1].ffn.up.register_forward_hook(lambda *call: None)
    own_forward(model.ln_f)
    assert kernels.explain(model) == {
        "ln_f": "has a forward of its own",
        "blocks.0.ffn.up": "is a torch.nn.modules.linear.Linear, expected gpt.block.Linear itself",
        "blocks.1.ffn.up": "has hooks",
    }


@pytest.mark.parametrize("position", [0, 1, 2])
def test_gelu_feed_forward_calls_what_is_not_plain(position: int) -> None:
    """An adapter, an activation or a hook inside `kernels.nn.GELUFeedForward` that has no effect."""
    module, x = GELUFeedForward(8, 12), torch.randn(3, 8)
    before = module(x)
    module[position].register_forward_hook(lambda *call: 2 * call[-1])
    assert [*kernels.explain(module)] == [str(position)]
    assert not torch.allclose(module(x), before)
    torch.testing.assert_close(module(x), nn.Sequential(*module)(x))


def test_compiling_traces_the_rule() -> None:
    """A check that torch.compile(fullgraph=True) cannot trace, or whose answer it freezes."""
    model, idx = random_model(n_layer=1), tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(idx, idx), model(idx, idx))
    model.blocks[0].ffn.up = nn.Linear(16, 64)
    torch.testing.assert_close(compiled(idx, idx), model(idx, idx))


def test_the_keys_of_a_state_dict_stay() -> None:
    """A head whose parameters have other names, which no earlier checkpoint has."""
    names = GPT(SMALL, device="meta").state_dict().keys()
    untied = GPT(SMALL, tie_weights=False, head_bias=True, device="meta").state_dict().keys()
    assert untied - names == {"lm_head.weight", "lm_head.bias"}
    assert GPT(SMALL, head_bias=True, device="meta").state_dict().keys() - names == {"lm_head.bias"}
