"""Tokenizers: one token per character, and byte-level byte-pair encoding (GPT-2's, or trained on a text).

A tokenizer is saved as one `tokenizer.json`. Byte-pair encodings are trained by Hugging Face `tokenizers`,
saved in its format, and encoded by tiktoken.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gpt.errors import InputError, cannot_write, shown
from gpt.files import read_regular, user_path, verified_file
from kernels.files import cache_folder, write_json

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
SIZE_LIMIT = 1 << 26  # bytes of the largest tokenizer file that is read
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
Value = TypeVar("Value")


class Tokenizer(Protocol):
    """Converts text to token ids and back.

    `to_json` returns the whole state. `decode_bytes` is for streaming, where ids may end inside a character.
    """

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def to_json(self) -> dict[str, Any]: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...


class CharTokenizer:
    """One token per character.

    Args:
        characters: Distinct characters; their ids follow the sorted order.

    Raises:
        InputError: `characters` is empty, repeats a character, or has a lone surrogate.
    """

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(characters))
        self._ids = {character: i for i, character in enumerate(self.characters)}
        if not characters or len(self._ids) != len(characters):
            raise InputError(
                f"CharTokenizer: characters has {len(characters)} characters, {len(self._ids)} of them "
                "distinct, expected distinct ones, at least 1"
            )
        _check_unicode(self.characters, "CharTokenizer: characters")

    def __repr__(self) -> str:
        return f"CharTokenizer({shown(self.characters)}, {self.vocab_size:,} characters)"

    @classmethod
    def train(cls, texts: str | Iterable[str]) -> CharTokenizer:
        """A tokenizer with every character that occurs in `texts`."""
        seen: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            seen.update(text)
        return cls("".join(seen))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`. `special` has no effect, because there are no special tokens.

        Raises:
            InputError: The tokenizer does not have a character of `text`.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            position, character = next((i, c) for i, c in enumerate(text) if c not in self._ids)
        raise InputError(
            f"CharTokenizer: character {character!r} (U+{ord(character):04X}) at position {position} of the "
            f"text, expected one of the tokenizer's {self.vocab_size} characters"
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
        _save(self, Path(path))


class BPETokenizer:
    """Byte-level byte-pair encoding with GPT-2's pre-tokenization; any Unicode text is decoded exactly.

    Args:
        ranks: The bytes of each token -> its id. Ids follow the order of merging, and all 256 single bytes
            are tokens.
        special_tokens: The name of each token outside the merges -> its id. `encode` uses them only on
            request.

    Attributes:
        merges: The two parts of each token that is longer than a byte, in the order of merging.

    Raises:
        InputError: The ids have gaps or repeats, a single byte has no token, a longer token is not the merge
            of two earlier ones, or the name of a special token is empty or that of another token.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int] | None = None) -> None:
        import tiktoken

        self.ranks = ranks
        self.special_tokens = special_tokens or {}
        ids = [*ranks.values(), *self.special_tokens.values()]
        if any(type(i) is not int for i in ids) or sorted(ids) != list(range(len(ids))):
            raise InputError("BPETokenizer: expected distinct ids, integers from 0 up without gaps")
        if b"" in ranks or any(bytes([b]) not in ranks for b in range(256)):
            raise InputError("BPETokenizer: expected a token for each of the 256 bytes, none empty")
        for name in self.special_tokens:
            _check_unicode(name, "BPETokenizer: the name of a special token")
            if not name or (all(c in _BYTES for c in name) and _from_printable(name) in ranks):
                raise InputError(
                    f"BPETokenizer: special token {name[:80]!a} is empty or also an ordinary one"
                )
        self.merges = _merges(ranks)
        self._encoding = tiktoken.Encoding(
            "bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def __repr__(self) -> str:
        return f"BPETokenizer({self.vocab_size:,} tokens, special ones {shown(self.special_tokens)})"

    @classmethod
    def gpt2(cls) -> BPETokenizer:
        """GPT-2's tokenizer with 50,257 tokens, from tiktoken's cache, this package's cache, or a download.

        Raises:
            InputError: The merges are in no cache, and the download fails, within a few seconds.
        """
        return _from_merges(_gpt2_merges())

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int = 4096) -> BPETokenizer:
        """Learns at most `vocab_size` tokens, including <|endoftext|> as the last, from `texts`."""
        from tokenizers import Tokenizer as HuggingFaceTokenizer
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise InputError(
                f"BPETokenizer: vocab_size is {vocab_size}, expected at least 257 (256 bytes and "
                f"{END_OF_TEXT})"
            )
        learner = HuggingFaceTokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        texts = [texts] if isinstance(texts, str) else texts
        learner.train_from_iterator(
            (part for text in texts for part in text.split(END_OF_TEXT)),
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
        """The ids of `text`; with `special`, names of special tokens in the text become those tokens.

        Raises:
            InputError: The text has a lone surrogate, which no bytes express.
        """
        _check_unicode(text, "BPETokenizer: the text")
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; they may end inside a character."""
        ids = list(ids)
        _check_ids(ids, self.vocab_size, "BPETokenizer")
        return self._encoding.decode_bytes(ids)

    def to_json(self) -> dict[str, Any]:
        """The state in the format of Hugging Face's `tokenizer.json`."""
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
                "merges": [[_to_printable(part) for part in pair] for pair in self.merges],
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, readable by Hugging Face `tokenizers`, into the folder `path`."""
        _save(self, Path(path))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer that `save` or Hugging Face `tokenizers` wrote.

    Args:
        path: A `tokenizer.json`, a folder with one, or GPT-2's `vocab.bpe` (`merges.txt`).

    Raises:
        InputError: The file is missing or damaged, or holds another kind of tokenizer than characters or
            byte-level byte pairs.
    """
    file = user_path(path, "tokenizer")
    if os.path.isdir(file):
        file /= FILE_NAME
    content = read_regular(file, "tokenizer", SIZE_LIMIT)
    try:
        text = content.decode("utf-8")
        return _from_merges(text) if text.startswith("#version") else tokenizer_from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer: {file} is not a tokenizer that can be used: {error}") from error


def tokenizer_from_json(state: Any) -> Tokenizer:
    """The tokenizer of the content of a tokenizer.json; InputError if it is damaged or of another kind."""
    model = _field(state, "model", dict)
    kind = _field(model, "type", str)
    if kind == "characters":
        return CharTokenizer(_field(model, "vocab", str))
    split = state.get("pre_tokenizer")
    if kind != "BPE" or not isinstance(split, dict) or split.get("type") != "ByteLevel":
        raise InputError(
            f"a {kind[:80]!a} tokenizer, expected characters, or BPE with GPT-2's ByteLevel split"
        )
    if split.get("add_prefix_space"):
        raise InputError("ByteLevel has add_prefix_space, expected GPT-2's split, which adds no space")

    vocab, special = _field(model, "vocab", dict), dict[str, int]()
    for token in _field(state, "added_tokens", list) if "added_tokens" in state else ():
        name, i = _field(token, "content", str), _field(token, "id", int)
        if special.get(name, i) != i or vocab.get(name, i) != i:
            raise InputError(f"token {name[:80]!a} has several ids, expected one")
        special[name] = i
    ranks = {_from_printable(token): i for token, i in vocab.items() if token not in special}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in _field(model, "merges", list)]
    return _checked(BPETokenizer(ranks, special), pairs)


