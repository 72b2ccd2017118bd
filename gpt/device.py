"""The device: which one to use, what it computes in, its memory, and the peak throughput of a GPU."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from gpt.config import GPTConfig, TrainConfig
from gpt.errors import InputError, first_line
from gpt.memory import ROOT, Free, free_memory, show_bytes


class GPU(NamedTuple):
    """What NVIDIA states for the GPU whose device name contains `name`.

    `flops` are dense bfloat16 FLOP/s; `bandwidth` is byte/s of its memory.
    """

    name: str
    flops: float
    bandwidth: float


GPUS = (  # the first that matches counts
    GPU("H100 PCIe", 756e12, 2.0e12),
    GPU("H100 NVL", 835e12, 3.9e12),
    GPU("H100", 989e12, 3.35e12),
    GPU("H200 NVL", 835e12, 4.8e12),
    GPU("GH200", 989e12, 4.0e12),
    GPU("H200", 989e12, 4.8e12),
    GPU("B200", 2250e12, 8.0e12),
    GPU("A100-SXM4-40GB", 312e12, 1.555e12),
    GPU("A100-PCIE-40GB", 312e12, 1.555e12),
    GPU("A100", 312e12, 2.0e12),
    GPU("A10G", 70e12, 0.6e12),
    GPU("A10", 125e12, 0.6e12),
    GPU("L40S", 362e12, 0.864e12),
    GPU("RTX 4090", 165e12, 1.008e12),
    GPU("RTX 3090", 71e12, 0.936e12),
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device `name`; None is a GPU if there is one, else the CPU.

    Raises:
        InputError: This machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:  # its message lists devices that torch can be compiled for
        raise InputError(f"device is {name!r}, expected cpu, cuda, cuda:1, ...") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise InputError(
            f"device is {name!r}, expected a device of this machine ({first_line(error)})"
        ) from error
    if device.type == "meta":
        raise InputError("device is 'meta', expected cpu or cuda, which hold values")
    return device


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` means on `device`: "auto" is bfloat16 where the hardware multiplies it, else
    float32.

    Raises:
        InputError: float16 on a CPU, where its matmuls are many times slower than those of float32.
    """
    if name == "float16" and device.type == "cpu":
        raise InputError("TrainConfig: dtype is 'float16' on a CPU, expected float32 or bfloat16 there")
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. A CPU that emulates it is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes compute in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_flops(name: str) -> float | None:
    """The dense bfloat16 FLOP/s that NVIDIA states for the GPU `name`; None for any other device."""
    gpu = known_gpu(name)
    return None if gpu is None else gpu.flops


def known_gpu(name: str) -> GPU | None:
    """The row of GPUS for the device `name`, as in "NVIDIA H200"; None if there is none."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)


def find_gpu(name: str) -> GPU:
    """The GPU in GPUS with this name; case, spaces, hyphens and underscores do not count.

    Raises:
        InputError: GPUS has no such name.
    """
    for gpu in GPUS:
        if _letters(gpu.name) == _letters(name):
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise InputError(f"--gpu is {name!r}, expected one of {known}")


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def check_memory(config: GPTConfig, train: TrainConfig, device: torch.device, *, root: Path = ROOT) -> None:
    """Raises InputError where training needs more memory than is free on `device`."""
    value = autocast_dtype(train.dtype, device).itemsize
    _check_free(
        f"model: training {config.parameter_counts()['total']:,} parameters with batch_size "
        f"{train.batch_size}",
        config.training_bytes(train.batch_size, value),
        device,
        root,
    )


def check_weights(where: str, size: int, device: torch.device, *, root: Path = ROOT) -> None:
    """Raises InputError where weights of `size` bytes need more memory than is free on `device`."""
    _check_free(f"{where}: loading the weights", size, device, root)


def _check_free(what: str, needed: int, device: torch.device, root: Path) -> None:
    free = _free_memory(device, root)
    if free is not None and needed > free.bytes:
        most = f"{show_bytes(free.bytes)} {free.where}"
        raise InputError(f"{what} takes about {show_bytes(needed)}, expected at most the {most}")


def _free_memory(device: torch.device, root: Path) -> Free | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Free(torch.cuda.mem_get_info(device)[0] + cached, f"free on {device}")
    return free_memory(root) if device.type == "cpu" else None
