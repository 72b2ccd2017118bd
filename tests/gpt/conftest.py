"""Fixtures of all tests of gpt: a cache folder for each test, a text, and a run trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpt.text import TEXT


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FUSED_GPT_CACHE", str(folder))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on the text for 60 steps."""
    from gpt import train  # not at the top: tests/conftest.py chooses the interpreter after this import
    from tests.gpt.training.small_runs import TINY

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    flags = [*TINY, "--max_steps", "60", "--learning_rate", "2e-2", "--batch_size", "8"]
    assert train.main([*flags, "--data", str(folder / "text.txt"), "--out", str(folder / "run")]) == 0
    return folder / "run"
