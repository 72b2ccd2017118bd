"""Rows about limits: memory while loading, memory that runs out, and values that are not finite."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from gpt import GPT, GPTConfig, TokenData, Trainer, eval, sample, train
from gpt.data.dataset import DataConfig
from gpt.data.tokenizers import CharTokenizer
from gpt.errors import NonFiniteError
from gpt.training import trainer
from gpt.weights import checkpoint, huggingface
from gpt.weights.hashes import write_sums
from gpt.weights.pretrained import load_pretrained
from tests.gpt.text import TEXT
from tests.gpt.training import small_runs
from tests.scorecard.row import Outcome, Row
from tests.scorecard.trials import Refused, Say, answer, quick_ends, random_of, run_trials, same, variables

SIZE = 200 << 20  # bytes of a large file
LARGE = GPTConfig(vocab_size=SIZE // 4096, block_size=8, n_layer=1, n_head=1, n_embd=1024)
PATIENCE = 60.0  # seconds to hash and load a large file on a busy machine


def _zeros(path: Path, size: int) -> None:
    """A file of zeros that takes no space on disk."""
    with path.open("wb") as file:
        file.truncate(size)


def _sparse_model(folder: Path, model: GPT, save: Callable[[GPT, Path], None]) -> None:
    """Saves `model`, which is on the meta device, with zeros as its values, without holding them."""

    def write(tensors: dict[str, torch.Tensor], path: Path, metadata: Any = None) -> None:
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        content = json.dumps(header).encode()
        with Path(path).open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            file.truncate(8 + len(content) + end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", write)
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
        for module in (checkpoint, huggingface):
            patch.setattr(module, "check_finite", lambda *_: None)
        save(model, folder)


def _own(folder: Path) -> Callable[[], Any]:
    tokenizer = CharTokenizer.train(TEXT)
    model = GPT(LARGE, device="meta")
    _sparse_model(folder, model, lambda model, place: checkpoint.save_model(model, place, tokenizer))
    return lambda: load_pretrained(folder, device="cpu")


def _export(folder: Path) -> Callable[[], Any]:
    _sparse_model(folder, GPT(LARGE, device="meta"), huggingface.save_huggingface)
    return lambda: load_pretrained(folder, device="cpu")


def _nanogpt(folder: Path) -> Callable[[], Any]:
    from tests.gpt.weights.layouts import NanoGPT

    folder.mkdir()
    nano = NanoGPT()
    state = nano.state_dict()
    width = state["transformer.wte.weight"].shape[1]
    rows = SIZE // 4 // width
    state["transformer.wte.weight"] = state["lm_head.weight"] = torch.zeros(rows, width)
    torch.save({"model": state, "model_args": {**nano.arguments, "vocab_size": rows}}, folder / "ckpt.pt")
    return lambda: load_pretrained(folder, device="cpu")


def _bin(folder: Path) -> Callable[[], Any]:
    folder.mkdir()
    CharTokenizer.train(TEXT).save(folder)
    _zeros(folder / "train.bin", SIZE)
    _zeros(folder / "val.bin", 1 << 20)

    def load() -> None:
        data = TokenData.load(DataConfig(data=(str(folder),)))
        data.check(64)
        data.batch("train", 8, 64, seed=1, step=1)

    return load


def _text(folder: Path) -> Callable[[], Any]:
    """Tokenizes and caches a text, and reads it from the cache."""
    folder.mkdir()
    with (folder / "text.txt").open("w") as file:
        for _ in range(SIZE // 10 // len(TEXT)):
            file.write(TEXT)

    def load() -> None:
        for _ in range(2):
            data = TokenData.load(DataConfig(data=(str(folder / "text.txt"),)))
            data.batch("train", 8, 64, seed=1, step=1)

    return load


def _claims(folder: Path) -> Callable[[], Any]:
    """A checkpoint with right hashes whose config claims terabytes, and headers that claim as much."""
    checkpoint.save_model(GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4)), folder)
    settings = json.loads((folder / checkpoint.CONFIG).read_text())
    (folder / checkpoint.CONFIG).write_text(json.dumps({**settings, "vocab_size": 2**31, "n_embd": 2**14}))
    write_sums(folder)

    def load() -> None:
        assert isinstance(answer(lambda: load_pretrained(folder, device="cpu")), Refused), "accepted"
        with (folder / checkpoint.MODEL).open("wb") as file:
            header = {"wte.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
            content = json.dumps(header).encode()
            file.write((2**40).to_bytes(8, "little") + content)
        write_sums(folder)
        assert isinstance(answer(lambda: load_pretrained(folder, device="cpu")), Refused), "accepted"

    return load


def _sampled(folder: Path) -> Callable[[], Any]:
    _own(folder)
    argv = ["--checkpoint", str(folder), "--prompt", "the", "--max_new_tokens", "2", "--device", "cpu"]

    def load() -> None:
        code, message = _run(sample, argv)
        assert code == 0, message

    return load


LOADS = (_own, _bin, _export, _nanogpt, _text, _claims, _sampled)


def _memory(trials: int, seed: int, folder: Path) -> Outcome:
    total = Outcome()
    largest = 0.0
    for number in range(trials):
        build = LOADS[number % len(LOADS)]
        folder.mkdir(parents=True, exist_ok=True)
        place, report = folder / str(number), folder / "peak"
        with variables(FUSED_GPT_CACHE=str(folder / "cache")):
            attack = _measured(build, place, report)
            outcome = run_trials(1, attack, limit=PATIENCE)
        total.trials += 1
        total.failures += outcome.failures
        total.slowest = max(total.slowest, outcome.slowest)
        size, peak = map(int, report.read_text().split()) if report.exists() else (0, 0)
        if size >= SIZE // 10 and peak / size > largest:
            largest, total.worst = (
                peak / size,
                f"{build.__name__[1:]}: {peak / size:.2f} x its {size >> 20} MB",
            )
        report.unlink(missing_ok=True)
        shutil.rmtree(place)
    return total


def _measured(build: Callable[[Path], Callable[[], Any]], place: Path, report: Path) -> Callable[..., int]:
    """An attack that loads what `build` has written, and reports the bytes of the files and of the peak."""
    load = build(place)
    size = sum(path.stat().st_size for path in place.iterdir())

    def attack(number: int, say: Say) -> int:
        say(build.__name__[1:])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        report.write_text(f"{size} {peak}")
        return size

    return attack


def _run(module: ModuleType, argv: list[str]) -> tuple[int, str]:
    """The exit code of a command, and the line that it prints on stderr apart from warnings."""
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        code = module.main(argv)
    lines = [
        line for line in err.getvalue().splitlines() if line.startswith("gpt.") and ": warning:" not in line
    ]
    assert len(lines) <= 1, f"{lines[:3]}"
    return code, "".join(lines)


def _out_of_memory(trials: int, seed: int, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    config = GPTConfig(vocab_size=10_000, block_size=16, n_layer=1, n_head=1, n_embd=256)
    checkpoint.save_model(GPT(config, device="cpu"), folder / "model", CharTokenizer.train(TEXT))
    text, place = str(folder / "text.txt"), str(folder / "model")
    common = ["--device", "cpu", "--use_triton", "false"]
    commands: tuple[tuple[ModuleType, list[str]], ...] = (
        (sample, ["--checkpoint", place, "--prompt", "the", "--max_new_tokens", "3", *common]),
        (eval, ["--checkpoint", place, "--data", text, *common]),
        (train, ["--data", text, *small_runs.TINY, "--max_steps", "2", "--use_triton", "false"]),
        (train, ["--init", place, "--data", text, "--tokenizer", place, "--max_steps", "2", *common]),
    )

    def attack(number: int, say: Say) -> None:
        rng = random_of("out-of-memory", seed, number)
        module, argv = rng.choice(commands)
        extra = int(2 ** rng.uniform(0, 8)) << 20
        if module is train:
            out = folder / f"out-{number}"
            argv = [*argv, "--out", str(out), "--batch_size", str(rng.choice((4, 64)))]
        say(f"{module.__name__} with {extra >> 20} MB")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + extra
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        try:
            with variables(FUSED_GPT_CACHE=str(folder / "cache")):
                code, message = _run(module, argv)
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_AS, before)
            answer(partial(_raise, error))
            raise
        resource.setrlimit(resource.RLIMIT_AS, before)
        refused = code == 2 and "takes about" in message  # before it starts: needed and free bytes
        assert refused or code in (0, 5), f"exit code {code}: {message}"
        assert (code == 0) == (not message), f"exit code {code}: {message!r}"
        if module is train:
            for path in checkpoint.list_checkpoints(out):
                checkpoint.verify(path)
            shutil.rmtree(out, ignore_errors=True)

    return run_trials(trials, attack, limit=PATIENCE)


def _raise(error: Exception) -> None:
    raise error


BAD = (math.nan, math.inf, -math.inf)
PLACES = ("weight", "moment", "gradient", "loss", "learning rate")


class Planting(TokenData):
    """Calls `plant` when the batches of training step `at` are drawn."""

    at = -1
    plant: Callable[[], None]

    def batch(self, stream: Any, *args: Any, **kwargs: Any) -> Any:
        if stream == "train" and kwargs["step"] == self.at and kwargs["micro_step"] == 0:
            self.plant()
        return super().batch(stream, *args, **kwargs)


def _trainer(out: Path, optimizer: str, *, resume: bool = False, data: TokenData | None = None) -> Trainer:
    from dataclasses import replace

    data = data or TokenData.from_text(TEXT)
    config = replace(small_runs.CONFIG, optimizer=optimizer)
    torch.manual_seed(11)
    return Trainer(small_runs.make_model(data), data, config, out=out, resume=resume)


def _weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def _plant(place: str, value: float, run: Trainer, rng: Random) -> None:
    """Puts `value` into one element of the place, while training is at this step."""
    parameters = list(run.model.parameters())
    if place == "weight":
        chosen = rng.choice(parameters)
        chosen.data.view(-1)[rng.randrange(chosen.numel())] = value
    elif place == "moment":
        moments = [t for t in run._step.tensors().values() if t.is_floating_point() and t.ndim]
        if not moments:  # before the first step
            return _plant("weight", value, run, rng)
        chosen = rng.choice(moments)
        chosen.view(-1)[rng.randrange(chosen.numel())] = value
    elif place == "gradient":
        rng.choice(parameters).register_hook(lambda gradient: gradient.clone().fill_(value))
    elif place == "loss":
        run._step._forward = lambda *args, **kwargs: run.model(*args, **kwargs) * value  # type: ignore[misc]
    return None


def _training(trials: int, seed: int, folder: Path) -> Outcome:
    clean = {}
    for optimizer in ("adamw", "muon"):
        with quick_ends(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run = _trainer(folder / optimizer, optimizer)
            run.run()
        clean[optimizer] = _weights(run)

    def attack(number: int, say: Say) -> None:
        rng = random_of("non-finite", seed, number)
        place, value, optimizer = rng.choice(PLACES), rng.choice(BAD), rng.choice(("adamw", "muon"))
        at = rng.randrange(small_runs.CONFIG.max_steps)
        say(f"{value} in the {place} at step {at} of {optimizer}")
        out = folder / f"run-{number}"
        data = TokenData.from_text(TEXT)
        data.__class__ = Planting
        with quick_ends() as patch:
            run = _trainer(out, optimizer, data=data)
            data.at, data.plant = at, partial(_plant, place, value, run, rng)  # type: ignore[attr-defined]
            if place == "learning rate":  # it is computed before the batches are drawn
                plain = trainer.learning_rate
                patch.setattr(trainer, "learning_rate", lambda i, c: value if i == at else plain(i, c))
            message = ""
            try:
                run.run()
            except NonFiniteError as error:
                message = str(error)
            assert message, "the run ends as if nothing had happened"
        for path in checkpoint.list_checkpoints(out):
            checkpoint.verify(path)
            for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
                for name, tensor in checkpoint.read_tensors(path / file).items():
                    assert bool(torch.isfinite(tensor).all()), f"{path.name}/{file} has {name} not finite"
        if checkpoint.list_checkpoints(out):
            with quick_ends():
                again = _trainer(out, optimizer, resume=True)
                again.run()
            assert same(_weights(again), clean[optimizer]), (
                "the resumed run has other weights than a clean one"
            )
        shutil.rmtree(out)

    return run_trials(trials, attack, limit=20)


def _files(trials: int, seed: int, folder: Path) -> Outcome:
    with quick_ends(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        _trainer(folder / "clean", "adamw").run()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")

    def attack(number: int, say: Say) -> None:
        from safetensors.torch import save_file

        rng = random_of("non-finite-files", seed, number)
        out = folder / "victim"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "clean", out)
        newest = max(checkpoint.list_checkpoints(out), key=checkpoint.step_of)
        file = rng.choice((checkpoint.MODEL, checkpoint.OPTIMIZER))
        tensors = {name: t.clone() for name, t in checkpoint.read_tensors(newest / file).items()}
        name = rng.choice(sorted(n for n, t in tensors.items() if t.is_floating_point()))
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice(BAD)
        save_file(tensors, newest / file)
        write_sums(newest)
        say(f"{file} {name}")

        if file == checkpoint.MODEL:
            for module, argv in (
                (sample, ["--prompt", "the", "--max_new_tokens", "1"]),
                (eval, ["--data", str(folder / "text.txt")]),
            ):
                argv = ["--checkpoint", str(newest), "--device", "cpu", "--use_triton", "false", *argv]
                code, message = _run(module, argv)
                assert code == 4, f"{module.__name__} ends with exit code {code}: {message}"
                assert name in message, f"{module.__name__} does not name {name}: {message}"
        resumed = answer(lambda: _trainer(out, "adamw", resume=True))
        if not isinstance(resumed, Refused):
            finite = [*_weights(resumed).values(), *resumed._step.tensors().values()]
            assert all(bool(torch.isfinite(t).all()) for t in finite), "resumes from a poisoned checkpoint"

    with variables(FUSED_GPT_CACHE=str(folder / "cache")):
        return run_trials(trials, attack)


ROWS: tuple[Row, ...] = (
    Row(
        "limits-memory",
        "loading a file takes at most twice its size and 256 MB; a header or config that claims terabytes "
        "allocates nothing",
        _memory,
        trials=7,
        small=2,
        long=14,
    ),
    Row(
        "limits-out-of-memory",
        "a command without enough memory ends with exit code 5 and one line, or is refused with the bytes "
        "needed and free; its checkpoints stay intact",
        _out_of_memory,
        trials=40,
        small=3,
        long=1000,
    ),
    Row(
        "non-finite-training",
        "a value that is not finite, planted in a run, ends it with exit code 4; no checkpoint has it, and "
        "the resumed run equals a clean one",
        _training,
        trials=60,
        small=8,
        long=1000,
    ),
    Row(
        "non-finite-files",
        "a checkpoint with a value that is not finite is refused by name (exit code 4), or passed over",
        _files,
        trials=40,
        small=4,
        long=500,
    ),
)
