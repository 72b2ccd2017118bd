"""Rows with several threads or processes: threads that swap backends, torchrun with a rank that differs."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import kernels
from gpt import GPT, GPTConfig, TokenData, train
from gpt.data.tokenizers import CharTokenizer
from gpt.weights import checkpoint
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import disk_full
from tests.scorecard.row import Outcome, Row
from tests.scorecard.trials import Say, quick_ends, quiet, random_of, run_trials, same, variables

MODEL = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)
BACKENDS = ("triton", "reference", "auto")
SWITCH = 1e-5  # seconds between two threads' turns: as many interleavings as possible


def _together(*jobs: Callable[[], None]) -> None:
    """Runs the jobs in threads that start at the same time.

    Raises:
        AssertionError: A job raised an exception.
    """
    errors: list[str] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, "; ".join(errors[:2])


X, WEIGHT = torch.linspace(-1, 1, 16).reshape(2, 8), torch.ones(8)


def _backend() -> str:
    return kernels.explain("layer_norm", X, WEIGHT).backend


def _expected(backend: str, outside: str) -> str:
    """What `explain` gives inside use_backend(backend) on a CPU."""
    return {"triton": "triton", "reference": "reference"}.get(backend, outside)


def _overlapping_blocks(rng: Random) -> None:
    """use_backend in several threads, nested and overlapping; some threads share one object."""
    outside = _backend()
    shared = kernels.use_backend("reference")

    def job(number: int) -> Callable[[], None]:
        turns = Random(number)

        def run() -> None:
            for _ in range(30):
                backend = turns.choice(BACKENDS[:2])
                with kernels.use_backend(backend):
                    assert _backend() == backend, f"runs {_backend()} inside use_backend({backend!r})"
                    if turns.random() < 0.5:
                        with kernels.use_backend(norm="reference"):
                            assert _backend() == "reference", "the inner block is ignored"
                    if turns.random() < 0.3:
                        with shared, shared:
                            assert _backend() == "reference", "a block that is entered twice is ignored"
                    assert _backend() == backend, f"runs {_backend()} after the inner block"
                assert _backend() == outside, f"runs {_backend()} outside all blocks"

        return run

    _together(*(job(rng.randrange(1000)) for _ in range(rng.randint(2, 4))))
    assert _backend() == outside, f"{_backend()} is left after all threads have ended"


def _explaining_beside_ops(rng: Random) -> None:
    """explain in one thread while others call the op."""

    def explaining() -> None:
        for _ in range(100):
            choice = kernels.explain("layer_norm", X, WEIGHT)
            assert isinstance(choice.reason, str), "explain gives no reason"

    expected = kernels.layer_norm(X, WEIGHT)

    def calling() -> None:
        for _ in range(100):
            with kernels.use_backend("reference"):
                assert torch.equal(kernels.layer_norm(X, WEIGHT), expected), "the op gives other values"

    _together(explaining, calling, *[calling] * rng.randint(0, 1))


def _model(seed: int, use_triton: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(MODEL, use_triton=use_triton, device="cpu").eval()


def _two_models(rng: Random) -> None:
    """A model on kernels and a model on references; each has its own backend and values."""
    ids = torch.randint(11, (1, 4), generator=torch.Generator().manual_seed(rng.randrange(100)))
    models = [_model(1, True), _model(2, False)]
    backends: list[list[str]] = [[], []]
    for model, seen in zip(models, backends, strict=True):
        model.wte.register_forward_hook(lambda *_, seen=seen: seen.append(_backend()))
    with torch.no_grad():
        expected = [model(ids) for model in models]
    results: list[torch.Tensor | None] = [None, None]

    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(1 if number == 0 else 30):
                    results[number] = models[number](ids)

        return run

    _together(job(0), job(1))
    for number, name in enumerate(("triton", "reference")):
        assert set(backends[number]) == {name}, f"a model with {name} runs {set(backends[number])}"
        assert same(results[number], expected[number]), f"the model on {name} gives other values"


def _two_generations(rng: Random) -> None:
    """Text from one model, or from two, in two threads."""
    first = _model(rng.randrange(100), False)
    models = [first, first if rng.random() < 0.5 else _model(3, False)]
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    def generate(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        return models[number].generate(prompt, 20, top_k=5, generator=generator)

    expected = [generate(number) for number in range(2)]
    results: list[torch.Tensor | None] = [None, None]

    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            results[number] = generate(number)

        return run

    _together(job(0), job(1))
    assert same(results, expected), "a thread generates other text than alone"


SCENES = (_overlapping_blocks, _explaining_beside_ops, _two_generations, _two_models)


def _threads(trials: int, seed: int, folder: Path) -> Outcome:
    scenes = SCENES if kernels.dispatch.interpreting else SCENES[:-1]  # the last runs kernels

    def attack(number: int, say: Say) -> None:
        scene = scenes[number % len(scenes)]
        say((scene.__doc__ or "").splitlines()[0])
        scene(random_of("threads", seed, number))

    return run_trials(trials, attack, limit=30)


@dataclass(frozen=True)
class Fault:
    """What differs on one rank, and what must come of it.

    Attributes:
        name: In words.
        flags: More flags of rank 1.
        patch: Called in each rank's process before the command, with the rank.
        code: The exit code of rank 0; None if any but 0 will do.
        word: What the message of rank 0 contains.
        resumes: Whether a run with --resume must end like a run without the fault.
    """

    name: str
    flags: tuple[str, ...] = ()
    patch: Callable[[int], None] = lambda rank: None
    code: int | None = 2
    word: str = ""
    resumes: bool = False


def _at_step(step: int, action: Callable[[], None]) -> None:
    """Calls `action` once, when a batch of a training step is drawn."""
    plain, actions = TokenData.batch, [action]

    def batch(self: TokenData, stream: Any, *args: Any, **kwargs: Any) -> Any:
        if stream == "train" and kwargs["step"] == step and actions:
            actions.pop()()
        return plain(self, stream, *args, **kwargs)

    TokenData.batch = batch  # type: ignore[method-assign]


def _killed(rank: int) -> None:
    if rank == 1:
        _at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _terminated(rank: int) -> None:
    if rank == 1:
        _at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _full(rank: int) -> None:
    if rank == 0:
        _at_step(3, lambda: setattr(checkpoint, "write_tensors", disk_full))


def _not_finite(rank: int) -> None:
    if rank == 1:
        forward = GPT.forward

        def poisoned(self: GPT, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs) * math.nan

        _at_step(3, lambda: setattr(GPT, "forward", poisoned))


def _faults(folder: Path) -> tuple[Fault, ...]:
    other = folder / "other.txt"
    other.write_text(TEXT[100:], encoding="utf-8")
    CharTokenizer.train(TEXT + "\u3042").save(folder / "tokenizer")
    return (
        Fault("another learning rate", ("--learning_rate", "0.5"), word="learning_rate"),
        Fault("one rank is killed", patch=_killed, code=None, resumes=True),
        Fault("other data", ("--data", str(other)), word="text"),
        Fault("a full disk", patch=_full, code=5, word="space", resumes=True),
        Fault("another seed", ("--seed", "7"), word="seed"),
        Fault("a loss that is not finite", patch=_not_finite, code=4, word="nan", resumes=True),
        Fault("another tokenizer", ("--tokenizer", str(folder / "tokenizer")), word="vocab_size"),
        Fault("SIGTERM to one rank", patch=_terminated, code=143, resumes=True),
        Fault("another size", ("--n_embd", "32"), word="n_embd"),
        Fault("more steps", ("--max_steps", "9"), word="max_steps"),
        Fault("none", code=0),
    )


FLAGS = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2 --grad_accum 2 --eval_batches 1"
FLAGS += " --device cpu --use_triton false --max_steps 5 --eval_interval 2 --dropout 0"
ENDED = 40.0  # seconds after the first rank has ended in which torchrun's SIGTERM must end the others


def _launch(
    argv: Sequence[Sequence[str]], folder: Path, patch: Callable[[int], None]
) -> tuple[list[int], str]:
    """Runs gpt.train in one forked process per rank, as torchrun does; a rank that fails ends the others.

    Returns the exit codes, by rank, and what rank 0 prints on stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(len(argv)), "LOCAL_WORLD_SIZE": str(len(argv))}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FUSED_GPT_CACHE": str(folder / "cache")}
    ranks = []
    for rank, arguments in enumerate(argv):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                quiet()
                if rank == 0:
                    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                patch(rank)
                with quick_ends():
                    code = train.main(list(arguments))
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        ranks.append(child)

    codes: dict[int, int] = {}
    asked = math.inf
    while len(codes) < len(ranks):
        for rank, child in enumerate(ranks):
            if rank not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if any(codes.values()) and asked == math.inf and len(codes) < len(ranks):
            asked = now
        if (
            now > asked + 1
        ):  # torchrun looks once a tenth of a second; a second lets the others end by themselves
            for rank, child in enumerate(ranks):
                if rank not in codes:
                    os.kill(child, signal.SIGTERM if now < asked + ENDED else signal.SIGKILL)
            assert now < asked + ENDED, f"rank {set(range(len(ranks))) - set(codes)} ignores SIGTERM"
            time.sleep(0.5)
        time.sleep(0.02)
    return [codes[rank] for rank in range(len(ranks))], (folder / "stderr").read_text("utf-8", "replace")


