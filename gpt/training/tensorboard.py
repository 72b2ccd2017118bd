"""The log of a run as TensorBoard's scalars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.errors import InputError, cannot_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raises InputError where TensorBoard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            "tensorboard: the package is not installed, expected it (pip install tensorboard)"
        ) from error


class TensorBoard:
    """A Trainer's `on_log` that writes each number of a record as a scalar.

    Args:
        folder: Created with the first record.
        first_step: The run's first step; what an earlier run wrote from it on no longer counts.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._writer: SummaryWriter | None = None

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Writes the record to the disk.

        Raises:
            InputError, MachineError: The folder cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), purge_step=self._first_step)
            for name, value in _scalars(record):
                self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()
        except OSError as error:
            raise cannot_write("tensorboard", self._folder, error) from error


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record but its step, with those of nested objects as "gradient_norms/blocks.0"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            yield prefix + name, value
