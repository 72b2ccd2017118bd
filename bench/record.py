"""The file format of measurements: dataclasses, written as JSON and read back with every field checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kernels.files
from bench.measure import Timing
from gpt.errors import InputError
from gpt.files import read_json

FORMAT = 1
STATUSES = ("measured", "absent", "unavailable", "wrong", "failed")
DIRECTIONS = ("forward", "backward", "both", "step", "first token", "decode")

FORMULAS = {
    "time": "median of interleaved samples, seconds per call; low and high are the 20th and 80th percentiles",
    "graph": "the same as the replay of a CUDA graph, without launch gaps",
    "error": "largest error of output and gradients over what kernels/tolerance.py allows; 1 is the limit",
    "TFLOP/s": "flops / time / 1e12; flops by the op's formula; causal attention counts only unmasked pairs",
    "GB/s": "bytes / time / 1e9; bytes is the least that must be moved: each input read once, each output "
    "written once",
    "% of limit": "100 · limit / time; limit is the larger of flops / measured matmul rate and bytes / "
    "measured copy rate",
    "MFU": "(6 N + 12 L H D T) · tokens / time / peak; N counts parameters without position embeddings",
    "memory": "bytes that one call allocates at its peak; a training step includes model and optimizer",
}


@dataclass(frozen=True)
class Machine:
    """The hardware and software of a measurement."""

    device: str  # the name of the GPU or CPU
    kind: str  # "cuda" | "cpu"
    architecture: str  # "sm_90" on a GPU; the instruction set, as in "x86_64", on a CPU
    memory_bytes: int
    threads: int
    driver: str | None
    cuda: str | None
    python: str
    torch: str
    triton: str | None
    system: str
    commit: str
    date: str  # ISO 8601, UTC
    ptxas: str | None = None  # on a GPU: its version, and where it comes from in brackets


@dataclass(frozen=True)
class Row:
    """One contestant in one direction of one case.

    `limit` is the least time, in seconds, that this machine's measured ceilings allow. Only whole models have
    `tokens`.
    """

    op: str
    case: str
    dtype: str
    direction: str
    contestant: str
    status: str
    reason: str = ""
    error: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    graph_seconds: float | None = None
    flops: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    limit: float | None = None
    memory: int | None = None

    def measured(self, timing: Timing, **more: Any) -> Row:
        """This row with a contestant's time, and with the fields in `more`."""
        times = {"seconds": timing.median, "low": timing.low, "high": timing.high, "samples": timing.samples}
        return dataclasses.replace(self, status="measured", **(times | more))

    @property
    def tflops(self) -> float | None:
        return None if self.seconds is None or not self.flops else self.flops / self.seconds / 1e12

    @property
    def gbps(self) -> float | None:
        return None if self.seconds is None or not self.bytes else self.bytes / self.seconds / 1e9

    @property
    def share(self) -> float | None:
        """The share of the limit that was reached, 0 to 1."""
        return None if self.seconds is None or self.limit is None else self.limit / self.seconds

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None or self.tokens is None else self.tokens / self.seconds

    @property
    def alone(self) -> Row:
        """This row with the time of the GPU alone: that of a CUDA graph, which hides the host's time."""
        return dataclasses.replace(self, seconds=self.graph_seconds)

    @property
    def sort_key(self) -> tuple[str, str, str]:
        return self.op, self.case, self.direction


@dataclass
class Report:
    """Everything that one run measured, and what it left out."""

    title: str  # the command
    machine: Machine
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # noise, what was left out and why, test results
    ceilings: dict[str, float] = field(default_factory=dict)  # "copy" in byte/s, "MxNxK dtype" in FLOP/s
    formulas: dict[str, str] = field(default_factory=lambda: dict(FORMULAS))
    format: int = FORMAT
    complete: bool = False

    def find(self, **wanted: object) -> list[Row]:
        """The rows whose fields have these values."""
        return [
            row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())
        ]

    def save(self, path: str | Path) -> None:
        write_json(path, dataclasses.asdict(self))


def load(path: str | Path) -> Report:
    """The report in a file.

    Raises:
        InputError: The file is unreadable or is not a report of this format: a field is unknown, missing or
            of the wrong type.
    """
    content = read_json(Path(path), "report")
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: format is {content.get('format')!r}, expected {FORMAT}")
    report = parse(Report, content, str(path))
    for row in report.rows:
        for name, valid in (("status", STATUSES), ("direction", DIRECTIONS)):
            if getattr(row, name) not in valid:
                raise InputError(
                    f"{path}: {name} is {getattr(row, name)!r}, expected one of {', '.join(valid)}"
                )
        if (row.status == "measured") != (row.seconds is not None):
            raise InputError(
                f"{path}: {row.op} {row.case} {row.contestant} is {row.status}, with seconds {row.seconds}"
            )
    return report


def parse(kind: Any, value: object, where: str) -> Any:
    """Converts the JSON value `value` to the dataclass or type `kind`.

    Raises:
        InputError: It cannot be converted; the message names `where` and the path of fields below it.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where}: is {type(value).__name__}, expected an object")
        hints = typing.get_type_hints(kind)
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        for name in [*(n for n in value if n not in hints), *(n for n in required if n not in value)]:
            raise InputError(f"{where}: {name} is {'unknown' if name in value else 'missing'}")
        return kind(**{name: parse(hints[name], v, f"{where}: {name}") for name, v in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and isinstance(value, list):
        return [parse(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: parse(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    options = arguments if origin in (types.UnionType, typing.Union) else (kind,)
    for option in options:
        accepted = (int, float) if option is float else option
        if (
            typing.get_origin(option) is None
            and isinstance(value, accepted)
            and isinstance(value, bool) == (option is bool)
        ):
            return float(value) if option is float else value  # type: ignore[arg-type]
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise InputError(f"{where} is {value!r}, expected {expected}")


def write_json(path: str | Path, content: object) -> None:
    """Replaces a file by JSON, atomically.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        kernels.files.write_json(Path(path), content, indent=1)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