def _from_merges(text: str) -> BPETokenizer:
    """The tokenizer of GPT-2's merges file: a header, then one pair per line.

    The single bytes come before the merges, printable bytes first.
    """
    pairs = [line.split(" ") for line in text.splitlines()[1:] if line]
    merged = [_from_printable("".join(pair)) for pair in pairs]
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in _PRINTABLE), *merged])}
    return _checked(BPETokenizer(ranks, {END_OF_TEXT: len(ranks)}), pairs)


def _checked(tokenizer: BPETokenizer, pairs: Sequence[Any]) -> BPETokenizer:
    """`tokenizer`, whose file has the merges `pairs`; InputError if it would merge otherwise."""
    merges: dict[tuple[bytes, bytes], int] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise InputError("a merge is not a pair of tokens")
        first, second = map(_from_printable, pair)
        if first + second not in tokenizer.ranks:
            raise InputError(f"a merge gives {''.join(pair)[:80]!a}, which is not in the vocabulary")
        merges[first, second] = tokenizer.ranks[first + second]

    order = list(dict.fromkeys(merges.values()))  # a token may come from several merges; the first counts
    if order != sorted(order):
        raise InputError("the ids have another order than the merges, expected the order of merging")
    for pair in tokenizer.merges:
        if pair not in merges:
            parts = " and ".join(ascii(_to_printable(part)[:80]) for part in pair)
            raise InputError(f"the merge of {parts} is missing, expected all that its tokens take")
    return tokenizer


