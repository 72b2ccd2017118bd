"""The hardware and software of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.record import Machine
from gpt.device import pick_device
from gpt.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def bench_device(name: str | None) -> torch.device:
    """The device `name`, a CPU or an NVIDIA GPU; None is a GPU if there is one, else the CPU.

    Raises:
        InputError: This machine has no such device, or it is of another kind.
    """
    device = pick_device(name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}, expected cpu or cuda")
    return device


def describe(device: torch.device) -> Machine:
    """Describes the machine that `device` belongs to."""
    kind, name, architecture, memory = "cpu", _cpu_name(), platform.machine(), _memory()
    assembler = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind, name, memory = "cuda", properties.name, properties.total_memory
        architecture = f"sm_{properties.major}{properties.minor}"
        assembler = ptxas(10 * properties.major + properties.minor)
    return Machine(
        device=name,
        kind=kind,
        architecture=architecture,
        memory_bytes=memory,
        threads=torch.get_num_threads(),
        driver=_driver() if kind == "cuda" else None,
        cuda=torch.version.cuda if kind == "cuda" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=installed("triton"),
        system=platform.platform(),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        ptxas=assembler,
    )


def ptxas(architecture: int) -> str | None:
    """The version of the ptxas that Triton runs for an architecture, as in "12.8 (bundled)".

    In brackets is the environment variable that names it, if one does. None: Triton or its ptxas is missing.
    """
    name = "ptxas_blackwell" if architecture >= 100 else "ptxas"
    variable = f"TRITON_{name.upper()}_PATH"
    try:
        from triton import knobs

        tool = getattr(knobs.nvidia, name)
    except (ImportError, OSError, RuntimeError):
        return None
    return f"{tool.version} ({variable if tool.path == os.environ.get(variable) else 'bundled'})"


def installed(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the sources, with "+changes" if files differ from it.

    Outside a git repository it is the value of FUSED_GPT_COMMIT.
    """
    hashed = _git("rev-parse", "--short=12", "HEAD")
    if hashed is None:
        return os.environ.get("FUSED_GPT_COMMIT", "unknown")
    return hashed + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    """The NVIDIA driver's version, as nvidia-smi reports it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
