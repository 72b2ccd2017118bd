"""Corpora as memory-mapped token ids, and batches that are a pure function of (seed, step, micro-step)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from gpt.cache import cache_folder, replacing
from gpt.corpus import STDLIB, Document, open_corpus
from gpt.errors import InputError
from gpt.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, fingerprint, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]
    Positions = NDArray[np.int64]

Split = Literal["train", "validation"]
Stream = Literal["train", "validation", "estimate"]

IGNORED = -100
_CHUNK = 1 << 20  # characters tokenized, or tokens counted, at a time
_STREAMS: dict[Stream, int] = {"train": 0, "validation": 1, "estimate": 2}


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    data: tuple[str, ...] = field(
        default=(STDLIB,),
        metadata={
            "help": "stdlib (Python's own sources and documentation), shakespeare (a download), or UTF-8 files, folders, globs"
        },
    )
    tokenizer: str = field(
        default="char", metadata={"help": "char, gpt2, bpe (trained on the text), or the path of a tokenizer.json"}
    )
    bpe_vocab_size: int = field(default=4096, metadata={"help": "the most tokens that --tokenizer bpe learns"})
    pack_documents: bool = field(
        default=False, metadata={"help": "no token attends to, or is predicted from, another document (file) than its own"}
    )


class Batch(NamedTuple):
    """A step's tensors.

    `inputs` and `targets` are (B, T) int64, each target the token after its input, -100 where there is none;
    `document_start` is (B, T) int32 as the model takes it, for packed documents alone.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    document_start: torch.Tensor | None = None


class _Part(NamedTuple):
    """A split: its tokens and, for packed documents, the sorted positions at which documents begin."""

    tokens: Ids
    documents: Positions | None


class TokenData:
    """A tokenized corpus: the first 90% of its tokens to train on, the rest to validate.

    Args:
        tokens: (N,) unsigned ids; an array or a memory map.
        tokenizer: What made them, kept for samples and checkpoints.
        documents: Sorted positions at which documents begin, to keep documents apart; None treats the corpus as one text.
        identity: A hash of the corpus and tokenizer, by which a resumed run knows its data.
    """

    def __init__(
        self, tokens: Ids, tokenizer: Tokenizer, *, documents: Positions | None = None, identity: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.identity = identity or hashlib.sha256(fingerprint(tokenizer).encode() + tokens.tobytes()).hexdigest()
        cut = len(tokens) * 9 // 10
        self._parts = {
            "train": _Part(tokens[:cut], documents),
            "validation": _Part(tokens[cut:], None if documents is None else documents[documents >= cut] - cut),
        }

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer | None = None) -> TokenData:
        """The tokens of `text`, by default one for each character."""
        import numpy as np

        tokenizer = tokenizer or CharTokenizer.train(text)
        return cls(np.asarray(tokenizer.encode(text), dtype=_dtype(tokenizer)), tokenizer)

    @classmethod
    def load(cls, config: DataConfig) -> TokenData:
        """Reads the corpus that `config` names; its tokens are mapped from a cache keyed by the hash of text and tokenizer.

        Raises:
            InputError: A source or the tokenizer is missing or damaged, or the tokenizer lacks a character.
        """
        documents = open_corpus(config.data)
        hashed = hashlib.sha256()
        characters: set[str] = set()
        for document in documents:
            text = document.read()
            hashed.update(hashlib.sha256(text.encode("utf-8")).digest())
            if config.tokenizer == "char":
                characters.update(text)
        tokenizer = _tokenizer(config, characters, documents)
        identity = hashlib.sha256(f"{hashed.hexdigest()} {fingerprint(tokenizer)}".encode()).hexdigest()
        tokens, begins = _cached_tokens(documents, tokenizer, cache_folder() / "tokens" / identity[:32])
        return cls(tokens, tokenizer, documents=begins if config.pack_documents else None, identity=identity)

    def tokens(self, split: Split) -> Ids:
        """The ids of a split."""
        return self._parts[split].tokens

    def check(self, block_size: int) -> None:
        """Raises InputError where a split is too short for one window of `block_size` tokens and their targets."""
        for split, part in self._parts.items():
            if len(part.tokens) <= block_size:
                raise InputError(
                    f"data: the {split} split has {len(part.tokens)} tokens, "
                    f"expected at least {block_size + 1} (block_size {block_size} and one more)"
                )

    def batch(
        self,
        stream: Stream,
        batch_size: int,
        block_size: int,
        *,
        seed: int,
        step: int,
        micro_step: int = 0,
    ) -> Batch:
        """Windows of a split, drawn by Philox at counter (step, micro_step): the same arguments give the same batch, at any time.

        "estimate" draws from the train split, independently of the training batches.
        """
        import numpy as np

        part = self._parts["validation" if stream == "validation" else "train"]
        words = np.random.Philox(key=seed, counter=[0, micro_step, step, _STREAMS[stream]]).random_raw(batch_size)
        starts = (words % np.uint64(len(part.tokens) - block_size)).astype(np.int64)
        return _windows(part, starts, block_size)

    def windows(self, split: Split, batch_size: int, block_size: int) -> Iterator[Batch]:
        """The whole split in windows that meet without overlapping: each token but the first is a target once."""
        import numpy as np

        part = self._parts[split]
        starts = np.arange(0, len(part.tokens) - 1, block_size)
        for i in range(0, len(starts), batch_size):
            yield _windows(part, starts[i : i + batch_size], block_size)

    def bigram_loss(self) -> float:
        """Mean of -log((count(a, b) + 1) / (count(a) + V)) over the validation split, counted on the train split.

        Memory grows with the distinct pairs of the validation split, so a large vocabulary or corpus is no obstacle.
        """
        import numpy as np

        vocab_size = self.tokenizer.vocab_size
        pairs = [a.astype(np.int64) * vocab_size + b for a, b in self._pairs("validation")]
        wanted, times = np.unique(np.concatenate(pairs), return_counts=True)
        pair_counts = np.zeros(len(wanted), np.int64)
        token_counts = np.zeros(vocab_size, np.int64)
        for a, b in self._pairs("train"):
            token_counts += np.bincount(a, minlength=vocab_size)
            keys = a.astype(np.int64) * vocab_size + b
            found = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
            pair_counts += np.bincount(found[wanted[found] == keys], minlength=len(wanted))
        loss = np.log(token_counts[wanted // vocab_size] + vocab_size) - np.log(pair_counts + 1)
        return float((loss * times).sum() / times.sum())

    def _pairs(self, split: Split) -> Iterator[tuple[Ids, Ids]]:
        """Each token with the one after it, in chunks; none across packed documents."""
        import numpy as np

        tokens, documents = self._parts[split]
        for i in range(0, len(tokens) - 1, _CHUNK):
            chunk = tokens[i : i + _CHUNK + 1]
            first, second = chunk[:-1], chunk[1:]
            if documents is not None:
                within = ~np.isin(np.arange(i + 1, i + len(chunk)), documents)
                first, second = first[within], second[within]
            yield first, second


def _windows(part: _Part, starts: Positions, block_size: int) -> Batch:
    """The rows [start, start + block_size) of a split; past its end, the last token without a target."""
    import numpy as np

    tokens, documents = part
    positions = starts[:, None] + np.arange(block_size + 1)
    rows = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)
    missing = positions[:, 1:] >= len(tokens)
    begins = None
    if documents is not None:
        begins = np.concatenate(([0], documents))[np.searchsorted(documents, positions, side="right")]
        missing |= begins[:, 1:] == positions[:, 1:]
    batch = Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(np.where(missing, IGNORED, rows[:, 1:])))
    if begins is None:
        return batch
    return batch._replace(document_start=torch.from_numpy(np.maximum(begins[:, :-1] - starts[:, None], 0).astype(np.int32)))


