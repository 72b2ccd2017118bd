"""The operations that the crash rows attack: how each is prepared, what a reader may see, how it goes on."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from matplotlib.figure import Figure

from gpt import GPT, GPTConfig, train
from gpt.data.dataset import DataConfig, TokenData
from gpt.data.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer
from gpt.files import read_json
from gpt.training.run_folder import RunFolder
from gpt.weights import checkpoint
from kernels.files import write_json
from tests.gpt.text import make_text
from tests.scorecard import shim
from tests.scorecard.crash_trials import Child, difference, snapshot
from tests.scorecard.row import HANG

TEXT = make_text(2000)
FLAGS = (
    "--n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 2 --eval_batches 1 --eval_interval 2 "
    "--checkpoint_interval 2 --log_interval 1 --warmup_steps 2 --device cpu --dtype float32 "
    "--use_triton false --max_steps 6"
)
TINY = FLAGS.split()  # a small run of gpt.train


class Operation:
    """Something that changes files.

    `before` holds the files before it, and `after` those after it and after the next start. A trial runs
    `act` in a copy of `before`; it may be killed. `read` and `settle` then raise AssertionError for a broken
    promise.

    Args:
        folder: An empty folder for what the operation needs.
    """

    name = ""
    command = "child"  # the beginning of its error messages

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = folder / "before"
        self.before.mkdir(parents=True)
        self.prepare()

    def prepare(self) -> None:
        """Fills `before`."""

    def act(self, place: Path) -> int | None:
        """The operation, in a copy of `before`. Returns an exit code."""
        raise NotImplementedError

    def read(self, place: Path, done: bool) -> None:
        """Checks that a reader gets the old or the new state; after a success (`done`) the new one."""

    def go_on(self, place: Path) -> int | None:
        """What the user does next: the same again, or --resume."""
        return self.act(place)

    def settle(self, place: Path) -> None:
        """Checks that going on gives what an undisturbed operation gives, and leaves no stray."""
        code = self.go_on(place)
        assert not code, f"the next attempt ended with exit code {code}"
        gap = difference(snapshot(place), self.after)
        assert not gap, f"after the next attempt, the folder {gap}"

    def copy(self, place: Path) -> None:
        """Makes `place` a copy of `before`."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.before, place)

    @functools.cached_property
    def undisturbed(self) -> tuple[dict[str, str], float]:
        """The snapshot after a process that is not attacked, and the seconds that it took."""
        place = self.folder / "place"
        self.copy(place)
        started = time.perf_counter()
        ended = Child(lambda: self.act(place) or self.go_on(place), self.folder / "undisturbed").wait(60)
        assert ended.code == 0, ended.errors
        return snapshot(place), time.perf_counter() - started

    @property
    def after(self) -> dict[str, str]:
        """The snapshot after a process that is not attacked."""
        return self.undisturbed[0]

    @property
    def limit(self) -> float:
        """Seconds after which a trial hangs; more than HANG where a busy machine is slow."""
        return max(HANG, 5 * self.undisturbed[1])


def make_model(seed: int) -> tuple[GPT, CharTokenizer]:
    """A small model, and the tokenizer of TEXT."""
    tokenizer = CharTokenizer.train(TEXT)
    torch.manual_seed(seed)
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}
    return GPT(GPTConfig(**shape), device="cpu", use_triton=False), tokenizer


class SaveOwn(Operation):
    """Replaces a saved model."""

    name = "save_pretrained"
    format = "fused-gpt"

    def prepare(self) -> None:
        self.models = [make_model(seed) for seed in (1, 2)]
        self.save(self.before, 0)

    def save(self, place: Path, which: int) -> None:
        model, tokenizer = self.models[which]
        if self.format == "fused-gpt":
            checkpoint.save_model(model, place / "model", tokenizer)
        else:
            from gpt.weights.huggingface import save_huggingface

            save_huggingface(model, place / "model", tokenizer)

    def act(self, place: Path) -> None:
        self.save(place, 1)

    def read(self, place: Path, done: bool) -> None:
        loaded = dict(GPT.from_pretrained(place / "model", use_triton=False).named_parameters())
        for model, _ in self.models[done:]:
            if all(torch.equal(loaded[name], p) for name, p in model.named_parameters()):
                return
        raise AssertionError(f"the model is not the new one{'' if done else ' or the old one'}")


class SaveHuggingFace(SaveOwn):
    """Replaces an export."""

    name = "export"
    format = "huggingface"


class SaveCheckpoint(Operation):
    """Saves a checkpoint of a run, and removes the oldest."""

    name = "save_checkpoint"

    def prepare(self) -> None:
        self.model, self.tokenizer = make_model(1)
        for step in (1, 2, 3):
            self.save(self.before, step)

    def save(self, place: Path, step: int) -> None:
        state = {"step": step}
        with torch.no_grad():
            self.model.wte.weight.fill_(step)
        moments = {"moments": torch.full((64,), float(step))}
        checkpoint.save_checkpoint(place, step, self.model, self.tokenizer, moments, state)

    def act(self, place: Path) -> None:
        self.save(place, 4)

    def read(self, place: Path, done: bool) -> None:
        newest = checkpoint.find_checkpoint(place)
        step = checkpoint.step_of(newest)
        assert step == 4 or (step == 3 and not done), f"the newest checkpoint is of step {step}"
        assert read_json(newest / checkpoint.STATE)["step"] == step, "the state of another step"
        model = checkpoint.load_model(newest, use_triton=False)
        assert bool((model.wte.weight == step).all()), "the weights of another step"

    def go_on(self, place: Path) -> None:
        newest = checkpoint.step_of(checkpoint.find_checkpoint(place))
        RunFolder(place).prepare(newest, keep_final=False)
        for step in range(newest + 1, 6):
            self.save(place, step)


