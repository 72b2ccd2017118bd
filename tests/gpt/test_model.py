"""The model, compared with its formula, and its properties for any parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from gpt import GPT, GPTConfig, InputError
from tests.gpt.models import BOOK, CONFIGS, SMALL, padded, random_model, tokens

each_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def formula(model: GPT, idx: Tensor) -> Tensor:
    """The logits (T, V) of one sequence (T,), computed from the named parameters."""
    c, w = model.config, dict(model.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        y = (
            (x - x.mean(-1, keepdim=True))
            / (x.var(-1, keepdim=True, correction=0) + c.eps).sqrt()
            * w[f"{name}.weight"]
        )
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def attention(x: Tensor, name: str) -> Tensor:
        heads = []
        q, k, v = linear(x, f"{name}.qkv").chunk(3, -1)
        for h in range(c.n_head):
            qh, kh, vh = (t[:, h * c.head_size : (h + 1) * c.head_size] for t in (q, k, v))
            logits = qh @ kh.T / c.head_size**0.5
            heads.append(
                logits.masked_fill(torch.ones_like(logits).triu(1) == 1, -torch.inf).softmax(-1) @ vh
            )
        return linear(torch.cat(heads, -1), f"{name}.proj")

    def ffn(x: Tensor, name: str) -> Tensor:
        act = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}[
            c.activation
        ]
        return linear(act(linear(x, f"{name}.up")), f"{name}.down")

    x = w["wte.weight"][idx] + w["wpe.weight"][: len(idx)]
    for b in (f"blocks.{i}" for i in range(c.n_layer)):
        if c.norm == "post":
            x = norm(c.residual * x + attention(x, f"{b}.attn"), f"{b}.ln_1")
            x = norm(c.residual * x + ffn(x, f"{b}.ffn"), f"{b}.ln_2")
        else:
            x = c.residual * x + attention(norm(x, f"{b}.ln_1"), f"{b}.attn")
            x = c.residual * x + ffn(norm(x, f"{b}.ln_2"), f"{b}.ffn")
    x = norm(x, "ln_f") if c.final_norm else x
    logits = x @ w["wte.weight" if c.tie_weights else "lm_head.weight"].T
    return logits + w["lm_head.bias"] if c.head_bias else logits


@each_config
def test_logits_follow_the_formula(fields: dict[str, Any]) -> None:
    """An option that is ignored, a misplaced norm or residual, or a head with the wrong weight."""
    model, idx = random_model(**fields).double(), tokens(2, 9)
    torch.testing.assert_close(model(idx), torch.stack([formula(model, row) for row in idx]))


@each_config
def test_the_loss_is_cross_entropy(fields: dict[str, Any]) -> None:
    """A loss over shifted or ignored tokens, without the head's bias, or without some parameter."""
    model, idx, targets = random_model(**fields).double(), tokens(3, 12), tokens(3, 12)
    targets[0, 3], targets[2] = -100, -100
    loss = model(idx, targets)
    torch.testing.assert_close(
        loss, F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-100)
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@each_config
def test_logits_do_not_depend_on_later_tokens(fields: dict[str, Any]) -> None:
    """A causal mask that is off by one."""
    model, idx = random_model(**fields).double(), tokens(2, 10)
    before = model(idx)
    for t in range(10):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().amax() > 1e-9  # small without shortcuts; never rounding


@each_config
def test_padding_changes_nothing(fields: dict[str, Any]) -> None:
    """Padding that is attended to, or that positions count."""
    model, prompts = random_model(**fields).double(), [tokens(1, length) for length in (4, 9, 1)]
    idx, mask = padded(prompts)
    for form in (mask, mask.bool(), mask.float()):
        for logits, prompt in zip(model(idx, attention_mask=form), prompts, strict=True):
            torch.testing.assert_close(logits[-prompt.shape[1] :], model(prompt)[0])


