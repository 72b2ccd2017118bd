"""Byte-pair encodings trained on a corpus, kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from gpt.data.cache import open_cached, write_cached
from gpt.data.corpus import Corpus
from gpt.data.tokenizers import SIZE_LIMIT, BPETokenizer, Tokenizer, tokenizer_from_json


def trained_bpe(corpus: Corpus, vocab_size: int) -> Tokenizer:
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
