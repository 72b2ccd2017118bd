"""Preflight of a model and of a training run: the checked shapes, and the effect of a failing kernel."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt.training.trainer
import kernels
from gpt import GPT, GPTConfig
from gpt.preflight import cases
from gpt.train import main
from kernels import dispatch

preflight = sys.modules["kernels.preflight"]
USED = set(preflight.SPECS) - {"causal_attention"}  # the model's attention takes the packed projection
MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_distrusted", {})
    monkeypatch.setattr(gpt.training.trainer, "SAMPLE_TOKENS", 5)


def without_mask(qkv: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.fixture
def lost_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(preflight.SPECS["causal_attention_qkv"], function=without_mask)
    monkeypatch.setitem(preflight.SPECS, "causal_attention_qkv", broken)


def train(tmp_path: Path, *flags: str) -> int:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    model = [f"--{name}={value}" for name, value in MODEL.items()]
    steps = ["--max_steps=2", "--batch_size=2", "--warmup_steps=0", "--eval_batches=1"]
    return main([f"--data={text}", f"--out={tmp_path / 'run'}", "--device=cpu", *model, *steps, *flags])


@pytest.mark.parametrize(("norm", "residual"), [("pre", True), ("post", True), ("pre", False)])
def test_every_op_is_checked_as_the_model_calls_it(
    norm: str, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op that preflight omits, or checks with other sizes, options, dtypes or strides."""
    config = GPTConfig(
        vocab_size=37,
        block_size=12,
        n_layer=2,
        n_head=2,
        n_embd=16,
        dropout=0.1,
        bias=False,
        activation="gelu",
        norm=norm,
        residual=residual,
    )
    expected = dict(cases(config, 3, 12, torch.float32))
    seen: dict[str, dict[str, Any]] = {}
    for op in preflight.SPECS:
        original = getattr(kernels, op)

        @functools.wraps(original)
        def spy(*args: Any, _op: str = op, _original: Any = original, **kwargs: Any) -> Any:
            names = list(preflight.SPECS[_op].arguments)
            seen.setdefault(_op, dict(zip(names, args, strict=False)) | kwargs)
            return _original(*args, **kwargs)

        monkeypatch.setattr(kernels, op, spy)
    model = GPT(config, use_triton=False)
    model.dropout_seed = 1
    idx = torch.randint(37, (3, 12))
    model(idx, idx)
    model.generate(idx[:, :4], 8)
    model.generate(torch.zeros(kernels.DECODE_BATCH + 1, 4, dtype=torch.int64), 2)
    assert seen.keys() == expected.keys()
    for op, case in expected.items():
        inputs = preflight.SPECS[op].make_inputs(case, torch.float32, torch.device("cpu"), torch.Generator())
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and op != "decode_attention" and value.ndim > 0:
                called = seen[op][name]
                assert (called.numel(), called.dtype) == (value.numel(), value.dtype), (op, name)
                if op == "causal_attention_qkv":
                    assert called.stride() == value.stride(), (op, name)
            if value is None:
                assert seen[op].get(name) is None, (op, name)
        if "dropout_p" in inputs:
            assert inputs["dropout_p"] == seen[op]["dropout_p"]


def test_a_model_checks_itself() -> None:
    """A report that omits an op, or that fails for correct kernels."""
    report = GPT(vocab_size=33, **MODEL).preflight(2, 16)
    assert report.checked == []  # "auto" runs the references on a CPU
    model = GPT(vocab_size=33, **MODEL, dropout=0.1, use_triton=True)
    report = model.preflight(2, 16)
    assert report.ok, str(report)
    assert sorted(report.checked) == sorted(USED)


def test_a_failing_kernel_falls_back_with_a_warning(
    tmp_path: Path, lost_mask: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that uses a wrong kernel, that stops without --strict, or that does not warn."""
    assert train(tmp_path, "--use_triton=true") == 0
    printed = capsys.readouterr()
    assert "PREFLIGHT FAILED, the references run instead: causal_attention_qkv: out: FAILED" in printed.err
    assert "causal_attention_qkv" in printed.out
    assert dispatch._distrusted.keys() == {"causal_attention_qkv"}
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["final"] is True


def test_strict_ends_the_run(tmp_path: Path, lost_mask: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A --strict run that trains, has another exit code, or leaves a folder."""
    assert train(tmp_path, "--use_triton=true", "--strict") == 3
    assert "--strict: preflight failed, nothing was trained: causal_attention_qkv" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_strict_accepts_correct_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A --strict run that ends although its kernels are correct."""
    assert train(tmp_path, "--use_triton=true", "--strict") == 0
    assert "FAILED" not in capsys.readouterr().out


def test_references_need_no_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on references that does not print so, or that spends time on a check."""
    assert train(tmp_path) == 0
    assert (
        "kernels: none, the references run (auto: on a CPU the interpreter only serves tests)"
        in capsys.readouterr().out
    )
