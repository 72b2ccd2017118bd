"""Bugs planted in copies of the attention kernels: the checks of attention_suite must catch every one.

A mutant is a replacement in the source text of one kernel file. It runs in a forked child process, since some
mutants access invalid memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from tests.kernels.attention_suite import CHECKS
from tests.memory import in_a_fork
from tests.planting import Mutation, planted

pytest.importorskip("kernels.attention.torch_op", reason="triton is not installed")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(sys.platform != "linux", reason="guard pages need Linux's mmap"),
]

# Bugs that shipped in other packages, each with the check that catches it.
FAMOUS: dict[str, tuple[Mutation, str]] = {
    "offsets in 32 bits": (
        ("forward", "rows.to(tl.int64)[:, None] * stride", "rows[:, None] * stride"),
        "far rows",
    ),
    "the gradient has the output's strides": (
        ("backward", "stride_ot, stride_dot, Tq", "stride_ot, stride_ot, Tq"),
        "strided gradients",
    ),
    "columns past the head dimension are read": (
        ("forward", "(rows < T)[:, None] & (offs_d < D)[None, :], other", "(rows < T)[:, None], other"),
        "documents",
    ),
    "the causal mask is aligned at the first key": (
        ("forward", "offs_m - begin + (Tk - Tq)", "offs_m - begin"),
        "one key ahead",
    ),
    "a row without keys is NaN": (
        ("forward", 'tl.where(new_max == float("-inf"), 0.0, new_max)', "new_max"),
        "empty rows",
    ),
    "another dropout mask in dK": (
        ("backward", "Tq + offs_m, key, Tk", "Tq + offs_m, key + 16, Tk"),
        "dropout",
    ),
    "another dropout mask in dQ": (
        (
            "backward",
            "keep_tile(seed, pid_bh * Tq + offs_m, begin",
            "keep_tile(seed + 1, pid_bh * Tq + offs_m, begin",
        ),
        "dropout",
    ),
    "a load past the end is hidden by the store": (
        ("forward", "offs_m, stride_qt, Tq, D, BLOCK_D, True)", "offs_m, stride_qt, Tq, D, BLOCK_D, False)"),
        "guard pages",
    ),
}

MUTANTS: dict[str, Mutation] = {
    # masks
    "the diagonal is hidden": ("forward", "keys <= positions", "keys < positions"),
    "the first key is hidden": ("forward", "visible & (keys >= start)", "visible & (keys > start)"),
    "the first key is hidden for dK": ("backward", "offs_n[:, None] >= start", "offs_n[:, None] > start"),
    "key_start is ignored": ("forward", "visible = visible & (keys >= start)", "visible = visible"),
    "key_start is ignored for dK": ("backward", "visible & (offs_n[:, None] >= start[None, :])", "visible"),
    "key_start is read past the end for dK": (
        "backward",
        "* stride_st, mask=offs_m < Tq, other=0)",
        "* stride_st)",
    ),
    "the store writes rows past the end": ("forward", "ty), mask=(rows < T)[:, None] & ", "ty), mask="),
    "the store writes columns past the end": (
        "forward",
        "ty), mask=(rows < T)[:, None] & (offs_d < D)[None, :]",
        "ty), mask=(rows < T)[:, None]",
    ),
    "keys and values past the end are read": ("forward", "tl.minimum(offs_n, Tk - 1)", "offs_n"),
    "keys and values past the end are read for dQ": ("backward", "tl.minimum(offs_n, Tk - 1)", "offs_n"),
    "dQ counts positions from the first query": ("backward", "offs_m - begin + (Tk - Tq)", "offs_m - begin"),
    "dK counts positions from the first query": ("backward", "first = begin + (Tk - Tq)", "first = begin"),
    "key_start counts from the first key": ("forward", "(start - begin)[:, None]", "start[:, None]"),
    "key_start counts from the first key for dQ": ("backward", "(start - begin)[:, None]", "start[:, None]"),
    "lse2 is written past the end": ("forward", "Tq + offs_m, lse2, mask=offs_m < Tq)", "Tq + offs_m, lse2)"),
    "lse2 is read past the end": (
        "backward",
        "offs_m, mask=offs_m < Tq, other=0.0)\n        delta",
        "offs_m)\n        delta",
    ),
    "weights of queries past the end are infinite": (
        "backward",
        "offs_m, mask=offs_m < Tq, other=0.0)\n        delta",
        'offs_m, mask=offs_m < Tq, other=float("-inf"))\n        delta',
    ),
    "delta is written past the end": (
        "backward",
        "Tq + offs_m, delta, mask=offs_m < Tq)",
        "Tq + offs_m, delta)",
    ),
    "key_start is read past the end": ("forward", "tl.minimum(rows, Tq - 1)", "rows"),
    "dQ sees the future": ("backward", "s = tl.where(visible, s,", "_ = tl.where(visible, s,"),
    "dK sees the future": ("backward", "st = tl.where(visible, st,", "_ = tl.where(visible, st,"),
    # ranges
    "dK, dV read the bounds of another sequence's tiles": (
        "backward",
        "first_ptr += pid_b * num_rows",
        "first_ptr += pid_b",
    ),
    "a masked tile counts as full": ("forward", "(first + 1) // BLOCK_N", "(first + BLOCK_N) // BLOCK_N"),
    "the last tile of keys is skipped": (
        "forward",
        "hi = tl.minimum(first + BLOCK_M, Tk)",
        "hi = tl.minimum(first + BLOCK_M - 1, Tk)",
    ),
    "the first tile of keys is skipped": (
        "forward",
        "lo = tl.min(start, 0) // BLOCK_N * BLOCK_N",
        "lo = tl.cdiv(tl.min(start, 0), BLOCK_N) * BLOCK_N",
    ),
    "a late start counts as full": (
        "forward",
        "tl.cdiv(tl.max(start, 0), BLOCK_N)",
        "tl.cdiv(tl.min(start, 0), BLOCK_N)",
    ),
    "masked tiles are shifted": ("forward", "full_hi + (i - before) * BLOCK", "full_hi + i * BLOCK"),
    "dK misses the first queries": (
        "backward",
        "lo = tl.maximum(key - (Tk - Tq), 0) // BLOCK_M * BLOCK_M",
        "lo = tl.cdiv(tl.maximum(key - (Tk - Tq), 0), BLOCK_M) * BLOCK_M",
    ),
    "dK takes diagonal queries as full": (
        "backward",
        "key + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M)",
        "key - (Tk - Tq), 0), BLOCK_M)",
    ),
    "dK misses the last queries": ("backward", "hi = tl.minimum(hi, Tq)", "hi = tl.minimum(hi, Tq) - ROWS"),
    "dK takes late queries as full": ("backward", "late = (last > key)", "late = (last > key + BLOCK_N)"),
    "dK misses queries that start late": ("backward", "first < key + BLOCK_N", "first < key"),
    "dK's tail of queries is missing": ("backward", "    hi = Tq\n", "    hi = Tq // BLOCK_M * BLOCK_M\n"),
    # softmax
    "the running sum is not rescaled": ("forward", "row_sum * alpha", "row_sum"),
    "the output is not rescaled": ("forward", "acc * alpha[:, None]", "acc"),
    "the maximum is not scaled": ("forward", "tl.max(s, 1) * scale2", "tl.max(s, 1)"),
    "the logits are not scaled": ("forward", "tl.exp2(s * scale2 - shift", "tl.exp2(s - shift"),
    "the future is seen": ("forward", "s = tl.where(visible, s,", "_ = tl.where(visible, s,"),
    "lse2 without its maximum": ("forward", "row_max + tl.log2(row_sum)", "tl.log2(row_sum)"),
    "the sum of an empty row": ("forward", "row_sum = tl.where(empty, 1.0, row_sum)", "row_sum = row_sum"),
    # gradients
    "delta is lost": ("backward", "ds = p * (dp - delta[:, None])", "ds = p * dp"),
    "delta is lost in dK": ("backward", "pt * (dpt - delta[None, :])", "pt * dpt"),
    "dQ is not scaled": ("backward", "dq * scale, offs_m", "dq, offs_m"),
    "dQ is scaled in base 2": ("backward", "dq * scale, offs_m", "dq * scale2, offs_m"),
    "dK is not scaled": ("backward", "dk * scale, offs_n", "dk, offs_n"),
    "dV is scaled": ("backward", "dv, offs_n, stride_dvt", "dv * scale, offs_n, stride_dvt"),
    "the logits of dQ are not scaled": ("backward", "s = s * scale2 -", "s = s -"),
    "the logits of dK are not scaled": ("backward", "st = st * scale2 -", "st = st -"),
    "only one query head adds to dK": (
        "backward",
        "for group in tl.range(GROUPS):",
        "for group in tl.range(1):",
    ),
    "query heads read the wrong key head": (
        "forward",
        "pid_h // GROUPS * stride_kh",
        "pid_h % GROUPS * stride_kh",
    ),
    "values of the wrong head in backward": ("backward", "pid_h // GROUPS * stride_vh", "pid_h * stride_vh"),
    # dropout
    "kept weights are not scaled": ("forward", "keep_scale / row_sum", "1.0 / row_sum"),
    "dropout before the sum": (
        "forward",
        "alpha + tl.sum(p, 1)",
        "alpha + tl.sum(p, 1) * (1 - HAS_DROPOUT * 0.5)",
    ),
    "dP of kept weights is not scaled": (
        "backward",
        "tl.where(keep, dp * keep_scale, 0.0)",
        "tl.where(keep, dp, 0.0)",
    ),
    "dV ignores dropout": ("backward", "tl.where(keep, pt * keep_scale, 0.0)", "pt"),
    "one mask for all heads": (
        "forward",
        "keep_tile(seed, pid_bh * Tq + offs_m",
        "keep_tile(seed, offs_m.to(tl.int64)",
    ),
    "words of other counters": (
        "forward",
        "rows[:, None] * (Tk // 4) + begin // 4",
        "rows[:, None] * (Tk // 4) + begin",
    ),
    # decoding
    "decoding sees the future": (
        "decode",
        "offs_n[None, :] <= position[:, None]",
        "offs_n[None, :] < cache_len",
    ),
    "decoding sees the padding": ("decode", "& (offs_n[None, :] >= first)", ""),
    "the last split is lost": ("decode", "mask_s = offs_s < used", "mask_s = offs_s < used - 1"),
    "parts that were not stored are joined": (
        "decode",
        "mask_s = offs_s < used",
        "mask_s = offs_s < BLOCK_S",
    ),
    "splits count alike": ("decode", "parts * weight[:, None]", "parts"),
    "all rows of a tile are joined alike": ("decode", "* Tq + row_t) * SPLITS", "* Tq) * SPLITS"),
    "parts are not normalised": ("decode", "acc / tl.where(empty, 1.0, row_sum)[:, None]", "acc"),
    "the first program joins": ("decode", '"acq_rel") == used - 1', '"acq_rel") == 0'),
    "one counter for all tiles": ("decode", "counter_ptr + pid // SPLITS", "counter_ptr"),
    "cache_len past the cache": (
        "decode",
        "tl.minimum(tl.load(len_ptr + pid_b * stride_lb), Tmax)",
        "tl.load(len_ptr + pid_b * stride_lb)",
    ),
    "decoding reads past its part": (
        "decode",
        "end = tl.minimum(begin + per_part * BLOCK_N, cache_len)",
        "end = cache_len",
    ),
    "an empty query is NaN": ("decode", "tl.where(total == 0, 1.0, total)", "total"),
}


@pytest.fixture
def plant() -> Iterator[Callable[..., SimpleNamespace]]:
    """A function that plants one mutation in the kernels of attention and returns the copies' launchers."""
    with ExitStack() as stack:
        yield lambda *mutation: stack.enter_context(planted("attention", mutation))


def failure(launchers: SimpleNamespace, *checks: str) -> str:
    """An empty string if the launchers pass the checks, else the first failure."""

    def run() -> None:
        for name in checks:
            CHECKS[name](launchers)

    return in_a_fork(run)


@pytest.mark.slow
def test_unmodified_kernels_pass(plant: Callable[..., SimpleNamespace]) -> None:
    """Checks that fail for any copy, and so seem to catch every mutant."""
    assert failure(plant("forward", "tl.dot", "tl.dot"), *CHECKS) == ""


@pytest.mark.parametrize("name", FAMOUS)
def test_famous_bugs_are_caught(name: str, plant: Callable[..., SimpleNamespace]) -> None:
    """A bug that shipped in another package and that the suite does not catch."""
    mutation, check = FAMOUS[name]
    assert failure(plant(*mutation), check) != ""


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, plant: Callable[..., SimpleNamespace]) -> None:
    """A mask, a range, a cast or a scale whose loss no check catches."""
    assert failure(plant(*MUTANTS[name]), *CHECKS) != ""
