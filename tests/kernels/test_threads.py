"""Settings of the backend in threads, generators, asyncio tasks, compiled functions and backward passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gpt
import kernels
from kernels import dispatch
from kernels.registry import SPECS
from kernels.spec import OpSpec

X, W = torch.randn(3, 8), torch.ones(8)
ROUNDS = 50


def reason() -> str:
    return kernels.explain("layer_norm", X, W).reason


UNSET = reason()


def together(*functions: Callable[[threading.Barrier], Any]) -> list[Any]:
    """The results of functions that run in one new thread each; `barrier.wait()` waits for all of them."""
    barrier = threading.Barrier(len(functions), timeout=120)

    def run(function: Callable[[threading.Barrier], Any]) -> Any:
        try:
            return function(barrier)
        except BaseException:
            barrier.abort()  # the other threads end too
            raise

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in functions]]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert reason() == UNSET


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(thread, backend) of each choice from here on."""
    recorded = []
    choose = dispatch.Op.choose

    def spy(*args: Any, **kwargs: Any) -> kernels.Choice:
        choice = choose(*args, **kwargs)
        recorded.append((threading.get_ident(), choice.backend))
        return choice

    monkeypatch.setattr(dispatch.Op, "choose", spy)
    return recorded


def test_overlapping_blocks_of_two_threads_leave_nothing() -> None:
    """A thread's setting that reaches another thread, or that remains after blocks that overlapped."""

    def first(barrier: threading.Barrier) -> None:
        for _ in range(ROUNDS):
            barrier.wait()  # both are outside
            with kernels.use_backend("reference"):
                barrier.wait()  # the first is inside
                barrier.wait()  # both are inside
                assert reason() == "use_backend('reference')"
                barrier.wait()
            assert reason() == UNSET
            barrier.wait()  # the first is outside

    def second(barrier: threading.Barrier) -> None:
        for _ in range(ROUNDS):
            barrier.wait()
            barrier.wait()
            assert reason() == UNSET
            with kernels.use_backend(norm="reference"):
                barrier.wait()
                assert reason() == "use_backend(norm='reference')"
                barrier.wait()
                barrier.wait()
            assert reason() == UNSET

    together(first, second)


def test_a_new_thread_starts_without_settings() -> None:
    """A thread that takes over the settings of the thread that started it."""
    with kernels.use_backend("reference"), kernels.model_backend(False):
        assert together(lambda barrier: reason()) == [UNSET]


@pytest.mark.interpreter  # a session of ttsem holds in one thread
def test_models_in_two_threads_run_their_own_backends(choices: list[tuple[int, str]]) -> None:
    """A model that runs the backend of a model in another thread."""
    idx = torch.zeros(1, 4, dtype=torch.int64)

    def worker(use_triton: bool) -> Callable[[threading.Barrier], int]:
        model = gpt.GPT(
            vocab_size=8, block_size=4, n_layer=1, n_head=1, n_embd=16, bias=False, use_triton=use_triton
        )

        def run(barrier: threading.Barrier) -> int:
            def wait(*_: Any) -> None:
                barrier.wait()

            model.blocks[0].register_forward_pre_hook(wait)
            model.blocks[0].register_forward_hook(wait)
            with torch.no_grad():
                model(idx)
            return threading.get_ident()

        return run

    with_triton, without = together(worker(True), worker(False))
    assert {backend for thread, backend in choices if thread == with_triton} == {"triton"}
    assert {backend for thread, backend in choices if thread == without} == {"reference"}


def test_explain_beside_ops() -> None:
    """An op or an `explain` that fails, or answers for another thread, while other threads run ops."""

    def explains(backend: str, expected: str) -> Callable[[threading.Barrier], None]:
        def run(barrier: threading.Barrier) -> None:
            for _ in range(ROUNDS):
                barrier.wait()
                with kernels.use_backend(backend):
                    barrier.wait()
                    assert reason().startswith(expected)

        return run

    def computes(barrier: threading.Barrier) -> None:
        for _ in range(ROUNDS):
            barrier.wait()
            with kernels.use_backend(norm="reference"):
                barrier.wait()
                assert kernels.layer_norm(X, W).shape == X.shape
                assert reason() == "use_backend(norm='reference')"

    together(explains("reference", "use_backend('ref"), explains("auto", "auto"), computes, computes)


