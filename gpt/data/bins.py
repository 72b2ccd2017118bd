"""The splits of a corpus of .bin files: two named files, one file, or a folder of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpt.data.shards import ShardFiles, Shards, shard_files, split_by_name
from gpt.data.token_files import bin_files, check_id, document_begins, open_bin, separator, split_at
from gpt.data.tokenizers import Tokenizer
from gpt.errors import InputError

if TYPE_CHECKING:
    from gpt.data.token_files import Ids, Positions


class Bins(NamedTuple):
    """The splits, their tokenizer, packed documents as in `TokenData`, and hashes of the files."""

    train: Ids | Shards
    validation: Ids | Shards
    tokenizer: Tokenizer
    documents: Positions | None
    hashes: list[str]


def open_bins(
    data: Sequence[str],
    validation: Sequence[str],
    fraction: Fraction,
    choose: Callable[[Path], Tokenizer],
    *,
    pack_documents: bool,
) -> Bins | None:
    """The corpus in .bin files that `data` and `validation` name; None if `data` names other sources.

    Args:
        data: One .bin file, or a folder of them.
        validation: Likewise; all of `data` is then for training.
        fraction: The share of `data` that is for validation, if no file is.
        choose: Gives the tokenizer of the file that it is called with.
        pack_documents: Keep documents apart.

    Raises:
        InputError: A file is missing or damaged, has an id that is not in the vocabulary, or `validation`
            names other sources.
    """
    shards, files = shard_files(data), bin_files(data)
    if not shards and not files:
        return None
    held_out = bin_files(validation) if validation else []
    if validation and not shards:
        files += held_out
        if len(files) != 2:
            raise InputError(f"{_both(data, validation)}, expected one .bin file for each of them")
    if not shards:
        return _open_files(files, fraction, choose(files[0]), pack_documents=pack_documents)

    if validation:
        held_out = shard_files(validation) or held_out
        if not held_out:
            raise InputError(f"{_both(data, validation)}, expected .bin files for each of them")
    else:
        shards, held_out = split_by_name(shards)
    return _open_shards(
        shards, held_out, fraction, choose((shards or held_out)[0]), pack_documents=pack_documents
    )


def _open_files(
    files: Sequence[Path], fraction: Fraction, tokenizer: Tokenizer, *, pack_documents: bool
) -> Bins:
    """One file, of which `fraction` is for validation, or one for each split."""
    import numpy as np

    parts, contents = zip(*map(open_bin, files), strict=True)
    for file, content in zip(files, contents, strict=True):
        check_id(content.largest, content.position, tokenizer.vocab_size, str(file))
    documents = None
    if pack_documents:
        offsets = [0, *(len(part) for part in parts)]
        documents = np.concatenate(
            [document_begins(p, tokenizer) + o for p, o in zip(parts, offsets, strict=False)]
        )
    cut = len(parts[0]) if parts[1:] else split_at(len(parts[0]), fraction)
    validation = parts[1] if parts[1:] else parts[0][cut:]
    return Bins(parts[0][:cut], validation, tokenizer, documents, [content.sha256 for content in contents])


def _open_shards(
    files: Sequence[Path],
    held_out: Sequence[Path],
    fraction: Fraction,
    tokenizer: Tokenizer,
    *,
    pack_documents: bool,
) -> Bins:
    """Many files for training, and those that are held out, or else `fraction` of the tokens, to validate."""
    end = separator(tokenizer) if pack_documents else None
    opened = [ShardFiles(paths, tokenizer.vocab_size) for paths in (files, held_out)]
    train, validation = (shards.all(end) for shards in opened)
    if not held_out:
        cut = split_at(len(train), fraction)
        train, validation = train[:cut], train[cut:]
    return Bins(train, validation, tokenizer, None, [shards.sha256 for shards in opened])


def _both(data: Sequence[str], validation: Sequence[str]) -> str:
    """The begin of a message about sources that do not fit together."""
    return f"data: {' '.join(data)} with validation {' '.join(validation)}"
