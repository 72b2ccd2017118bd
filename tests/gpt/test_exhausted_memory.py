"""Memory that runs out: the limit that counts, a refusal before allocating, and one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt import GPT, CharTokenizer, GPTConfig, InputError, TrainConfig, eval, sample
from gpt.cli import run_command
from gpt.device import check_memory, check_weights
from gpt.errors import MachineError
from gpt.memory import Free, exhausted, free_memory
from gpt.weights.checkpoint import save_model
from tests.gpt.models import SMALL

MIB = 2**20
CPU = torch.device("cpu")


def write(root: Path, **files: str) -> Path:
    """A folder with files of the kernel; "__" in a name separates folders."""
    for name, content in files.items():
        path = root.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MACHINE = {
    "proc__meminfo": "MemTotal:  4096 kB\nMemAvailable:    2048 kB\n",
    "proc__self__limits": "Max address space         unlimited            unlimited            bytes\n",
    "proc__self__status": "VmSize:\t    1024 kB\n",
    "proc__self__cgroup": "4:cpu,memory:/a/b\n3:pids:/\n0::/x/y\n",
}
V1 = {
    "sys__fs__cgroup__memory__a__memory.limit_in_bytes": "1500000\n",
    "sys__fs__cgroup__memory__a__memory.usage_in_bytes": "700000\n",
    "sys__fs__cgroup__memory__a__memory.stat": "inactive_file 9\ntotal_inactive_file 100000\n",
}
V2 = {
    "sys__fs__cgroup__x__y__memory.max": "max\n",
    "sys__fs__cgroup__x__y__memory.current": "5\n",
    "sys__fs__cgroup__x__memory.max": "1000000\n",
    "sys__fs__cgroup__x__memory.current": "999990\n",
}
ULIMIT = {"proc__self__limits": "Max address space         1048586              unlimited            bytes\n"}


@pytest.mark.parametrize(
    ("files", "free", "where"),
    [
        (MACHINE, 2 * MIB, "free on this machine"),
        (MACHINE | V1, 900_000, "free below the limit of the control group {}/sys/fs/cgroup/memory/a"),
        (MACHINE | V2, 10, "free below the limit of the control group {}/sys/fs/cgroup/x"),
        (MACHINE | V1 | V2 | ULIMIT, 10, "free below the limit of "),
        (MACHINE | ULIMIT, 10, "free below the limit of ulimit -v"),
        (MACHINE | ULIMIT | {"proc__self__status": "VmSize: 4096 kB\n"}, 0, "free below the limit of ulimit"),
    ],
    ids=["machine", "v1", "v2-parent", "tightest", "ulimit", "ulimit-passed"],
)
def test_the_tightest_limit_counts(files: dict[str, str], free: int, where: str, tmp_path: Path) -> None:
    """A limit of a container, or of a group around it, that is ignored; used memory that counts as free."""
    limit = free_memory(write(tmp_path, **files))
    assert limit is not None
    assert limit.bytes == free
    assert limit.where.startswith(where.format(tmp_path))


def test_a_system_without_proc_states_its_total(tmp_path: Path) -> None:
    """A traceback on macOS, or no check there."""
    free = free_memory(tmp_path)
    assert free is None or (free.bytes > MIB and free.where == "of this machine")


def test_training_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A model that exhausts what is free although the machine has more; a check that ignores the dtype."""
    root = write(tmp_path, **MACHINE, **V1)
    small = GPTConfig(vocab_size=64, block_size=64, n_layer=1, n_head=1, n_embd=32)
    for dtype, value in (("float32", 4), ("bfloat16", 2)):
        fixed, one = (small.training_bytes(size, value, fused=False) for size in (0, 1))
        batch = (900_000 - fixed) // (one - fixed)
        check_memory(small, TrainConfig(batch_size=batch, dtype=dtype), CPU, root=root)
        message = (
            rf"with batch_size {batch + 1} takes about .* KiB, expected at most the 878\.9 KiB free below"
        )
        with pytest.raises(InputError, match=message):
            check_memory(small, TrainConfig(batch_size=batch + 1, dtype=dtype), CPU, root=root)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Weights that are read until the kernel kills the process."""
    root = write(tmp_path, **MACHINE)
    check_weights("--checkpoint", 2 * MIB, CPU, root=root)
    with pytest.raises(
        InputError, match=r"^--checkpoint: loading the weights takes about 3\.0 MiB, expected"
    ):
        check_weights("--checkpoint", 3 * MIB, CPU, root=root)


def test_sample_and_eval_check_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that allocates first."""
    save_model(GPT(SMALL), tmp_path / "m", CharTokenizer("ab"))
    (tmp_path / "text").write_text("abab")
    monkeypatch.setattr("gpt.device.free_memory", lambda root: Free(1000, "free here"))
    flags = ["--checkpoint", str(tmp_path / "m"), "--device", "cpu"]
    assert sample.main(flags) == 2
    assert eval.main([*flags, "--data", str(tmp_path / "text")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("KiB, expected at most the 1,000 bytes free here") for line in lines)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "memory is exhausted: 64 bytes free here"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "memory is exhausted: 3.6 TiB requested, 64 bytes free here",
        ),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
                "which 5.12 GiB is free. Process 1 has 73.00 GiB memory in use."
            ),
            "memory is exhausted: 20.0 GiB requested, 5.1 GiB free on the GPU",
        ),
        (OSError(12, "Cannot allocate memory"), "memory is exhausted: 64 bytes free here"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory is exhausted"),
    ],
    ids=["python", "torch", "cuda", "mmap", "cublas"],
)
def test_exhausted_memory_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, or a message without the sizes and the flag to lower."""
    monkeypatch.setattr("gpt.memory.free_memory", lambda: Free(64, "free here"))
    reported = exhausted(error, "--batch_size")
    assert isinstance(reported, MachineError)
    assert str(reported) == f"{message}, expected less (lower --batch_size)"


def test_other_errors_are_not_about_memory() -> None:
    """A bug that is shown as exhausted memory."""
    for error in (RuntimeError("shape mismatch"), OSError(28, "No space left"), ValueError("memory")):
        assert exhausted(error, "") is None


@pytest.mark.parametrize("allocate", [np.empty, torch.empty, bytearray])
def test_an_allocation_that_fails_ends_with_exit_code_5(
    allocate: Callable[[int], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of numpy, torch or Python, in the words of the installed version, as a traceback."""

    def command(argv: Sequence[str]) -> int:
        allocate(2**55)
        return 0

    assert run_command("gpt.x", command, [], lower="--batch_size") == 5
    error = capsys.readouterr().err
    assert error.startswith("gpt.x: memory is exhausted: ")
    assert error.endswith(", expected less (lower --batch_size)\n")
    assert error.count("\n") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS has no effect elsewhere")