def _torchrun(trials: int, seed: int, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    faults = _faults(folder)
    clean: list[Any] = []

    def weights(out: Path) -> Any:
        checkpoints = checkpoint.list_checkpoints(out)
        for path in checkpoints:
            checkpoint.verify(path)
        return checkpoint.read_tensors(checkpoints[-1] / checkpoint.MODEL)

    def attack(number: int, say: Say) -> None:
        fault = faults[(number + seed) % len(faults)]
        out = folder / f"out-{number}"
        say(fault.name)
        argv = [*FLAGS.split(), "--data", str(text), "--out", str(out)]
        codes, message = _launch([argv, [*argv, *fault.flags]], folder, fault.patch)
        lines = [
            line for line in message.splitlines() if line.startswith("gpt.train: ") and "warning:" not in line
        ]
        assert "Traceback" not in message or fault.code is None, f"a traceback: {message[-300:]}"
        if fault.code is None:
            assert all(codes), f"exit codes {codes}"
        else:
            assert codes[0] == fault.code, f"exit codes {codes}: {lines or message[-300:]}"
            assert bool(lines) == (fault.code in (2, 4, 5)), f"exit codes {codes}: {message[-300:]}"
        assert fault.word.lower() in " ".join(lines).lower(), (
            f"the message does not say {fault.word}: {lines}"
        )
        if fault.code == 0:
            assert codes == [0, 0], f"exit codes {codes}"
        if fault.code == 2:
            assert not checkpoint.list_checkpoints(out), "a run that is refused saves checkpoints"
        for path in checkpoint.list_checkpoints(out):
            checkpoint.verify(path)
        if fault.resumes:
            codes, message = _launch([[*argv, "--resume"]] * 2, folder, lambda rank: None)
            assert codes == [0, 0], f"the resumed run ends with {codes}: {message[-300:]}"
            if not clean:
                codes, _ = _launch([[*argv[:-1], str(folder / "clean")]] * 2, folder, lambda rank: None)
                assert codes == [0, 0], f"the clean run ends with {codes}"
                clean.append(weights(folder / "clean"))
            assert same(weights(out), clean[0]), "the resumed run has other weights than a clean one"
        shutil.rmtree(out, ignore_errors=True)

    with variables(OMP_NUM_THREADS="1"):
        return run_trials(trials, attack, limit=120, forks=True)


ROWS: tuple[Row, ...] = (
    Row(
        "threads",
        "threads that swap backends, explain, run models or generate get what each would get alone",
        _threads,
        trials=60,
        small=4,
        long=1000,
    ),
    Row(
        "torchrun",
        "two ranks of which one differs, fails or is killed both end, with the right exit code and a named "
        "reason; checkpoints stay valid, and a resume equals a clean run",
        _torchrun,
        trials=11,
        small=1,
        long=110,
    ),
)
