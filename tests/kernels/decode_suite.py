"""Checks of the fused ops of a decoded token: of the kernels themselves, and of copies with a planted bug."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.registry import SPECS
from kernels.spec import Case, OpSpec
from kernels.verify import Oracle, run_case
from tests.memory import guard_allocations, guarded
from tests.planting import Mutation

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


def _parts(launchers: Any) -> None:
    """Several parts of the keys of two tiles, in memory that does not start as zeros."""
    inputs = inputs_of(BLOCK, SIZES | {"B": 1})
    with pytest.MonkeyPatch.context() as patch:
        plain = torch.Tensor.new_empty
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **options: plain(*args, **options).fill_(5))
        for _ in range(2):
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


def logits_of(kind: str, b: int, v: int, dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Logits (b, v), most of which occur several times, with the special values that `kind` names."""
    generator = torch.Generator().manual_seed(v)
    logits = (2 * torch.randn(b, v, generator=generator)).round().to(dtype)
    some = torch.rand(b, v, generator=generator) < 0.1
    if kind == "zeros":
        logits = torch.where(some, 0.0, -0.0)
    elif kind == "the lowest":
        logits = torch.full_like(logits, -math.inf)
        logits[:, -1] = torch.finfo(dtype).min
    elif kind == "-inf everywhere":
        logits.fill_(-math.inf)
    elif kind != "ties":
        logits[some] = float(kind)
    if kind == "nan":
        logits[:, ::2].neg_()  # the sign of NaN does not count
        logits[:, :2] = math.inf
    return logits.to(device, dtype)


KINDS = "ties", "zeros", "the lowest", "-inf everywhere", "inf", "-inf", "nan"


def assert_argmax(logits: torch.Tensor) -> None:
    """The kernel stores what torch.argmax gives, in a strided `out`, and nothing beside it."""
    wide = torch.full((2 * len(logits),), -7, device=logits.device)
    with kernels.use_backend(decode="triton"):
        out = kernels.decode_argmax(logits, wide[::2])
    assert out.tolist() == logits.argmax(-1).tolist()
    assert wide[1::2].eq(-7).all()


def _argmax(launchers: Any) -> None:
    """Special values, ties within and across tiles, whole tiles and tails, rows that are far apart."""
    for v in (1, 31, 32, 33, 97, 128, 200):
        for kind in KINDS:
            assert_argmax(poisoned(logits_of(kind, 3, v, torch.float32)))
    one = torch.zeros(1, 96)
    for column in (0, 31, 32, 63, 64, 95):  # the ends of tiles
        assert_argmax(one.index_fill(1, torch.tensor(column), 1.0))


