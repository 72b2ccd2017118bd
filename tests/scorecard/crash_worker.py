"""A process that imports torch once and forks for each trial, with the library of shim.c preloaded.

`run_row` starts it at its first call and then sends it one request per row. The worker forks for each row, so
that no row sees what another one left in memory, and a row forks for each trial.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any

from tests.scorecard import shim
from tests.scorecard.row import Outcome

ROOT = Path(__file__).parents[2]


def run_row(function: str, trials: int, seed: int, folder: Path, sabotage: str = "") -> Outcome:
    """What `function`, named "module:name", returns in a fork of the worker.

    Args:
        function: It takes `trials`, `seed` and `folder`, and returns an Outcome.
        trials, seed, folder: Its arguments.
        sabotage: A function named "module:name" that breaks the code on purpose, and runs first.
    """
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    request = {"function": function, "trials": trials, "seed": seed, "folder": str(folder)}
    worker.stdin.write(json.dumps({**request, "sabotage": sabotage}) + "\n")
    worker.stdin.flush()
    answer = json.loads(worker.stdout.readline() or '{"error": "the worker ended"}')
    if "error" in answer:
        raise RuntimeError(f"{function}: {answer['error']}")
    return Outcome(**answer)


@functools.cache
def _worker() -> subprocess.Popen[str]:
    """The process, in a session of its own: Ctrl-C ends it only together with this process."""
    folder = tempfile.TemporaryDirectory(prefix="scorecard-")
    library = shim.build(Path(folder.name))
    preload = {} if library is None else {"LD_PRELOAD": str(library)}
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.scorecard.crash_worker"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **preload},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def end() -> None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
        folder.cleanup()

    atexit.register(end)
    return worker


def _warm_up() -> None:
    """Trains and samples once, so that no trial pays for imports.

    Forking stays safe: torch has one thread, its backward pass on a CPU starts none, tqdm's is turned off.
    tqdm's lock is a semaphore that forks share, and a killed trial may hold it: it becomes a lock of its own.
    """
    import torch
    from tqdm import tqdm

    from gpt import eval, sample, train
    from gpt.training import trainer
    from tests.scorecard.crash_operations import TEXT, TINY

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    trainer.SAMPLE_TOKENS = 8  # the sample at the end of a run is not what the rows test
    output = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="scorecard-") as folder, redirect_stdout(output):
        text, run = f"{folder}/text.txt", f"{folder}/run"
        Path(text).write_text(TEXT)
        os.environ["FUSED_GPT_CACHE"] = f"{folder}/cache"
        with redirect_stderr(output):
            codes = [
                train.main([*TINY, "--data", text, "--out", run]),
                sample.main(["--checkpoint", run, "--max_new_tokens", "2"]),
                eval.main(["--checkpoint", run, "--data", text]),
            ]
    if any(codes) or threading.active_count() > 1:
        raise RuntimeError(f"exit codes {codes}, {threading.enumerate()}: {output.getvalue()}")
    gc.collect()
    gc.freeze()


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers requests until there are no more."""
    _warm_up()
    for request in requests:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            with open(writing, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(_answer(json.loads(request))))
            os._exit(0)
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        answers.write((answer or '{"error": "the row ended without an answer"}') + "\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of the row's Outcome, or an "error"."""
    try:
        if request["sabotage"]:
            _named(request["sabotage"])()
        outcome = _named(request["function"])(request["trials"], request["seed"], Path(request["folder"]))
        return dataclasses.asdict(outcome)
    except BaseException:
        return {"error": traceback.format_exc()}


def _named(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)  # it is loaded, and programs that a trial starts do not need it
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _serve(sys.stdin, answers)
