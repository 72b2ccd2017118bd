"""`python -m gpt.info`: a model's parameters, FLOPs and training memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpt import info
from gpt.weights.checkpoint import load_model


def test_the_command_prints_counts_and_costs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts that differ from the model's, or costs by another formula than the printed one."""
    assert info.main(["gpt2", "--tie_weights", "false", "--qkv-bias", "false"]) == 0
    printed = capsys.readouterr().out
    for part in ("39,383,808", "38,597,376", "786,432", "7,085,568", "1,536", "163,009,536", "621.83"):
        assert part in printed
    assert info.main(["gpt2"]) == 0
    assert "855.2 MFLOP per token" in capsys.readouterr().out
    assert info.main([str(trained)]) == 0
    assert f"{load_model(trained).num_parameters():,}" in capsys.readouterr().out
    for flags, words in (("gtp2", "'gtp2' 'gpt2'"), ("", "PRESET|DIR"), ("gpt2 more", "'more'")):
        assert info.main(flags.split()) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"gpt\.info: .*\n", error)
        assert all(word in error for word in words.split())
