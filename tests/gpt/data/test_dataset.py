"""Corpora, the token cache, batches, .bin files, and the bigram baseline."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt import BPETokenizer, CharTokenizer, InputError
from gpt.data.dataset import IGNORED, Batch, DataConfig, TokenData, save_bin
from tests.gpt.data.loading import BINS, joined, load, write, write_bins
from tests.gpt.models import random_model
from tests.gpt.text import TEXT

BATCH = {"batch_size": 3, "block_size": 8, "seed": 5, "step": 7, "micro_step": 1}


@pytest.fixture
def data() -> TokenData:
    return TokenData.from_text(TEXT)


def test_the_first_90_percent_are_for_training(data: TokenData) -> None:
    """Validation tokens in the train split, or a split in other proportions."""
    assert len(data.tokens("train")) == 5400
    assert joined(data) == TEXT


def test_targets_are_the_next_tokens(data: TokenData) -> None:
    """Targets equal to the inputs, or shifted in the wrong direction."""
    inputs, targets, document_start = data.batch("train", **BATCH)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (3, 8)
    assert document_start is None
    train = data.tokenizer.decode(data.tokens("train").tolist())
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert x[1:] == y[:-1]
        assert data.tokenizer.decode([*x, y[-1]]) in train


def test_batches_are_a_function_of_seed_and_step(data: TokenData) -> None:
    """Batches that depend on earlier batches, so that a resume reads other text, or consume random state."""
    first = data.batch("train", **BATCH)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for change in (
        {"seed": 6},
        {"step": 8},
        {"micro_step": 0},
        {"stream": "estimate"},
        {"stream": "validation"},
    ):
        other = data.batch(**{"stream": "train", **BATCH, **change})
        assert not torch.equal(other.inputs, first.inputs), change
    assert torch.equal(TokenData.from_text(TEXT).batch("train", **BATCH).inputs, first.inputs)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_batches_are_those_of_earlier_versions() -> None:
    """Other windows than earlier versions draw from the same seed, so that no released figure is repeated."""
    data = TokenData(np.arange(60_000, dtype=np.uint16), BINS, identity="unread")
    expected = {
        "train": [27401, 45459, 1902, 53157, 23222, 44437, 19567, 20861, 18537, 34578],
        "validation": [55422, 57713, 57595, 55489, 58619, 58545, 59193, 54108, 59382, 58992],
        "estimate": [40333, 9580, 2380, 14880, 40744, 39511, 16315, 16742, 46051, 39312],
    }
    for stream, starts in expected.items():
        batches = [data.batch(stream, 5, 16, seed=1337, step=step) for step in (0, 7)]  # type: ignore[arg-type]
        assert [start for batch in batches for start in batch.inputs[:, 0].tolist()] == starts


def assert_cuts_are_equal(data: TokenData, block_size: int = 12) -> None:
    """Checks that steps of 8 and of 15 sequences do not depend on how they are cut."""

    def step(batch_size: int, grad_accum: int) -> Batch:
        batches = [
            data.batch("train", batch_size, block_size, seed=5, step=7, micro_step=n, grad_accum=grad_accum)
            for n in range(grad_accum)
        ]
        columns = zip(*batches, strict=True)
        return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))

    for sizes in ((8, 4, 2, 1), (15, 5, 3, 1)):
        whole, *others = (step(size, sizes[0] // size) for size in sizes)
        for other in others:
            for expected, actual in zip(whole, other, strict=True):
                assert (expected is None and actual is None) or torch.equal(expected, actual)


def test_a_step_has_the_same_sequences_however_it_is_cut(data: TokenData, tmp_path: Path) -> None:
    """Accumulation or more processes that train on other data than one large batch."""
    documents(tmp_path)
    packed = load(tmp_path, pack_documents=True)
    rows = [{"prompt": f"{n} and one is ", "completion": str(n + 1)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    instructions = load(tmp_path / "rows.jsonl", pack_documents=True)
    for one in (data, packed, instructions):
        assert_cuts_are_equal(one)


def test_every_window_can_be_drawn(data: TokenData) -> None:
    """A first or last window that is never drawn, or a window past the end."""
    batch = data.batch("validation", 20_000, 592, seed=0, step=0)
    tokens = torch.from_numpy(data.tokens("validation").astype(np.int64))
    assert {tuple(row) for row in batch.inputs[:, :4].unique(dim=0).tolist()} == {
        tuple(tokens[i : i + 4].tolist()) for i in range(8)
    }


def test_windows_cover_each_target_once(data: TokenData) -> None:
    """An evaluation that leaves out the end of the split, or counts tokens twice."""
    targets: list[int] = []
    for batch in data.windows("validation", batch_size=7, block_size=11):
        for x, y in zip(batch.inputs, batch.targets, strict=True):
            real = y != IGNORED
            assert torch.equal(x[1:][real[:-1] & real[1:]], y[:-1][real[:-1] & real[1:]])
            targets += y[real].tolist()
    assert targets == data.tokens("validation")[1:].tolist()


def test_the_bigram_loss_follows_its_formula(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline counted on the validation split, without smoothing, or over other targets."""
    monkeypatch.setattr("gpt.data.dataset.CHUNK", 97)
    train, validation = data.tokens("train").tolist(), data.tokens("validation").tolist()
    pairs, singles = Counter(itertools.pairwise(train)), Counter(train[:-1])
    v = data.tokenizer.vocab_size
    terms = [math.log(singles[a] + v) - math.log(pairs[a, b] + 1) for a, b in itertools.pairwise(validation)]
    assert data.bigram_loss() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_a_short_corpus_is_refused() -> None:
    """A corpus shorter than a window that fails only when a batch is drawn."""
    data = TokenData.from_text(TEXT[:100])
    data.check(9)
    with pytest.raises(
        InputError, match=r"validation split has 10 tokens, expected at least 11 \(block_size 10"
    ):
        data.check(10)
    with pytest.raises(InputError, match="train split has 90 tokens, expected at least 1025"):
        data.check(1024)


