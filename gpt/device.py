"""The device: which one to use, what it computes in, its memory, and the peak throughput of a GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from gpt.config import GPTConfig, TrainConfig
from gpt.errors import InputError, first_line

# Dense bfloat16 FLOP/s that NVIDIA states, by a part of the GPU's name. The first match counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device is {name!r}, expected a device of this machine ({first_line(error)})"
        ) from error
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
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def check_memory(config: GPTConfig, train: TrainConfig, device: torch.device) -> None:
    """Raises InputError where training needs more memory than `device` has in total."""
    needed = config.training_bytes(train.batch_size)
    total = _total_memory(device)
    if total is not None and needed > total:
        raise InputError(
            f"model: training {config.parameter_counts()['total']:,} parameters with batch_size "
            f"{train.batch_size} takes about {needed / 2**30:,.0f} GiB, expected at most the "
            f"{total / 2**30:,.0f} GiB of {device}"
        )


def _total_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
