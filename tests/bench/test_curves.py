"""Training with kernels and with plain PyTorch, side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import curves
from bench.contestants import OURS
from bench.curves import OTHER, Curve, compare
from bench.record import load
from bench.train import PLAIN
from gpt.cli import run_command
from gpt.config import GPTConfig
from kernels import dispatch

TINY = GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to train on; the presets are tiny, and no kernel is interpreted."""
    monkeypatch.setattr(GPTConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(dispatch, "interpreting", False)
    path = tmp_path / "text.txt"
    path.write_text("a line of text, and another one\n" * 60, encoding="utf-8")
    return path


def test_both_backends_train_on_the_same_data(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs whose data, parameters or rates differ, or a seed that changes nothing."""
    image, path = text.with_name("curves.png"), text.with_name("curves.json")
    flags = ["--device", "cpu", "--steps", "21", "--batch_size", "2", "--data", str(text)]
    assert run_command("bench.curves", curves.main, [*flags, "--out", str(image), "--json", str(path)]) == 0
    report = load(path)
    assert report.complete
    assert [row.contestant for row in report.rows] == [OURS, PLAIN, OTHER]
    assert all(row.tokens == 32 and row.seconds for row in report.rows)
    gaps = report.notes[-1]
    assert f"{OURS} 0.0000" in gaps
    assert f"{OTHER} 0.0000" not in gaps
    assert image.read_bytes().startswith(b"\x89PNG")


def test_differences_are_of_means() -> None:
    """A gap between single steps, or one that ignores its sign."""
    flat, spiky = Curve([2.0] * 40, 1.0, None), Curve([2.0] * 20 + [1.0, 2.0] * 10, 1.0, None)
    last, gaps = compare({OURS: spiky, PLAIN: flat, OTHER: flat})
    assert f"{OURS} 1.5000, {PLAIN} 2.0000" in last
    assert f"{OURS} 0.5000, {OTHER} 0.0000" in gaps


@pytest.mark.parametrize("flag", ["--steps", "--batch_size"])
def test_sizes_are_checked(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a timed step, or without a sequence."""
    assert run_command("bench.curves", curves.main, ["--device", "cpu", flag, "0"]) == 2
    assert "expected more than" in capsys.readouterr().err