def hash_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def test_files_are_ordered_by_a_hash_of_their_names(tmp_path: Path) -> None:
    """Files left out or read twice, a split by the alphabet, or one that depends on the parent folder."""
    texts = {"a.txt": TEXT[:40], "b.txt": TEXT[40:90], "sub/c.txt": TEXT[90:120], "sub/d.txt": TEXT[120:200]}
    order = sorted(texts, key=hash_of)
    assert order != sorted(texts)
    for parent in ("one", "another"):
        for name, text in texts.items():
            (tmp_path / parent / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / parent / name).write_text(text)
    one, another = (load(tmp_path / parent) for parent in ("one", "another"))
    assert joined(one) == "".join(texts[name] for name in order)
    assert another.identity == one.identity
    assert load(tmp_path / "one" / "**" / "*.txt").identity == one.identity
    assert joined(load(tmp_path / "one" / "*.txt")) == "".join(
        texts[name] for name in order if "/" not in name
    )
    assert joined(load(tmp_path / "one" / "**" / "c.txt")) == TEXT[90:120]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"abc\0def", "binary byte 3"),
        (b"abcd\xffe", "UTF-8 byte 4 0xff"),
        (b"abcd\xe6\x9d", "UTF-8 byte 4 0xe6"),
    ],
)
def test_a_wrong_file_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    """A file that is read in part, or an error without the file and the position."""
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    for word in [*words.split(), str(path)]:
        assert word in str(caught.value)


def test_sources_without_files_are_refused(tmp_path: Path) -> None:
    """An empty folder, glob or list that is accepted."""
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(InputError, match="holds no files"):
            load(source)
    with pytest.raises(InputError, match="no source"):
        load()


def test_an_unknown_character_is_named_with_its_file(tmp_path: Path) -> None:
    """An error about an unknown character that does not name the file."""
    CharTokenizer("abc").save(tmp_path)
    path = write(tmp_path, text="abcaXb") / "text.txt"
    with pytest.raises(InputError, match=r"text\.txt.*'X' \(U\+0058\) at position 4"):
        load(path, tokenizer=str(tmp_path))
    with pytest.raises(InputError, match="tokenizer: nowhere does not exist"):
        load(path, tokenizer="nowhere")


