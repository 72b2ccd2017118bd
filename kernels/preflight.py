"""Checks every op of a run against its reference, at the shapes of the run, before the first step."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from kernels import dispatch
from kernels.files import cache_folder, read_json, write_json
from kernels.registry import SPECS
from kernels.spec import Case, OpSpec
from kernels.verify import check, run_case

COMPILERS = 16  # threads that compile at the same time; each takes a core and some 100 MB
CHILD = [sys.executable, "-c", "from kernels.preflight import serve; serve()"]


@dataclass(frozen=True)
class Row:
    """The result of preflight for one op at one shape.

    `forward` and `backward` are the largest errors divided by their bounds: 1 is the limit, None means that
    nothing was checked. `speedup` is the reference's time divided by the kernel's time for forward plus
    backward. `problem` states what failed; `skipped` states why the op runs its reference without a check.
    """

    op: str
    case: str
    forward: float | None = None
    backward: float | None = None
    speedup: float | None = None
    problem: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Report:
    """The rows of a preflight, its dtype, device and duration, and whether it comes from the cache."""

    rows: tuple[Row, ...]
    dtype: str
    device: str
    seconds: float
    cached: bool = False

    @property
    def failed(self) -> dict[str, str]:
        """Op -> what failed."""
        return {row.op: row.problem for row in self.rows if row.problem}

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def checked(self) -> list[str]:
        """The ops whose kernels were run."""
        return [row.op for row in self.rows if not row.skipped]

    @property
    def skipped(self) -> list[str]:
        """The distinct reasons why the other ops run their reference."""
        return list(dict.fromkeys(row.skipped for row in self.rows if row.skipped))

    def enforce(self) -> None:
        """Makes each op that failed run its reference in this process; `explain` gives the failure."""
        for op, problem in self.failed.items():
            dispatch.distrust(op, f"preflight failed: {problem}")

    def __str__(self) -> str:
        source = "from the cache" if self.cached else f"{self.seconds:.1f} s"
        lines = [f"preflight on {self.device} in {self.dtype}, {source}; errors divided by their bounds"]
        width = max([4, *(len(row.case) for row in self.rows)])
        lines.append(f"{'op':<22} {'case':<{width}} {'forward':>8} {'backward':>8} {'speed-up':>8}  verdict")
        for row in self.rows:
            numbers = "".join(f" {_number(value):>8}" for value in (row.forward, row.backward, row.speedup))
            verdict = (
                f"FAILED: {row.problem}"
                if row.problem
                else f"reference: {row.skipped}"
                if row.skipped
                else "ok"
            )
            lines.append(f"{row.op:<22} {row.case:<{width}}{numbers}  {verdict}")
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def preflight(
    cases: Iterable[tuple[str, Case]],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    prefer: str = "triton",
    isolate: bool | None = None,
    use_cache: bool = True,
) -> Report:
    """Checks ops at given shapes against their float32 references (float64 for float32), forward and
    backward.

    Args:
        cases: (op name, Case) pairs, e.g. a model's own shapes.
        device: Where to run.
        dtype: The dtype that the ops compute in.
        prefer: The backend of the run, "triton" or "auto". An op for which it selects the reference is not
            checked, but listed with the reason.
        isolate: Whether to run in a child process, so that an illegal memory access is reported with its op.
            None means on CUDA only.
        use_cache: Whether to reuse the verdicts of an earlier run with the same GPU, driver, versions, kernel
            sources and shapes.

    Returns:
        A Report with one row per case.

    Raises:
        ValueError: An unknown op or preference.
    """
    device, cases = torch.device(device), list(cases)
    for name, _ in cases:
        if name not in SPECS:
            raise ValueError(f"preflight: {name!r} is not an op, expected one of {', '.join(sorted(SPECS))}")
    start = time.perf_counter()
    file = _cache_file(cases, device, dtype, prefer)
    if use_cache and (rows := _read_cache(file, cases)) is not None:
        return Report(rows, _name(dtype), _device_name(device), 0.0, cached=True)
    isolate = device.type == "cuda" if isolate is None else isolate
    if isolate:
        rows = tuple(_run_isolated(cases, device, dtype, prefer))
    else:
        rows = tuple(_examine(SPECS[name], case, device, dtype, prefer) for name, case in cases)
    report = Report(rows, _name(dtype), _device_name(device), time.perf_counter() - start)
    if use_cache and report.ok:
        _write_cache(file, report.rows)
    return report


def _examine(spec: OpSpec, case: Case, device: torch.device, dtype: torch.dtype, prefer: str) -> Row:
    with dispatch.model_backend(prefer):
        inputs = spec.make_inputs(case, dtype, device, torch.Generator(device).manual_seed(0))
        choice = dispatch.explain(spec.name, **inputs)
    if choice.backend == "reference":
        return Row(spec.name, case.id, skipped=choice.reason)
    oracle = torch.float64 if dtype == torch.float32 else torch.float32
    try:
        verdicts = check(spec, case, dtype, device, oracle_dtype=oracle)
        _synchronize(device)
    except RuntimeError as error:
        return Row(spec.name, case.id, problem=str(error).partition("\n")[0] or type(error).__name__)
    forward = max(max(v.max_ratio, v.rms_ratio) for v in verdicts if v.name.startswith("out"))
    backward = max(
        (max(v.max_ratio, v.rms_ratio) for v in verdicts if not v.name.startswith("out")), default=None
    )
    problem = "; ".join(str(v) for v in verdicts if not v.ok)
    seconds = [_seconds(spec, inputs, backend, device) for backend in ("reference", "triton")]
    return Row(spec.name, case.id, forward, backward, seconds[0] / seconds[1], problem)


def _seconds(
    spec: OpSpec, inputs: dict[str, Any], backend: str, device: torch.device, repeats: int = 3
) -> float:
    """The time of the fastest of a few calls, forward plus backward."""
    fastest = math.inf
    with dispatch.use_backend(**{spec.name: backend}):
        for _ in range(repeats if device.type == "cuda" else 1):
            _synchronize(device)
            start = time.perf_counter()
            run_case(spec.function, inputs, spec.gradients, spec.writes)
            _synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run_isolated(
    cases: Sequence[tuple[str, Case]], device: torch.device, dtype: torch.dtype, prefer: str
) -> list[Row]:
    """Runs the cases in a child process; if a child exits early, the next child takes the remaining cases.

    The first child compiles the kernels of all cases together. If it exits before its first row, any of them
    may be the reason, so that the next child starts again, and compiles one case after the other.
    """
    rows: list[Row] = []
    together = True
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the child finds the same modules
    while len(rows) < len(cases):
        rest = cases[len(rows) :]
        encoded = [(name, _encode(case)) for name, case in rest]
        order = {"device": str(device), "dtype": _name(dtype), "prefer": prefer, "cases": encoded}
        child = subprocess.run(
            CHILD,
            input=json.dumps(order | {"together": together}),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        finished = [Row(**json.loads(line)) for line in child.stdout.splitlines() if line.startswith("{")]
        rows += finished
        certain = finished or not together
        if certain and len(rows) < len(cases) and (child.returncode != 0 or not finished):
            name, case = cases[len(rows)]
            last = child.stderr.strip().splitlines()[-1] if child.stderr.strip() else "no message"
            rows.append(
                Row(name, case.id, problem=f"its process ended with exit code {child.returncode}: {last}")
            )
        together = False
    return rows


def serve() -> None:
    """Entry point of the child: reads cases from standard input and prints one row per case.

    It exits after the first case that raises, because a CUDA error invalidates all later results of the
    process. The parent starts a new child for the remaining cases.
    """
    order = json.load(sys.stdin)
    device, dtype, prefer = torch.device(order["device"]), getattr(torch, order["dtype"]), order["prefer"]
    cases = [(SPECS[name], _decode(case)) for name, case in order["cases"]]
    if order["together"] and device.type == "cuda":
        _compile_together(cases, device, dtype, prefer)
    for spec, case in cases:
        row = _examine(spec, case, device, dtype, prefer)
        print(json.dumps(asdict(row)), flush=True)
        if row.problem and row.forward is None:
            os._exit(0)  # a normal exit can crash in a broken CUDA context


def _compile_together(
    cases: Sequence[tuple[OpSpec, Case]], device: torch.device, dtype: torch.dtype, prefer: str
) -> None:
    """Compiles the kernels of all cases in parallel. An error is ignored: the case's check repeats it."""
    from kernels.launch import Launch, collect

    def load(launch: Launch) -> None:
        with suppress(Exception), torch.cuda.device(device):
            launch.compile()

    with collect() as launches, dispatch.model_backend(prefer):
        for spec, case in cases:
            with suppress(Exception):
                inputs = spec.make_inputs(case, dtype, device, torch.Generator(device).manual_seed(0))
                run_case(spec.function, inputs, spec.gradients, spec.writes)
    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
        list(pool.map(load, launches))


