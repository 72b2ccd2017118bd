"""The cache of tokens, and of what reading a .bin file has shown: damage, full disks, several builders."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt import BPETokenizer, CharTokenizer, InputError
from gpt.data import formats, token_files
from tests.gpt.data.loading import joined, load, write, write_bins
from tests.gpt.text import TEXT

DAMAGED = "it is computed again"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path, text=TEXT) / "text.txt"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenized from now on."""
    texts: list[str] = []
    encode = CharTokenizer.encode

    def counting(self: CharTokenizer, text: str, **options: Any) -> list[int]:
        texts.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(CharTokenizer, "encode", counting)
    return texts


def test_tokens_are_cached_by_content(text: Path, encoded: list[str], tmp_path: Path) -> None:
    """Cached tokens of another text or tokenizer, or text tokenized again at each start."""
    first = load(text)
    assert len(encoded) == 1
    write(tmp_path, copy=TEXT)
    again = load(tmp_path / "copy.txt")
    assert (len(encoded), again.identity, joined(again)) == (1, first.identity, TEXT)
    write(tmp_path, copy=TEXT[::-1])
    changed = load(tmp_path / "copy.txt")
    assert changed.identity != first.identity
    assert joined(changed) == TEXT[::-1]


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 40)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def objects(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.asarray([print, None], object), allow_pickle=True)


def other(path: Path) -> None:
    load(write(path.parent, other=TEXT[::-1]) / "other.txt")
    (reverse,) = set(path.parent.glob("*.tokens")) - {path}
    path.write_bytes(reverse.read_bytes())


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "a terabyte": sparse,
    "of another text": other,
    "a FIFO": fifo,
    "a device": device,
    "pickled objects": objects,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_replaced(damage: str, text: Path, encoded: list[str], cache: Path) -> None:
    """Training on other tokens than the text's, or a start that hangs, after damage in the cache."""
    load(text)
    tokens = next(cache.rglob("*.tokens"))
    content = tokens.read_bytes()
    DAMAGE[damage](tokens)
    encoded.clear()
    with pytest.warns(UserWarning, match=rf"{tokens.name} .*; {DAMAGED}") as caught:
        assert joined(load(text)) == TEXT
    assert len(caught) == 1
    assert tokens.read_bytes() == content
    assert joined(load(text)) == TEXT
    assert encoded == [TEXT]


def test_every_byte_of_the_cache_is_checked(tmp_path: Path, cache: Path) -> None:
    """A byte of the ids, of the documents' ends or of the hash that may change unnoticed."""
    write(tmp_path, a=TEXT[:30], b=TEXT[30:37])
    ids, begins, _ = map(np.array, load(tmp_path, pack_documents=True)._parts["train"])
    path = next(cache.rglob("*.tokens"))
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.warns(UserWarning, match=DAMAGED):
            again = load(tmp_path, pack_documents=True)._parts["train"]
        assert (again.tokens == ids).all()
        assert (again.documents == begins).all()
    assert len(content) == 2 * 37 + 8 * 2 + 8 * 3 + 32


def disk_full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("below a file", "Not a directory"),
        ("no home", "no home folder, set FUSED_GPT_CACHE"),
        ("full", "No space left on device"),
        ("a folder", "Is a directory"),
    ],
)
def test_loading_works_without_a_writable_cache(
    failure: str, reason: str, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that cannot be written and makes training impossible, or is not used without a word."""
    if failure == "below a file":
        monkeypatch.setenv("FUSED_GPT_CACHE", str(text / "below a file"))
    elif failure == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("FUSED_GPT_CACHE")
        monkeypatch.setattr(Path, "home", no_home)
    elif failure == "full":
        monkeypatch.setattr(os, "fsync", disk_full)
    else:
        load(text)
        tokens = next(cache.rglob("*.tokens"))
        tokens.unlink()
        tokens.mkdir()
    with pytest.warns(UserWarning, match="cache: ") as caught:
        assert joined(load(text, pack_documents=True)) == TEXT
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == (2 if failure == "a folder" else 1)
    assert lines[-1].startswith("cache: cannot write ")
    assert f"{reason}; the next start computes it again" in lines[-1]
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_an_unreadable_cache_is_replaced(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached file of another user that ends the run."""
    load(text)
    (tokens,), open_file = cache.rglob("*.tokens"), os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if path == tokens and tokens.stat().st_ino == inode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, flags, *rest, **options)

    inode = tokens.stat().st_ino
    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match=rf"{tokens.name}: Permission denied; {DAMAGED}") as caught:
        assert joined(load(text)) == TEXT
    assert len(caught) == 1
    assert tokens.stat().st_ino != inode


def test_several_builders_get_the_same_tokens(text: Path, cache: Path) -> None:
    """Two runs that start at once, of which one reads what the other has half written."""
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        assert {joined(data) for data in pool.map(load, [text] * 8)} == {TEXT}
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".tokens"]


