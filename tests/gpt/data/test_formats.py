"""Rows of .jsonl, .parquet and saved data sets; the end of a document; masked targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt import InputError, TokenData
from gpt.data import formats
from gpt.data.corpus import Corpus
from gpt.data.dataset import IGNORED, USUAL
from gpt.data.documents import Document, Piece
from gpt.data.sources import Source
from gpt.data.token_files import cached_tokens
from tests.gpt.data.loading import BINS, joined, load, write
from tests.gpt.text import TEXT

END = "<|endoftext|>"


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """The path of a tokenizer with one token per byte, and <|endoftext|>."""
    BINS.save(tmp_path / "bytes")
    return str(tmp_path / "bytes")


ROWS = [{"text": f"{i}: {TEXT[9 * i : 9 * i + 9]}", "id": i} for i in range(40)]


def test_rows_are_documents(tmp_path: Path, tokenizer: str) -> None:
    """Rows that run into each other, another field than asked for, or a row in both splits."""
    path = jsonl(tmp_path / "rows.jsonl", *ROWS)
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n \n", 1), encoding="utf-8")
    data = load(path, tokenizer=tokenizer, pack_documents=True)
    splits = [data.tokenizer.decode(data.tokens(s).tolist()).split(END) for s in ("train", "validation")]
    assert [split.pop() for split in splits] == ["", ""]
    train, validation = splits
    texts = [row["text"] for row in ROWS]
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train]
    begins = [0, *np.cumsum([len(text) + 1 for text in train + validation])[:-1]]
    assert data._parts["train"].documents.tolist() == begins

    renamed = jsonl(tmp_path / "other.jsonl", *({"body": row["text"]} for row in reversed(ROWS)))
    other = load(renamed, tokenizer=tokenizer, text_field="body")
    assert sorted(data.tokenizer.decode(other.tokens("validation").tolist()).split(END)[:-1]) == sorted(
        validation
    )


def test_a_document_ends_once(tmp_path: Path, tokenizer: str) -> None:
    """The name of <|endoftext|> in a text that is spelt in bytes, or a document that ends twice."""
    write(tmp_path, a=f"one{END}two{END}")
    data = load(tmp_path / "a.txt", tokenizer=tokenizer, pack_documents=True)
    assert data.all_tokens().tolist() == [*b"one", 256, *b"two", 256]
    assert data._parts["train"].documents.tolist() == [0, 4]
    write(tmp_path, b="end")
    assert load(tmp_path / "b.txt", tokenizer=tokenizer).all_tokens().tolist() == [*b"end", 256]
    assert joined(load(tmp_path / "a.txt")) == f"one{END}two{END}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ("\xff", "is not JSON .*utf-8"),
        ("[" * 100_000, "is not JSON .*recursion"),
        ('{"text": ' + "1" * 5000 + "}", "is not JSON .*integer"),
        ('{"text": 1}', "has 1 as 'text', expected a text"),
        ('{"text": ["a"]}', r"has \['a'\] as 'text', expected a text"),
        ('{"body": "a"}', r"has the fields \['body'\], expected 'text' among them \(--text_field names"),
        ('{"text": "a\\ud800"}', r"has the lone surrogate U\+D800 at character 1, expected Unicode text"),
        ("x" * 101, "has more than 100 bytes, the most of a line"),
    ],
)
def test_a_wrong_row_is_named(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is left out without a word, a traceback, or a message without the file and the line."""
    if message.startswith("has more"):
        monkeypatch.setattr(formats, "LINE_LIMIT", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n', encoding="latin-1")
    with pytest.raises(InputError, match=rf"^data: {path}:3 {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    """Empty rows that end the run, or that are left out without a word."""
    path = jsonl(tmp_path / "rows.jsonl", {"text": ""}, *ROWS, {"text": None})
    with pytest.warns(UserWarning, match=r"^data: skipped 2 of 42 rows of rows\.jsonl: empty$"):
        load(path)
    with pytest.warns(UserWarning, match="empty"), pytest.raises(InputError, match="has no text"):
        load(jsonl(path, {"text": ""}))


def test_equal_rows_are_in_one_split(tmp_path: Path) -> None:
    """A row that is validated on after training on its copy."""
    path = jsonl(tmp_path / "rows.jsonl", *ROWS, *reversed(ROWS))
    data = load(path, pack_documents=True)
    splits = [data.tokenizer.decode(data.tokens(split).tolist()) for split in ("train", "validation")]
    for row in ROWS:
        assert sorted(split.count(row["text"]) for split in splits) == [0, 2]


def test_rows_and_texts_are_split_alike(tmp_path: Path) -> None:
    """A corpus of both whose validation split has rows alone, or has tokens that are trained on too."""
    jsonl(tmp_path / "rows.jsonl", *ROWS)
    write(tmp_path, text="#" * 200 + "=" * 50)
    data = load(tmp_path)
    train, validation = (data.tokenizer.decode(data.tokens(s).tolist()) for s in ("train", "validation"))
    assert train.endswith("#" * 200 + "=" * 25)
    assert validation.startswith("=" * 25)
    for row in ROWS:
        assert [row["text"] in train, row["text"] in validation].count(True) == 1
    assert sum(row["text"] in validation for row in ROWS) == 4
    whole = load(tmp_path, validation=(str(tmp_path / "rows.jsonl"),))
    assert len(whole.tokens("train")) == len(train) + len(validation)


def test_rows_are_held_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of rows that has to fit in memory."""
    alive = most = 0

    class Counted(Document):
        def __new__(cls, *args: Any) -> Counted:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, *args)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(formats, "Document", Counted)
    load(jsonl(tmp_path / "rows.jsonl", *ROWS))
    assert most < 5


def test_pieces_that_are_not_trained_on_are_masked(tmp_path: Path) -> None:
    """A prompt that the model learns to predict, or a completion or its end that it does not."""
    rows = [
        Document(f"data: {i}", [Piece(f"ask {i}", False), Piece(f" say {i}"), Piece("!", False), Piece("?")])
        for i in range(5)
    ] + [Document("data: 5", [Piece("no answer", False)])]
    corpus = Corpus([Source("rows", lambda: rows, rows=True)], USUAL, characters=False)
    tokens = cached_tokens(corpus, BINS, "pieces", USUAL)
    again = cached_tokens(corpus, BINS, "pieces", USUAL)
    for a, b in zip(tokens, again, strict=True):
        assert np.array_equal(a, b)

    data = TokenData(
        tokens.ids[: tokens.cut], BINS, validation=tokens.ids[tokens.cut :], untrained=tokens.untrained
    )
    assert sorted("".join(BINS.decode(data.all_tokens()[data.all_targets()])).split(END)) == [
        "",
        *(f" say {i}?" for i in range(5)),
    ]
    predicted: list[str] = []
    for split in ("train", "validation"):
        for batch in data.windows(split, 4, 10):
            predicted += [BINS.decode([b]) for b in batch.targets.flatten().tolist() if b != IGNORED]
    answers = sorted("".join(predicted).split(END))
    assert answers == ["", *sorted(f" say {i}?" for i in range(5))]
    assert sum(len(b) for _, b in [*data._pairs("train"), *data._pairs("validation")]) == len(predicted)


def test_parquet_and_arrow_hold_rows(tmp_path: Path, tokenizer: str) -> None:
    """Rows that differ from those of the same .jsonl, or a damaged file that ends in a traceback."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = arrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    with arrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    expected = load(jsonl(tmp_path / "rows.jsonl", *ROWS), tokenizer=tokenizer)
    for name in ("rows.parquet", "rows.arrow"):
        assert joined(load(tmp_path / name, tokenizer=tokenizer)) == joined(expected)
        with pytest.raises(
            InputError, match=rf"{name} has the fields \['text', 'id'\], expected 'body' among"
        ):
            load(tmp_path / name, text_field="body")
        with pytest.raises(InputError, match=rf"{name}: row 1 has 0 as 'id', expected a text"):
            load(tmp_path / name, text_field="id")
        content = (tmp_path / name).read_bytes()
        for damaged in (b"", content[:-9], content[: len(content) // 2], b"PAR1" + bytes(60)):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=rf"^data: .*{name} .*") as caught:
                load(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback where pyarrow is not installed."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"rows\.parquet needs pyarrow .*, expected it installed"):
        load(tmp_path / "rows.parquet")


def saved(folder: Path, texts: dict[str, list[str]]) -> Path:
    """Writes what `save_to_disk` of `datasets` writes for several splits."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for split, rows in texts.items():
        (folder / split).mkdir(parents=True)
        table = arrow.table({"text": rows})
        with arrow.ipc.new_stream(folder / split / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        (folder / split / "cache-1.arrow").write_bytes(b"of a map that is not part of the data set")
        (folder / split / "dataset_info.json").write_text("{}")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(texts)}))
    return folder


