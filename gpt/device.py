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

    `flops` are dense bfloat16 FLOP/s with float32 accumulation, which equal those of float16; `bandwidth` is
    byte/s of its memory; `memory` is in GB, as sold. `link` is byte/s of its NVLink in both directions
    together, where an NVSwitch connects all GPUs of a machine.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    link: float | None = None


GPUS = (
    # The datasheets of H100, H200 and GH200; half of the figures with sparsity.
    GPU("H100", 989e12, 3.35e12, 80, 900e9),
    GPU("H100 PCIe", 756e12, 2.0e12, 80),
    GPU("H100 NVL", 835e12, 3.9e12, 94),
    GPU("H200", 989e12, 4.8e12, 141, 900e9),
    GPU("H200 NVL", 835e12, 4.8e12, 141),
    GPU("GH200", 989e12, 4.0e12, 96),
    # The datasheets of HGX B200, GB200 NVL72 and HGX B300, per GPU.
    GPU("B200", 2250e12, 8.0e12, 180, 1800e9),
    GPU("GB200", 2500e12, 8.0e12, 186, 1800e9),
    GPU("B300", 2250e12, 8.0e12, 270, 1800e9),
    # The datasheets of A100, A30, A10 and A40; AWS's of A10G.
    GPU("A100", 312e12, 2.0e12, 80, 600e9),
    GPU("A100-SXM4-40GB", 312e12, 1.555e12, 40, 600e9),
    GPU("A100-PCIE-40GB", 312e12, 1.555e12, 40),
    GPU("A30", 165e12, 0.933e12, 24),
    GPU("A10", 125e12, 0.6e12, 24),
    GPU("A10G", 70e12, 0.6e12, 24),
    GPU("A40", 149.7e12, 0.696e12, 48),
    # The datasheets of L4, L40 and L40S; half of the figures with sparsity.
    GPU("L4", 121e12, 0.3e12, 24),
    GPU("L40", 181e12, 0.864e12, 48),
    GPU("L40S", 362e12, 0.864e12, 48),
    # The rows "with FP32 Accumulate", for which GeForce cards have half their rate, of the whitepapers on the
    # GA102 (with RTX A6000), Ada and RTX Blackwell architectures.
    GPU("RTX 3090", 71e12, 0.936e12, 24),
    GPU("RTX 3090 Ti", 80e12, 1.008e12, 24),
    GPU("RTX A6000", 154.8e12, 0.768e12, 48),
    GPU("RTX 4080", 97.5e12, 0.717e12, 16),
    GPU("RTX 4090", 165e12, 1.008e12, 24),
    GPU("RTX 5070", 61.7e12, 0.672e12, 12),
    GPU("RTX 5070 Ti", 87.9e12, 0.896e12, 16),
    GPU("RTX 5080", 112.6e12, 0.96e12, 16),
    GPU("RTX 5090", 209.5e12, 1.792e12, 32),
    # The datasheets of RTX A5000 and RTX 6000 Ada and the whitepaper on RTX PRO Blackwell.
    GPU("RTX A5000", 111e12, 0.768e12, 24),
    GPU("RTX 6000 Ada Generation", 364e12, 0.96e12, 48),
    GPU("RTX PRO 6000 Blackwell Workstation Edition", 503.8e12, 1.792e12, 96),
)
# Words of a device name that make it another GPU than the one in the table, or a part of it.
VARIANTS = {"Ti", "SUPER", "D", "Laptop", "Max-Q", "MIG"}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device `name`; None is a GPU if there is one, else the CPU.

    Raises:
        InputError: This machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = find_device(name)
    if device.type == "meta":
        raise InputError("device is 'meta', expected cpu or cuda, which hold values")
    return device


def find_device(name: torch.device | str | None) -> torch.device:
    """The device `name`, which may be "meta"; None is torch's default.

    Raises:
        InputError: This machine has no such device.
    """
    if name is None:
        return torch.get_default_device()
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, TypeError) as error:  # it lists what torch can be compiled for
        raise InputError(f"device is {name!r}, expected cpu, cuda, cuda:1, ...") from error
    shown = str(device)
    if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise InputError(
            f"device is {shown!r}, but this torch is built without CUDA, expected 'cpu', or a build of torch "
            "with CUDA (pytorch.org/get-started)"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device is {shown!r}, but torch sees no GPU, expected 'cpu', or a GPU that nvidia-smi lists and "
            "CUDA_VISIBLE_DEVICES, if set, does not hide"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise InputError(
            f"device is {shown!r}, expected a device of this machine ({first_line(error)})"
        ) from error
    return device


def parameter_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of parameters that `name` means, as in torch.bfloat16 or "bfloat16"; None is torch's default.

    Raises:
        InputError: It is another one than float32, bfloat16, float16 and float64.
    """
    if name is None:
        return None
    dtypes = {**_DTYPES, "float64": torch.float64}
    plain = str(name).removeprefix("torch.")
    if plain not in dtypes:
        raise InputError(f"dtype is {plain!r}, expected one of {', '.join(dtypes)}")
    return dtypes[plain]


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


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The dense FLOP/s that NVIDIA states for the GPU `name` in `dtype`; None where GPUS has no figure."""
    gpu = known_gpu(name) if dtype in (torch.bfloat16, torch.float16) else None
    return None if gpu is None else gpu.flops


def known_gpu(name: str) -> GPU | None:
    """The row of GPUS for the device `name`, as in "NVIDIA H200"; None if there is none."""
    matches = [gpu for gpu in GPUS if re.search(rf"(?<!\w){re.escape(gpu.name)}(?!\w)", name)]
    gpu = max(matches, key=lambda gpu: len(gpu.name), default=None)
    return None if gpu is None or VARIANTS & set(name.replace(gpu.name, "").split()) else gpu


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


def check_memory(
    config: GPTConfig, train: TrainConfig, device: torch.device, *, shards: int = 1, root: Path = ROOT
) -> None:
    """Raises InputError where training needs more memory than is free on `device`.

    It counts what `GPTConfig.training_bytes` does: of the fused ops on a GPU, of the references elsewhere.
    `shards` ranks share the parameters.
    """
    if not train.check_memory:
        return
    needed = config.training_bytes(
        train.batch_size,
        autocast_dtype(train.dtype, device).itemsize,
        fused=device.type == "cuda",
        checkpoint_activations=train.checkpoint_activations,
        shards=shards,
    )
    advice = "a smaller batch_size" if train.checkpoint_activations else "--checkpoint_activations"
    _check_free(
        f"model: training {config.parameter_counts()['total']:,} parameters with batch_size "
        f"{train.batch_size}" + (f" in {shards} shards" if shards > 1 else ""),
        needed,
        device,
        root,
        f" ({advice} takes less; --check_memory false trains all the same)",
    )


def check_weights(where: str, size: int, device: torch.device, *, root: Path = ROOT) -> None:
    """Raises InputError where weights of `size` bytes need more memory than is free on `device`."""
    _check_free(f"{where}: loading the weights", size, device, root)


def _check_free(what: str, needed: int, device: torch.device, root: Path, advice: str = "") -> None:
    free = _free_memory(device, root)
    if free is not None and needed > free.bytes:
        most = f"{show_bytes(free.bytes)} {free.where}"
        raise InputError(f"{what} takes about {show_bytes(needed)}, expected at most the {most}{advice}")


def _free_memory(device: torch.device, root: Path) -> Free | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Free(torch.cuda.mem_get_info(device)[0] + cached, f"free on {device}")
    return free_memory(root) if device.type == "cpu" else None
