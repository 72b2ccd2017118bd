"""`python -m gpt.eval`: what it prints and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gpt import eval
from gpt.training.evaluation import evaluate
from gpt.weights.checkpoint import save_model
from tests.gpt.models import BYTES, random_byte_model
from tests.gpt.text import TEXT


def test_the_command_prints_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another tokenizer, text or stride than requested, or wrong input that raises a traceback."""
    model = random_byte_model()
    save_model(model, tmp_path / "m", BYTES)
    (tmp_path / "text.txt").write_text(TEXT[:300])
    flags = ["--checkpoint", str(tmp_path / "m"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]

    assert eval.main([*flags, "--stride", "2"]) == 0
    printed = capsys.readouterr().out
    expected = evaluate(model, np.asarray(BYTES.encode(TEXT[:300]), np.uint16), BYTES, stride=2)
    assert printed == (
        f"loss {expected.loss:.4f} nats per token, perplexity {expected.perplexity:,.2f}, "
        f"{expected.bits_per_byte:.4f} bits per byte, over {expected.tokens} tokens\n"
    )

    for wrong, words in (
        (flags[:2], "--data is not given"),
        (flags[2:], "--checkpoint is not given"),
        ([*flags, "--stride", "9"], "stride is 9"),
        ([*flags, "--batch_size", "0"], "--batch_size is 0"),
        ([*flags, "--dtype", "float16"], "float16"),
        (["--checkpoint", str(tmp_path), *flags[2:]], "expected"),
    ):
        assert eval.main(wrong) == 2
        assert re.fullmatch(rf"gpt\.eval: .*{words}.*\n", capsys.readouterr().err)
