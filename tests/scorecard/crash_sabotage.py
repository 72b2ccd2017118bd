"""Code that is broken on purpose, to show that the rows notice; each function patches its process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt import cli, train
from gpt.data import tokenizers
from gpt.training import run_folder, trainer
from gpt.weights import checkpoint, commit, huggingface
from gpt.weights.hashes import write_sums


def delete_before_renaming() -> None:
    """A folder is removed before the new one has its name."""

    @contextmanager
    def careless(target: Path) -> Iterator[Path]:
        unfinished = target.with_name(f".unfinished-{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        write_sums(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)

    checkpoint.commit = huggingface.commit = careless


def keep_leftovers() -> None:
    """What a killed save left has a name that no other process looks for."""
    commit._hidden = lambda prefix, target: target.with_name(f"{prefix}{target.name}-{os.getpid()}")


def forget_to_sync() -> None:
    """What is renamed may not be on the disk yet."""
    os.fsync = lambda handle: None


def write_in_place() -> None:
    """A JSON file is overwritten, not replaced."""

    def write_json(path: Path, content: Any, **options: Any) -> None:
        path.write_text(json.dumps(content, **options))

    tokenizers.write_json = write_json


def ignore_failed_writes() -> None:
    """A save whose writes failed counts as done."""
    write = checkpoint.write_tensors

    def careless(*args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            write(*args, **kwargs)

    checkpoint.write_tensors = careless


def report_with_a_traceback() -> None:
    """Errors of a command are not caught."""
    cli.ReportedError = ZeroDivisionError


def ignore_locks() -> None:
    """Two processes may write to one folder."""
    run_folder.RunFolder.lock = lambda self: None


def forget_the_random_state() -> None:
    """A resumed run draws other random numbers."""
    trainer.rng.set_state = lambda state, device: trainer.rng.seed(1, 1, 1)


def always_exit_with_0() -> None:
    """A run that was stopped looks like one that ended."""
    main = train.main
    train.main = lambda argv: main(argv) and 0
