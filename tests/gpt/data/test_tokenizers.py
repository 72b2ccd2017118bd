"""Tokenizers: round trips, files, and wrong input."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import BPETokenizer, CharTokenizer, InputError, files, load_tokenizer
from gpt.data.tokenizers import END_OF_TEXT, Tokenizer, fingerprint, first_ids
from tests.gpt.text import TEXT

SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
UNICODE = "naïve 東京 \U0001f642 e\u0301\n\n\t  don't  x\r\n123 \u00a0<|endoftext|> end "


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 400)


def test_char_ids_follow_the_sorted_characters() -> None:
    """Ids that depend on the order of the characters in the text."""
    tokenizer = CharTokenizer.train(SHAKESPEARE[::-1] * 2)
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("First Citi") == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47]
    assert tokenizer.decode([18, 47, 56, 57, 58]) == "First"
    assert CharTokenizer.train(["ba", "c"]).characters == "abc"


def test_char_refuses_an_unknown_character() -> None:
    """An unknown character that is dropped, or an error without the character and its position."""
    with pytest.raises(InputError, match=r"'☃' \(U\+2603\) at position 3 .* 65 characters"):
        CharTokenizer(SHAKESPEARE).encode("abc\u2603d")
    with pytest.raises(InputError, match=r"'\\ud800'"):
        CharTokenizer(SHAKESPEARE).encode("\ud800")
    with pytest.raises(InputError, match=r"id 65 at position 1.*64"):
        CharTokenizer(SHAKESPEARE).decode([0, 65])
    for characters in ("", "aa"):
        with pytest.raises(InputError, match="distinct"):
            CharTokenizer(characters)


@given(st.text())
def test_bpe_decodes_exactly(bpe: BPETokenizer, text: str) -> None:
    """A text that changes when it is encoded and decoded."""
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_learns_merges(bpe: BPETokenizer) -> None:
    """A vocabulary of single bytes, or larger than requested."""
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    with pytest.raises(InputError, match="vocab_size is 256, expected at least 257"):
        BPETokenizer.train(TEXT, 256)


def test_special_tokens_are_encoded_on_request_only(bpe: BPETokenizer) -> None:
    """The name of a special token in a user's text that becomes the special token."""
    last = bpe.vocab_size - 1
    assert bpe.encode(END_OF_TEXT, special=True) == [last]
    assert last not in bpe.encode(END_OF_TEXT)
    assert bpe.decode([last]) == bpe.decode(bpe.encode(END_OF_TEXT)) == END_OF_TEXT


def test_single_tokens_decode_to_bytes(bpe: BPETokenizer) -> None:
    """Bytes that are lost when a character spans several tokens."""
    assert b"".join(bpe.decode_bytes([i]) for i in bpe.encode("東京")) == "東京".encode()


def test_hugging_face_reads_the_file(bpe: BPETokenizer, tmp_path: Path) -> None:
    """A tokenizer.json with other ids in Hugging Face `tokenizers`."""
    import tokenizers

    bpe.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = UNICODE.replace(END_OF_TEXT, "")
    for sample in (TEXT, text):
        assert theirs.encode(sample).ids == bpe.encode(sample)
        assert theirs.decode(bpe.encode(sample)) == sample
    assert theirs.encode(END_OF_TEXT).ids == bpe.encode(END_OF_TEXT, special=True)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_saved_tokenizer_loads(kind: str, bpe: BPETokenizer, tmp_path: Path) -> None:
    """A loaded tokenizer that encodes differently."""
    tokenizer: Tokenizer = bpe if kind == "bpe" else CharTokenizer.train(UNICODE)
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert fingerprint(loaded) == fingerprint(tokenizer)
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode(UNICODE) == tokenizer.encode(UNICODE)


