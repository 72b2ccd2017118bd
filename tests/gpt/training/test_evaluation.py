"""How well a model predicts a text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt import GPT, InputError
from gpt.training.evaluation import evaluate
from tests.gpt.data.loading import BINS
from tests.gpt.models import BYTES, random_byte_model
from tests.gpt.text import TEXT


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_byte_model()


@pytest.mark.parametrize("length", [2, 8, 9, 10, 40, 41, 43])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_every_token_counts_once_with_its_context(length: int, stride: int, model: GPT) -> None:
    """A target counted twice or left out, or one with less context than the stride guarantees."""
    ids = np.asarray(BYTES.encode(TEXT)[:length], np.uint16)
    nats = 0.0
    for position in range(1, length):
        start = 0 if position <= 8 else -(-(position - 8) // stride) * stride
        logits = model(torch.from_numpy(ids[start:position].astype(np.int64))[None])[0, -1]
        nats += F.cross_entropy(logits, torch.tensor(int(ids[position]))).item()

    evaluation = evaluate(model, ids, BYTES, stride=stride, batch_size=3)
    assert evaluation.tokens == length - 1
    assert evaluation.loss == pytest.approx(nats / (length - 1), rel=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))
    size = len(BYTES.decode_bytes(ids[1:].tolist()))
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_only_targets_count(model: GPT) -> None:
    """The loss of prompts in that of the answers, or answers that are left out."""
    ids = np.asarray(BYTES.encode(TEXT)[:43], np.uint16)
    answers = np.arange(43) % 7 > 3
    every, own, rest = (
        evaluate(model, ids, BYTES, targets=targets, stride=3) for targets in (None, answers, ~answers)
    )
    assert [every.tokens, own.tokens, rest.tokens] == [42, answers[1:].sum(), (~answers[1:]).sum()]
    assert own.loss * own.tokens + rest.loss * rest.tokens == pytest.approx(every.loss * 42, rel=1e-5)
    size = len(BYTES.decode_bytes(ids[answers].tolist()))
    assert own.bits_per_byte == pytest.approx(own.loss * own.tokens / math.log(2) / size)
    with pytest.raises(InputError, match="no tokens to predict"):
        evaluate(model, ids, BYTES, targets=np.zeros(43, bool))


def test_the_end_of_a_document_has_no_bytes() -> None:
    """Bits per byte of a text that counts the name of <|endoftext|>, or that divides by no bytes."""
    model = GPT({"vocab_size": 257, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}, device="cpu")
    evaluation = evaluate(model.eval(), np.asarray([*b"abc", 256, *b"de", 256], np.uint16), BINS)
    assert evaluation.tokens == 6
    assert evaluation.bits_per_byte == pytest.approx(6 * evaluation.loss / math.log(2) / 4)
    assert evaluate(model, np.asarray([97, 256], np.uint16), BINS).bits_per_byte == math.inf


def test_wrong_settings_are_refused(model: GPT) -> None:
    """A stride that leaves tokens out, or a text without targets, that is accepted."""
    ids = np.zeros(20, np.uint16)
    for stride in (0, 9):
        with pytest.raises(InputError, match=rf"stride is {stride}, expected 1 to 8 \(block_size\)"):
            evaluate(model, ids, BYTES, stride=stride)
    with pytest.raises(InputError, match="has 1 tokens, expected at least 2"):
        evaluate(model, ids[:1], BYTES)