@pytest.mark.parametrize("held_out", ["validation", "test", None])
def test_splits_of_a_saved_data_set_are_used(held_out: str | None, tmp_path: Path, tokenizer: str) -> None:
    """Rows of the test split among those that are trained on, or a validation split that is not used."""
    texts = {"train": ["one", "two"], "unsupervised": ["never"]} | ({held_out: ["three"]} if held_out else {})
    folder = saved(tmp_path / "set", texts)
    data = load(folder, tokenizer=tokenizer)
    splits = [data.tokenizer.decode(data.tokens(s).tolist()) for s in ("train", "validation")]
    if held_out:
        assert splits == [f"one{END}two{END}", f"three{END}"]
    else:
        assert sorted(splits) == [f"one{END}", f"two{END}"]
    other = load(folder, validation=(str(folder / "unsupervised"),), tokenizer=tokenizer)
    assert other.tokenizer.decode(other.tokens("validation").tolist()) == f"never{END}"

    (folder / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../secret"}]}')
    with pytest.raises(InputError, match=r"state\.json has .*secret.* as _data_files, expected the names"):
        load(folder)


def test_data_sets_of_hugging_face_are_read(tmp_path: Path, tokenizer: str) -> None:
    """Another layout than the one that `datasets` writes."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    expected = load(jsonl(tmp_path / "rows.jsonl", *ROWS), tokenizer=tokenizer)
    assert sorted(joined(load(tmp_path / "whole", tokenizer=tokenizer)).split(END)) == sorted(
        joined(expected).split(END)
    )
    datasets.DatasetDict(whole.train_test_split(0.2, shuffle=False)).save_to_disk(tmp_path / "split")
    data = load(tmp_path / "split", tokenizer=tokenizer)
    texts = [row["text"] for row in ROWS]
    for split, rows in (("train", texts[:32]), ("validation", texts[32:])):
        assert data.tokenizer.decode(data.tokens(split).tolist()) == "".join(f"{text}{END}" for text in rows)
