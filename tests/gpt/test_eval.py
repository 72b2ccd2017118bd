"""`gpt.eval`: loss, perplexity and bits per byte of a text."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt import GPT, BPETokenizer, InputError, eval
from gpt.eval import evaluate
from gpt.weights.checkpoint import save_model
from tests.gpt.text import TEXT

BYTES = BPETokenizer({bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257})


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(vocab_size=258, block_size=8, n_layer=1, n_head=1, n_embd=16, device="cpu").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("length", [2, 8, 9, 10, 40, 41, 43])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_every_token_counts_once_with_its_context(length: int, stride: int, model: GPT) -> None:
    """Tokens counted twice or not at all, or with less context than the stride leaves."""
    ids = np.asarray(BYTES.encode(TEXT)[:length], np.uint16)
    nats = 0.0
    for position in range(1, length):
        start = 0 if position <= 8 else -(-(position - 8) // stride) * stride
        logits = model(torch.from_numpy(ids[start:position].astype(np.int64))[None])[0, -1]
        nats += F.cross_entropy(logits, torch.tensor(int(ids[position]))).item()
    found = evaluate(model, ids, BYTES, stride=stride, batch_size=3)
    assert found.tokens == length - 1
    assert found.loss == pytest.approx(nats / (length - 1), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    size = len(BYTES.decode_bytes(ids[1:].tolist()))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_wrong_settings(model: GPT) -> None:
    """A stride that leaves tokens out, or a text of nothing."""
    ids = np.zeros(20, np.uint16)
    for stride in (0, 9):
        with pytest.raises(InputError, match=rf"stride is {stride}, expected 1 to 8 \(block_size\)"):
            evaluate(model, ids, BYTES, stride=stride)
    with pytest.raises(InputError, match="has 1 tokens, expected at least 2"):
        evaluate(model, ids[:1], BYTES)


def test_command(model: GPT, tmp_path: Path, capsys: Any) -> None:
    """Another tokenizer or text than asked for, or numbers that are not the library's."""
    save_model(model, tmp_path / "m", BYTES)
    (tmp_path / "text.txt").write_text(TEXT[:300])
    flags = ["--checkpoint", str(tmp_path / "m"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    assert eval.main([*flags, "--stride", "2"]) == 0
    printed = capsys.readouterr().out
    found = evaluate(model, np.asarray(BYTES.encode(TEXT[:300]), np.uint16), BYTES, stride=2)
    assert printed == (
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:,.2f}, "
        f"{found.bits_per_byte:.4f} bits per byte, over {found.tokens} tokens\n"
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