def test_a_process_with_a_limit(tmp_path: Path) -> None:
    """A killed process, or a traceback, where the system refuses memory."""
    save_model(GPT(SMALL), tmp_path / "m", CharTokenizer("ab"))
    script = (
        "import resource, sys\nfrom gpt import sample\nimport gpt.device\n"
        "gpt.device.free_memory = lambda root: None\n"  # the check before would refuse
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, -1))\n"
        "sys.exit(sample.main(sys.argv[1:]))\n"
    )
    (tmp_path / "prompt").write_text("ab" * 2**22)
    flags = ["--checkpoint", str(tmp_path / "m"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags, "--prompt_file", str(tmp_path / "prompt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr[-500:]
    assert done.stderr.startswith("gpt.sample: memory is exhausted: ")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_file_that_does_not_fit_is_not_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exhausted memory that is reported as a damaged file, with the exit code of bad input."""
    save_model(GPT(SMALL), tmp_path / "model", CharTokenizer("theca \n"))
    source = tmp_path / "model"
    if name == "model.pt":
        source = tmp_path / name
        torch.save(GPT(SMALL).state_dict(), source)

    def no_memory(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unable to mmap 13418848 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr("safetensors.torch.load_file", no_memory)
    monkeypatch.setattr("torch.load", no_memory)

    def load(_: Sequence[str]) -> int:
        GPT.from_pretrained(source, config={"n_head": SMALL.n_head} if name == "model.pt" else None)
        return 0

    assert run_command("load", load, []) == 5
    assert "memory is exhausted" in capsys.readouterr().err