def _encode(case: Case) -> dict[str, Any]:
    options = {n: str(v) if isinstance(v, torch.dtype) else v for n, v in case.options.items()}
    return {"sizes": dict(case.sizes), "options": options}


def _decode(case: dict[str, Any]) -> Case:
    def option(value: Any) -> Any:
        is_dtype = isinstance(value, str) and value.startswith("torch.")
        return getattr(torch, value.removeprefix("torch.")) if is_dtype else value

    return Case(case["sizes"], {n: option(v) for n, v in case["options"].items()})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _sources() -> str:
    """One hash of all source files of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cache_file(
    cases: Sequence[tuple[str, Case]], device: torch.device, dtype: torch.dtype, prefer: str
) -> str:
    """Where the verdicts of a preflight are cached, below the cache folder."""
    driver = torch.version.cuda, _driver() if device.type == "cuda" else None
    versions = torch.__version__, dispatch.triton_version, dispatch.interpreting, driver
    choice = prefer, dispatch.environment
    key = repr(
        (_device_name(device), versions, choice, _sources(), _name(dtype), [(n, c.id) for n, c in cases])
    )
    return f"preflight/{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@cache
def _driver() -> str:
    """The version of the NVIDIA driver, as the driver reports it in /proc."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text(encoding="utf-8").splitlines()[0] if path.exists() else "unknown"


def _read_cache(file: str, cases: Sequence[tuple[str, Case]]) -> tuple[Row, ...] | None:
    """The rows stored in `file`; None if the file is missing, damaged or holds other cases."""
    try:
        rows = tuple(Row(**row) for row in read_json(cache_folder() / file)["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    asked = [(name, case.id) for name, case in cases]
    return rows if all(map(_has_passed, rows)) and [(row.op, row.case) for row in rows] == asked else None


def _has_passed(row: Row) -> bool:
    """Whether a stored row has the types of a Row and no problem, as `_write_cache` writes them."""
    numbers = row.forward, row.backward, row.speedup
    return row.problem == "" and isinstance(row.skipped, str) and {*map(type, numbers)} <= {float, NoneType}


def _write_cache(file: str, rows: Sequence[Row]) -> None:
    try:
        write_json(cache_folder() / file, {"rows": [asdict(row) for row in rows]})
    except OSError:
        return  # without a cache, the next run repeats the checks
