"""A tokenized corpus, and batches that are a function of seed and step, however a step is cut."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from gpt.cli import option
from gpt.data.bins import open_bins
from gpt.data.corpus import Corpus
from gpt.data.saved_datasets import saved_split
from gpt.data.shards import Shards, shuffled
from gpt.data.sources import STDLIB, open_sources
from gpt.data.token_files import (
    BIN_NAMES,
    CHUNK,
    Tokens,
    cached_tokens,
    check_id,
    ids_dtype,
    split_at,
)
from gpt.data.tokenizer_choice import choose_tokenizer, tokenizer_of_bin
from gpt.data.tokenizers import (
    END_OF_TEXT,
    CharTokenizer,
    Tokenizer,
    end_of_text,
    fingerprint,
)
from gpt.errors import InputError, cannot_write
from kernels.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpt.data.token_files import Ids, Positions

Split = Literal["train", "validation"]
Stream = Literal["train", "validation", "estimate"]

IGNORED = -100
FRACTION = 0.1  # of the tokens are for validation, unless something else is given
USUAL = Fraction(str(FRACTION))
BIGRAM_CHUNKS = 256  # of CHUNK tokens, the most that the bigram baseline counts
HELD_OUT = ("validation", "test")  # splits of a saved data set, the first of which is for validation
_STREAMS: dict[Stream, int] = {"train": 0, "validation": 1, "estimate": 2}


@dataclass(frozen=True)
class DataConfig:
    """Which text to use, and how to tokenize it."""

    data: tuple[str, ...] = option(
        (STDLIB,),
        "stdlib (Python's own sources and documentation), shakespeare (a download), or UTF-8 files, folders, "
        "globs; rows of .jsonl, .parquet and Hugging Face data sets; .bin token files or a folder of them",
    )
    validation: tuple[str, ...] = option(
        (), "text to validate on, as in --data, all of which is then for training"
    )
    validation_fraction: float = option(FRACTION, "the part of --data to validate on")
    tokenizer: str | None = option(
        None,
        "char, gpt2, bpe (trained on the text), or the path of a tokenizer.json (default: char, with a gpt2 "
        "preset gpt2, with .bin files the tokenizer.json beside them)",
    )
    bpe_vocab_size: int = option(4096, "the most tokens that --tokenizer bpe learns")
    pack_documents: bool = option(
        False, "no token attends to, or is predicted from, another document (file or row) than its own"
    )
    text_field: str = option("text", "the field of a row that has its text")
    keep_newlines: bool = option(False, "keep the carriage returns of CRLF")

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                f"data: validation_fraction is {self.validation_fraction}, expected more than 0, less than 1"
            )
        if self.validation and self.validation_fraction != FRACTION:
            raise InputError("data: validation and validation_fraction are both given, expected one of them")


class Batch(NamedTuple):
    """The input of one forward pass.

    Attributes:
        inputs: (B, T) int64 token ids.
        targets: (B, T) int64, the token after each input, or -100 where there is none.
        document_start: (B, T) int32 for packed documents, as in `GPT.forward`; else None.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    document_start: torch.Tensor | None = None


class _Part(NamedTuple):
    """A split: its tokens, the sorted begins of packed documents, if any, and `untrained` as in `Tokens`."""

    tokens: Ids | Shards
    documents: Positions | None
    untrained: Positions

    def are_untrained(self, positions: Positions) -> NDArray[np.bool_]:
        """Whether the tokens at `positions` are not targets."""
        import numpy as np

        return np.searchsorted(self.untrained, positions, side="right") % 2 == 1

    def targets(self) -> NDArray[np.bool_]:
        """Whether each of `tokens` is a target."""
        import numpy as np

        inside = self.untrained[self.untrained < len(self.tokens)]
        lengths = np.diff(np.concatenate([[0], inside, [len(self.tokens)]]))
        return np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)


