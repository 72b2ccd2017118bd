"""CUDA graphs simulated on a CPU.

A capture leaves memory and random state unchanged, and a replay runs the same operations on the same memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels.attention import reference as attention
from kernels.decode import reference as decode


class Recording(TorchDispatchMode):
    """Replaces torch.cuda.CUDAGraph. Values that the host read during capture stay fixed in replays."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that are written, and their old values
        self._own: dict[int, Tensor] = {}  # memory of the graph, kept alive as in its pool
        self._random: dict[int, tuple[torch.Generator, Tensor]] = {}  # generators and their old states
        self.register_generator_state(torch.default_generator)
        self.replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        assert generator is None or generator._cdata in self._random, "an unregistered generator"
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for t in tree_leaves(value):  # a tensor or a list of them
                    if _memory(t) not in self._own and _memory(t) not in self._before:
                        self._before[_memory(t)] = t, t.clone()
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **kwargs)
        self._own |= {
            _memory(t): t for t in tree_leaves(result) if isinstance(t, Tensor) and _memory(t) not in given
        }
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # a graph reads addresses
        self._operations.append((function, args, kwargs, result))
        return result

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._random[generator._cdata] = generator, generator.get_state()

    @torch.no_grad()
    def undo(self) -> None:
        for generator, state in self._random.values():
            generator.set_state(state)
        for tensor, values in self._before.values():
            tensor.copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self._operations:
            for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and _memory(kept) != _memory(new):
                    kept.copy_(new)


class Stream:
    """Replaces torch.cuda.Stream."""

    def __init__(self, device: object = None) -> None:
        self.device = device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.device == other.device

    def __hash__(self) -> int:
        return hash(self.device)

    def wait_stream(self, stream: Stream) -> None:
        pass


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def fake(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Replaces CUDA graphs by recordings; the returned list grows with each one."""
    made: list[Recording] = []

    def create() -> Recording:
        made.append(Recording())
        return made[-1]

    @contextmanager
    def capture(graph: Recording, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert not gc.isenabled()  # it could free another graph, which CUDA does not permit here
        try:
            with graph:
                yield
        finally:
            graph.undo()

    for reference in (attention, decode):  # on a CPU, they would read the lengths on the host
        monkeypatch.setattr(reference, "host_lengths", lambda cache_len: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", create)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made