def test_ids_above_65535_are_kept(tmp_path: Path) -> None:
    """Ids above 65,535 that wrap around in 16 bits."""
    characters = "".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x13000)]))
    CharTokenizer(characters).save(tmp_path)
    text = characters[-500:]
    data = load(write(tmp_path, text=text) / "text.txt", tokenizer=str(tmp_path))
    assert data.tokens("train").dtype == np.uint32
    assert data.tokens("train")[0] > 65535
    assert joined(data) == text
    assert int(data.batch("train", 4, 8, seed=0, step=0).inputs.min()) > 65535


def test_chunks_have_the_ids_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long file whose ids differ from those of its text encoded in one piece."""
    path = write(tmp_path, text=TEXT.replace(" ", "  \n \n", 300)) / "text.txt"
    whole = load(path, tokenizer="bpe", bpe_vocab_size=300)
    monkeypatch.setattr("gpt.data.token_files.CHUNK", 50)
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "other"))
    cut = load(path, tokenizer="bpe", bpe_vocab_size=300)
    for split in ("train", "validation"):
        assert cut.tokens(split).tolist() == whole.tokens(split).tolist()


def test_stdlib_is_large_and_plain() -> None:
    """A default corpus that is missing, too small, or has a thousand rare characters."""
    data = load("stdlib")
    assert len(data.tokens("train")) > 1_000_000
    assert data.tokenizer.vocab_size <= 96
    assert "def __init__(self" in data.tokenizer.decode(data.tokens("validation").tolist())
    assert load("stdlib").identity == data.identity
    assert sum(len(data.tokens(split)) for split in ("train", "validation")) <= 4_000_000


def test_shakespeare_without_a_network_names_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a network that does not say which file is needed, and where."""

    def refuse(url: str) -> bytes:
        raise TimeoutError("no answer in 4 s")

    monkeypatch.setattr("gpt.files._fetch", refuse)
    with pytest.raises(InputError, match=rf"no answer.*{cache}/tinyshakespeare\.txt.*--data PATH"):
        load("shakespeare")


def documents(tmp_path: Path) -> list[str]:
    """Writes texts under names whose hashes are in the texts' order."""
    texts = [TEXT[:40], TEXT[40:43], TEXT[43:60], TEXT[60:65], TEXT[65:260]]
    names = sorted((f"d{i}" for i in range(len(texts))), key=lambda name: hash_of(f"{name}.txt"))
    write(tmp_path, **dict(zip(names, texts, strict=True)))
    return texts


def test_packed_documents_have_their_starts(tmp_path: Path) -> None:
    """A document start that is off by one, or a target in the next document."""
    texts = documents(tmp_path)
    data = load(tmp_path, pack_documents=True)
    begins = {0, *np.cumsum([len(text) for text in texts])}
    position = 0
    for batch in data.windows("train", 1, 9):
        assert batch.document_start is not None
        assert batch.document_start.dtype == torch.int32
        for x, y, start in zip(
            batch.inputs[0].tolist(), batch.targets[0].tolist(), batch.document_start[0].tolist(), strict=True
        ):
            if position >= len(data.tokens("train")):
                break
            own = max(begin for begin in begins if begin <= position)
            window = position - position % 9
            assert start == max(0, own - window)
            last = position + 1 in begins or position + 1 == len(data.tokens("train"))
            assert x == data.tokens("train")[position]
            assert y == (IGNORED if last else data.tokens("train")[position + 1])
            position += 1


def test_packed_documents_equal_separate_batches(tmp_path: Path) -> None:
    """Attention across documents, or positions that do not restart."""
    documents(tmp_path)
    data = load(tmp_path, pack_documents=True)
    model = random_model().double().eval()
    batch = next(iter(data.windows("train", 6, 12)))

    def loss(batch: Batch) -> torch.Tensor:
        return model(batch.inputs, batch.targets, document_start=batch.document_start)

    total, count = 0.0, 0
    for x, y, starts in zip(batch.inputs, batch.targets, batch.document_start, strict=True):
        for start in starts.unique():
            own = starts == start
            targets = int((y[own] != IGNORED).sum())
            if targets:
                total += loss(Batch(x[own][None], y[own][None])).item() * targets
                count += targets
    assert loss(batch).item() == pytest.approx(total / count, rel=1e-6)


