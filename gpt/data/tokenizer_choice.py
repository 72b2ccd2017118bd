"""The tokenizer that --tokenizer names; one that is trained on a corpus is kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from gpt.data.cache import open_cached, write_cached
from gpt.data.corpus import Corpus
from gpt.data.tokenizers import (
    FILE_NAME,
    SIZE_LIMIT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_json,
)
from gpt.errors import InputError
from gpt.files import user_path


def choose_tokenizer(name: str | None, corpora: Sequence[Corpus], bpe_vocab_size: int) -> Tokenizer:
    """The tokenizer `name`; "char", the default, has the characters of all corpora, "bpe" learns the first.

    Raises:
        InputError: The file that `name` is the path of is missing or damaged.
    """
    if name is None or name == "char":
        return CharTokenizer("".join(set().union(*(corpus.characters for corpus in corpora))))
    if name == "gpt2":
        return BPETokenizer.gpt2()
    if name == "bpe":
        return _trained_bpe(corpora[0], bpe_vocab_size)
    path = user_path(name, "tokenizer")
    if not os.path.lexists(path):
        raise InputError(f"tokenizer: {name} does not exist, expected char, gpt2, bpe or a path")
    return load_tokenizer(path)


def tokenizer_of_bin(file: Path, name: str | None) -> Tokenizer:
    """The tokenizer of a .bin file: `name` (gpt2 or a path), by default the tokenizer.json beside it."""
    beside = file.with_name(FILE_NAME)
    if name in ("char", "bpe") or (name is None and not os.path.lexists(beside)):
        given = name or "not given"
        raise InputError(
            f"tokenizer is {given}, expected gpt2 or a path, because {file} does not contain its tokenizer"
        )
    return choose_tokenizer(name, [], 0) if name else load_tokenizer(beside)


def _trained_bpe(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The byte-pair encoding that `BPETokenizer.train` learns, from the cache if it has been trained before.

    The file in the cache is named after a hash of the text, `vocab_size` and the version of `tokenizers`.
    The hash at its end is checked, and a damaged file is replaced.
    """
    key = hashlib.sha256(f"{corpus.sha256} {vocab_size} {version('tokenizers')}".encode()).hexdigest()
    name = f"tokenizers/{key[:32]}.json"
    if (cached := open_cached(name, SIZE_LIMIT)) is not None:
        with cached.file:
            return tokenizer_from_json(json.loads(cached.file.read(cached.length)))
    tokenizer = BPETokenizer.train(corpus.texts(), vocab_size)
    write_cached(name, [json.dumps(tokenizer.to_json()).encode()])
    return tokenizer