class Train(Operation):
    """Trains from the start to the end, with saves, a sample and a plot."""

    name = "train"
    command = "gpt.train"
    draws = False  # drawing takes half of the time of such a run

    def prepare(self) -> None:
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT)

    def train(self, place: Path, *flags: str) -> int:
        os.environ["FUSED_GPT_CACHE"] = str(self.folder / "cache")
        if not self.draws:
            Figure.savefig = save_curves
        return train.main([*flags, "--out", str(place / "run")])

    def start(self, place: Path) -> int:
        return self.train(place, *TINY, "--data", str(self.text))

    def act(self, place: Path) -> int:
        return self.start(place)

    def read(self, place: Path, done: bool) -> None:
        if done or checkpoint.list_checkpoints(place / "run"):
            step = checkpoint.step_of(checkpoint.find_checkpoint(place / "run"))
            assert step == 6 or not done, f"the newest checkpoint of the whole run is of step {step}"
            checkpoint.load_model(place / "run", use_triton=False)

    def go_on(self, place: Path) -> int:
        if checkpoint.list_checkpoints(place / "run"):
            return self.train(place, "--resume")
        return self.start(place)


class Resume(Train):
    """Resumes a run that was killed while it saved, and whose newest checkpoint is damaged."""

    name = "resume"

    def prepare(self) -> None:
        super().prepare()
        place = self.folder / "place"
        calls = list_calls(self, place, self.start)
        saving = next(call for call in calls if "step-6" in call.path and "optimizer" in call.path)
        ended = Child(lambda: self._killed(saving), self.folder / "killed").wait(60)
        assert ended.code == 137, ended.errors
        run = self.before / "run"
        (run / "checkpoints" / "step-4" / "model.safetensors").write_bytes(b"damaged")

    def _killed(self, call: shim.Call) -> int:
        """Trains, and is killed while it saves step 6."""
        shim.arm(self.before, shim.Attack("kill-after", call))
        return self.start(self.before)

    def act(self, place: Path) -> int:
        return self.train(place, "--resume")


class Finish(Train):
    """Resumes a run that has taken its last step: it evaluates, samples and plots again."""

    name = "finish"
    draws = True

    def prepare(self) -> None:
        super().prepare()
        ended = Child(lambda: self.start(self.before), self.folder / "trained").wait(60)
        assert ended.code == 0, ended.errors

    def act(self, place: Path) -> int:
        return self.train(place, "--resume")


class Cache(Operation):
    """Tokenizes a text into the cache."""

    name = "token cache"

    def prepare(self) -> None:
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT)
        self.expected = CharTokenizer.train(TEXT).encode(TEXT)

    def act(self, place: Path) -> None:
        os.environ["FUSED_GPT_CACHE"] = str(place / "cache")
        tokens = TokenData.load(DataConfig(data=(str(self.text),))).all_tokens().tolist()
        assert tokens == self.expected, "the tokens are not those of the text"

    def read(self, place: Path, done: bool) -> None:
        self.act(place)


class SaveTokenizer(Operation):
    """Replaces a tokenizer.json."""

    name = "tokenizer.save"

    def prepare(self) -> None:
        self.tokenizers = [BPETokenizer.train(TEXT, size) for size in (260, 270)]
        self.tokenizers[0].save(self.before)

    def act(self, place: Path) -> None:
        self.tokenizers[1].save(place)

    def read(self, place: Path, done: bool) -> None:
        expected = [tokenizer.to_json() for tokenizer in self.tokenizers[done:]]
        assert load_tokenizer(place).to_json() in expected, "another tokenizer"


class WriteJson(Operation):
    """Replaces a JSON file."""

    name = "write_json"

    def prepare(self) -> None:
        write_json(self.before / "content.json", {"version": 1})

    def act(self, place: Path) -> None:
        with reporting():
            write_json(place / "content.json", {"version": 2})

    def read(self, place: Path, done: bool) -> None:
        version = read_json(place / "content.json")["version"]
        assert version == 2 or (version == 1 and not done), f"the file has version {version}"


def save_curves(figure: Figure, image: Path | IO[bytes], **_: object) -> None:
    """Replaces Figure.savefig: writes the points of the curves, without drawing them."""
    points = repr([line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]).encode()
    if isinstance(image, (str, Path)):
        Path(image).write_bytes(points)
    else:
        image.write(points)


@contextmanager
def reporting() -> Iterator[None]:
    """Reports an OSError as a command does, for functions whose contract is to raise it."""
    from gpt.errors import cannot_write

    try:
        yield
    except OSError as error:
        raise cannot_write("write", "file", error) from error


def list_calls(operation: Operation, place: Path, act: Callable[[Path], int | None]) -> list[shim.Call]:
    """The calls that `act` makes in a copy of `before`, when nothing attacks it."""
    operation.copy(place)
    trace = operation.folder / "trace"

    def traced() -> int | None:
        shim.arm(place, None, os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        code = act(place)
        shim.disarm()
        return code

    ended = Child(traced, operation.folder / "traced").wait(60)
    assert ended.code == 0, ended.errors
    return shim.read_trace(trace)
