"""Rows with instructions: which pieces are trained on, the template of a conversation, and damaged rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gpt import DataConfig, InputError, TokenData
from gpt.data.dataset import IGNORED, save_bin
from gpt.data.documents import Piece
from gpt.data.instructions import conversation, instruction
from gpt.data.tokenizers import BPETokenizer

USER, ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_completion_is_trained_on_and_its_prompt_is_not() -> None:
    """A prompt among the targets, or text that is not in the row."""
    row = {"id": 3, "prompt": "2+2=", "completion": "4"}
    assert instruction("data: a.jsonl:1", row) == [
        Piece("2+2=", trained=False),
        Piece("4<|endoftext|>", trained=True),
    ]
    assert instruction("data: a.jsonl:1", {"text": "2+2=4"}) is None


def test_the_answers_of_a_conversation_and_what_ends_them_are_trained_on() -> None:
    """A user's turn among the targets, or an answer whose end is not learnt."""
    row = {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}
    assert instruction("data: a.jsonl:1", row) == [
        Piece("### System:\nBe brief.\n\n### User:\nHi.\n\n### Assistant:\n", trained=False),
        Piece("Hello!\n\n### User:\n", trained=True),
        Piece("Hi.\n\n### Assistant:\n", trained=False),
        Piece("Hello!<|endoftext|>", trained=True),
    ]