def test_save_creates_its_folder(bpe: BPETokenizer, tmp_path: Path) -> None:
    """A traceback for a missing folder, or for one that cannot be created."""
    bpe.save(tmp_path / "new" / "folder")
    assert load_tokenizer(tmp_path / "new" / "folder").vocab_size == bpe.vocab_size
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"tokenizer: cannot write .*file.tokenizer\.json: "):
        bpe.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "'model' is missing"),
        ("{}", "'model' is missing"),
        ('{"model": {"type": "characters", "vocab": "aa"}}', "distinct"),
        ('{"model": {"type": "characters", "vocab": "a\\ud800"}}', "surrogate U+D800 position 1"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "Unigram BPE"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "ByteLevel"),
        (
            '{"pre_tokenizer": {"type": "ByteLevel"}, '
            '"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            "256 bytes",
        ),
        (
            '{"pre_tokenizer": {"type": "ByteLevel"}, '
            '"model": {"type": "BPE", "vocab": {"\u6771": 0}, "merges": []}}',
            "\u6771 printable",
        ),
        ("\xff", "utf-8"),
        ("[" * 100_000, "recursion"),
        ('{"a": ' + "1" * 5000 + "}", "integer"),
    ],
)
def test_a_damaged_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    """A damaged file that loads, or that ends in a traceback."""
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1" if content == "\xff" else "utf-8")
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    for word in words.split():
        assert word in str(caught.value)


def test_ids_out_of_merge_order_are_refused(bpe: BPETokenizer, tmp_path: Path) -> None:
    """A vocabulary in another order than its merges, which tiktoken would encode wrongly."""
    state = bpe.to_json()
    vocab, (first, second) = state["model"]["vocab"], state["model"]["merges"][:2]
    a, b = "".join(first), "".join(second)
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InputError, match="order of merging"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A traceback for a mistyped path."""
    with pytest.raises(InputError, match=r"cannot read .*nowhere.*No such file"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_merges_file_gives_gpt2_ids(tmp_path: Path) -> None:
    """Other ids than GPT-2's: printable bytes first, then the other bytes, then the merges."""
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n\u0120 t\nh e\n\u0120t he\n", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "vocab.bpe")
    assert tokenizer.encode("!~ \n the he") == [0, 93, 220, 198, 258, 220, 257]
    assert tokenizer.vocab_size == 260


# The lines of GPT-2's vocab.bpe, counted from its first merge, that the two phrases below need.
GPT2_LINES = {
    1: "\u0120 a",
    7: "e r",
    17: "o r",
    18: "e s",
    24: "o u",
    29: "\u0120 m",
    41: "l l",
    48: "\u0120 e",
    58: "\u0120 I",
    75: "\u0120 y",
    76: "v er",
    89: "\u0120y ou",
    163: "or t",
    231: "f f",
    292: "ver y",
    439: "e ll",
    453: "o v",
    460: "\u0120a m",
    658: "\u0120e ff",
    1153: "\u0120m ov",
    3370: "\u0120eff ort",
    5844: "\u0120mov es",
    5853: "E very",
    10853: "ell o",
    15240: "H ello",
}


def filler() -> Iterator[str]:
    """Merges of control bytes, which do not occur in the phrases: pairs, then triples, then quadruples."""
    first, second, third, fourth = (
        [chr(i) for i in range(begin, begin + 16)] for begin in (0x100, 0x110, 0x121, 0x131)
    )
    pairs = [(a, b) for a in first for b in second]
    triples = [(a + b, c) for a, b in pairs for c in third]
    quadruples = ((abc + c, d) for abc, c in triples for d in fourth)
    return map(" ".join, itertools.chain(pairs, triples, quadruples))


def test_gpt2_ids_from_a_partial_merges_file(tmp_path: Path) -> None:
    """Another numbering, split or order of merging than GPT-2's."""
    others = filler()
    lines = [GPT2_LINES.get(i) or next(others) for i in range(50_000)]
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "vocab.bpe")
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.encode(END_OF_TEXT, special=True) == [50256]


def test_gpt2_without_a_network_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that hangs, or an error that does not say which file is needed, and where."""

    def refuse(url: str) -> bytes:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "_fetch", refuse)
    with pytest.raises(InputError, match=r"Network is unreachable.*vocab\.bpe.*--tokenizer PATH"):
        BPETokenizer.gpt2()


def test_gpt2_ids_from_the_original_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another encoding than GPT-2 was trained with."""
    monkeypatch.delenv("FUSED_GPT_CACHE")
    try:
        tokenizer = BPETokenizer.gpt2()
    except InputError as error:
        pytest.skip(f"GPT-2's merges are not on this machine and cannot be downloaded: {error}")
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.encode(END_OF_TEXT, special=True) == [50256]


def test_generation_starts_from_a_newline(bpe: BPETokenizer) -> None:
    """A generation without a prompt that starts from no token."""
    assert first_ids(CharTokenizer("xy")) == [0]
    assert first_ids(CharTokenizer("x\t\n")) == [1]
    assert first_ids(bpe) == bpe.encode("\n")