def _tokenizer(config: DataConfig, characters: set[str], documents: Sequence[Document]) -> Tokenizer:
    if config.tokenizer == "char":
        return CharTokenizer("".join(characters))
    if config.tokenizer == "gpt2":
        return BPETokenizer.gpt2()
    if config.tokenizer == "bpe":
        return BPETokenizer.train((document.read() for document in documents), config.bpe_vocab_size)
    if not Path(config.tokenizer).exists():
        raise InputError(f"tokenizer: {config.tokenizer} does not exist, expected char, gpt2, bpe or a path")
    return load_tokenizer(config.tokenizer)


def _dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger[Any]]:
    import numpy as np

    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _cached_tokens(documents: Sequence[Document], tokenizer: Tokenizer, stem: Path) -> tuple[Ids, Positions]:
    """The tokens of all documents and where each begins: from the cache, made first where it has none."""
    import numpy as np

    dtype = _dtype(tokenizer)
    tokens_file, ends_file = stem.with_suffix(".tokens"), stem.with_suffix(".npy")

    def read() -> tuple[Ids, Positions]:
        ends: Positions = np.load(ends_file, allow_pickle=False)
        if tokens_file.stat().st_size != ends[-1] * dtype.itemsize:
            raise OSError(f"{tokens_file} is truncated")
        return np.asarray(np.memmap(tokens_file, dtype, mode="r")), ends[:-1]

    try:
        return read()
    except (OSError, ValueError, EOFError):  # not there yet, or damaged: made anew
        ends = [0]
    try:
        with replacing(tokens_file) as file:
            for ids in _tokenize(documents, tokenizer, ends):
                file.write(np.asarray(ids, dtype).tobytes())
        with replacing(ends_file) as file:
            np.save(file, np.asarray(ends, np.int64))
        return read()
    except OSError:  # a full or read-only cache: the tokens stay in memory
        ends = [0]
        chunks = [np.asarray(ids, dtype) for ids in _tokenize(documents, tokenizer, ends)]
        return np.concatenate(chunks), np.asarray(ends[:-1], np.int64)


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer, ends: list[int]) -> Iterator[list[int]]:
    """Ids in chunks, with progress when it takes long; appends to `ends` where each document ends."""
    from tqdm import tqdm

    count = 0
    for document in tqdm(documents, desc="tokenizing", unit=" documents", leave=False, delay=1):
        text = document.read()
        for start, chunk in _chunks(text):
            try:
                ids = tokenizer.encode(chunk)
            except InputError as error:
                raise InputError(f"data: {document.name}, from character {start}: {error}") from error
            count += len(ids)
            yield ids
        ends.append(count)


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    """Pieces of `text` and where they begin.

    A cut is between a character and a newline, which GPT-2's split never joins, so the ids are those of the whole text.
    """
    cut = re.compile(r"(?<=\S)(?=\n)")
    start = 0
    while len(text) - start > _CHUNK and (end := cut.search(text, start + _CHUNK)):
        yield start, text[start : end.start()]
        start = end.start()
    yield start, text[start:]
