"""Tokenizers: the corpus's own characters, and byte-level byte-pair encodings (GPT-2's, or trained on the
user's text).

Each is one `tokenizer.json`. Byte-pair encodings are trained by Hugging Face `tokenizers`, kept in its
format, and encoded by tiktoken.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from gpt.errors import InputError
from gpt.files import verified_file
from kernels.files import cache_folder

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


class Tokenizer(Protocol):
    """Text to token ids and back.

    `to_json` is the whole state; `decode_bytes` serves streaming, where ids may end inside a character.
    """

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def to_json(self) -> dict[str, Any]: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...


class CharTokenizer:
    """One token per character; the ids follow the sorted order of `characters`.

    Raises:
        InputError: `characters` is empty or repeats a character.
    """

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(characters))
        self._ids = {character: i for i, character in enumerate(self.characters)}
        if not characters or len(self._ids) != len(characters):
            raise InputError(
                f"CharTokenizer: characters has {len(characters)} with repeats, expected distinct ones, at "
                "least 1"
            )

    @classmethod
    def train(cls, texts: str | Iterable[str]) -> CharTokenizer:
        """The tokenizer of every character that occurs in `texts`."""
        seen: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            seen.update(text)
        return cls("".join(seen))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`; there are no special tokens, so `special` changes nothing.

        Raises:
            InputError: A character the tokenizer never saw.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            position, character = next((i, c) for i, c in enumerate(text) if c not in self._ids)
        raise InputError(
            f"CharTokenizer: character {character!a} (U+{ord(character):04X}) at position {position} of the "
            "text, "
            f"expected one of the {self.vocab_size} characters that the tokenizer was made from"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""
        ids = list(ids)
        _check_ids(ids, self.vocab_size, "CharTokenizer")
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`."""
        return self.decode(ids).encode("utf-8")

    def to_json(self) -> dict[str, Any]:
        return {"model": {"type": "characters", "vocab": self.characters}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` into the folder `path`."""
        _write_json(self, path)


class BPETokenizer:
    """Byte-level byte-pair encoding in GPT-2's pre-tokenization; any Unicode text makes the round trip.

    Args:
        ranks: Each token's bytes and its id; ids are the order of merging, and all 256 single bytes are
            tokens.
        special_tokens: Name and id of tokens outside the merges; encoded only when asked for.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int] | None = None) -> None:
        import tiktoken

        self.ranks = ranks
        self.special_tokens = special_tokens or {}
        used = sorted([*ranks.values(), *self.special_tokens.values()])
        if used != list(range(len(used))) or any(bytes([b]) not in ranks for b in range(256)):
            raise InputError(
                "BPETokenizer: expected distinct ids from 0 up, without gaps, and a token for each of the "
                "256 bytes"
            )
        self._encoding = tiktoken.Encoding(
            "bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    @classmethod
    def gpt2(cls) -> BPETokenizer:
        """GPT-2's 50,257 tokens, from tiktoken's cache or the network.

        Raises:
            InputError: Neither is there; said within a few seconds.
        """
        return cls(*_ranks_from_merges(_gpt2_merges()))

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int = 4096) -> BPETokenizer:
        """A byte-pair encoding of at most `vocab_size` tokens, learned from `texts`, with `<|endoftext|>` as
        the last."""
        from tokenizers import Tokenizer as HuggingFaceTokenizer
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise InputError(
                f"BPETokenizer: vocab_size is {vocab_size}, expected at least 257 (256 bytes and "
                f"{END_OF_TEXT})"
            )
        learner = HuggingFaceTokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learner.train_from_iterator(
            [texts] if isinstance(texts, str) else texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size - 1,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        ranks = {_from_printable(token): i for token, i in learner.get_vocab().items()}
        return cls(ranks, {END_OF_TEXT: len(ranks)})

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.special_tokens)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`; with `special`, the names of special tokens in it become these tokens."""
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, which may end inside a character."""
        ids = list(ids)
        _check_ids(ids, self.vocab_size, "BPETokenizer")
        return self._encoding.decode_bytes(ids)

    def to_json(self) -> dict[str, Any]:
        """The state as Hugging Face's `tokenizer.json` has it."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        vocab = {_to_printable(token): i for token, i in self.ranks.items()} | self.special_tokens
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in self.special_tokens.items()],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                "merges": [[_to_printable(part) for part in pair] for pair in self._merges()],
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, readable by Hugging Face `tokenizers`, into the folder `path`."""
        _write_json(self, path)

    def _merges(self) -> list[list[bytes]]:
        """The pair that each longer token was merged from: its bytes, encoded with the earlier tokens
        alone."""
        return [
            _merge([bytes([b]) for b in token], self.ranks, below=rank)
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
            if len(token) > 1
        ]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer that `save` or Hugging Face `tokenizers` wrote.

    Args:
        path: A `tokenizer.json`, a folder that holds one, or GPT-2's `vocab.bpe` (`merges.txt`).

    Raises:
        InputError: The file is missing, damaged, or of a kind other than characters or byte-level byte pairs.
    """
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    try:
        text = file.read_text("utf-8")
        if text.startswith("#version"):
            return BPETokenizer(*_ranks_from_merges(text))
        state = json.loads(text)
        model = state["model"]
        if model["type"] == "characters":
            return CharTokenizer(model["vocab"])
        pre_tokenizer = state.get("pre_tokenizer") or {}
        if (
            model["type"] != "BPE"
            or pre_tokenizer.get("type") != "ByteLevel"
            or pre_tokenizer.get("add_prefix_space")
        ):
            raise InputError(
                f"{file}: a {model['type']} tokenizer, expected characters, or BPE with GPT-2's ByteLevel "
                "split"
            )
        special = {token["content"]: token["id"] for token in state.get("added_tokens", [])}
        ranks = {_from_printable(token): i for token, i in model["vocab"].items() if token not in special}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged = [ranks[_from_printable("".join(pair))] for pair in pairs]
    except OSError as error:
        raise InputError(f"tokenizer: cannot read {file}: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"tokenizer: {file} is no tokenizer.json ({type(error).__name__}: {error})"
        ) from error
    merged = list(dict.fromkeys(merged))
    if merged != sorted(merged):
        raise InputError(
            f"tokenizer: {file} has ids that do not follow its merges, expected ids in the order of merging"
        )
    return BPETokenizer(ranks, special)


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What generation starts from when there is no prompt: a new line, or the first token where there is
    none."""
    try:
        return tokenizer.encode("\n")
    except InputError:
        return [0]


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides how `tokenizer` encodes."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()


def _write_json(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    text = json.dumps(tokenizer.to_json(), ensure_ascii=False, indent=1)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / FILE_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"tokenizer: cannot write {Path(path) / FILE_NAME}: {error.strerror}") from error


def _check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise InputError(
                f"{name}: id {i} at position {position}, expected 0 to {vocab_size - 1} (vocab_size "
                f"{vocab_size})"
            )


def _merge(parts: list[bytes], ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Merges neighbours, lowest rank first, with the tokens whose rank is below `below`."""
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _printable_bytes() -> dict[int, str]:
    """GPT-2's bijection from bytes to printable characters: printable Latin-1 stands for itself, the rest
    follows from U+0100."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in itself]
    return {b: chr(b) for b in itself} | {b: chr(256 + i) for i, b in enumerate(rest)}


_PRINTABLE = _printable_bytes()
_BYTES = {character: b for b, character in _PRINTABLE.items()}


def _to_printable(token: bytes) -> str:
    return "".join(_PRINTABLE[b] for b in token)


def _from_printable(token: str) -> bytes:
    return bytes(_BYTES[character] for character in token)


def _ranks_from_merges(text: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """GPT-2's merges file: a header, then a pair on each line. The single bytes come first, printable ones
    ahead."""
    merged = [_from_printable("".join(line.split(" "))) for line in text.splitlines()[1:] if line]
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in _PRINTABLE), *merged])}
    return ranks, {END_OF_TEXT: len(ranks)}


def _gpt2_merges() -> str:
    """GPT-2's merges from tiktoken's cache, our own, or the network; tiktoken itself downloads without a
    timeout."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    theirs = Path(
        named or Path(tempfile.gettempdir(), "data-gym-cache"), hashlib.sha1(GPT2_MERGES.encode()).hexdigest()
    )
    ours = cache_folder() / "gpt2-vocab.bpe"
    try:
        return verified_file([theirs, ours], GPT2_MERGES, GPT2_MERGES_SHA256).decode("utf-8")
    except OSError as error:
        raise InputError(
            f"gpt2 tokenizer: cannot download {GPT2_MERGES} ({error}), expected a network, that file as "
            f"{ours}, "
            "or --tokenizer PATH of GPT-2's tokenizer.json, vocab.bpe or merges.txt"
        ) from error
