"""Instruction tuning on forty rows, from the file to the answers that `gpt.sample` prints."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gpt import GPT, DataConfig, TokenData, TrainConfig, sample
from gpt.training.optim import make_optimizers
from kernels import dispatch

STEPS, RATE, BLOCK = 80, 5e-2, 48


def turns(*numbers: int) -> list[dict[str, str]]:
    pairs = [(("user", n), ("assistant", n + 1)) for n in numbers]
    return [{"role": role, "content": str(n)} for pair in pairs for role, n in pair]


ROWS = [
    *({"prompt": f"{chr(c)}>", "completion": chr(c + 1)} for c in range(ord("a"), ord("u"))),
    *({"messages": turns(n)} for n in range(10)),
    *({"messages": turns(n, n * 7 % 10)} for n in range(10, 20)),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenData]:
    """A model that is trained on ROWS, and the rows."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = (str(folder / "chat.jsonl"),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_GPT_CACHE", str(folder / "cache"))
        patch.setattr(dispatch, "interpreting", False)  # the references run, as on any CPU
        config = DataConfig(rows, validation=rows, tokenizer="bpe", bpe_vocab_size=300, pack_documents=True)
        data = TokenData.load(config)

        torch.manual_seed(0)
        model = GPT(vocab_size=data.tokenizer.vocab_size, block_size=BLOCK, n_layer=1, n_head=2, n_embd=32)
        names = {p: name for name, p in model.named_parameters()}
        optimizers = make_optimizers(names, TrainConfig(optimizer="muon", weight_decay=0.0))
        for step in range(STEPS):
            batch = data.batch("train", 16, BLOCK, seed=0, step=step)
            model(batch.inputs, batch.targets, document_start=batch.document_start).backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (1 - step / STEPS)
                optimizer.step()
                optimizer.zero_grad()
        model.save_pretrained(folder / "model", tokenizer=data.tokenizer)
    return folder / "model", data


def test_the_loss_of_the_completions_is_small(tuned: tuple[Path, TokenData]) -> None:
    """Prompts that are trained on, which nothing predicts: the loss then stays above 1."""
    model, data = GPT.from_pretrained(tuned[0]), tuned[1]
    batch = data.batch("validation", 40, BLOCK, seed=1, step=0)
    with torch.no_grad():
        loss = model(batch.inputs, batch.targets, document_start=batch.document_start).item()
    assert loss < 0.05


@pytest.mark.parametrize(
    ("kind", "lines", "answers"),
    [
        ([], [f"{letter}>" for letter in "abcdefghijklmnopqrst"], "bcdefghijklmnopqrstu"),
        (["--chat"], ["13", "1"], ["14", "2"]),
    ],
    ids=["prompts", "chat"],
)
def test_the_answers_are_right_and_end(
    kind: list[str],
    lines: list[str],
    answers: Sequence[str],
    tuned: tuple[Path, TokenData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A prompt with other ids than in training, an answer without an end, or a turn without those before."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    flags = ["--checkpoint", str(tuned[0]), "--greedy", "--max_new_tokens", "8", "--interactive", *kind]
    assert sample.main(flags) == 0
    assert capsys.readouterr() == ("".join(f"{answer}\n" for answer in answers), "")