def test_an_open_conversation_begins_as_the_one_that_was_trained_on() -> None:
    """Another template while sampling than in training."""
    trained = instruction("data: a.jsonl:1", {"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert trained is not None
    assert conversation("", [("Hi.", "Hello!"), ("Hi.", None)]) == trained[:-1]


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"prompt": 3, "completion": "4"}, "prompt is 3, expected a text"),
    "completion": ({"prompt": "3", "completion": None}, "completion is None, expected a text"),
    "list": ({"messages": "Hi."}, "messages is 'Hi.', expected a list of messages"),
    "empty": ({"messages": []}, r"messages is \[\], expected a list of messages"),
    "message": ({"messages": ["Hi."]}, r"messages\[0\] is 'Hi.', expected an object"),
    "role": ({"messages": [USER, USER]}, r"messages\[1\] has the role 'user', expected 'assistant'"),
    "no role": ({"messages": [{}]}, r"messages\[0\] has the role None, expected 'user'"),
    "late system": (
        {"messages": [USER, SYSTEM]},
        r"messages\[1\] has the role 'system', expected 'assistant'",
    ),
    "content": ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is None, expected a text"),
    "open": (
        {"messages": [USER, ASSISTANT, USER]},
        "messages ends with the role 'user', expected 'assistant'",
    ),
    "system": ({"messages": [SYSTEM]}, "messages ends with the role 'system', expected 'assistant'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_row_is_refused(case: str) -> None:
    """A traceback, or a message that does not lead to the row and the field."""
    row, message = DAMAGED[case]
    with pytest.raises(InputError) as raised:
        instruction("data: a.jsonl:7", row)
    assert re.match(f"data: a.jsonl:7: {message}", str(raised.value))
    assert "\n" not in str(raised.value)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [{"prompt": f"{n} and one make ", "completion": f"{n + 1}"} for n in range(20)]
ROWS += [{"messages": [SYSTEM, {"role": "user", "content": f"Say {n}."}, ASSISTANT]} for n in range(20)]


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
@pytest.mark.parametrize("pack", [False, True])
def test_only_answers_are_targets(tokenizer: str, pack: bool, tmp_path: Path) -> None:
    """A prompt that has a gradient, an answer that has none, or one that ends without <|endoftext|>."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = DataConfig((path,), tokenizer=tokenizer, bpe_vocab_size=300, pack_documents=pack)
    data = TokenData.load(config)
    answers = [f"{n + 1}<|endoftext|>" for n in range(20)] + ["Hello!<|endoftext|>"] * 20
    block_size = 4096 if pack else 16
    windows = [*data.windows("train", 99, block_size), *data.windows("validation", 99, block_size)]
    targets = [i for batch in windows for i in batch.targets[batch.targets != IGNORED].tolist()]
    text = data.tokenizer.decode(targets)
    assert sorted(text.split("<|endoftext|>")) == sorted(
        a.removesuffix("<|endoftext|>") for a in [*answers, ""]
    )


def test_a_prompt_has_the_same_ids_as_alone(tmp_path: Path) -> None:
    """A prompt tokenized together with its completion: gpt.sample then gives the model other ids."""
    rows = [{"text": "apples apples apples"}] * 9 + [{"prompt": "an apple", "completion": "s grow"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = TokenData.load(DataConfig((path,), validation=(path,), tokenizer="bpe", bpe_vocab_size=270))
    tokenizer = data.tokenizer
    alone = [*tokenizer.encode("an apple"), *tokenizer.encode("s grow")]
    assert tokenizer.encode("an apples grow") != alone
    assert data.tokens("train")[-len(alone) - 1 : -1].tolist() == alone


def test_windows_of_instructions_begin_with_a_row(tmp_path: Path) -> None:
    """Completions whose prompt is before the window, or a last row that is in no window."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = TokenData.load(DataConfig((path,), validation=(path,), tokenizer="char", pack_documents=True))
    batches = [data.batch("train", 64, 80, seed=0, step=step) for step in range(8)]
    texts = [data.tokenizer.decode(row) for batch in batches for row in batch.inputs.tolist()]
    assert all(re.match(r"\d+ and one|### System", text) for text in texts)
    prompts = {text.partition("<")[0] for text in texts}
    assert len(prompts) == 40

    (batch,) = data.windows("train", 99, 80)
    answers = [data.tokenizer.decode(row[row != IGNORED].tolist()) for row in batch.targets]
    assert all(re.match(r"\d|H|$", answer) for answer in answers), answers


def test_learnt_byte_pairs_have_no_end_of_text(tmp_path: Path) -> None:
    """Tokens wasted on pieces of the name <|endoftext|>, which is a token of its own."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    tokenizer = TokenData.load(DataConfig((path,), tokenizer="bpe", bpe_vocab_size=400)).tokenizer
    assert isinstance(tokenizer, BPETokenizer)
    assert not [token for token in tokenizer.ranks if b"|" in token and len(token) > 1]


def test_instructions_are_not_saved_without_their_masks(tmp_path: Path) -> None:
    """Prompts that are trained on because a .bin file does not mark them."""
    data = TokenData.load(DataConfig((write_rows(tmp_path / "rows.jsonl", ROWS),)))
    with pytest.raises(InputError, match="save_bin: data has instructions, expected text"):
        save_bin(data, tmp_path / "bins")
    assert not (tmp_path / "bins").exists()


@pytest.mark.parametrize("row", [{"prompt": "3", "completion": 4}, {"prompt": "3"}, {"messages": [USER]}])
def test_a_damaged_row_is_named_by_file_and_line(row: dict[str, Any], tmp_path: Path) -> None:
    """A row that is left out silently, or that ends training in a traceback."""
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": "plain"}, row])
    with pytest.raises(InputError, match=rf"^data: {re.escape(path)}:42.*, expected .*") as raised:
        TokenData.load(DataConfig((path,)))
    assert "\n" not in str(raised.value)


def test_instructions_are_read_from_parquet(tmp_path: Path) -> None:
    """Columns that are not read because they are not the field of a text."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for number, rows in enumerate((ROWS[:20], ROWS[20:])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
    data = TokenData.load(DataConfig((str(tmp_path),)))
    expected = TokenData.load(DataConfig((write_rows(tmp_path / "rows.jsonl", ROWS),)))
    assert sorted(data.tokenizer.decode(data.all_tokens())) == sorted(
        expected.tokenizer.decode(expected.all_tokens())
    )
