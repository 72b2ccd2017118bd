"""What the checks of an op say about kernels with a planted bug: interpreted, or compiled and executed.

The interpreter runs on forgiving memory, as a GPU's allocator often gives it: zero where nothing was written,
and rounded up at the end. A check there compares values and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kernels.registry import SPECS
from kernels.spec import Case
from kernels.tuning import AttentionTiles, Tile
from kernels.verify import check
from tests.memory import in_a_fork
from tests.planting import Mutation, planted

Check = Callable[[Any], None]

CPU = torch.device("cpu")
SLACK = 1 << 14  # elements after the end of forgiving memory
NOT_FINITE = "not finite"  # the outcomes of a check that fails without a fault
WRONG_VALUES = "wrong values"


class Bug:
    """Mutations of an op family's kernels, and the checks that must catch them."""

    def __init__(
        self, family: str, *mutations: Mutation, checks: Iterable[Check], atomic: bool = False
    ) -> None:
        self.family = family
        self.mutations = mutations
        self.checks = tuple(checks)
        self.atomic = atomic  # attention's backward takes its atomic form

    def compiled(self) -> str:
        """What stops the checks in an open session of ttsem, a fault or wrong values; "" if nothing does."""
        from ttsem.sanitize import KernelFault

        try:
            self._check()
        except KernelFault as error:
            return error.fault.kind
        except AssertionError as error:
            return NOT_FINITE if "not finite" in str(error) else WRONG_VALUES
        return ""

    def interpreted(self) -> str:
        """What stops the checks in Triton's interpreter, in a process of their own; "" if nothing does."""
        from tests.interpreter import patch_interpreter

        patch_interpreter()

        def run() -> None:
            with forgiving_memory():
                self._check()

        return in_a_fork(run)

    def _check(self) -> None:
        with planted(self.family, *self.mutations) as launchers, tiles_for_mutants(atomic=self.atomic):
            for run in self.checks:
                run(launchers)


def values(op: str, sizes: dict[str, int], **options: Any) -> Check:
    """The check of one case of one op, in float32."""

    def run(launchers: Any) -> None:
        verdicts = check(SPECS[op], Case(sizes, options), torch.float32, CPU)
        failures = [str(verdict) for verdict in verdicts if not verdict.ok]
        assert not failures, failures

    return run


@contextmanager
def tiles_for_mutants(*, atomic: bool) -> Iterator[None]:
    """While open, ops take small tiles and few programs; with `atomic`, backward takes its atomic form."""
    from kernels.attention import torch_op

    plain = torch_op.attention_tiles

    def tiles(*args: Any, **options: Any) -> AttentionTiles:
        return plain(*args, **options)._replace(atomic=Tile(32, 16) if atomic else None)

    with pytest.MonkeyPatch.context() as patch:
        take_small_tiles(patch)
        patch.setattr(torch_op, "attention_tiles", tiles)
        yield


def take_small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Makes ops take the interpreter's tiles and few programs, so that small tensors have several of each."""
    for family in ("attention", "decode", "ffn"):
        patch.setattr(f"kernels.{family}.torch_op.architecture", lambda device: 0)
    patch.setattr("kernels.tuning._multiprocessors", lambda device: 2)


@contextmanager
def forgiving_memory() -> Iterator[None]:
    """While open, inputs and allocations are followed by zeros, and allocations are zero themselves."""
    places: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (torch, ("empty", "empty_like")),
        (torch.Tensor, ("new_empty",)),
    )
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in places:
            for name in names:
                plain = getattr(owner, name)
                patch.setattr(
                    owner, name, lambda *args, plain=plain, **options: _zero(plain(*args, **options))
                )
        for name, spec in SPECS.items():
            patch.setitem(SPECS, name, dataclasses.replace(spec, make_inputs=_forgiving(spec.make_inputs)))
        yield


def _forgiving(make_inputs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make(*args: Any) -> dict[str, Any]:
        inputs = make_inputs(*args)
        return {
            name: _zero(value).copy_(value) if isinstance(value, torch.Tensor) and value.numel() else value
            for name, value in inputs.items()
        }

    return make


def _zero(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the tensor's shape and strides, with SLACK more after the end."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.zeros(max(0, extent) + SLACK, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
