"""Checks of a model's inputs.

Values on a GPU are not read, because that would synchronise; the attention mask is the exception.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.errors import InputError

INTEGERS = (torch.int64, torch.int32)


def token_ids(idx: Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """`idx` as int64.

    Raises:
        InputError: It is not int64 or int32 (B, T) on `device`, or on a CPU has ids outside [0, vocab_size).
    """
    if not isinstance(idx, Tensor) or idx.ndim != 2 or idx.dtype not in INTEGERS or idx.numel() == 0:
        raise InputError(
            f"GPT: idx is {describe(idx)}, expected int64 (B, T) with at least one token{_hint(idx)}"
        )
    if idx.device != device:
        raise InputError(f"GPT: idx is on {idx.device}, expected {device} (the model's)")
    if _readable(idx):
        low, high = (int(i) for i in idx.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(f"GPT: idx has {low if low < 0 else high}, expected ids in [0, {vocab_size})")
    return idx.long()


def target_ids(targets: Tensor, idx: Tensor) -> Tensor:
    """`targets` as int64; the loss checks the values.

    Raises:
        InputError: It is not int64 or int32, or has another shape or device than `idx`, which is int64.
    """
    if not isinstance(targets, Tensor) or targets.dtype not in INTEGERS or not _alike(targets, idx):
        raise InputError(f"GPT: targets is {describe(targets)}, expected {describe(idx)} (idx's)")
    return targets.long()


def padding(attention_mask: Tensor, idx: Tensor) -> Tensor:
    """int32 (B,), the number of padding tokens on the left of each row.

    Raises:
        InputError: The mask does not fit `idx`, has other values than 0 and 1, or has padding on the right.
    """
    if not isinstance(attention_mask, Tensor) or not _alike(attention_mask, idx):
        expected = f"{tuple(idx.shape)} on {idx.device} (idx's)"
        raise InputError(f"GPT: attention_mask is {describe(attention_mask)}, expected {expected}")
    real = attention_mask == 1
    if not torch.compiler.is_compiling():
        if not (real | (attention_mask == 0)).all():
            raise InputError("GPT: attention_mask has another value, expected 0 for padding and 1 for tokens")
        if not (real[:, 1:] >= real[:, :-1]).all() or not real[:, -1].all():
            raise InputError(
                "GPT: attention_mask has 0 after a 1 or in a whole row, expected padding on the left of a "
                "token"
            )
    return (~real).sum(1, dtype=torch.int32)


def check_document_start(document_start: Tensor, idx: Tensor) -> None:
    """Raises InputError unless document_start is int32 (B, T), on a CPU with values in [0, token's index]."""
    if (
        not isinstance(document_start, Tensor)
        or document_start.dtype != torch.int32
        or not _alike(document_start, idx)
    ):
        expected = f"int32 {tuple(idx.shape)} on {idx.device} (idx's)"
        raise InputError(f"GPT: document_start is {describe(document_start)}, expected {expected}")
    if _readable(idx):
        outside = (document_start < 0) | (document_start > torch.arange(idx.shape[1]))
        if outside.any():
            row, token = (int(i) for i in outside.nonzero()[0])
            value = int(document_start[row, token])
            raise InputError(
                f"GPT: document_start has {value} at row {row}, token {token}, expected a value in [0, "
                f"{token}]"
            )


def positions(length: int, key_start: Tensor | None, device: torch.device) -> Tensor:
    """int64 (T,) or (B, T), the position of each token relative to its key_start; 0 for padding."""
    index = torch.arange(length, device=device)
    if key_start is None:
        return index
    return (index - (key_start[:, None] if key_start.ndim == 1 else key_start)).clamp(min=0)


def describe(value: object) -> str:
    """A tensor's dtype, shape and device; for any other value, the name of its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def _hint(idx: object) -> str:
    """How to make a batch of what is often passed instead: a list of ids, or a tensor of one row."""
    if isinstance(idx, Tensor):
        return ": idx[None] is a batch of one row" if idx.ndim == 1 and idx.numel() else ""
    if isinstance(idx, (list, tuple)) and idx:
        rows = "ids" if isinstance(idx[0], (list, tuple)) else "[ids]"
        return f": torch.tensor({rows}, device=model.device)"
    return ""


def _alike(tensor: Tensor, idx: Tensor) -> bool:
    return tensor.shape == idx.shape and tensor.device == idx.device


def _readable(tensor: Tensor) -> bool:
    """Whether values can be read without synchronising or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
