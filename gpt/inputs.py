"""Checks of what a model is called with. Values are read on a CPU only, so that a GPU is never waited for;
padding always is."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.errors import InputError


def check_ids(idx: Tensor, vocab_size: int, device: torch.device) -> None:
    """Refuses anything but int64 (B, T) on `device` and, on a CPU, ids outside [0, vocab_size)."""
    if not isinstance(idx, Tensor) or idx.ndim != 2 or idx.dtype != torch.int64 or idx.numel() == 0:
        raise InputError(f"GPT: idx is {describe(idx)}, expected int64 (B, T) with at least one token")
    if idx.device != device:
        raise InputError(f"GPT: idx is on {idx.device}, expected {device} (the model's)")
    if _readable(idx):
        low, high = (int(i) for i in idx.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(f"GPT: idx has {low if low < 0 else high}, expected ids in [0, {vocab_size})")


def check_targets(targets: Tensor, idx: Tensor) -> None:
    """Refuses targets of another shape, dtype or device; their values are checked by the loss."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or not _alike(targets, idx):
        raise InputError(f"GPT: targets is {describe(targets)}, expected {describe(idx)} (idx's)")


def padding(attention_mask: Tensor, idx: Tensor) -> Tensor:
    """int32 (B,): how many tokens of each row are padding, which must stand on the left of at least one
    token."""
    if not isinstance(attention_mask, Tensor) or not _alike(attention_mask, idx):
        expected = f"{tuple(idx.shape)} on {idx.device} (idx's)"
        raise InputError(f"GPT: attention_mask is {describe(attention_mask)}, expected {expected}")
    real = attention_mask == 1
    if not torch.compiler.is_compiling():
        if not (real | (attention_mask == 0)).all():
            raise InputError(
                "GPT: attention_mask has a value that is neither, expected 0 for padding and 1 for tokens"
            )
        if not (real[:, 1:] >= real[:, :-1]).all() or not real[:, -1].all():
            raise InputError(
                "GPT: attention_mask has 0 after a 1 or in a whole row, expected padding on the left of a "
                "token"
            )
    return (~real).sum(1, dtype=torch.int32)


def check_document_start(document_start: Tensor, idx: Tensor) -> None:
    """Refuses anything but int32 (B, T) and, on a CPU, a start behind its own token or below 0."""
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
    """int64 (T,) or (B, T): the position of each token, counted from where its keys start, 0 before."""
    index = torch.arange(length, device=device)
    if key_start is None:
        return index
    return (index - (key_start[:, None] if key_start.ndim == 1 else key_start)).clamp(min=0)


def describe(value: object) -> str:
    """A tensor's dtype, shape and device, or a type's name."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def _alike(tensor: Tensor, idx: Tensor) -> bool:
    return tensor.shape == idx.shape and tensor.device == idx.device


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