def test_a_text_that_changes_while_it_is_read_is_refused(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of a changed text, cached under the hash of the text before."""
    read_text = formats.read_text

    def changing(path: Path) -> str:
        content = read_text(path)
        path.write_text(content[::-1])
        return content

    monkeypatch.setattr(formats, "read_text", changing)
    with pytest.raises(InputError, match=r"text\.txt changed while it was read"):
        load(text)
    assert list(cache.rglob("*.tokens")) == []


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the byte-pair encodings that are trained from now on."""
    sizes: list[int] = []
    train = BPETokenizer.train

    def counting(texts: Any, vocab_size: int) -> BPETokenizer:
        sizes.append(vocab_size)
        return train(texts, vocab_size)

    monkeypatch.setattr(BPETokenizer, "train", counting)
    return sizes


def test_a_tokenizer_is_trained_once(text: Path, trained: list[int], cache: Path) -> None:
    """Minutes of training at each start, or the tokenizer of another text, size or damaged file."""
    first = load(text, tokenizer="bpe", bpe_vocab_size=280)
    again = load(text, tokenizer="bpe", bpe_vocab_size=280)
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert again.identity == first.identity
    assert load(text, tokenizer="bpe", bpe_vocab_size=270).tokenizer.vocab_size == 270
    load(write(text.parent, other=TEXT[::-1]) / "other.txt", tokenizer="bpe", bpe_vocab_size=280)
    assert trained == [280, 270, 280]
    for path in sorted((cache / "tokenizers").iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.warns(UserWarning, match=DAMAGED):
        assert load(text, tokenizer="bpe", bpe_vocab_size=280).identity == first.identity
    assert trained == [280, 270, 280, 280]


def test_a_tokenizer_is_trained_without_a_cache(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written and makes training a tokenizer impossible."""
    monkeypatch.setenv("FUSED_GPT_CACHE", str(text / "below a file"))
    with pytest.warns(
        UserWarning, match="cache: cannot write .*; the next start computes it again"
    ) as caught:
        assert joined(load(text, tokenizer="bpe", bpe_vocab_size=270)) == f"{TEXT}<|endoftext|>"
    assert sum("/tokenizers/" in str(warning.message) for warning in caught) == 1


@pytest.fixture
def bins(tmp_path: Path) -> Path:
    return write_bins(tmp_path, train=TEXT[:200], val=TEXT[300:350])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The .bin files that are read from now on. A file is settled at once."""
    paths: list[Path] = []
    read_bin = token_files._read_bin

    def counting(file: Any, path: Path, form: token_files.BinForm) -> token_files.Content:
        paths.append(path)
        return read_bin(file, path, form)

    monkeypatch.setattr(token_files, "_read_bin", counting)
    monkeypatch.setattr(token_files, "SETTLED_NS", -(10**12))
    return paths


def test_a_bin_file_is_read_once(bins: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """18 GB that are read at each start, or a verdict on a file that may still change unnoticed."""
    first = load(bins)
    assert [path.name for path in read] == ["train.bin", "val.bin"]
    (bins / "link").symlink_to(bins)
    assert load(bins / "link").identity == first.identity
    assert len(read) == 2
    monkeypatch.setattr(token_files, "SETTLED_NS", 10**12)
    (bins / "train.bin").touch()
    load(bins)
    load(bins)
    assert [path.name for path in read] == ["train.bin", "val.bin", "train.bin", "train.bin"]


def test_a_changed_bin_file_is_read_again(bins: Path, read: list[Path]) -> None:
    """A resume on other tokens: the middle of a file changed, and its time was put back."""
    first, status = load(bins), (bins / "train.bin").stat()
    time.sleep(0.02)  # longer than a tick of the kernel's clock
    content = bytearray((bins / "train.bin").read_bytes())
    content[200] ^= 1
    (bins / "train.bin").write_bytes(content)
    os.utime(bins / "train.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (bins / "train.bin").stat().st_mtime_ns == status.st_mtime_ns
    assert load(bins).identity != first.identity


def test_a_damaged_verdict_is_replaced(bins: Path, read: list[Path], cache: Path) -> None:
    """A verdict with another largest id or hash, after damage in the cache."""
    identity = load(bins).identity
    for path in sorted(cache.rglob("*.json")):
        content = path.read_bytes()
        for i in range(0, len(content), 5):
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            with pytest.warns(UserWarning, match=DAMAGED):
                assert load(bins).identity == identity
            assert path.read_bytes() == content


def test_a_bin_file_that_changes_while_it_is_read_is_refused(
    bins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is still being copied, accepted with a hash of half of it."""
    read_bin = token_files._read_bin

    def growing(file: Any, path: Path, form: token_files.BinForm) -> token_files.Content:
        content = read_bin(file, path, form)
        with path.open("ab") as copy:
            copy.write(b"ab")
        return content

    monkeypatch.setattr(token_files, "_read_bin", growing)
    with pytest.raises(InputError, match=r"train\.bin changed while it was read"):
        load(bins)
