"""The host work of a training step, and the launches of a decoded token."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from gpt import GPT
from gpt.decoding import Decoder

VIEWS = (
    "view",
    "transpose",
    "t.default",
    "unbind",
    "alias",
    "detach",
    "expand",
    "slice",
    "select",
    "empty",
    "unsqueeze",
    "_unsafe_view",
)
BATCH, TOKENS, WIDTH, HEADS = 2, 16, 32, 2


class Dispatches(TorchDispatchMode):
    """Lists the operations that reach a backend, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function).removeprefix("aten.").removeprefix("fused_gpt."))
        return function(*args, **(kwargs or {}))

    def launching(self) -> list[str]:
        """The operations that would launch something on a GPU."""
        return [name for name in self.names if not name.startswith(VIEWS)]


class Launches(TorchDispatchMode):
    """Lists the operations that launch something on a GPU, those inside of fused ops included."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fused_gpt":
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        result = function(*args, **kwargs)
        name = str(function).removeprefix("aten.")
        if function._schema.is_mutable or (_memory(result) - _memory((args, kwargs)) and "empty" not in name):
            self.names.append(name)
        return result


def _memory(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, torch.Tensor)}


def make(n_layer: int, *, use_triton: bool) -> GPT:
    return GPT(
        vocab_size=64,
        block_size=TOKENS,
        n_layer=n_layer,
        n_head=HEADS,
        n_embd=WIDTH,
        use_triton=use_triton,
    )


def step(model: GPT) -> Dispatches:
    """Records a forward and backward pass that starts without gradients, as a training step does."""
    idx = torch.randint(64, (BATCH, TOKENS))
    model(idx, idx).backward()
    model.zero_grad()
    with Dispatches() as dispatches:
        model(idx, idx).backward()
    return dispatches


def saved_bytes(model: GPT) -> int:
    """Bytes that a forward pass keeps for backward, without the parameters; each storage counts once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    idx = torch.randint(64, (BATCH, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, idx)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert loss.requires_grad
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


def per_layer(measure: Callable[[GPT], int], *, use_triton: bool) -> int:
    """What one more layer adds to a measurement of a model."""
    shallow, deep = (measure(make(n_layer, use_triton=use_triton)) for n_layer in (2, 3))
    return deep - shallow


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the kernels that are launched; none of them runs."""
    from kernels.launch import Launch

    names: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda self: names.append(self.kernel.__name__))
    return names


@pytest.mark.interpreter
def test_launches_of_a_layer(launches: list[str]) -> None:
    """Two kernels for a pass that took one; launches bound the time of a GPT-2 step."""

    def count(model: GPT) -> int:
        launches.clear()
        step(model)
        return len(launches) // 2  # `step` takes two steps

    # Forward: attention, two norms, GELU. Backward: dQ, dK with dV, two norms and their sums, GELU.
    assert per_layer(count, use_triton=True) == 4 + 7


@pytest.mark.interpreter
def test_operations_of_a_layer() -> None:
    """An extra copy, cast or fill between kernels, such as zeros for an unused gradient."""
    operations = {
        use_triton: per_layer(lambda model: len(step(model).launching()), use_triton=use_triton)
        for use_triton in (True, False)
    }
    # 8 fused ops, 6 matmuls, 2 sums for the biases of attention's projections.
    assert operations[True] <= 8 + 6 + 2
    assert operations[True] < operations[False]
    assert "zeros.default" not in step(make(1, use_triton=True)).names


@pytest.mark.interpreter
@pytest.mark.parametrize(("use_triton", "most"), [(True, 50), (False, 82)])
def test_dispatches_of_a_layer(use_triton: bool, most: int) -> None:
    """Needless views of activations, each of which costs a GPU's host about as much as a launch."""
    assert per_layer(lambda model: len(step(model).names), use_triton=use_triton) <= most


@pytest.mark.interpreter
def test_attention_is_not_rearranged() -> None:
    """Gradients of q, k and v that are stacked, or a transposed copy of the output of attention."""
    names = step(make(2, use_triton=True)).names
    assert "attention_qkv_backward.default" in names
    assert not {name for name in names if name.startswith(("stack", "cat", "clone", "transpose", "unbind"))}


@pytest.mark.interpreter
def test_bytes_that_a_layer_saves() -> None:
    """A second copy of an activation that is kept until backward."""
    # Two norms keep their input and their output, attention qkv and its output, the feed-forward its hidden
    # activations; the statistics are one log-sum-exp for each head, and two values for each norm.
    activations = (2 + 2 + 3 + 1 + 4) * WIDTH
    statistics = HEADS + 2 * 2
    assert per_layer(saved_bytes, use_triton=True) == 4 * BATCH * TOKENS * (activations + statistics)


FILTERS = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}


