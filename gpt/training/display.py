"""What a run shows on stderr while it works: progress bars, and a line for each evaluation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, initial: int = 0, **options: Any) -> tqdm[Any]:
    """A bar with the time taken and left; where stderr is a file, a line every ten seconds."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, mininterval=interval, dynamic_ncols=True, **options)


def bar_text(record: Mapping[str, Any]) -> str:
    """What the bar of the training shows besides steps and remaining time."""
    mfu = "" if record["mfu"] is None else f", {record['mfu']:.1%} MFU"
    return f"loss {record['train_loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s{mfu}"


def evaluation_line(record: Mapping[str, Any]) -> str:
    """The losses of an evaluation."""
    return (
        f"step {record['step']}: train {record['train_estimate']:.4f}, "
        f"validation {record['validation_loss']:.4f}"
    )