def test_packed_bigrams_stay_within_documents(tmp_path: Path) -> None:
    """A baseline over pairs that span two documents, which the model does not predict."""
    documents(tmp_path)
    packed, flat = load(tmp_path, pack_documents=True), load(tmp_path)
    pairs = [
        (int(a), int(b))
        for first, second in packed._pairs("train")
        for a, b in zip(first, second, strict=True)
    ]
    assert len(pairs) == len(flat.tokens("train")) - 1 - 4
    assert packed.bigram_loss() != flat.bigram_loss()


def test_bins_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nanoGPT's data split again, read in another byte order, or without its tokenizer."""
    data = load(write_bins(tmp_path, train=TEXT[:200], val=TEXT[300:350]))
    assert BINS.decode(data.tokens("train").tolist()) == TEXT[:200]
    assert BINS.decode(data.tokens("validation").tolist()) == TEXT[300:350]
    assert data.batch("train", **BATCH).inputs.dtype == torch.int64
    one = load(tmp_path / "train.bin")
    assert [len(one.tokens("train")), len(one.tokens("validation"))] == [180, 20]
    assert data.identity != one.identity
    monkeypatch.setattr("gpt.data.token_files.CHUNK", 16)
    middle = TEXT[300:325] + "X" + TEXT[326:350]
    for val in ("X" + TEXT[301:350], middle, TEXT[300:349] + "X", TEXT[300:351]):
        before = load(tmp_path).identity
        write_bins(tmp_path, val=val)
        assert load(tmp_path).identity != before


def test_packed_bins_have_their_starts(tmp_path: Path) -> None:
    """Documents in .bin files that are joined, or that begin with the previous end-of-text token."""
    data = load(write_bins(tmp_path, train="abc|de|fghijk|", val="lm|nopq"), pack_documents=True)
    inputs, targets, start = next(data.windows("train", 1, 13))
    assert BINS.decode(inputs[0].tolist()) == "abc<|endoftext|>de<|endoftext|>fghijk"
    assert start[0].tolist() == [0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 7, 7, 7]
    assert [i for i, y in enumerate(targets[0].tolist()) if y == IGNORED] == [3, 6]
    inputs, targets, start = next(data.windows("validation", 1, 6))
    assert start[0].tolist() == [0, 0, 0, 3, 3, 3]
    BPETokenizer(BINS.ranks, {"<|end|>": 256}).save(tmp_path)
    with pytest.raises(InputError, match="endoftext"):
        load(tmp_path, pack_documents=True)


def test_wrong_bins_are_refused(tmp_path: Path) -> None:
    """Ids without a tokenizer, half an id, or an id above the vocabulary."""
    write_bins(tmp_path, tokenizer=False, train=TEXT[:100])
    with pytest.raises(InputError, match=r"holds train\.bin without val\.bin"):
        load(tmp_path)
    write_bins(tmp_path, tokenizer=False, val=TEXT[:50])
    for name in (None, "char", "bpe"):
        with pytest.raises(InputError, match=rf"tokenizer is {name or 'not given'}, expected gpt2 or a path"):
            load(tmp_path, tokenizer=name)
    with pytest.raises(InputError, match=r"\.bin files among other sources"):
        load(tmp_path / "train.bin", tmp_path / "val.bin")
    BINS.save(tmp_path)
    for content in (b"", b"abc"):
        (tmp_path / "val.bin").write_bytes(content)
        with pytest.raises(InputError, match=rf"val\.bin has {len(content)} bytes, expected uint16"):
            load(tmp_path)
    (tmp_path / "val.bin").unlink()
    (tmp_path / "val.bin").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"val\.bin is a character device, expected a regular file"):
        load(tmp_path)