def _field(container: Any, name: str, kind: type[Value]) -> Value:
    """The entry `name` of a JSON object; InputError if it is missing or not of this type."""
    if not isinstance(container, dict) or name not in container:
        raise InputError(f"{name!r} is missing")
    value = container[name]
    if type(value) is not kind:
        raise InputError(f"{name!r} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids from which generation without a prompt starts: a newline, or id 0 if there is none."""
    try:
        return tokenizer.encode("\n")
    except InputError:
        return [0]


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of <|endoftext|>, which ends each document; None if the tokenizer has no such token."""
    return getattr(tokenizer, "special_tokens", dict[str, int]()).get(END_OF_TEXT)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the whole state of `tokenizer`."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json into `folder`."""
    try:
        write_json(folder / FILE_NAME, tokenizer.to_json(), indent=1, ensure_ascii=False)
    except OSError as error:
        raise cannot_write("tokenizer", folder / FILE_NAME, error) from error


def _check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise InputError(
                f"{name}: id {i} at position {position}, expected 0 to {vocab_size - 1} (vocab_size "
                f"{vocab_size})"
            )


def _check_unicode(text: str, name: str) -> None:
    """Raises InputError if `text` has a lone surrogate: JSON and command lines can have one, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "expected Unicode text"
        ) from None


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each longer token, in the order of merging: its bytes, encoded with earlier tokens.

    Raises:
        InputError: The parts of a token are more than two.
    """
    merges = []
    ranks_of_pairs: dict[tuple[int, int], int] = {}
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _encode(token, ranks, ranks_of_pairs, below=rank)
            if len(parts) != 2:
                raise InputError(
                    f"BPETokenizer: token {_to_printable(token)[:80]!a} has {len(parts)} parts that are "
                    "earlier tokens, expected the merge of 2"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _encode(
    token: bytes, ranks: dict[bytes, int], ranks_of_pairs: dict[tuple[int, int], int], *, below: int
) -> list[bytes]:
    """The parts of `token` after merging neighbours, lowest rank first, into tokens of a rank below `below`.

    The parts are a linked list, and the possible merges a heap, so the time is n log n in the length.

    Args:
        token: The bytes to merge.
        ranks: The rank of each token.
        ranks_of_pairs: The rank of the token that two tokens give, -1 if there is none; filled here, so that
            a pair of long tokens is hashed once.
        below: The limit of the ranks.
    """
    n = len(token)
    part_ranks = [ranks[token[i : i + 1]] for i in range(n)]  # of the part that begins at i
    ends = list(range(1, n + 1))  # of the part that begins at i; 0 if none does
    previous = list(range(-1, n))  # the beginning of the part before the one that begins at i
    heap: list[tuple[int, int, int, int]] = []

    def consider(i: int) -> None:
        """Puts the merge of the part at `i` and the next one on the heap."""
        if (j := ends[i]) < n:
            pair = part_ranks[i], part_ranks[j]
            if (rank := ranks_of_pairs.get(pair)) is None:
                rank = ranks_of_pairs[pair] = ranks.get(token[i : ends[j]], -1)
            if 0 <= rank < below:
                heapq.heappush(heap, (rank, i, j, ends[j]))

    for i in range(n):
        consider(i)
    while heap:
        rank, i, j, end = heapq.heappop(heap)
        if (ends[i], ends[j]) != (j, end):
            continue  # one of the parts has been merged with another neighbour
        part_ranks[i], ends[i], ends[j], previous[end] = rank, end, 0, i
        consider(i)
        if i:
            consider(previous[i])
    return [token[i:end] for i, end in enumerate(ends) if end]


def _printable_bytes() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters: printable Latin-1 to itself, the rest from U+0100."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in itself]
    return {b: chr(b) for b in itself} | {b: chr(256 + i) for i, b in enumerate(rest)}


_PRINTABLE = _printable_bytes()
_BYTES = {character: b for b, character in _PRINTABLE.items()}


def _to_printable(token: bytes) -> str:
    return "".join(_PRINTABLE[b] for b in token)


def _from_printable(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError as error:
        raise InputError(
            f"token {token[:80]!a} has the character {error}, expected GPT-2's printable bytes"
        ) from None


def _gpt2_merges() -> str:
    """GPT-2's merges from tiktoken's cache, our own, or the network.

    tiktoken does not download them, because it sets no timeout.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    theirs = Path(folder, hashlib.sha1(GPT2_MERGES.encode()).hexdigest())  # tiktoken's name for the file
    places = [theirs]
    with suppress(OSError):  # no home folder
        places.append(cache_folder() / "gpt2-vocab.bpe")
    try:
        return verified_file(places, GPT2_MERGES, GPT2_MERGES_SHA256).decode("utf-8")
    except OSError as error:
        raise InputError(
            f"gpt2 tokenizer: cannot download {GPT2_MERGES} ({error}), expected a network, that file as "
            f"{places[-1]}, or --tokenizer PATH of GPT-2's tokenizer.json, vocab.bpe or merges.txt"
        ) from error
