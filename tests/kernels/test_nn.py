"""The modules, compared with their counterparts in torch.nn for the same parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from kernels.nn import CausalSelfAttention, GELUFeedForward, LayerNorm
from kernels.tolerance import compare

B, T, C, H, HIDDEN = 2, 7, 24, 3, 40
Factory = Callable[[], nn.Module]


def sequential(bias: bool = True, approximate: str = "none", hidden: int = HIDDEN) -> nn.Module:
    return nn.Sequential(nn.Linear(C, hidden, bias), nn.GELU(approximate), nn.Linear(hidden, C, bias))


def multihead(**settings: Any) -> nn.Module:
    return nn.MultiheadAttention(C, H, batch_first=True, **settings)


COUNTERPARTS: dict[str, tuple[Factory, Factory]] = {
    "layer_norm": (lambda: LayerNorm(C), lambda: nn.LayerNorm(C)),
    "layer_norm-eps": (lambda: LayerNorm((C,), eps=0.3), lambda: nn.LayerNorm(C, eps=0.3)),
    "layer_norm-no-bias": (lambda: LayerNorm(C, bias=False), lambda: nn.LayerNorm(C, bias=False)),
    "gelu_ffn": (lambda: GELUFeedForward(C, HIDDEN), sequential),
    "gelu_ffn-default": (lambda: GELUFeedForward(C), lambda: sequential(hidden=4 * C)),
    "gelu_ffn-tanh": (
        lambda: GELUFeedForward(C, HIDDEN, approximate="tanh"),
        lambda: sequential(approximate="tanh"),
    ),
    "gelu_ffn-no-bias": (lambda: GELUFeedForward(C, HIDDEN, bias=False), lambda: sequential(bias=False)),
    "causal_attention_qkv": (lambda: CausalSelfAttention(C, H), multihead),
    "causal_attention_qkv-no-bias": (
        lambda: CausalSelfAttention(C, H, bias=False),
        lambda: multihead(bias=False),
    ),
}
each_counterpart = pytest.mark.parametrize("factories", COUNTERPARTS.values(), ids=COUNTERPARTS)


def same_parameters(factories: tuple[Factory, Factory]) -> list[nn.Module]:
    """Our module and torch's in float64, with the same random parameters, loaded from one state_dict."""
    ours, theirs = (make().double() for make in factories)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return [ours, theirs]


def call(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        causal = nn.Transformer.generate_square_subsequent_mask(T, device=x.device, dtype=x.dtype)
        return module(x, x, x, attn_mask=causal, need_weights=False)[0]
    return module(x)


@each_counterpart
def test_initial_state_dicts_equal_torch(factories: tuple[Factory, Factory]) -> None:
    """A parameter whose name, order, shape or initial value differs from torch.nn's."""
    states = []
    for make in factories:
        torch.manual_seed(1)
        states.append(make().state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def output_and_gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output for `x`, and the gradient of each parameter, by its name."""
    y = call(module, x)
    parameters = dict(module.named_parameters())
    weights = torch.linspace(-1, 1, C, dtype=y.dtype, device=y.device).expand(y.shape)
    gradients = torch.autograd.grad(y, [*parameters.values()], weights)
    return {"output": y.detach()} | dict(zip(parameters, gradients, strict=True))


@each_counterpart
def test_output_and_gradients_equal_torch(factories: tuple[Factory, Factory]) -> None:
    """A module that ignores a bias, eps, the GELU approximation or the mask, or that mixes up the heads."""
    x = torch.randn(B, T, C, dtype=torch.float64)
    ours, theirs = (output_and_gradients(module, x) for module in same_parameters(factories))
    torch.testing.assert_close([*ours.values()], [*theirs.values()])


@pytest.mark.gpu
@each_counterpart
def test_the_kernels_of_a_module_equal_torch(factories: tuple[Factory, Factory]) -> None:
    """A module that gives a kernel other arguments than its reference: a weight's layout, eps, the GELU."""
    x = torch.randn(B, T, C, dtype=torch.float64).cuda()
    ours, theirs = (module.cuda() for module in same_parameters(factories))
    exact = output_and_gradients(theirs, x)
    reference = output_and_gradients(theirs.float(), x.float())
    with kernels.use_backend("triton"):
        actual = output_and_gradients(ours.float(), x.float())
    for name, value in exact.items():
        verdict = compare(name, actual[name], reference[name], value, dtype=torch.float32, scale=1.0)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize(("op", "name"), [(name.split("-")[0], name) for name in COUNTERPARTS])
def test_a_module_runs_its_op(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that does not call the public op, so that use_backend has no effect on it."""
    calls, function = [], getattr(kernels, op)
    monkeypatch.setattr(
        kernels, op, lambda *args, **settings: calls.append(op) or function(*args, **settings)
    )
    COUNTERPARTS[name][0]()(torch.randn(B, T, C))
    assert calls == [op]


def test_attention_ignores_padding() -> None:
    """A module that ignores key_start: a padded row's output differs from that of the row without padding."""
    module = CausalSelfAttention(C, H).double()
    x = torch.randn(B, T, C, dtype=torch.float64)
    padded = module(x, key_start=torch.tensor([3, 0], dtype=torch.int32))
    torch.testing.assert_close(padded[:1, 3:], module(x[:1, 3:]))
    torch.testing.assert_close(padded[1:], module(x[1:]))


def test_attention_drops_in_training_mode_only() -> None:
    """Dropout that is active in eval mode, or inactive in training mode."""
    module, x = CausalSelfAttention(C, H, dropout=0.5), torch.randn(B, T, C)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNorm((3, 4)), "LayerNorm: normalized_shape is (3, 4), expected one dimension"),
        (
            lambda: CausalSelfAttention(C, 5),
            "CausalSelfAttention: num_heads is 5, expected a divisor of embed_dim (24)",
        ),
        (
            lambda: CausalSelfAttention(C, 0),
            "CausalSelfAttention: num_heads is 0, expected a divisor of embed_dim (24)",
        ),
    ],
)
def test_bad_sizes_are_refused(make: Factory, message: str) -> None:
    """A bad size that no error reports before the first call."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