def stays_inside(launchers: Any) -> None:
    """No access past the end of any tensor, including those that the launchers allocate."""
    with pytest.MonkeyPatch.context() as patch:
        guard_allocations(patch)
        for op, sizes in (
            ("decode_block", SIZES),
            ("decode_head", {"B": 3, "C": 33, "V": 35}),
            ("decode_embedding", {"B": 3, "C": 300, "V": 7, "P": 5}),
            ("decode_argmax", {"B": 3, "V": 67}),
        ):
            inputs = inputs_of(SPECS[op], sizes, key_start="padding")
            values = {n: guarded(v) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
            with kernels.use_backend(decode="triton"):
                SPECS[op].function(**values)


CHECKS: dict[str, Check] = {
    "block": agrees("decode_block", SIZES, key_start="padding"),
    "erf, no biases": agrees("decode_block", SIZES, bias=False, approximate="none", scale=0.3, eps=0.1),
    "strides": _strided,
    "lengths": _lengths,
    "parts": _parts,
    "embedding": _embeddings,
    "several tiles": agrees("decode_head", {"B": 2, "C": 300, "V": 67}),
    "large means": _large_means,
    "float32 logits": _rounds_once,
    "argmax": _argmax,
}

MUTANTS: dict[str, Mutation] = {
    # matmul
    "columns past the row are read": ("linear", "(i * BLOCK_K + cols < K)[None, :]\n", "True\n"),
    "rows past the weight are read": ("linear", "mask = (offs_n < N)[:, None] &", "mask ="),
    "the last tile of a row is lost": (
        "linear",
        "for i in tl.static_range(TILES):\n                acc",
        "for i in tl.static_range(max(1, TILES - 1)):\n                acc",
    ),
    "groups share a weight": (
        "linear",
        "weights[group * TILES + i].to(tl.float32)\n",
        "weights[i].to(tl.float32)\n",
    ),
    "all sequences read the first row": ("linear", "tl.full([], b, tl.int64) * stride_xb", "0 * stride_xb"),
    "outputs change places": ("linear", "slots % GROUPS * ROWS", "(GROUPS - 1 - slots % GROUPS) * ROWS"),
    "x ignores its stride": ("linear", '"stride_xb": x.stride(0)', '"stride_xb": k'),
    "the weight ignores its stride": ("linear", '"stride_wn": weight.stride(0)', '"stride_wn": k'),
    "without the bias": (
        "linear",
        "bias = tl.load(bias_ptr + offs_n",
        "bias = 0 * tl.load(bias_ptr + offs_n",
    ),
    "without the residual": ("linear", "value += residual", "value += 0"),
    # norm
    "masked columns add to the variance": (
        "linear",
        "tl.where((i * BLOCK_K + cols < K)[None, :], xs[i] - mean[:, None], 0.0)",
        "xs[i] - mean[:, None]",
    ),
    "a mean over the tile": ("linear", "tl.sum(total, 1) / K", "tl.sum(total, 1) / (TILES * BLOCK_K)"),
    "eps outside the root": ("linear", "/ K + eps)", "/ K) + eps"),
    "without the norm's weight": ("linear", " * norm_weights[i].to(tl.float32),)", ",)"),
    "without the norm's bias": ("linear", "value * rstd + shifts[group]", "value * rstd"),
    "the norm's bias is scaled": ("linear", "value * rstd + shifts[group]", "(value + shifts[group]) * rstd"),
    # GELU
    "always GELU by tanh": ("linear", 'gelu(value, GELU == "tanh")', "gelu(value, True)"),
    "always GELU by erf": ("linear", 'gelu(value, GELU == "tanh")', "gelu(value, False)"),
    "no GELU": ("block", "gelu=approximate", "gelu=None"),
    # caches
    "written one slot late": ("linear", "Tmax).to(tl.int64) - 1", "Tmax).to(tl.int64) - 0"),
    "an empty cache is written before its start": ("linear", "tl.maximum(index, 1)", "index"),
    "a length past the cache": ("linear", "tl.minimum(tl.maximum(index, 1), Tmax)", "tl.maximum(index, 1)"),
    "keys are written as values": (
        "linear",
        "is_q, is_v = head < H, head >= H + HKV",
        "is_q, is_v = head < H, head >= H",
    ),
    "value heads are off by the key heads": (
        "linear",
        "(head - H - HKV) * stride_vh",
        "(head - H) * stride_vh",
    ),
    "one length for all": (
        "linear",
        '"stride_lb": 0 if cache_len is None else cache_len.stride(0)',
        '"stride_lb": 0',
    ),
    "the counters keep their values": (
        "linear",
        "tl.store(counter_ptr + tile, 0)",
        "tl.store(counter_ptr + tile, 1)",
    ),
    "one counter is set": ("linear", "for tile in tl.range(COUNTERS)", "for tile in tl.range(1)"),
    # block
    "the first norm twice": (
        "block",
        "norm=(norm_2_weight, norm_2_bias)",
        "norm=(norm_1_weight, norm_1_bias)",
    ),
    "the residual is the input": ("block", "residual=h", "residual=x"),
    "attention sees the padding": ("block", "key_start=key_start", "key_start=None"),
    # embedding
    "positions start at one": ("embedding", ".to(tl.int64) - 1", ".to(tl.int64)"),
    "positions count the padding": ("embedding", "position -= tl.load", "position -= 0 * tl.load"),
    "a position past the table": (
        "embedding",
        "tl.minimum(tl.maximum(position, 0), P - 1)",
        "tl.maximum(position, 0)",
    ),
    "a negative position": ("embedding", "tl.maximum(position, 0)", "position"),
    "tokens ignore their stride": ("embedding", '"stride_tb": token.stride(0)', '"stride_tb": 1'),
    "columns past the row are stored": ("embedding", "mask = cols < C", "mask = cols < C + 1"),
    # argmax
    "the last tile of equals": ("argmax", "(x > best)", "(x >= best)"),
    "the last column of equals": (
        "argmax",
        """(0x7FFFFFFF - first - cols)  # the largest rank, then the first index
    tl.store(out_ptr + pid_b * stride_ob, 0x7FFFFFFF - (tl.max(key, 0) & 0x7FFFFFFF))""",
        """(first + cols)
    tl.store(out_ptr + pid_b * stride_ob, tl.max(key, 0) & 0x7FFFFFFF)""",
    ),
    "NaN is ignored": ("argmax", " | ((x != x) & (best == best))", ""),
    "the last NaN": ("argmax", "((x != x) & (best == best))", "(x != x)"),
    "NaN equals infinity": ("argmax", "rank = tl.where(best == best,", "rank = tl.where(best < 9e9,"),
    "a negative NaN is the lowest": ("argmax", "tl.where(best == best, bits ^", "tl.where(True, bits ^"),
    "-0.0 is below 0.0": ("argmax", "(best + 0.0)", "best"),
    "negative logits in the wrong order": ("argmax", "bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits"),
    "the last logit is lost": ("argmax", "whole + cols < V", "whole + cols < V - 1"),
    "a column past the logits": ("argmax", "whole + cols < V", "whole + cols <= V"),
    "the first tile is lost": ("argmax", "tl.range(0, whole", "tl.range(BLOCK_N, whole"),
    "tiles start one column late": ("argmax", "logits_ptr + start + cols", "logits_ptr + start + cols + 1"),
    "a tile without its place": ("argmax", "tl.where(larger, start, first)", "first"),
    "the first row for all": ("argmax", "pid_b * stride_lb", "0 * stride_lb"),
    "logits ignore their stride": ("argmax", "logits.stride(0) if b > 1 else 0", "v"),
    "out ignores its stride": ("argmax", '"stride_ob": out.stride(0)', '"stride_ob": 1'),
}