@each_config
def test_packed_documents_equal_separate_ones(fields: dict[str, Any]) -> None:
    """Keys, positions, a loss or gradients that cross from one packed document to another."""
    model = random_model(**fields).double()
    rows = [[tokens(1, n) for n in lengths] for lengths in ((5, 1, 6), (12,))]
    packed = torch.cat([torch.cat(row, 1) for row in rows])
    starts = [[0] * 5 + [5] + [6] * 6, [0] * 12]
    document_start = torch.tensor(starts, dtype=torch.int32)
    apart = torch.stack([torch.cat([model(document)[0] for document in row]) for row in rows])
    torch.testing.assert_close(model(packed, document_start=document_start), apart)
    targets = tokens(2, 12)
    expected = torch.autograd.grad(
        F.cross_entropy(apart.flatten(0, 1), targets.flatten()), list(model.parameters())
    )
    actual = torch.autograd.grad(
        model(packed, targets, document_start=document_start), list(model.parameters())
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 124_439_808),
        (BOOK, 163_009_536),
        ({**BOOK, "tie_weights": True}, 124_412_160),
        ({"config": "gpt2-xl"}, 1_557_611_200),
        *[({"config": SMALL, **fields}, None) for fields in CONFIGS.values()],
    ],
)
def test_parameter_counts(fields: dict[str, Any], count: int | None) -> None:
    """A parameter that the config does not count, or memory that a meta model allocates."""
    model = GPT(**fields, device="meta")
    assert model.num_parameters() == model.config.parameter_counts()["total"]
    assert count in (None, model.num_parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_tied_head_is_the_embedding() -> None:
    """A head that is tied by value only, or that is counted, saved or moved twice."""
    tied, untied = GPT(SMALL), GPT(SMALL, tie_weights=False)
    assert tied.head_weight.data_ptr() == tied.wte.weight.data_ptr()
    assert untied.head_weight.data_ptr() != untied.wte.weight.data_ptr()
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}
    moved = GPT(SMALL, device="meta").to_empty(device="cpu")
    moved.load_state_dict(tied.state_dict(), assign=True)
    assert moved.head_weight.data_ptr() == moved.wte.weight.data_ptr()


def test_initialisation_is_gpt2s() -> None:
    """A deviation that does not depend on depth, a bias other than 0, or ignoring torch's seed."""
    torch.manual_seed(3)
    model = GPT(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(float(name.endswith("weight"))).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("proj.weight", "down.weight")) else 0.02
            assert 0.95 * std < parameter.std() < 1.05 * std, name
    torch.manual_seed(3)
    assert torch.equal(GPT(model.config).wte.weight, model.wte.weight)


def test_all_constructors_agree() -> None:
    """Keywords, a dict, a preset and a config that give different models."""
    config = GPTConfig(
        65, 32, 2, 4, 64, dropout=0.1, tie_weights=False, head_bias=True, final_norm=False, head_dim=16
    )
    names = {
        "vocab_size": 65,
        "max_seq_len": 32,
        "emb_size": 64,
        "num_heads": 4,
        "head_size": 16,
        "num_layers": 2,
        "dropout": 0.1,
    }
    assert GPT(config).config == GPT(names).config == GPT(**names, device="cpu").config == config
    assert (
        GPT(config, dropout=0.3).config
        == GPT(names, dropout=0.3).config
        == GPTConfig.from_dict({**names, "dropout": 0.3})
    )
    assert GPT("char-cpu", n_layer=1).config == GPTConfig.preset("char-cpu", n_layer=1)
    assert GPT(device="meta").config == GPT("gpt2", device="meta").config == GPTConfig()
    assert GPT(config, dtype=torch.bfloat16).wte.weight.dtype == torch.bfloat16
    assert GPT(config).max_seq_len == 32
    for wrong in ({"config": 3}, {"config": SMALL, "emb_size": 8}, {"config": "gpt3"}, {"n_embed": 8}):
        with pytest.raises(InputError):
            GPT(**wrong)


