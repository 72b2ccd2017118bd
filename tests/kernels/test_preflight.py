"""Preflight: planted faults and crashed processes are reported, and verdicts are cached with a full key."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from kernels import Case, dispatch
from kernels import preflight as run_preflight
from kernels.spec import SHORT_DTYPE

preflight = sys.modules["kernels.preflight"]
CPU = torch.device("cpu")
ATTENTION = ("causal_attention", Case({"B": 1, "H": 2, "Tq": 33, "Tk": 33, "D": 16}, {"layout": "qkv"}))
NORM = ("layer_norm", Case({"N": 7, "C": 48}))


@pytest.fixture(autouse=True)
def a_separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_distrusted", {})


def plant(monkeypatch: pytest.MonkeyPatch, op: str, fault: Callable[..., Any]) -> None:
    """Replaces the op that preflight calls by a faulty one; the reference stays."""
    monkeypatch.setitem(preflight.SPECS, op, dataclasses.replace(preflight.SPECS[op], function=fault))


def failed(*cases: tuple[str, Case], dtype: torch.dtype) -> dict[str, str]:
    return run_preflight(cases, CPU, dtype, use_cache=False).failed


class StaleMask(torch.autograd.Function):
    """Dropout whose backward pass recomputes another mask than its forward pass applied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        ctx.p, ctx.seed, ctx.shape = p, seed, x.shape
        return torch.where(kernels.philox.keep_mask(seed, x.shape, p, CPU), x / (1 - p), 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        mask = kernels.philox.keep_mask(ctx.seed + 1, ctx.shape, ctx.p, CPU)
        return torch.where(mask, grad / (1 - ctx.p), 0), None, None


def wrong_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return kernels.reference.causal_attention(q, k, v, scale=1.02 * q.shape[-1] ** -0.5)


def lost_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def zero_weight_gradient(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return kernels.reference.layer_norm(x, weight.detach(), bias) + 0 * weight


def stale_mask(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout_p: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.reference.add_layer_norm(StaleMask.apply(x, dropout_p, seed), residual, weight, bias)


def one_bad_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    out = kernels.reference.causal_attention(q, k, v).clone()
    out[0, 0, 1024] = out[0, 0, 1023].detach()
    return out


class Larger(torch.autograd.Function):
    """The identity, with a gradient that is 10% too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.1


def a_tenth_too_much(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options: Any
) -> torch.Tensor:
    return kernels.reference.linear_cross_entropy(Larger.apply(x), weight, targets, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT_DTYPE.get)
@pytest.mark.parametrize(
    ("fault", "wrong", "op", "case"),
    [
        (wrong_scale, "out", *ATTENTION),
        (lost_mask, "out", *ATTENTION),
        (zero_weight_gradient, "dweight", *NORM),
        (stale_mask, "dx", "add_layer_norm", Case({"N": 7, "C": 48}, {"dropout_p": 0.3, "seed": 2})),
        (a_tenth_too_much, "dx", "linear_cross_entropy", Case({"N": 65536, "C": 16, "V": 65})),
        (one_bad_row, "out", "causal_attention", Case({"B": 1, "H": 1, "Tq": 1025, "Tk": 1025, "D": 16})),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_planted_faults_are_caught(
    fault: Callable[..., Any],
    wrong: str,
    op: str,
    case: Case,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong kernel that passes preflight, or that fails for another reason than its fault."""
    plant(monkeypatch, op, fault)
    problems = failed((op, case), dtype=dtype)
    assert list(problems) == [op]
    assert problems[op].startswith(f"{wrong}: FAILED max ")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT_DTYPE.get)
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    """A right kernel that is refused, or a report without errors and speed-ups."""
    report = run_preflight([ATTENTION, NORM], CPU, dtype, use_cache=False)
    assert report.ok, str(report)
    for row in report.rows:
        assert row.forward is not None
        assert row.backward is not None
        assert row.speedup is not None
        assert 0 < row.forward <= 1
    assert str(report).count(" ok") == 2


@pytest.mark.kernels
def test_a_failed_op_runs_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that still runs after its preflight failed, or another op that loses its kernel."""
    plant(monkeypatch, "causal_attention", lost_mask)
    run_preflight([ATTENTION, NORM], CPU, torch.float32, use_cache=False).enforce()
    q = torch.randn(1, 2, 5, 16)
    with kernels.model_backend("triton"):
        choice = kernels.explain("causal_attention", q, q, q)
        assert choice.backend == "reference"
        assert choice.reason.startswith("preflight failed: out: FAILED")
        assert kernels.explain("layer_norm", torch.randn(3, 8), torch.ones(8)).backend == "triton"


def test_ops_without_a_kernel_are_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preflight that fails because Triton is missing, or that reports an op as checked."""
    monkeypatch.setattr(dispatch, "triton_version", None)
    report = run_preflight([NORM], CPU, torch.float32, use_cache=False)
    assert report.ok
    assert report.rows[0].skipped == "triton is not installed"
    assert "reference: triton is not installed" in str(report)


def test_verdicts_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is repeated needlessly, or a verdict reused for other sources, shapes or dtypes."""
    report = run_preflight([NORM], CPU, torch.float32)
    assert not report.cached
    assert (
        dataclasses.replace(run_preflight([NORM], CPU, torch.float32), seconds=report.seconds, cached=False)
        == report
    )
    assert run_preflight([NORM], CPU, torch.float32).cached
    assert not run_preflight([NORM], CPU, torch.float16).cached
    assert not run_preflight([("layer_norm", Case({"N": 8, "C": 48}))], CPU, torch.float32).cached
    monkeypatch.setattr(preflight, "_sources", lambda: "changed")
    assert not run_preflight([NORM], CPU, torch.float32).cached


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"rows": [{"op": "layer_no',
        b"[]",
        b'{"rows": 1}',
        b'{"rows": []}',
        b'{"rows": [{"op": "layer_norm", "case": "N7-C48", "colour": 1}]}',
        b'{"rows": [{"op": "gelu_ffn", "case": "N7-C48"}]}',
        b'{"rows": [{"op": "layer_norm", "case": "N7-C48", "forward": "0.1"}]}',
        b'{"rows": [{"op": "layer_norm", "case": "N7-C48", "skipped": 1}]}',
        b'{"rows": [{"op": "layer_norm", "case": "N7-C48", "problem": "x"}]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_cache_file_is_replaced(content: bytes, tmp_path: Path) -> None:
    """A truncated or foreign cache file that ends the run with a traceback, or whose content is used."""
    report = run_preflight([NORM], CPU, torch.float32)
    (stored,) = (tmp_path / "preflight").iterdir()
    stored.write_bytes(content)
    repeated = run_preflight([NORM], CPU, torch.float32)
    assert not repeated.cached
    assert [row.op for row in repeated.rows] == [row.op for row in report.rows]
    assert run_preflight([NORM], CPU, torch.float32).cached


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only home folder, or a user without one, that makes preflight fail."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "file"))
    assert run_preflight([NORM], CPU, torch.float32).ok

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "FUSED_GPT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert run_preflight([NORM], CPU, torch.float32).ok


@pytest.mark.kernels
def test_failures_are_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that is still reported from the cache after its cause is fixed."""
    plant(monkeypatch, "layer_norm", zero_weight_gradient)
    assert not run_preflight([NORM], CPU, torch.float32).ok
    assert not run_preflight([NORM], CPU, torch.float32).cached


CRASH = """
import os, sys, kernels
from kernels.registry import SPECS
from kernels import preflight
module = sys.modules["kernels.preflight"]
examine = module._examine
def crash(spec, case, device, dtype, prefer):
    if spec.name == "causal_attention":
        os.kill(os.getpid(), 11)
    return examine(spec, case, device, dtype, prefer)
module._examine = crash
module.serve()
"""

CRASH_TOGETHER = CRASH.replace(
    "module.serve()",
    """
import io
order = sys.stdin.read()
if '"together": true' in order:
    os.kill(os.getpid(), 11)
sys.stdin = io.StringIO(order)
module.serve()
""",
)


def test_a_crashed_process_is_named_and_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal memory access that ends the run, or that keeps later ops from being checked."""
    monkeypatch.setattr(preflight, "CHILD", [sys.executable, "-c", CRASH])
    report = run_preflight([NORM, ATTENTION, NORM], CPU, torch.float32, isolate=True, use_cache=False)
    assert [row.op for row in report.rows] == ["layer_norm", "causal_attention", "layer_norm"]
    assert report.failed == {"causal_attention": "its process ended with exit code -11: no message"}


def test_a_crash_while_all_ops_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that crashes on one op while it compiles all of them, which is blamed on the first op."""
    monkeypatch.setattr(preflight, "CHILD", [sys.executable, "-c", CRASH_TOGETHER])
    report = run_preflight([NORM, ATTENTION], CPU, torch.float32, isolate=True, use_cache=False)
    assert [row.op for row in report.rows] == ["layer_norm", "causal_attention"]
    assert list(report.failed) == ["causal_attention"]


def test_the_child_imports_the_package_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child process that cannot import a package that is only on the parent's sys.path."""
    monkeypatch.chdir(tmp_path)
    report = run_preflight([NORM], CPU, torch.float32, isolate=True, use_cache=False)
    assert report.ok, str(report)


def test_cases_are_sent_to_the_child_unchanged() -> None:
    """An option that has another type in the child process."""
    case = Case(
        {"N": 3, "C": 8}, {"parameters": torch.float32, "dropout_p": 0.5, "bias": False, "layout": "qkv"}
    )
    assert preflight._decode(json.loads(json.dumps(preflight._encode(case)))) == case


def test_an_unknown_op_is_refused() -> None:
    """A misspelt op that is silently skipped."""
    with pytest.raises(
        ValueError, match=r"^preflight: 'softmax' is not an op, expected one of add_layer_norm"
    ):
        run_preflight([("softmax", Case({}))], CPU, torch.float32)
