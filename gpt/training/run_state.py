"""The state.json of a checkpoint: how far the run has come, random states, loss scale and settings.

All of it is checked before anything of a checkpoint is used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt.config import TrainConfig
from gpt.errors import InputError, shown
from gpt.files import read_json
from gpt.training import rng

LARGEST = 2**53  # of a count
# Settings that earlier versions lacked: a run of one goes on with their defaults. They lacked best_step too.
ADDED = {"keep_best", "time_limit", "final_eval_batches", "profile", "tensorboard", "checkpoint_activations"}
ADDED |= {"peak_tflops", "check_memory", "validation", "validation_fraction", "keep_newlines", "text_field"}
ADDED |= {"parallel", "shard_size"}


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and saves
    best_loss: float = math.inf  # lowest validation loss of an evaluation
    best_step: int = 0  # of that evaluation
    evaluations_since_best: int = 0

    def to_state(self) -> dict[str, Any]:
        """The entries of state.json."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "worse": self.evaluations_since_best,
        }

    def note_evaluation(self, loss: float) -> bool:
        """Notes the validation loss of an evaluation; returns whether it is the best one."""
        improved = loss < self.best_loss
        if improved:
            self.best_loss, self.best_step, self.evaluations_since_best = loss, self.step, 0
        else:
            self.evaluations_since_best += 1
        return improved


class RunState(NamedTuple):
    """A state.json.

    `random_states` has one state per rank; `scaler` is empty if the loss is not scaled; `identity` is the
    hash of text and tokenizer; `content` is the whole file.
    """

    progress: Progress
    random_states: Sequence[rng.State]
    scaler: Mapping[str, Any]
    identity: str
    train: TrainConfig
    content: Mapping[str, Any]


def read_state(path: Path) -> RunState:
    """Reads and checks a state.json.

    Raises:
        InputError: An entry is missing, of a wrong type or outside its range.
    """
    entries = _Entries(read_json(path), f"resume: {path}: ")
    progress = Progress(
        step=entries.number("step", int),
        tokens=entries.number("tokens", int),
        seconds=entries.number("seconds", float),
        best_loss=math.inf if entries.get("best") is None else entries.number("best", float, low=-math.inf),
        best_step=entries.number("best_step", int) if "best_step" in entries.content else 0,
        evaluations_since_best=entries.number("worse", int),
    )
    if f"step-{progress.step}" != path.parent.name:
        entries.fail("step", f"as in {path.parent.name}")

    states = entries.typed("rng", list, "a list with one state per process")
    if not states:
        entries.fail("rng", "a list with one state per process")
    random_states = [_random_state(_Entries(state, entries.where + "rng ")) for state in states]

    scaler = entries.typed("scaler", dict, "an object")
    if scaler:
        scale = _Entries(scaler, entries.where + "scaler ")
        if not scale.number("scale", float, high=2.0**127) > 0:
            scale.fail("scale", "above 0")
        scale.number("_growth_tracker", int, high=2**31 - 1)

    identity = entries.typed("data_identity", str, "a hash")
    train = entries.typed("train", dict, "an object")
    check_names(f"{entries.where}train", train, {field.name for field in fields(TrainConfig)})
    try:
        config = TrainConfig(**train)
    except InputError as error:
        raise InputError(f"{entries.where}{error}") from error
    return RunState(progress, random_states, scaler, identity, config, entries.content)


def check_names(where: str, settings: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises InputError if `settings` has a name that is not one of `names`, or lacks one of them."""
    unknown, missing = settings.keys() - {*names}, {*names} - settings.keys() - ADDED
    if wrong := unknown | missing:
        raise InputError(f"{where}: {min(wrong)} is unknown or missing, expected this version's")


class _Entries:
    """The entries of a JSON object; errors begin with `where`."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise InputError(f"{where}has a {type(content).__name__}, expected an object")
        self.content: dict[str, Any] = content

    def get(self, name: str) -> Any:
        if name not in self.content:
            raise InputError(f"{self.where}lacks {name!r}, expected a run of this version")
        return self.content[name]

    def typed(self, name: str, kind: type, expected: str) -> Any:
        if not isinstance(self.get(name), kind):
            self.fail(name, expected)
        return self.content[name]

    def number(self, name: str, kind: type, *, low: float = 0, high: float = LARGEST) -> Any:
        value = self.get(name)
        kinds = (int, float) if kind is float else (int,)
        # A comparison with NaN is false.
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            self.fail(
                name, f"a number in [{low}, {high}]" if kind is float else f"an integer in [{low}, {high}]"
            )
        return kind(value)

    def fail(self, name: str, expected: str) -> None:
        raise InputError(f"{self.where}{name} is {shown(self.content[name])}, expected {expected}")


def _random_state(entries: _Entries) -> rng.State:
    for name in ("cpu", "cuda"):
        value = entries.get(name)
        try:
            state = None if value is None else rng.from_hex(value)
            if state is not None and name == "cpu":
                torch.Generator().set_state(state)
        except (TypeError, ValueError, RuntimeError):
            entries.fail(name, "the state of a random number generator, in hexadecimal digits")
    return entries.content
