"""Writing texts and token files for tests, and loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpt import BPETokenizer
from gpt.data.dataset import DataConfig, TokenData

BINS = BPETokenizer({bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256})


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def load(*sources: Any, **fields: Any) -> TokenData:
    return TokenData.load(DataConfig(data=tuple(str(source) for source in sources), **fields))


def joined(data: TokenData) -> str:
    return data.tokenizer.decode([*data.tokens("train").tolist(), *data.tokens("validation").tolist()])


def write_bins(folder: Path, tokenizer: bool = True, **texts: str) -> Path:
    """Writes nanoGPT's files with one token per byte; | becomes the end-of-text token."""
    for name, text in texts.items():
        ids = [256 if c == "|" else ord(c) for c in text]
        np.asarray(ids, "<u2").tofile(folder / f"{name}.bin")
    if tokenizer:
        BINS.save(folder)
    return folder
