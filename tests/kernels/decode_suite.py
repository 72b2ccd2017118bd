"""Checks of the fused ops of a decoded token: of the kernels themselves, and of copies with a planted bug."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import kernels
from kernels.registry import SPECS
from kernels.spec import Case, OpSpec
from kernels.verify import Oracle, run_case

Check = Callable[[Any], None]  # takes the launchers, which a check of the public ops ignores
BLOCK = SPECS["decode_block"]
CPU = torch.device("cpu")
SIZES = {"B": 3, "C": 20, "H": 4, "Hkv": 2, "Tmax": 37, "D": 12, "I": 37}


def inputs_of(spec: OpSpec, sizes: dict[str, int], **options: Any) -> dict[str, Any]:
    return spec.make_inputs(Case(sizes, options), torch.float32, CPU, torch.Generator().manual_seed(0))


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with odd strides, and NaN after each row, which no kernel may use."""
    return F.pad(tensor, (0, 3), value=math.nan)[..., :-3]


def assert_agrees(op: str, inputs: dict[str, Any]) -> None:
    """The kernels' output, and what they write, agree with the reference."""
    spec = SPECS[op]
    with kernels.use_backend(decode="triton"):
        results = run_case(spec.function, inputs, (), spec.writes)
    verdicts = Oracle(spec, inputs, torch.float32).judge(results)
    assert all(verdict.ok for verdict in verdicts), [str(verdict) for verdict in verdicts if not verdict.ok]


def agrees(op: str, sizes: dict[str, int], **options: Any) -> Check:
    return lambda launchers: assert_agrees(op, inputs_of(SPECS[op], sizes, **options))


def _strided(launchers: Any) -> None:
    """Odd strides of every matrix and cache, and lengths with stride 0."""
    inputs = inputs_of(BLOCK, SIZES, key_start="padding")
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            inputs[name] = poisoned(value)
    inputs["cache_len"] = torch.tensor([29], dtype=torch.int32).expand(3)
    assert_agrees("decode_block", inputs)


def _lengths(launchers: Any) -> None:
    """Lengths and starts outside the cache; an empty range of keys."""
    inputs = inputs_of(BLOCK, SIZES)
    for lengths, starts in (([2**31 - 1, -7, 0], [0, 0, 0]), ([38, 37, 1], [-(2**31), 40, 2**31 - 1])):
        inputs["cache_len"] = torch.tensor(lengths, dtype=torch.int32)
        inputs["key_start"] = torch.tensor(starts, dtype=torch.int32)
        assert_agrees("decode_block", inputs)


def _embeddings(launchers: Any) -> None:
    """Positions before the first and past the last; strided tokens and weights."""
    inputs = inputs_of(SPECS["decode_embedding"], {"B": 3, "C": 300, "V": 7, "P": 5})
    inputs["token"] = torch.tensor([6, 99, 0, 99, 3, 99])[::2]
    inputs["cache_len"] = torch.tensor([2**31 - 1, 3, -(2**31) + 1], dtype=torch.int32)
    for start in (None, torch.tensor([2, 1, 0], dtype=torch.int32)):
        weights = {name: poisoned(inputs[name]) for name in ("token_weight", "position_weight")}
        assert_agrees("decode_embedding", inputs | weights | {"key_start": start})


def _large_means(launchers: Any) -> None:
    """A variance of one pass, or of masked columns, is wrong where the mean is large."""
    inputs = inputs_of(SPECS["decode_head"], {"B": 2, "C": 33, "V": 9})
    inputs["x"] = inputs["x"] + 300
    assert_agrees("decode_head", inputs)


def _rounds_once(launchers: Any) -> None:
    """Logits of 16-bit inputs that are rounded before they are stored in float32."""
    spec = SPECS["decode_head"]
    inputs = spec.make_inputs(
        Case({"B": 1, "C": 64, "V": 40}), torch.float16, CPU, torch.Generator().manual_seed(0)
    )
    with kernels.use_backend(decode="triton"):
        logits = kernels.decode_head(**inputs)
    expected = kernels.reference.decode_head(**{n: v.double() for n, v in inputs.items()})
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


CHECKS: dict[str, Check] = {
    "block": agrees("decode_block", SIZES, key_start="padding"),
    "erf, no biases": agrees("decode_block", SIZES, bias=False, approximate="none", scale=0.3, eps=0.1),
    "strides": _strided,
    "lengths": _lengths,
    "embedding": _embeddings,
    "several tiles": agrees("decode_head", {"B": 2, "C": 300, "V": 67}),
    "large means": _large_means,
    "float32 logits": _rounds_once,
}