class TokenData:
    """A tokenized corpus: the first 90% of its tokens for training, the rest for validation.

    Args:
        tokens: (N,) unsigned ids, as an array, a memory map or `Shards`.
        tokenizer: The tokenizer of the ids, kept for samples and checkpoints.
        validation: Ids for validation; all of `tokens` are then for training.
        documents: The sorted positions at which documents begin, counted through `tokens` and then
            `validation`. Documents are then kept separate: see `DataConfig.pack_documents`.
        untrained: Sorted positions, counted likewise: the tokens before the first are targets, those up to
            the second are not, and so on in turns. None: all are targets.
        identity: A hash of the corpus and the tokenizer, which a resumed run compares. None computes it from
            the tokens, and checks their ids; with an identity, the caller has checked them.

    Raises:
        InputError: An id is not in the tokenizer's vocabulary.
    """

    def __init__(
        self,
        tokens: Ids | Shards,
        tokenizer: Tokenizer,
        *,
        validation: Ids | Shards | None = None,
        documents: Positions | None = None,
        untrained: Positions | None = None,
        identity: str | None = None,
    ) -> None:
        import numpy as np

        self.tokenizer = tokenizer
        cut = split_at(len(tokens), USUAL) if validation is None else len(tokens)
        validation = tokens[cut:] if validation is None else validation
        later = None if documents is None else documents[documents >= cut] - cut
        untrained = np.zeros(0, np.int64) if untrained is None else untrained
        turns = int(np.searchsorted(untrained, cut, side="right"))  # before the validation split
        begin = np.zeros(turns % 2, np.int64)
        self.identity = identity or _read_ids([tokens[:cut], validation], tokenizer)
        self._parts = {
            "train": _Part(tokens[:cut], documents, untrained),
            "validation": _Part(validation, later, np.concatenate([begin, untrained[turns:] - cut])),
        }

    def __repr__(self) -> str:
        train, validation = (len(part.tokens) for part in self._parts.values())
        return f"TokenData({train:,} tokens to train on, {validation:,} to validate, {self.tokenizer!r})"

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer | None = None) -> TokenData:
        """Tokenizes `text`, by default with one token per character."""
        import numpy as np

        tokenizer = tokenizer or CharTokenizer.train(text)
        return cls(np.asarray(tokenizer.encode(text), dtype=ids_dtype(tokenizer)), tokenizer)

    @classmethod
    def load(cls, config: DataConfig, tokenizer: Tokenizer | None = None, *, split: bool = True) -> TokenData:
        """Loads the corpus that `config` names.

        The tokens are cached under a hash of the text and the tokenizer, and memory-mapped.

        Args:
            config: The corpus and the tokenizer.
            tokenizer: Used instead of the one that `config` names.
            split: False leaves all of `config.data` in the train split, in order.

        Raises:
            InputError: A source or the tokenizer is missing or damaged, or the tokenizer lacks a character.
        """
        import numpy as np

        config = _with_saved_splits(config)
        fraction = (
            Fraction(str(config.validation_fraction)) if split and not config.validation else Fraction()
        )

        def of_bin(file: Path) -> Tokenizer:
            return tokenizer or tokenizer_of_bin(file, config.tokenizer)

        bins = open_bins(
            config.data, config.validation, fraction, of_bin, pack_documents=config.pack_documents
        )
        if bins is not None:
            return cls(
                bins.train,
                bins.tokenizer,
                validation=bins.validation,
                documents=bins.documents,
                identity=_identity(bins.hashes, bins.tokenizer, fraction),
            )

        characters = tokenizer is None and config.tokenizer in ("char", None)
        corpora = []
        for paths in (config.data, config.validation) if config.validation else (config.data,):
            sources = open_sources(paths, text_field=config.text_field, keep_newlines=config.keep_newlines)
            corpora.append(Corpus(sources, fraction, characters=characters))
        chosen = tokenizer or choose_tokenizer(config.tokenizer, corpora, config.bpe_vocab_size)

        marks = [] if end_of_text(chosen) is None else [END_OF_TEXT]  # between documents

        def tokens(corpus: Corpus) -> Tokens:
            identity = _identity([corpus.sha256, *marks], chosen, fraction)
            return cached_tokens(corpus, chosen, identity, fraction)

        first = tokens(corpora[0])
        validation, begins, untrained = first.ids[first.cut :], first.begins, first.untrained
        if corpora[1:]:
            second, count = tokens(corpora[1]), len(first.ids)
            turn = np.full(len(untrained) % 2, count)  # the first tokens of `second` are targets
            validation = second.ids
            begins = np.concatenate([begins, second.begins + count])
            untrained = np.concatenate([untrained, turn, second.untrained + count])
        return cls(
            first.ids[: first.cut],
            chosen,
            validation=validation,
            documents=begins if config.pack_documents else None,
            untrained=untrained,
            identity=_identity([*(corpus.sha256 for corpus in corpora), *marks], chosen, fraction),
        )

    def tokens(self, split: Split) -> Ids | Shards:
        """The ids of a split; a folder of .bin files is not read before it is indexed, see `Shards`."""
        return self._parts[split].tokens

    def all_tokens(self) -> Ids:
        """The ids of both splits: train, then validation."""
        import numpy as np

        return np.concatenate([part.tokens for part in self._parts.values()])

    def all_targets(self) -> NDArray[np.bool_]:
        """Whether each of `all_tokens` is a target; prompts are not."""
        import numpy as np

        return np.concatenate([part.targets() for part in self._parts.values()])

    def check(self, block_size: int) -> None:
        """Raises InputError if a split is shorter than one window of `block_size` tokens and its targets."""
        for split, part in self._parts.items():
            length, where = len(part.tokens), ""
            if isinstance(part.tokens, Shards):
                length, where = part.tokens.longest(), " in its longest file"
            if length <= block_size:
                raise InputError(
                    f"data: the {split} split has {length} tokens{where}, "
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
        grad_accum: int = 1,
    ) -> Batch:
        """Random windows of a split, a function of the arguments.

        Micro-step n of `grad_accum` has the sequences [n B, (n + 1) B) of a step, where B is `batch_size`.
        Sequence i is the window that word i of a Philox stream of (seed, step, stream) names, so it does not
        depend on how the step is cut. Windows of packed instructions begin with a document, so that a
        completion does not lose its prompt, or past the first `block_size` tokens of one.

        Of `Shards`, training batches have each window once in an epoch (see `Shards.starts`), in an order
        that is a function of (seed, epoch): sequence i of a step is number step B `grad_accum` + i of it.

        The stream "estimate" reads the train split, with windows independent of the training batches.
        """
        import numpy as np

        part = self._parts["validation" if stream == "validation" else "train"]
        if isinstance(part.tokens, Shards) and stream == "train":
            first, count = (step * grad_accum + micro_step) * batch_size, part.tokens.windows(block_size)
            numbers = shuffled(first, batch_size, count, seed)
            return _windows(part, part.tokens.starts(numbers, block_size), block_size)

        words = _words(seed, step, stream, range(micro_step * batch_size, (micro_step + 1) * batch_size))
        if isinstance(part.tokens, Shards):
            numbers = (words % np.uint64(part.tokens.windows(block_size))).astype(np.int64)
            starts = part.tokens.starts(numbers, block_size)
        elif part.documents is None or not len(part.untrained):
            starts = (words % np.uint64(len(part.tokens) - block_size)).astype(np.int64)
        else:
            positions = (words % np.uint64(len(part.tokens))).astype(np.int64)
            begins = _begins(part.documents, positions)
            starts = np.where(positions - begins < block_size, begins, positions)
        return _windows(part, starts, block_size)

    def windows(
        self, split: Split, batch_size: int, block_size: int, most: int | None = None
    ) -> Iterator[Batch]:
        """Adjacent windows of a split: each token but the first is a target once.

        Of packed instructions, those that two windows share have no targets in the second.
        Of a split with more than `most` batches of windows, as many are taken, spread evenly.
        """
        import numpy as np

        part = self._parts[split]
        starts = range(0, len(part.tokens) - 1, block_size)
        taken = _spread(starts, len(starts) if most is None else most * batch_size)
        while batch := list(itertools.islice(taken, batch_size)):
            yield _windows(part, np.array(batch), block_size)

    def bigram_loss(
        self, batches: Iterable[Batch] | None = None, check: Callable[[], None] = lambda: None
    ) -> float:
        """The mean of -log((count(a, b) + 1) / (count(a) + V)) over the pairs (a, b) of input and target.

        Counts are taken on the train split; of more than BIGRAM_CHUNKS chunks of CHUNK tokens, on as many,
        spread evenly. Memory is proportional to the pairs plus V, not to V².

        Args:
            batches: The inputs and targets; None is the whole validation split.
            check: Called for each chunk of the train split; it may raise to end the computation.
        """
        import numpy as np

        vocab_size = self.tokenizer.vocab_size
        validation = self._pairs("validation") if batches is None else map(_pairs_of, batches)
        pairs = [a.astype(np.int64) * vocab_size + b for a, b in validation]
        validation_pairs, times = np.unique(np.concatenate(pairs), return_counts=True)
        pair_counts = np.zeros(len(validation_pairs), np.int64)
        token_counts = np.zeros(vocab_size, np.int64)
        for a, b in self._pairs("train"):
            check()
            token_counts += np.bincount(a, minlength=vocab_size)
            pair = a.astype(np.int64) * vocab_size + b
            index = np.minimum(np.searchsorted(validation_pairs, pair), len(validation_pairs) - 1)
            index = index[validation_pairs[index] == pair]
            pair_counts += np.bincount(index, minlength=len(validation_pairs))
        first_counts = token_counts[validation_pairs // vocab_size]
        loss = np.log(first_counts + vocab_size) - np.log(pair_counts + 1)
        return float((loss * times).sum() / times.sum())

    def _pairs(self, split: Split) -> Iterator[tuple[Ids, Ids]]:
        """Pairs of adjacent tokens of which the second is a target, in chunks; see `bigram_loss`."""
        import numpy as np

        tokens, documents, _ = part = self._parts[split]
        starts = range(0, len(tokens) - 1, CHUNK)
        for i in _spread(starts, BIGRAM_CHUNKS if split == "train" else len(starts)):
            chunk = np.asarray(tokens[i : i + CHUNK + 1])
            positions = np.arange(i + 1, i + len(chunk))
            targets = ~part.are_untrained(positions)
            if documents is not None:
                targets &= ~np.isin(positions, documents)
            if isinstance(tokens, Shards) and tokens.separator is not None:
                targets &= chunk[:-1] != tokens.separator
            yield chunk[:-1][targets], chunk[1:][targets]


def save_bin(data: TokenData, directory: str | os.PathLike[str]) -> None:
    """Writes `data` for nanoGPT: train.bin and val.bin (raw little-endian uint16 ids), and tokenizer.json.

    Raises:
        InputError: The vocabulary has more ids than 16 bits can hold, the data has prompts that are not
            trained on, or a file cannot be written.
    """
    import numpy as np

    if data.tokenizer.vocab_size > 1 << 16:
        raise InputError(
            f"save_bin: the vocabulary has {data.tokenizer.vocab_size} ids, expected at most 65536 (uint16)"
        )
    splits: tuple[Split, ...] = ("train", "validation")
    if any(len(data._parts[split].untrained) for split in splits):
        raise InputError("save_bin: data has instructions, expected text, as .bin files have no masks")
    folder = Path(directory)
    try:
        for split in splits:
            with replacing(folder / BIN_NAMES[split]) as file:
                np.asarray(data.tokens(split), "<u2").tofile(file)
        data.tokenizer.save(folder)
    except OSError as error:
        raise cannot_write("save_bin", folder, error) from error


def _spread(items: range, most: int) -> Iterator[int]:
    """All of `items`, or `most` of them, spread evenly."""
    count = min(len(items), most)
    return (items[i * len(items) // count] for i in range(count))


def _words(seed: int, step: int, stream: Stream, numbers: range) -> NDArray[np.uint64]:
    """The words `numbers` of the Philox stream of (seed, step, stream); a counter gives four of them."""
    import numpy as np

    counter, skipped = divmod(numbers.start, 4)
    philox = np.random.Philox(key=seed, counter=[counter, 0, step, _STREAMS[stream]])
    return philox.random_raw(skipped + len(numbers))[skipped:]


def _read_ids(parts: Sequence[Ids | Shards], tokenizer: Tokenizer) -> str:
    """A hash of `parts` and the tokenizer; InputError if an id is not in the vocabulary."""
    import numpy as np

    hashed = hashlib.sha256(fingerprint(tokenizer).encode())
    for part in parts:
        for i in range(0, len(part), CHUNK):
            ids = np.asarray(part[i : i + CHUNK])
            hashed.update(ids.tobytes())
            for position in (int(ids.argmin()), int(ids.argmax())):
                check_id(int(ids[position]), i + position, tokenizer.vocab_size, "an array of tokens")
    return hashed.hexdigest()


def _windows(part: _Part, starts: Positions, block_size: int) -> Batch:
    """The windows [start, start + block_size) of a split.

    Positions past the end of the split repeat the last token and have no target.
    """
    import numpy as np

    tokens, documents, _ = part
    positions = starts[:, None] + np.arange(block_size + 1)
    rows = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)
    missing = (positions[:, 1:] >= len(tokens)) | part.are_untrained(positions[:, 1:])
    begins = tokens.begins(positions, rows) if isinstance(tokens, Shards) else None
    if documents is not None:
        begins = _begins(documents, positions)
    if begins is not None:
        missing |= begins[:, 1:] == positions[:, 1:]
        if len(part.untrained):  # answers that another window has with the whole row before them
            missing |= (begins < starts[:, None])[:, 1:] & (positions - begins <= block_size)[:, 1:]
    batch = Batch(
        torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(np.where(missing, IGNORED, rows[:, 1:]))
    )
    if begins is None:
        return batch
    return batch._replace(
        document_start=torch.from_numpy(np.maximum(begins[:, :-1] - starts[:, None], 0).astype(np.int32))
    )


def _pairs_of(batch: Batch) -> tuple[Ids, Ids]:
    """The inputs that have a target, and their targets."""
    kept = batch.targets != IGNORED
    return batch.inputs[kept].numpy(), batch.targets[kept].numpy()


def _begins(documents: Positions, positions: Positions) -> Positions:
    """The begin of the document that each of `positions` is in."""
    import numpy as np

    return np.concatenate(([0], documents))[np.searchsorted(documents, positions, side="right")]


def _with_saved_splits(config: DataConfig) -> DataConfig:
    """`config` with splits of saved data sets in place of their folders.

    These are the train split in `data`, and the validation or test split in `validation`, where it becomes
    the default.
    """
    if config.validation:
        validation = [saved_split(source, HELD_OUT) or source for source in config.validation]
    elif config.validation_fraction == FRACTION:
        validation = [split for source in config.data if (split := saved_split(source, HELD_OUT))]
    else:
        validation = []
    data = [saved_split(source, ["train"]) or source for source in config.data]
    return replace(config, data=tuple(data), validation=tuple(validation))


def _identity(hashes: Iterable[str], tokenizer: Tokenizer, fraction: Fraction) -> str:
    """A hash of contents, the tokenizer, and the fraction for validation if it is not the default."""
    words = [*hashes, fingerprint(tokenizer), *([str(fraction)] if fraction != USUAL else [])]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()