def test_one_object_may_be_entered_again() -> None:
    """An object that forgets what was set before it when it is entered again, nested or by another thread."""
    setting = kernels.use_backend("reference")

    def recursive(depth: int) -> None:
        with setting:
            assert reason() == "use_backend('reference')"
            if depth:
                recursive(depth - 1)
            assert reason() == "use_backend('reference')"

    def overlapping(barrier: threading.Barrier) -> None:
        for _ in range(ROUNDS):
            barrier.wait()
            with setting:
                barrier.wait()
                recursive(2)
                barrier.wait()
            assert reason() == UNSET

    recursive(3)
    assert reason() == UNSET
    together(overlapping, overlapping)
    model = kernels.model_backend(False)
    with model, model:
        pass
    assert reason() == UNSET


def test_blocks_that_end_in_another_order_remove_their_own_setting() -> None:
    """A generator or task that ends before one that started later, and removes or restores its setting."""

    def steps(backend: str) -> Iterator[str]:
        with kernels.use_backend(norm=backend):
            yield reason()
            yield reason()

    outer, inner = steps("reference"), steps("auto")
    assert next(outer) == "use_backend(norm='reference')"
    assert next(inner).startswith("auto:")
    outer.close()
    assert reason().startswith("auto:")
    inner.close()
    assert reason() == UNSET

    async def task(backend: str, entered: asyncio.Event, leave: asyncio.Event) -> None:
        with kernels.use_backend(backend):
            entered.set()
            await leave.wait()
        entered.clear()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(task("reference", *events[:2]))
        await events[0].wait()
        second = asyncio.create_task(task("auto", *events[2:]))
        await events[2].wait()
        events[1].set()
        await first
        events[3].set()
        await second
        assert reason() == UNSET

    asyncio.run(main())


def test_a_block_ends_in_the_thread_that_entered_it() -> None:
    """A block that ends in another thread, and silently leaves its setting in the first."""
    setting = kernels.use_backend("reference")

    def leave(barrier: threading.Barrier) -> None:
        with pytest.raises(RuntimeError, match=r"^use_backend: exited in a thread that has not entered it$"):
            setting.__exit__(None, None, None)

    with setting:
        together(leave)
        assert reason() == "use_backend('reference')"


@pytest.mark.interpreter  # a session of ttsem holds in one thread
def test_compiled_functions_follow_the_settings_of_their_thread() -> None:
    """A compiled function that runs the backend it was compiled with, or that compiles for each thread."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        name = "triton" if "fused_gpt" in graph.code else "reference"
        graphs.append(name)

        def run(*args: Any) -> Any:
            ran.append((threading.get_ident(), name))
            return graph.forward(*args)

        return run

    ran: list[tuple[int, str]] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        with kernels.model_backend("auto"):
            return kernels.layer_norm(x, W)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def worker(names: list[str]) -> Callable[[threading.Barrier], tuple[int, list[str]]]:
        def run(barrier: threading.Barrier) -> tuple[int, list[str]]:
            for name in names:
                barrier.wait()
                with kernels.use_backend(name):
                    barrier.wait()
                    compiled(X)
            return threading.get_ident(), names

        return run

    with kernels.use_backend("reference"):
        compiled(X)
        ran.clear()
        turns = ["triton", "reference"] * 3
        threads = together(worker(turns), worker(turns[::-1]))
        compiled(X)
    for thread, expected in [*threads, (threading.get_ident(), ["reference"])]:
        assert [name for ident, name in ran if ident == thread] == expected
    assert sorted(graphs) == ["reference", "triton"]


@pytest.mark.kernels
@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS.values() if spec.gradients], ids=lambda spec: spec.name
)
def test_backward_does_not_choose(spec: OpSpec, choices: list[tuple[int, str]]) -> None:
    """A backward pass that reads the settings of the thread it runs in: autograd has its own threads."""
    case = spec.tagged("small")[0]
    inputs = spec.make_inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    for name in spec.gradients:
        if inputs.get(name) is not None:
            inputs[name].requires_grad_()
    with kernels.use_backend("triton"):
        result = spec.function(**inputs)
    output = result[0] if isinstance(result, tuple) else result
    assert choices
    choices.clear()
    together(lambda barrier: output.sum().backward())
    assert choices == []


def test_checkpointing_keeps_the_backend_by_context_fn() -> None:
    """A recomputation, in the thread of a backward pass, that takes another backend than the forward pass."""
    reasons: list[str] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        reasons.append(reason())
        return kernels.layer_norm(x, W)

    def contexts() -> tuple[kernels.use_backend, kernels.use_backend]:
        return kernels.use_backend("reference"), kernels.use_backend("reference")

    y = checkpoint(block, X.clone().requires_grad_(), use_reentrant=False, context_fn=contexts)
    together(lambda barrier: y.sum().backward())
    assert reasons == ["use_backend('reference')"] * 2