def test_a_missing_device_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of torch, or a message that does not say whether torch or the GPU is missing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, words in ((None, "this torch is built without CUDA"), ("13.0", "torch sees no GPU")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for create in (lambda: GPT(SMALL, device="cuda"), lambda: GPT.from_pretrained("x", device="cuda")):
            with pytest.raises(
                InputError, match=f"^device is 'cuda', but {words}, expected 'cpu', or "
            ) as error:
                create()
            assert "\n" not in str(error.value)


def test_device_and_dtype() -> None:
    """A dtype as text that is refused, one that cannot be trained, or a property with another value."""
    model = GPT(SMALL, dtype="bfloat16", device="meta")
    assert (model.device, model.dtype) == (torch.device("meta"), torch.bfloat16)
    assert GPT(SMALL, dtype="float64").dtype == torch.float64
    for wrong in ("bf16", torch.int8, torch.complex64):
        with pytest.raises(InputError, match="expected one of float32, bfloat16, float16, float64"):
            GPT(SMALL, dtype=wrong)
    with pytest.raises(InputError, match=r"'gpt2-small' is unknown, .*gpt2-medium.*char-cpu"):
        GPT("gpt2-small")


def test_a_model_prints_what_it_is() -> None:
    """A repr in which a norm, a head or an activation is a bare name."""
    text = repr(GPT(SMALL, norm="post", use_triton=False, bias=False))
    for words in (
        "7,008 parameters, use_triton=False",
        "2 x Block",
        "norm='post'",
        "Norm(16, eps=1e-05, bias=False)",
        "n_head=2, head_size=8",
        "activation='gelu_tanh'",
        "TiedHead(weight of the token embedding, bias=False)",
    ):
        assert words in text


def test_int32_ids_are_ids() -> None:
    """Token ids of a memory-mapped file that have to be converted first, or a loss of other targets."""
    model, idx, targets = random_model(), tokens(2, 6), tokens(2, 6)
    targets[0, 1] = -100
    assert torch.equal(model(idx.int()), model(idx))
    assert torch.equal(model(idx.int(), targets.int()), model(idx, targets))
    continued = model.generate(idx.int(), 3, do_sample=False)
    assert torch.equal(continued, model.generate(idx, 3, do_sample=False))
    assert continued.dtype == torch.int64


DROPOUT = {"dropout": 0.4}


@each_config
def test_the_seed_determines_every_mask(fields: dict[str, Any]) -> None:
    """A mask that ignores the seed, or a tensor seed that gives other masks than an int."""
    model, idx, targets = random_model(**fields, **DROPOUT), tokens(2, 8), tokens(2, 8)
    losses = {}
    for seed in (0, 1, -1, 2**40, torch.tensor(1)):
        model.dropout_seed = seed
        first = model(idx, targets)
        torch.rand(3)
        assert torch.equal(model(idx, targets), first)
        losses[int(seed), isinstance(seed, Tensor)] = first.item()
    assert losses.pop((1, True)) == losses[1, False]
    model.dropout_seed = None
    losses["drawn"] = model(idx, targets).item()
    losses["again"] = model(idx, targets).item()
    losses["none"] = model.eval()(idx, targets).item()
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("seed", [11, torch.tensor(11)])
@each_config
def test_every_mask_has_its_own_seed(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], seed: int | Tensor
) -> None:
    """Two layers or sites that drop the same elements, or a site that does not drop."""
    drawn = []

    def recording(name: str) -> Any:
        op = getattr(kernels, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "dropout" or kwargs["dropout_p"] == DROPOUT["dropout"]:
                drawn.append(int(kwargs["seed"]))
            return op(*args, **kwargs)

        return call

    for name in ("causal_attention_qkv", "add_layer_norm", "dropout"):
        monkeypatch.setattr(kernels, name, recording(name))
    model = random_model(**fields, **DROPOUT)
    for step in (seed, seed + 1):
        model.dropout_seed = step
        model(tokens(1, 4))
    assert len(set(drawn)) == len(drawn) == 2 * (3 * SMALL.n_layer + 1)


@pytest.mark.parametrize("seed", [None, 5])
def test_dropout_applies_to_the_embedding(seed: int | None) -> None:
    """Kept elements that are not scaled up, or dropout in evaluation mode."""
    model = GPT(SMALL, n_embd=64, final_norm=False, dropout=0.5)
    model.dropout_seed = seed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.wte.weight.fill_(1)  # the branches are 0, so the output is the dropped embedding
        dropped, kept = model(tokens(8, 12)) / 64, model.eval()(tokens(8, 12)) / 64
    assert (dropped > 0.4).all()
    assert (dropped < 1.6).all()
    assert 0.9 < dropped.mean() < 1.1
    assert dropped.std() > 0.05
    assert (kept == 1).all()


@each_config
def test_autocast(fields: dict[str, Any]) -> None:
    """Mixed precision that fails, or that rounds the residual stream of a pre-norm model."""
    model, idx, targets = random_model(**fields), tokens(3, 12), tokens(3, 12)
    full = model(idx, targets)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: streams.append(output[1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(idx, targets), model(idx)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    in_full = model.config.norm == "pre" and model.config.residual
    assert set(streams) == {torch.float32 if in_full else torch.bfloat16}
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )


@pytest.mark.parametrize(("name", "seed"), [("gpt2", None), ("post-bare", torch.tensor(3))])
def test_compiles_as_one_graph(name: str, seed: Tensor | None) -> None:
    """A graph break: a branch on tensor values, a warning, or a context that cannot be traced."""
    model, idx = random_model(**CONFIGS[name], dropout=0.0 if seed is None else 0.3), tokens(2, 8)
    model.dropout_seed = seed
    starts = torch.zeros_like(idx, dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kwargs in (
        {},
        {"targets": idx},
        {"targets": idx, "document_start": starts},
        {"attention_mask": torch.ones_like(idx)},
    ):
        torch.testing.assert_close(compiled(idx, **kwargs), model(idx, **kwargs))


def test_the_model_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A use_triton that forward or generate ignores, that outlives them, or that cannot change."""
    calls = []

    class Recording(kernels.model_backend):
        def __init__(self, backend: bool | str) -> None:
            super().__init__(backend)
            calls.append(self.backend)

    monkeypatch.setattr(kernels, "model_backend", Recording)
    monkeypatch.setattr(
        kernels, "warn_if_unavailable", lambda device, dtype: calls.append((device.type, dtype))
    )
    model, idx = GPT(SMALL, use_triton=False), tokens(1, 4)
    model(idx)
    model.use_triton = "auto"
    model.generate(idx, 1)
    model.use_triton = True
    assert calls == ["reference", "auto", ("cpu", torch.float32)]
    assert kernels.explain("layer_norm", torch.ones(2), torch.ones(2)).reason != "use_triton=False"
    for wrong in ("true", 1, None):
        with pytest.raises(InputError, match="use_triton is"):
            model.use_triton = wrong


IDX = torch.zeros(2, 5, dtype=torch.int64)
MASK = torch.ones(2, 5)
STARTS = torch.zeros(2, 5, dtype=torch.int32)


def changed(tensor: Tensor, value: float, *index: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"idx": [[1, 2]]}, "idx is list, expected int64 (B, T) with at least one token: torch.tensor(ids, "),
        ({"idx": [1, 2]}, "at least one token: torch.tensor([ids], device=model.device)"),
        ({"idx": IDX.short()}, "idx is int16 (2, 5) on cpu, expected int64 (B, T)"),
        ({"idx": IDX[0]}, "(B, T) with at least one token: idx[None] is a batch of one row"),
        ({"idx": IDX[:, :0]}, "expected int64 (B, T) with at least one token"),
        ({"idx": IDX[:0]}, "expected int64 (B, T) with at least one token"),
        ({"idx": IDX.to("meta")}, "idx is on meta, expected cpu (the model's)"),
        ({"idx": changed(IDX, 37, 1, 2)}, "idx has 37, expected ids in [0, 37)"),
        ({"idx": changed(IDX, -1, 0, 4)}, "idx has -1, expected ids in [0, 37)"),
        (
            {"idx": torch.zeros(1, 13, dtype=torch.int64)},
            "idx has 13 tokens, expected at most 12 (block_size)",
        ),
        ({"targets": IDX[:, 1:]}, "targets is int64 (2, 4) on cpu, expected int64 (2, 5) on cpu"),
        ({"targets": IDX.float()}, "targets is float32 (2, 5) on cpu, expected int64"),
        ({"targets": changed(IDX, 37, 0, 0)}, "targets has 37"),
        ({"attention_mask": MASK[:1]}, "attention_mask is float32 (1, 5) on cpu, expected (2, 5) on cpu"),
        ({"attention_mask": True}, "attention_mask is bool"),
        ({"attention_mask": changed(MASK, 0, 0, 4)}, "attention_mask has 0 after a 1"),
        ({"attention_mask": changed(MASK, 0, 1, 2)}, "attention_mask has 0 after a 1"),
        ({"attention_mask": changed(MASK, 0, 1)}, "or in a whole row"),
        ({"attention_mask": changed(MASK, 0.5, 1, 0)}, "expected 0 for padding and 1 for tokens"),
        ({"attention_mask": MASK, "document_start": STARTS}, "both given"),
        ({"document_start": STARTS.long()}, "document_start is int64 (2, 5) on cpu, expected int32 (2, 5)"),
        ({"document_start": STARTS[0]}, "document_start is int32 (5,) on cpu"),
        (
            {"document_start": changed(STARTS, 4, 1, 3)},
            "document_start has 4 at row 1, token 3, expected a value in [0, 3]",
        ),
        ({"document_start": changed(STARTS, -1, 0, 2)}, "document_start has -1 at row 0, token 2"),
    ],
)
def test_wrong_inputs_are_refused(arguments: dict[str, Any], message: str) -> None:
    """An input that gives an index error from inside torch, or a wrong result."""
    model = random_model()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        model(**{"idx": IDX, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_padding_on_the_right_is_refused() -> None:
    """A mask with padding after a token that passes the check."""
    model, idx = random_model(), tokens(1, 4)
    for bits in itertools.product((0, 1), repeat=4):
        mask = torch.tensor([bits])
        if bits[-1] == 1 and list(bits) == sorted(bits):
            model(idx, attention_mask=mask)
        else:
            with pytest.raises(InputError):
                model(idx, attention_mask=mask)