def decoding_launches(
    n_layer: int, launches: list[str], use_triton: bool = True, **settings: Any
) -> list[str]:
    """What a decoding step of one sequence launches on a GPU, all of it in a CUDA graph."""
    step = Decoder.step

    def record(decoder: Decoder, *arguments: Any) -> None:
        launches.clear()
        with Launches(launches):
            step(decoder, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "step", record)
        patch.setattr(sys.modules["kernels.linear"], "FEW", 0)  # the matmul of a GPU
        sizes = {"vocab_size": 64, "block_size": 1024, "n_layer": n_layer, "n_head": 2, "n_embd": 16}
        model = GPT(sizes, use_triton=use_triton)
        model.generate(torch.zeros(1, 3, dtype=torch.int64), 4, **settings)
    return list(launches)


@pytest.mark.interpreter
def test_launches_of_a_decoded_token(launches: list[str]) -> None:
    """A copy, a cast, a counter or a sum between the kernels, whose launches bound the time of a token."""
    deep, shallow = (Counter(decoding_launches(n, launches, do_sample=False)) for n in (12, 11))
    assert deep - shallow == {"_decode_linear_kernel": 4, "_attention_decode_kernel": 1}
    assert deep.total() <= 65
    assert deep["_decode_argmax_kernel"] == 1
    # The token's place among the ids, and the counters.
    assert {name: count for name, count in deep.items() if not name.endswith("_kernel")} == {
        "index_copy_.default": 1,
        "add_.Tensor": 1,
    }


@pytest.mark.interpreter
def test_the_choice_of_a_token_takes_the_models_backend(launches: list[str]) -> None:
    """A kernel that runs although the model asks for references, or a choice that only greedy steps fuse."""
    for settings in ({"do_sample": False}, {"do_sample": False, "stop_tokens": [1]}, {}):
        assert "_decode_argmax_kernel" in decoding_launches(1, launches, **settings)
        plain = decoding_launches(1, launches, use_triton=False, **settings)
        assert "argmax.out" in plain
        assert not [name for name in plain if name.endswith("_kernel")]


def test_the_arguments_of_a_choice_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks for every token, which a CPU does not need."""
    choose, calls = kernels.decode_argmax, []

    def record(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        calls.append(logits.shape)
        return choose(logits, out)

    monkeypatch.setattr(kernels, "decode_argmax", record)
    make(1, use_triton=False).generate(torch.zeros(1, 3, dtype=torch.int64), 6, do_sample=False)
    assert calls == [(1, 64)]


@pytest.mark.interpreter
def test_launches_of_sampling(launches: list[str]) -> None:
    """A setting of sampling that launches more than it needs, or a copy of the logits for each of them."""
    greedy, sampled, filtered = (
        len(decoding_launches(1, launches, **settings))
        for settings in ({"do_sample": False}, {}, {**FILTERS, "stop_tokens": [1, 2]})
    )
    # Temperature, softmax, noise, its lower bound, and the division by it.
    assert sampled - greedy <= 5
    # Penalty 4 + 1, top-k 3, top-p 7, min-p 5, stop tokens 5.
    assert filtered - sampled <= 25