def test_ids_beyond_the_vocabulary_are_refused_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong id that ends a run at the step that reads it, after days of training."""
    monkeypatch.setattr("gpt.data.token_files.CHUNK", 16)
    write_bins(tmp_path, train=TEXT[:200], val=TEXT[300:350])
    ids = np.fromfile(tmp_path / "val.bin", "<u2")
    ids[[41, 45]] = 300, 257
    ids.tofile(tmp_path / "val.bin")
    with pytest.raises(InputError, match=r"val\.bin has id 300 at position 41, expected 0 to 256 .*is 257"):
        load(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_ids_of_arrays_are_checked(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id of an array from Python that only the embedding notices, or no one."""
    monkeypatch.setattr("gpt.data.dataset.CHUNK", 7)
    tokens = np.zeros(100, np.int64)
    tokens[95] = wrong
    with pytest.raises(InputError, match=rf"has id {wrong} at position 95, expected 0 to 2"):
        TokenData(np.zeros(50, np.int64), CharTokenizer("abc"), validation=tokens)


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer.train("hello\n"), BPETokenizer.train("hello hello", 259)], ids=["char", "bpe"]
)
def test_save_bin_writes_what_nanogpt_reads(tokenizer: Any, tmp_path: Path) -> None:
    """Ids of another width or order, or splits that lose a token."""
    text = "hello\n" * 40
    data = TokenData.from_text(text, tokenizer)
    save_bin(data, tmp_path / "out")
    train, validation = (np.fromfile(tmp_path / "out" / f"{name}.bin", "<u2") for name in ("train", "val"))
    assert [*train, *validation] == tokenizer.encode(text)
    assert len(train) == len(data.tokens("train"))
    back = TokenData.load(DataConfig(data=(str(tmp_path / "out"),)))
    assert back.tokenizer.to_json() == tokenizer.to_json()
    assert all(np.array_equal(back.tokens(split), data.tokens(split)) for split in ("train", "validation"))


def test_save_bin_refuses_a_large_vocabulary(tmp_path: Path) -> None:
    """Ids above 65,535 that wrap around."""

    class Large(CharTokenizer):
        vocab_size = 65537

    with pytest.raises(InputError, match="save_bin: the vocabulary has 65537 ids, expected at most 65536"):
        save_bin(TokenData.from_text("ab" * 9, Large("ab")), tmp_path)


def test_validation_texts_replace_the_split(tmp_path: Path) -> None:
    """Text of --data that is not trained on, or a validation that reads another text."""
    write(tmp_path, a=TEXT[:500], b="#" + TEXT[500:700])
    data = load(tmp_path / "a.txt", validation=(str(tmp_path / "b.txt"),), pack_documents=True)
    tokens = [data.tokenizer.decode(data.tokens(split).tolist()) for split in ("train", "validation")]
    assert tokens == [TEXT[:500], "#" + TEXT[500:700]]
    assert [part.documents.tolist()[0] for part in data._parts.values()] == [0, 0]
    assert data.identity != load(tmp_path / "a.txt").identity
    swapped = load(tmp_path / "b.txt", validation=(str(tmp_path / "a.txt"),))
    assert swapped.identity != data.identity

    bins = write_bins(tmp_path, train=TEXT[:200], other=TEXT[300:350])
    data = load(bins / "train.bin", validation=(str(bins / "other.bin"),))
    assert BINS.decode(data.tokens("train").tolist()) == TEXT[:200]
    assert BINS.decode(data.tokens("validation").tolist()) == TEXT[300:350]
    with pytest.raises(InputError, match=r"train\.bin with validation .*a\.txt, expected one \.bin file"):
        load(bins / "train.bin", validation=(str(tmp_path / "a.txt"),))


def test_the_validation_fraction_is_used(tmp_path: Path) -> None:
    """A fraction that is ignored, rounded in binary, or changed at a resume without an error."""
    write(tmp_path, a=TEXT[:1000])
    data = load(tmp_path / "a.txt", validation_fraction=0.3)
    assert [len(data.tokens(split)) for split in ("train", "validation")] == [700, 300]
    assert data.identity != load(tmp_path / "a.txt").identity
    assert load(tmp_path / "a.txt", validation_fraction=0.1).identity == load(tmp_path / "a.txt").identity
    bins = write_bins(tmp_path, train=TEXT[:200])
    assert len(load(bins / "train.bin", validation_fraction=0.25).tokens("validation")) == 50
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match="expected more than 0, less than 1"):
            load(tmp_path / "a.txt", validation_fraction=fraction)
    with pytest.raises(InputError, match="both given"):
        load(tmp_path / "a.txt", validation_fraction=0.2, validation=("b",))


def test_representations_are_readable() -> None:
    """`<gpt.data.dataset.TokenData object at 0x7f…>` in a notebook."""
    data = TokenData.from_text("hello\n" * 40)
    assert repr(data) == (
        "TokenData(216 tokens to train on, 24 to validate, CharTokenizer('\\nehlo', 5 characters))"
    )
    assert repr(BINS) == "BPETokenizer(257 tokens, special ones {'<|endoftext|>': 256})"
