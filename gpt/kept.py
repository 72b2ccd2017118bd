"""What a model keeps between calls of `generate`: decoders, for as long as the model stays as it is.

They are not attributes of the model, so copying, pickling and saving it leave them out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

MOST = 4  # decoders of a model
MOST_BYTES = 1 << 30  # of their key-value caches


class Keepable(Protocol):
    """What can be kept."""

    nbytes: int
    intact: bool  # False after an operation on it was interrupted


@dataclass(frozen=True)
class _Kept:
    key: Hashable
    state: Hashable
    value: Keepable


Value = TypeVar("Value", bound=Keepable)
_models: WeakKeyDictionary[nn.Module, list[_Kept]] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def borrow(model: nn.Module, key: Hashable, state: Hashable, make: Callable[[], Value]) -> Iterator[Value]:
    """A value that no other thread uses inside the block: a kept one with this key, else a new one.

    It is kept after the block if it is intact. The least recently used values make way for it.

    Args:
        model: The owner.
        key: Of the value.
        state: Of the model. Values that were made for another state are freed.
        make: Returns a new value, which must not refer to the model.
    """
    with _lock:
        values = _models.setdefault(model, [])
        values[:] = [kept for kept in values if kept.state == state]
        index = next((i for i, kept in enumerate(values) if kept.key == key), None)
        value = None if index is None else values.pop(index).value
    value = make() if value is None else value

    try:
        yield value  # type: ignore[misc]  # a key belongs to one type
    finally:
        with _lock:  # if the model has been cleared since, nothing refers to this list any more
            if value.intact:
                values.append(_Kept(key, state, value))
            while len(values) > MOST or sum(kept.value.nbytes for kept in values) > MOST_BYTES:
                values.pop(0)


def fits(nbytes: int) -> bool:
    """Whether a value of this size can be kept."""
    return nbytes <= MOST_BYTES


def clear(model: nn.Module) -> None:
    """Frees what the model keeps."""
    with _lock:
        _models.pop(model, None)
