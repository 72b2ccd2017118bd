"""`python -m bench.validate`: executes what every compiler pass makes of every kernel; no GPU is needed.

Each kernel is launched on small tensors, with the tile that the tuning table has for an architecture.
Triton's compiler hands a module from pass to pass. ttsem executes each of these modules on the CPU, from
the first Triton IR to the final TTGIR, which has pipelined loops, asynchronous copies and the matmuls of
the tensor cores. Copies and matmuls finish as late as the waits of the module allow
(`bench.validate.late_completion`).

What a module computes is compared with Triton's interpreter, which runs the kernel's source without the
compiler. The interpreter, in turn, is compared with plain PyTorch by the package's rule
(kernels/tolerance.py): column "torch", where 1 is the limit. In column "error", 1 is the tolerance of a
stage. The exit code is 1 if a stage differs by more, or does not run to its end. Column "s" is seconds of
CPU time.

It needs ttsem, and the version of Triton that ttsem is made for. LLVM, PTX and machine code are not
executed, and races between threads are not looked for.
"""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.compiling import architecture_of, in_processes, ops_of
from bench.machine import describe, installed
from bench.record import write_json
from bench.validate.record import Recorded
from bench.validate.report import HEADER, TOLERANCES, Result, as_json, line, total, unexamined, verdict
from gpt.cli import OptionParser, option
from gpt.errors import InputError
from kernels.registry import SPECS

ARCHITECTURES = (80, 90)
TRITON = "3.8.0"  # the version that ttsem 0.1.0 is made for
RECORD = "import sys; from bench.validate.record import write; write(*sys.argv[1:])"


@dataclass(frozen=True)
class Options:
    """Flags."""

    arch: tuple[str, ...] = option(tuple(map(str, ARCHITECTURES)), "architectures, as in 80 or sm_90")
    op: tuple[str, ...] = option(tuple(SPECS), "ops or families")
    match: str = option("", "only launches whose kernel name and case contain this text")
    json: str | None = option(None, "write the report to this file, as it comes")


def main(argv: Sequence[str]) -> int:
    parser = OptionParser("python -m bench.validate", __doc__ or "", options=Options())
    _, values = parser.parse_tables(argv)
    options = Options(**values["options"])
    architectures, ops = [architecture_of(text, ARCHITECTURES) for text in options.arch], ops_of(options.op)
    check_environment()

    began = time.monotonic()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.validate", *argv]),
        "machine": asdict(describe(torch.device("cpu"))),
        "ttsem": installed("ttsem"),
        "tolerances": TOLERANCES,
    }
    results: list[Result] = []
    print(HEADER)
    for architecture in architectures:
        launches = [r for r in record(ops, architecture) if options.match in f"{r.kernel} {r.label}"]
        examine = partial(validate_launch, architecture=architecture)
        for result in in_processes(examine, launches, partial(_crashed, architecture=architecture)):
            results.append(result)
            print(line(result), flush=True)
            if options.json is not None:
                write_json(options.json, report | {"total": None, "launches": as_json(results)})

    last = total(results, time.monotonic() - began)
    print(last)
    if options.json is not None:
        write_json(options.json, report | {"total": last, "launches": as_json(results)})
    return 1 if any(result.wrong for result in results) else 0


def check_environment() -> None:
    """Raises InputError unless ttsem and its Triton are installed, and kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET is 1, expected it unset: interpreted kernels cannot be compiled")
    if installed("ttsem") is None:
        raise InputError(
            "ttsem is not installed, expected it for executing compiled modules (pip install ttsem)"
        )
    if installed("triton") != TRITON:
        raise InputError(f"triton is {installed('triton')}, expected {TRITON}, which ttsem is made for")


def record(ops: Iterable[str], architecture: int) -> list[Recorded]:
    """Runs the samples of `ops` in the interpreter, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.pickle"
        done = subprocess.run(
            [sys.executable, "-c", RECORD, str(path), str(architecture), *ops],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the interpreter failed: {done.stderr}")
        return list(pickle.loads(path.read_bytes()))  # written by the child, in a folder of this process


def _crashed(recorded: Recorded, architecture: int) -> Result:
    return replace(unexamined(recorded, architecture), problem="the compiler crashed")


def validate_launch(recorded: Recorded, architecture: int) -> Result:
    """Compiles a launch, executes every module on the way, and judges."""
    from bench.validate.stages import as_record, modules, run_stages

    began, result = time.process_time(), unexamined(recorded, architecture)
    launch = as_record(recorded)
    try:
        stages = modules(launch, architecture)
    except Exception as error:  # any failure of the compiler is reported
        return replace(result, problem=f"does not compile: {type(error).__name__}: {error}")
    fields = verdict(run_stages(launch, stages))
    return replace(result, **fields, seconds=time.process_time() - began)
